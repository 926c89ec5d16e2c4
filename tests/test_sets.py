"""The answer of a study is a set: who is in it, what it is about, and how it is said."""

import numpy as np
import pandas as pd
import pytest

from pftools.compare.sets import best_sets, set_in_words
from pftools.errors import PftoolsError
from pftools.study.file import load_study


def study(gaps, *, seeds=3, blocks=40, by_seed=0.01, noise=0.05, key=0, asked=0.5, measured=None):
    """(results, block losses): orderings whose true losses are that much apart."""
    generator = np.random.default_rng(key)
    text = generator.normal(3, 0.5, blocks)
    rows, losses = [], {}
    for name, gap in gaps.items():
        for seed in range(seeds):
            run = f"{name}-{asked}-{seed}"
            losses[run] = text + gap + by_seed * generator.normal() + noise * generator.normal(size=blocks)
            rows.append(
                {
                    "ordering": name,
                    "asked": asked,
                    "measured": (measured or {}).get(name, asked),
                    "perplexity": float(np.exp(losses[run].mean())),
                    "finetune_tokens": 1000,
                    "n_finetunes": 1,
                    "seed": seed,
                    "method": "wanda",
                    "pattern": "unstructured",
                    "merge": "auto",
                    "run": run,
                }
            )
    return pd.DataFrame(rows), losses


GAPS = {"finetune_prune": 0.0, "prune_finetune": 0.0, "prune": 0.5}


def test_several_seeds_give_a_set_of_orderings():
    (found,) = best_sets(*study(GAPS))
    assert set(found.members) == {"finetune_prune", "prune_finetune"}
    assert (found.metric, found.where, found.n_seeds, found.n) == ("perplexity", "50%", 3, 40)
    says = set_in_words(found)
    assert says.startswith("At 50%, one of ") and " has the lowest perplexity (95%" in says
    assert says.endswith("(95% confidence, 3 seeds, 40 blocks); the other is behind.")


def test_one_seed_gives_a_set_of_models_and_says_so():
    """ "The best ordering" was named from one training each, which cannot say it."""
    (found,) = best_sets(*study(GAPS, seeds=1))
    says = set_in_words(found)
    assert "prune" not in found.members and "of these 3 models" in says
    assert says.endswith("which ordering is best, one training each cannot say.")


def test_the_best_is_first_and_the_highest_sparsity_too():
    low, high = study({"P F": 0.3, "F P": 0.0}, asked=0.3), study({"P F": 0.0, "F P": 0.3}, asked=0.6)
    found = best_sets(pd.concat([low[0], high[0]], ignore_index=True), low[1] | high[1])
    assert [one.asked for one in found] == [0.6, 0.3]
    assert [one.members for one in found] == [("P F",), ("F P",)]


def test_other_measured_sparsities_take_no_part():
    table, losses = study(GAPS, measured={"finetune_prune": 0.42})
    (found,) = best_sets(table, losses)
    assert "finetune_prune" not in found.labels


def test_only_seeds_that_all_have_count():
    table, losses = study(GAPS)
    (found,) = best_sets(table[(table["ordering"] != "prune") | (table["seed"] < 2)], losses)
    assert found.n_seeds == 2
    assert "(95% confidence, the 2 seeds that all have, 40 blocks)" in set_in_words(found)
    (found,) = best_sets(table[(table["ordering"] != "prune") | (table["seed"] == 2)], losses)
    assert "(95% confidence, the one seed that all have, 40 blocks)" in set_in_words(found)


def test_equivalence_is_claimed_only_within_a_margin_and_over_seeds():
    quiet = {"by_seed": 0.0005, "noise": 0.005}
    assert not best_sets(*study(GAPS, **quiet))[0].equivalent
    (found,) = best_sets(*study(GAPS, **quiet), margin=0.01)
    assert found.equivalent and set_in_words(found).endswith("Those 2 are equivalent within 1%.")
    assert not best_sets(*study(GAPS, seeds=1, **quiet), margin=0.01)[0].equivalent
    assert not best_sets(*study(GAPS), margin=0.01)[0].equivalent


def answers(right):
    return pd.DataFrame(
        {"task": "facts", "subject": "facts", "question": range(len(right)), "correct": right * 1.0}
    )


def test_tasks_have_sets_of_their_own():
    table, losses = study(GAPS)
    generator = np.random.default_rng(3)
    ease = generator.random(300)
    share = {"finetune_prune": 0.7, "prune_finetune": 0.4, "prune": 0.4}
    samples = {
        run: answers(ease + 0.05 * generator.normal(size=300) < share[name])
        for name, run in zip(table["ordering"], table["run"])
    }
    perplexity, facts = best_sets(table, losses, samples)
    assert facts.metric == "facts" and facts.members == ("finetune_prune",) and facts.n == 300
    assert "finetune_prune has most right answers to facts (" in set_in_words(facts)
    assert perplexity.metric == "perplexity"


def test_a_single_ordering_has_no_set():
    table, losses = study({"prune": 0.0})
    assert best_sets(table, losses) == []


def test_the_best_of_equals_is_rarely_left_out():
    lost = 0
    for key in range(200):
        (found,) = best_sets(*study({"a P": 0.0, "b P": 0.0, "c P": 0.0}, by_seed=0.02, key=key))
        lost += "a P" not in found.members
    assert lost <= 0.05 * 200 + 2 * np.sqrt(200 * 0.05 * 0.95)


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_set_is_never_empty(seeds):
    for key in range(10):
        (found,) = best_sets(*study({"P F": 0.0, "F P": 1.0}, seeds=seeds, key=key))
        assert found.members


@pytest.mark.parametrize("given,margin", [("1%", 0.01), ("0.02", 0.02), ("", None)])
def test_a_study_file_says_what_does_not_matter(tmp_path, given, margin):
    path = tmp_path / "mine.yaml"
    path.write_text("orderings: [prune]\n" + (f"equivalent_within: {given}\n" if given else ""))
    assert load_study(path).equivalent_within == margin


def test_a_margin_that_is_none_is_refused(tmp_path):
    for given in ("0", "120%", "much"):
        (tmp_path / "mine.yaml").write_text(f"orderings: [prune]\nequivalent_within: {given}\n")
        with pytest.raises(PftoolsError, match="equivalent_within"):
            load_study(tmp_path / "mine.yaml")

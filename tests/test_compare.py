import itertools
import math
import re

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from pftools import compare
from pftools.errors import PftoolsError


def test_mcnemar_agrees_with_statsmodels():
    generator = np.random.default_rng(0)
    a, b = generator.random(200) < 0.6, generator.random(200) < 0.5
    table = [[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]]
    assert compare.compare_accuracy(a, b).p == pytest.approx(mcnemar(table, exact=True).pvalue)
    assert compare.compare_accuracy(a, b).estimate == pytest.approx(a.mean() - b.mean())


def test_the_perplexity_interval_is_near_the_t_interval_of_the_log_ratio():
    generator = np.random.default_rng(0)
    a = generator.normal(3, 0.4, 60)
    b = a + generator.normal(0.05, 0.05, 60)
    found = compare.compare_perplexity(a, b)
    test = stats.ttest_rel(a, b)
    low, high = np.exp(test.confidence_interval())
    assert found.estimate == pytest.approx(math.exp((a - b).mean()))
    assert (found.low, found.high) == pytest.approx((low, high), rel=0.004)


def test_no_difference_is_found_no_more_often_than_stated():
    generator = np.random.default_rng(1)
    false = wrong = 0
    for _ in range(300):
        text = generator.normal(3, 0.5, 40)
        a, b = text + generator.normal(0, 0.05, 40), text + generator.normal(0, 0.05, 40)
        found = compare.compare_perplexity(a, b)
        false += found.p < 0.05
        wrong += not found.low <= 1 <= found.high
    assert false <= 27 and wrong <= 27  # 5% of 300 is 15; 27 is three standard errors above


def test_intervals_of_accuracy_differences_cover():
    generator = np.random.default_rng(2)
    covered = false = 0
    for trial in range(300):
        skill = generator.random(250)
        a, b = generator.random(250) < skill, generator.random(250) < skill
        found = compare.compare_accuracy(a, b, seed=trial)
        covered += found.low <= 0 <= found.high
        false += found.p < 0.05
    assert covered >= 273 and false <= 27


def test_the_smallest_visible_difference_is_seen_with_the_stated_power():
    n, disagreement = 300, 0.3
    difference = compare.smallest_visible_difference(n, disagreement=disagreement)
    generator = np.random.default_rng(3)
    seen = 0
    for _ in range(400):
        outcome = generator.choice(
            [1, -1, 0],
            n,
            p=[(disagreement + difference) / 2, (disagreement - difference) / 2, 1 - disagreement],
        )
        first, second = int((outcome > 0).sum()), int((outcome < 0).sum())
        seen += stats.binomtest(first, first + second).pvalue < 0.05
    assert 0.72 < seen / 400 < 0.88
    assert compare.smallest_visible_difference(1200, disagreement=disagreement) == pytest.approx(
        difference / 2, rel=0.1
    )


def test_holm_agrees_with_hand_and_with_statsmodels():
    p = np.random.default_rng(0).random(45) ** 3
    assert compare.holm(p.tolist()) == pytest.approx(multipletests(p, method="holm")[1])
    assert compare.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert compare.holm([]) == []


def test_interval_and_exact_test_say_the_same_of_any_answers():
    """Five of five questions: p was 0.06, and the interval began at 10 points."""
    for n, most in ((5, 5), (20, 12), (200, 16)):
        for ahead in range(most + 1):
            for behind in range(min(ahead, most - ahead) + 1):
                first, second = np.zeros(n), np.zeros(n)
                first[:ahead], second[ahead : ahead + behind] = 1, 1
                for found in (
                    compare.compare_accuracy(first, second),
                    compare.compare_accuracy(second, first),
                ):
                    assert (found.low <= 0 <= found.high) == (found.p >= 0.05), (n, ahead, behind)


def test_the_interval_of_guessing():
    low, high = compare.chance_interval(0.2, 245)
    assert (
        stats.binom.cdf(round(low * 245) - 1, 245, 0.2)
        < 0.025
        < 0.975
        <= stats.binom.cdf(round(high * 245), 245, 0.2)
    )


def results(**changes):
    table = pd.DataFrame(
        {
            "ordering": ["prune", "finetune_prune", "prune_finetune"],
            "asked": 0.5,
            "measured": [0.5, 0.5, 0.5],
            "perplexity": [23.0, 19.0, 17.0],
            "finetune_tokens": [0, 1000, 1000],
            "seed": 0,
            "method": "wanda",
            "pattern": "unstructured",
            "merge": "auto",
            "run": ["a", "b", "c"],
        }
    )
    return table.assign(**changes)


def losses(noise=0.01):
    generator = np.random.default_rng(0)
    text = generator.normal(0, 0.5, 40)
    return {
        run: math.log(perplexity) + text - text.mean() + generator.normal(0, noise, 40)
        for run, perplexity in zip("abc", (23, 19, 17))
    }


def test_a_real_difference_is_named_with_its_winner():
    pairs = compare.compare_orderings(results(), losses())
    assert len(pairs) == 3 and (pairs["verdict_kind"] == "differs").all()
    verdict = pairs["verdict"].iloc[2]
    assert (
        verdict.startswith("prune_finetune came out ahead of finetune_prune at 50%")
        and "whether the orderings do, one training each cannot say" in verdict
        and "both were fine-tuned on 1,000 tokens" in verdict
    )
    assert "training was not equal" in pairs["verdict"].iloc[0]


def test_noise_cannot_be_told_apart():
    noisy = {run: np.random.default_rng(ord(run)).normal(3, 0.5, 12) for run in "abc"}
    assert (compare.compare_orderings(results(), noisy)["verdict_kind"] == "cannot be told apart").all()


def test_other_sparsities_are_not_compared():
    pairs = compare.compare_orderings(results(measured=[0.5, 0.5, 0.42]), losses())
    assert pairs["verdict_kind"].tolist() == ["differs", "not comparable", "not comparable"]
    assert "50.0% and 42.0%" in pairs["verdict"].iloc[1] and math.isnan(pairs["ratio"].iloc[1])


def test_seeds_are_pooled_by_block():
    table = pd.concat([results(), results(seed=1, run=["d", "e", "f"])], ignore_index=True)
    more = losses() | dict(zip("def", losses(0.02).values()))
    pairs = compare.compare_orderings(table, more)
    assert len(pairs) == 3 and (pairs["seeds"] == 2).all()


def test_one_comparison_is_tested_once():
    twice = pd.concat(
        [results(merge="masked"), results(merge="dense")], ignore_index=True
    )  # the same runs under two merges
    assert (
        len(compare.compare_orderings(twice, losses()))
        == len(compare.compare_orderings(results(), losses()))
        == 3
    )


def test_tasks_say_what_could_have_been_seen():
    generator = np.random.default_rng(0)
    samples = {
        run: pd.DataFrame(
            {"task": "facts", "question": range(200), "correct": (generator.random(200) < 0.5) * 1.0}
        )
        for run in "abc"
    }
    table = compare.compare_tasks(results(), samples)
    assert (
        len(table) == 3
        and table["verdict"].str.contains("cannot be told apart on 200 questions: a difference under").all()
    )


def test_sums_over_seeds_are_tested_as_a_loop_over_all_signs_does():
    generator = np.random.default_rng(4)
    first, second = (generator.random((3, 9)) < share for share in (0.7, 0.4))
    d = first.sum(axis=0).astype(int) - second.sum(axis=0)
    sums = [
        sum(sign * value for sign, value in zip(signs, d)) for signs in itertools.product((1, -1), repeat=9)
    ]
    expected = np.mean([abs(total) >= abs(d.sum()) for total in sums])
    assert compare.compare_accuracy(first, second).p == pytest.approx(expected)
    assert compare.compare_accuracy(first, second).estimate == pytest.approx(first.mean() - second.mean())


def test_one_seed_is_mcnemar_also_on_many_questions():
    generator = np.random.default_rng(5)
    a, b = generator.random(14_037) < 0.31, generator.random(14_037) < 0.30
    only = int((a & ~b).sum()), int((b & ~a).sum())
    assert compare.compare_accuracy(a, b).p == pytest.approx(
        stats.binomtest(only[0], sum(only)).pvalue, rel=1e-6
    )
    assert compare.compare_accuracy(a, a).p == 1


def test_intervals_cover_where_few_questions_differ():
    generator = np.random.default_rng(6)
    covered = 0
    for trial in range(300):
        outcome = generator.choice([1, -1, 0], 100, p=[0.05, 0.01, 0.94])
        found = compare.compare_accuracy(outcome == 1, outcome == -1, seed=trial)
        covered += found.low <= 0.04 <= found.high
    assert covered >= 273
    same = compare.compare_accuracy(np.ones(100), np.ones(100))
    assert same.low < 0 < same.high


def test_a_pooled_test_over_seeds_keeps_its_level_and_sees_more(monkeypatch):
    monkeypatch.setattr(compare.paired, "_RESAMPLES", 10)
    generator = np.random.default_rng(7)

    def rates(gain, seeds, trials=250):
        found = 0
        for _ in range(trials):
            skill = generator.beta(2, 2, 200)
            first, second = (
                generator.random((seeds, 200)) < np.minimum(skill + gain, 1),
                generator.random((seeds, 200)) < skill,
            )
            found += compare.compare_accuracy(first, second).p < 0.05
        return found / trials

    assert rates(0.0, 3) <= 0.091  # 5% and three standard errors
    assert rates(0.07, 3) > rates(0.07, 1) + 0.2


def test_the_smallest_visible_ratio_is_seen_with_the_stated_power(monkeypatch):
    monkeypatch.setattr(compare.paired, "_RESAMPLES", 1000)
    generator = np.random.default_rng(8)
    text = generator.normal(3, 0.5, 60)
    noise = generator.normal(0, 0.05, (300, 60))
    visible = compare.smallest_visible_ratio(text + noise[0], text)
    expected = math.exp((stats.t.ppf(0.975, 59) + stats.t.ppf(0.8, 59)) * 0.05 / math.sqrt(60))
    seen = sum(compare.compare_perplexity(text + math.log(expected) + own, text).p < 0.05 for own in noise)
    assert 0.72 < seen / 300 < 0.88 and visible == pytest.approx(expected, rel=0.01)


def test_a_study_without_differences_rarely_finds_one(monkeypatch):
    """The family-wise rate over all pairs of four orderings, by perplexity and by task.

    Holm finds a pair if and only if the smallest p times the number of pairs is below 5%. So p-values of
    2,000 studies are made at once; that the tables have these p-values is seen on three of them.
    """
    monkeypatch.setattr(compare.paired, "_RESAMPLES", 10)
    generator = np.random.default_rng(9)
    studies, first, second = 2000, *np.triu_indices(4, 1)
    losses = generator.normal(3, 0.5, (studies, 1, 40)) + generator.normal(0, 0.05, (studies, 4, 40))
    skill = generator.beta(2, 2, (studies, 1, 150))
    right = (generator.random((studies, 4, 150)) < skill).astype(float)
    of_losses = stats.ttest_1samp(losses[:, first] - losses[:, second], 0, axis=-1).pvalue
    ahead = (right[:, first] > right[:, second]).sum(-1)
    behind = (right[:, first] < right[:, second]).sum(-1)
    of_answers = np.minimum(1, 2 * stats.binom.cdf(np.minimum(ahead, behind), ahead + behind, 0.5))
    table = pd.concat([results(), results().iloc[:1].assign(ordering="iter_pf", run="d")], ignore_index=True)
    for number in range(3):
        pairs = compare.compare_orderings(table, dict(zip("abcd", losses[number])))
        np.testing.assert_allclose(pairs["p"], of_losses[number], rtol=1e-6)
        asked = {run: answers(given) for run, given in zip("abcd", right[number])}
        pairs_by_task = compare.compare_tasks(table, asked)
        np.testing.assert_allclose(pairs_by_task["p"], of_answers[number], rtol=1e-6)
        assert (pairs["verdict_kind"] == "differs").any() == (of_losses[number].min() * 6 < 0.05)
        assert (pairs_by_task["verdict_kind"] == "differs").any() == (of_answers[number].min() * 6 < 0.05)
    limit = 0.05 + 3 * math.sqrt(0.05 * 0.95 / studies)
    assert (of_losses.min(axis=1) * 6 < 0.05).mean() <= limit
    assert (of_answers.min(axis=1) * 6 < 0.05).mean() <= limit


def answers(correct, task="facts"):
    return pd.DataFrame(
        {
            "task": task,
            "subject": task,
            "question": range(len(correct)),
            "correct": np.asarray(correct, dtype=float),
        }
    )


def test_tasks_are_pooled_over_seeds_and_corrected_by_task():
    generator = np.random.default_rng(10)
    table = pd.concat([results(), results(seed=1, run=["d", "e", "f"])], ignore_index=True)
    shares = dict(zip("abcdef", (0.4, 0.4, 0.62) * 2))
    draw = {run: generator.random(300) < share for run, share in shares.items()}
    samples = {
        run: pd.concat([answers(correct), answers(correct[:4], "few")]) for run, correct in draw.items()
    }
    pairs = compare.compare_tasks(table, samples).set_index(["task", "pair"])
    assert len(pairs) == 6 and (pairs["seeds"] == 2).all() and pairs.loc["facts", "n"].eq(300).all()
    row = pairs.loc["facts", "finetune_prune / prune_finetune, 50%"]
    assert row["difference"] == pytest.approx(
        np.mean([draw["b"], draw["e"]]) - np.mean([draw["c"], draw["f"]])
    )
    assert (
        row["verdict"].startswith("facts: prune_finetune is better than finetune_prune at 50% (")
        and "in 2 of 2 seeds" in row["verdict"]
    )
    assert row["verdict"].endswith("both were fine-tuned on 1,000 tokens.")
    for task in ("facts", "few"):
        assert pairs.loc[task, "p_holm"].tolist() == pytest.approx(
            compare.holm(pairs.loc[task, "p"].tolist())
        )
    assert (pairs.loc["few", "visible"] > 1).all()  # four questions show nothing
    assert "no difference would be seen four times in five" in pairs.loc["few", "verdict"].iloc[0]
    assert pairs["low"].min() >= -1 and pairs["high"].max() <= 1


def test_too_few_blocks_are_a_verdict_not_a_failure():
    pairs = compare.compare_orderings(results(), {run: [3.0, 3.1] for run in "abc"})
    assert (pairs["verdict_kind"] == "not comparable").all() and "2 blocks are too few" in pairs[
        "verdict"
    ].iloc[0]


def test_results_that_cannot_be_paired_are_refused():
    with pytest.raises(PftoolsError, match="same blocks and questions"):
        compare.compare_perplexity([1.0] * 6, [1.0] * 7)
    with pytest.raises(PftoolsError, match="too few"):
        compare.compare_perplexity([1.0] * 3, [1.0] * 3)


def trained(seeds, *, gap=0.0, by_seed=0.01, blocks=64, noise=0.05, key=0):
    """(results, losses) of two orderings, whose trainings vary."""
    generator = np.random.default_rng(key)
    text = generator.normal(3, 0.5, blocks)
    tables, losses = [], {}
    for seed in range(seeds):
        runs = [f"{name}{seed}" for name in ("finetune_prune", "prune_finetune")]
        for run, mean in zip(runs, (gap, 0.0)):
            losses[run] = text + mean + by_seed * generator.normal() + noise * generator.normal(size=blocks)
        perplexities = [float(np.exp(losses[run].mean())) for run in runs]
        tables.append(results().iloc[1:].assign(seed=seed, run=runs, perplexity=perplexities))
    return pd.concat(tables, ignore_index=True), losses


def test_trainings_that_vary_are_no_difference_between_orderings():
    """Blocks alone were drawn: "differs" was said in 24 to 42% of studies without any difference."""
    kinds = [
        compare.compare_orderings(*trained(3, by_seed=0.02, key=key))["verdict_kind"].iloc[0]
        for key in range(60)
    ]
    assert kinds.count("differs") <= 0.08 * 60 + 2 * math.sqrt(60 * 0.08 * 0.92)


def test_one_training_each_never_beats():
    (verdict,) = compare.compare_orderings(*trained(1, gap=0.5))["verdict"]
    assert "these two models differ on this text" in verdict and "one training each cannot say" in verdict
    (alike,) = compare.compare_orderings(*trained(1, by_seed=0.0))["verdict"]
    assert "about the orderings, one training each says nothing" in alike
    assert "beats" not in verdict + alike and "better" not in verdict + alike


def test_several_trainings_differ_and_say_what_varies():
    (row,) = compare.compare_orderings(*trained(4, gap=0.5)).to_dict("records")
    assert row["verdict_kind"] == "differs" and row["verdict"].startswith("prune_finetune is better than")
    assert "the same sign in 4 of 4 seeds" in row["verdict"] and "% is seeds" in row["verdict"]
    assert row["low"] < row["ratio"] < row["high"] and row["ratio"] == pytest.approx(math.exp(0.5), rel=0.05)


def test_where_a_seed_failed_numbers_and_winner_are_those_of_the_seeds_that_both_have():
    """The number of one ordering was told as the other's, and the loser was bold."""
    table, losses = trained(3, gap=0.1, by_seed=0.0)
    for run in table.loc[table["seed"] == 2, "run"]:
        losses[run] = losses[run] + 0.4  # a hard seed, whatever the ordering
    table["perplexity"] = [float(np.exp(np.mean(losses[run]))) for run in table["run"]]
    worse, better = "finetune_prune", "prune_finetune"
    table = table[(table["ordering"] != worse) | (table["seed"] < 2)]
    entries = compare.entries(table).set_index("ordering")
    assert (
        entries.loc[worse, "perplexity"] < entries.loc[better, "perplexity"] and entries.loc[better, "best"]
    )
    row = compare.compare_orderings(table, losses).iloc[0]
    assert f"{better} is better than {worse}" in row["verdict"] and "2 seeds that both have" in row["verdict"]
    shared = table[table["seed"] < 2].groupby("ordering")["perplexity"]
    told = " vs ".join(f"{compare.geometric_mean(shared.get_group(name)):.2f}" for name in (better, worse))
    assert f"({told}, ratio " in row["verdict"] and row["alone"] == 1


def test_an_interval_that_leaves_no_difference_out_says_why_none_is_found():
    """Of ten orderings a pair by itself would differ, and the sentence showed its interval only."""
    generator = np.random.default_rng(0)
    rows, losses = [], {}
    for place in range(10):
        run = f"run {place}"
        losses[run] = 3 + (0.0052 if place else 0.0) + generator.normal(0, 0.01, 40)
        rows.append({**results().iloc[0], "ordering": "P F" + " F" * place, "run": run, "perplexity": 20.0})
    pairs = compare.compare_orderings(pd.DataFrame(rows), losses)
    own = pairs[((pairs["low"] > 1) | (pairs["high"] < 1)) & (pairs["verdict_kind"] != "differs")]
    assert len(own) and own["verdict"].str.contains("p 0.0.. before the correction for all pairs").all()
    rest = pairs.drop(own.index)
    assert not rest["verdict"].str.contains("before the correction").any()


def test_numbers_beyond_reason_are_short():
    """Two seeds that vary gave a ratio of ninety digits."""
    row = compare.compare_orderings(*trained(2, gap=0.1, by_seed=3.0)).iloc[0]
    assert row["high"] > 1e6 and len(row["verdict"]) < 400 and re.search(r"\de\+\d\d", row["verdict"])
    assert "only a ratio of" in row["verdict"]


def test_doubt_has_a_price():
    (row,) = compare.compare_orderings(*trained(3, by_seed=0.05)).to_dict("records")
    assert row["verdict_kind"] == "cannot be told apart"
    assert "to see 1% takes" in row["verdict"] and "(now 3 seeds, 64 blocks)" in row["verdict"]


def test_equivalence_is_said_within_the_readers_margin_only():
    quiet = trained(4, by_seed=0.0005, noise=0.005)
    assert compare.compare_orderings(*quiet)["verdict_kind"].iloc[0] == "cannot be told apart"
    (row,) = compare.compare_orderings(*quiet, margin=0.01).to_dict("records")
    assert row["verdict_kind"] == "equivalent" and "are equivalent within 1% at 50%" in row["verdict"]
    alone = trained(1, noise=0.005)
    assert compare.compare_orderings(*alone, margin=0.01)["verdict_kind"].iloc[0] != "equivalent"

"""Verdicts over trainings and text: levels, intervals, sets, looks and power, against other
implementations and simulations."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy import stats
from statsmodels.stats.weightstats import ttost_paired

from pftools.errors import PftoolsError
from pftools.inference.confidence_set import best_set, leaving_levels
from pftools.inference.crossed import Estimate, Variances, crossed_mean, crossed_proportion
from pftools.inference.equivalence import all_equivalent, equivalence_p
from pftools.inference.power import needed_for, visible_difference
from pftools.inference.sequential import decide, level_of_looks, look_schedule
from tests import oracles


def differences(seeds=4, blocks=30, *, by_seed=0.5, by_block=1.0, rest=1.0, mean=0.0, studies=None, key=0):
    generator = np.random.default_rng(key)
    shape = () if studies is None else (studies,)
    d = mean + generator.normal(size=(*shape, seeds, 1)) * by_seed
    d = d + generator.normal(size=(*shape, 1, blocks)) * by_block
    return d + generator.normal(size=(*shape, seeds, blocks)) * rest


# ------------------------------------------------------------------------------------------ crossed


def test_mean_squares_agree_with_the_restatement_in_loops():
    d = differences()
    found = crossed_mean(d)
    assert (found.by_seed, found.by_block, found.by_both) == pytest.approx(oracles.crossed_mean_squares(d))


def test_variance_components_agree_with_statsmodels_mixed_model():
    d = differences(seeds=8, blocks=25, key=3)
    seeds, blocks = np.indices(d.shape)
    frame = {"d": d.ravel(), "seed": seeds.ravel(), "block": blocks.ravel(), "all": 1}
    parts = {"seed": "0 + C(seed)", "block": "0 + C(block)"}
    model = sm.MixedLM.from_formula("d ~ 1", pd.DataFrame(frame), groups="all", vc_formula=parts)
    fitted = model.fit(reml=True)
    found = crossed_mean(d).variances
    by_name = dict(zip(model.exog_vc.names, fitted.vcomp))
    assert found.seeds == pytest.approx(by_name["seed"], rel=0.01)
    assert found.blocks == pytest.approx(by_name["block"], rel=0.01)
    assert found.rest == pytest.approx(fitted.scale, rel=0.01)


def test_one_seed_is_the_paired_t_test():
    d = differences(seeds=1, mean=0.4)
    test = stats.ttest_1samp(d[0], 0)
    assert crossed_mean(d).p == pytest.approx(test.pvalue, rel=1e-9)
    assert crossed_mean(d).interval() == pytest.approx(tuple(test.confidence_interval(0.95)))


def test_p_is_the_level_at_which_the_interval_ends_at_no_difference():
    for key in range(5):
        found = crossed_mean(differences(mean=0.6, key=key))
        assert found.half_width(found.p) == pytest.approx(abs(found.mean), rel=1e-9)


def test_p_has_no_floor_where_holm_needs_it():
    """A p-value from 10,000 resamples never falls below 1/10,001, which 500 pairs cannot use."""
    found = crossed_mean(differences(seeds=10, blocks=200, by_seed=0.01, mean=5.0))
    assert 0 < found.p < 1e-8


def test_the_interval_is_never_narrower_than_from_blocks_alone():
    for key in range(20):
        d = differences(seeds=3, by_seed=key / 10, key=key)
        alone = crossed_mean(d.mean(axis=0, keepdims=True))
        assert crossed_mean(d).half_width() >= alone.half_width() * (1 - 1e-12)


def test_many_at_once_are_the_same_as_one_by_one():
    d = differences(studies=6, mean=0.3)
    together = crossed_mean(d)
    apart = [crossed_mean(one) for one in d]
    assert together.p == pytest.approx([one.p for one in apart])
    assert together.half_width() == pytest.approx([one.half_width() for one in apart])


@pytest.mark.parametrize("seeds,limit", [(3, 0.08), (10, 0.06)])
@pytest.mark.parametrize("by_seed", [0.0, 0.125, 0.25])
def test_seeds_that_vary_do_not_pose_as_a_difference_between_orderings(seeds, limit, by_seed):
    """The earlier test drew blocks only: with trainings that vary it said "differs" in 24 to 32% of
    such studies."""
    d = differences(
        seeds, 64, by_seed=by_seed, by_block=math.sqrt(0.5), rest=math.sqrt(0.5), studies=3000, key=seeds
    )
    found = crossed_mean(d)
    false = np.mean(np.abs(found.mean) > found.half_width())
    assert false <= limit
    if by_seed == 0.25:
        alone = crossed_mean(d.mean(axis=1, keepdims=True))
        assert np.mean(np.abs(alone.mean) > alone.half_width()) > 1.5 * limit


def test_answers_that_hardly_differ_still_have_an_interval():
    d = np.zeros((3, 100))
    low, high = crossed_proportion(d).interval()
    assert low < 0 < high and crossed_proportion(d).p == 1
    d[:, 0] = 1
    assert crossed_proportion(d).mean == pytest.approx(0.01) and crossed_proportion(d).p > 0.05


def test_shares_of_the_variance_add_up_and_find_what_varies():
    found = crossed_mean(differences(seeds=10, blocks=200, by_seed=1.0, by_block=0.1, rest=0.1))
    shares = found.variances.shares(10, 200)
    assert sum(shares) == pytest.approx(1) and shares[0] > 0.95
    assert Variances(0.0, 0.0, 0.0).shares(3, 40) == (0, 0, 0)


def test_one_block_is_refused():
    with pytest.raises(PftoolsError, match="one block"):
        crossed_mean(np.zeros((3, 1)))


# ------------------------------------------------------------------------------------------ the set


def orderings(k=5, seeds=3, blocks=40, *, gap=0.0, noise=0.3, by_seed=0.05, key=0):
    generator = np.random.default_rng(key)
    text = generator.normal(3, 0.5, blocks)
    own = generator.normal(size=(k, seeds, 1)) * by_seed
    return text + own + generator.normal(size=(k, seeds, blocks)) * noise + gap * np.arange(k)[:, None, None]


@pytest.mark.parametrize("seeds", [1, 4])
@pytest.mark.parametrize("level", [0.05, 0.01])
def test_the_set_agrees_with_its_restatement_in_loops(seeds, level):
    for key in range(6):
        losses = orderings(seeds=seeds, gap=0.04 * key, key=key)
        assert np.flatnonzero(best_set(losses, level=level)).tolist() == oracles.best_set(losses, level)


def test_many_sets_at_once_are_the_same_as_one_by_one():
    losses = np.stack([orderings(gap=0.05 * key, key=key) for key in range(8)])
    assert best_set(losses).tolist() == [best_set(one).tolist() for one in losses]


def test_an_ordering_leaves_at_its_leaving_level():
    losses = orderings(gap=0.1)
    levels = leaving_levels(losses)
    assert levels.max() == 1 and (levels > 0.05).tolist() == best_set(losses).tolist()
    for level in (0.2, 0.01, 1e-4):
        assert (levels > level).tolist() == best_set(losses, level=level).tolist()


def test_the_set_is_as_arch_has_it_where_the_case_is_clear():
    """arch 8.0.0: MCS(losses, 0.05, reps=2000, block_size=1, method="max", seed=0).included."""
    behind = np.array([0, 0, 0.15, 0.3, 0.3, 0.6])[:, None, None]
    losses = orderings(6, 1, 200, noise=0.3, by_seed=0.0, key=11) + behind
    assert np.flatnonzero(best_set(losses)).tolist() == [0, 1]


def test_the_set_holds_the_best_over_seeds_and_text():
    generator = np.random.default_rng(5)
    held = 0
    for _ in range(400):
        own = generator.normal(size=(6, 3, 1)) * 0.1
        losses = own + generator.normal(size=(6, 1, 50)) * 0.3 + generator.normal(size=(6, 3, 50)) * 0.3
        held += best_set(losses)[0]
    assert held >= 0.95 * 400 - 2 * math.sqrt(400 * 0.05 * 0.95)


def test_a_single_ordering_is_its_own_set():
    assert best_set(orderings(1)).tolist() == [True]


# ------------------------------------------------------------------------------------------ equivalence


def test_two_one_sided_tests_agree_with_statsmodels():
    d = differences(seeds=1, mean=0.1)[0]
    expected = ttost_paired(d, np.zeros_like(d), -0.8, 0.9)[0]
    assert expected != 0
    p, *_ = ttost_paired(d, np.zeros_like(d), -0.8, 0.8)
    assert equivalence_p(crossed_mean(d[None]), 0.8) == pytest.approx(p, rel=1e-6)


def test_few_data_are_not_equivalence():
    """ "Cannot be told apart" was all that could be said, and a reader took it for "the same"."""
    few, many = orderings(2, 3, 6, by_seed=0.0), orderings(2, 8, 400, by_seed=0.001)
    assert best_set(few).all() and not all_equivalent(few, 0.05)
    assert best_set(many).all() and all_equivalent(many, 0.05)
    assert not all_equivalent(orderings(2, 8, 400, gap=0.2, by_seed=0.001), 0.05)


def test_equivalence_at_the_margin_is_claimed_no_more_often_than_stated():
    d = differences(seeds=3, blocks=60, by_seed=0.1, mean=0.5, studies=1500, key=8)
    found = crossed_mean(d)
    claimed = np.mean(np.abs(found.mean) + found.half_width(0.1) <= 0.5)
    assert claimed <= 0.07


# ------------------------------------------------------------------------------------------ looks


def test_looks_spend_the_level_once():
    assert look_schedule(3, 10) == (3, 5, 8, 10) and look_schedule(4, 4) == (4,)
    assert sum(level_of_looks((3, 5, 8, 10), 0.05)) == pytest.approx(0.05)


def test_seeds_are_added_only_where_doubt_remains():
    losses = orderings(3, 10, 60, gap=0.0, noise=0.1, by_seed=0.01)
    losses[2] += 1.0
    first = decide({name: values[:3] for name, values in zip("abc", losses)}, start=3, most=10)
    assert first.members == ("a", "b") and first.next_seeds == 5 and not first.reason
    assert (
        decide(dict(zip("abc", [losses[0][:5], losses[1][:5], losses[2][:3]])), start=3, most=10).next_seeds
        == 8
    )
    whole = decide(dict(zip("abc", [losses[0], losses[1], losses[2][:3]])), start=3, most=10)
    assert whole.members == ("a", "b") and whole.reason == "no more seeds" and len(whole.looks) == 4


def test_the_procedure_ends_with_one_or_with_equivalents():
    clear = orderings(3, 3, 60, gap=1.0)
    assert decide(dict(zip("abc", clear)), start=3, most=10).reason == "one is left"
    same = orderings(2, 3, 400, noise=0.01, by_seed=0.0001)
    assert decide(dict(zip("ab", same)), start=3, most=10, margin=0.05).reason == "equivalent"


def test_before_the_first_look_nothing_is_said():
    decision = decide(dict(zip("ab", orderings(2, 2))), start=3, most=5)
    assert decision.looks == () and decision.members == ("a", "b") and decision.next_seeds == 3


# ------------------------------------------------------------------------------------------ power


@pytest.mark.parametrize("seeds", [3, 10])
@pytest.mark.parametrize("by_seed", [0.0, 0.2])
def test_the_visible_difference_is_seen_with_the_stated_power(seeds, by_seed):
    variances = Variances(by_seed**2, 0.5, 0.5)
    visible = visible_difference(variances, seeds, 60)
    d = differences(
        seeds, 60, by_seed=by_seed, by_block=math.sqrt(0.5), rest=math.sqrt(0.5), mean=visible, studies=2000
    )
    found = crossed_mean(d)
    assert 0.7 < np.mean(found.mean > found.half_width()) < 0.9


def test_what_is_needed_shows_the_difference_and_less_does_not():
    variances = Variances(0.04, 0.5, 0.5)
    needed = needed_for(0.4, variances, 3, 40)
    assert (
        visible_difference(variances, needed.seeds, 40)
        <= 0.4
        < visible_difference(variances, needed.seeds - 1, 40)
    )
    seeds, blocks = needed.both
    assert visible_difference(variances, seeds, blocks) <= 0.4
    assert needed_for(0.05, variances, 3, 40).blocks is None  # three seeds that vary so much never show it


def test_one_seed_sees_nothing_about_orderings():
    seen = [visible_difference(Variances(0.04, 0.5, 0.5), seeds, 40) for seeds in (1, 3, 5, 10)]
    assert seen[0] == math.inf and seen[1] > seen[2] > seen[3]


def test_unknown_seed_variance_is_not_taken_for_none():
    found = crossed_mean(differences(seeds=1)).variances
    assert math.isnan(found.seeds) and math.isnan(visible_difference(found, 3, 40))


def test_shifting_moves_the_mean_only():
    found = crossed_mean(differences())
    assert found.shifted(2.0).mean == pytest.approx(found.mean + 2) and isinstance(
        found.shifted(1.0), Estimate
    )
    assert found.shifted(2.0).half_width() == found.half_width()


# ------------------------------------------------------------------------------------------------------------
# What the documentation says of the simulations


def _percent(values, digits=0):
    low, high = (f"{value:.{digits}%}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def test_the_documentation_says_what_the_simulations_found():
    root = Path(__file__).parents[1]
    stored = json.loads((root / "benchmarks" / "results" / "verdicts-cpu.json").read_text())
    found = {name.removeprefix("verdicts: "): entry["measured"] for name, entry in stored.items()}
    assert all(entry["settings"]["studies"] == 1000 for entry in stored.values())
    words = {
        name: (root / name).read_text() for name in ("README.md", "docs/statistics.md", "docs/measured.md")
    }
    page = " ".join(words["docs/statistics.md"].split())
    pairs, answers = found["pairs of losses"], found["pairs of answers"]
    losses = {seeds: pairs["worst"][seeds] for seeds in ("3 seeds", "more seeds")}
    accuracies = {seeds: answers["worst"][seeds] for seeds in losses}

    def worst(seeds, what, who="crossed"):
        return [f"{one[seeds][who][what]:.1%}" for one in (losses, accuracies)]

    few, more = "3 seeds", "more seeds"
    alone = [f"{losses[seeds]['blocks alone']['false']:.0%}" for seeds in (few, more)]
    assert f"| 8% | {worst(few, 'false')[0]} of losses, {worst(few, 'false')[1]} of accuracies |" in page
    assert f"| 6% | {', '.join(worst(more, 'false'))} |" in page and f"| | {', '.join(alone)} |" in page
    assert f"| 94% | {', '.join(worst(more, 'coverage'))} |" in page
    assert f"| 94% | **{worst(few, 'coverage')[0]}**, {worst(few, 'coverage')[1]} |" in page
    looked = f"{found['looks']['least often held']:.1%}"
    set_ = f"{found['sets']['least often held']['kit']:.1%}"
    assert f"| 95% | **{set_}** |" in page and f"| 95% | {looked} |" in page
    again = found["again"]
    assert "{}, {} and {}".format(*(f"{value:.1%}" for value in again["coverage of pairs"].values())) in page
    assert "{} and {}".format(*(f"{value:.1%}" for value in again["sets hold the best"].values())) in page
    cells = {**pairs["cells"], **answers["cells"]}
    still = {name: cell for name, cell in cells.items() if "seed deviation 0.0" in name}
    for end, row in {
        "shared 1.0": "losses, all of the blocks' variance shared by the seeds",
        "shared 0.5": "losses, half of it shared",
        "shared 0.0": "losses, nothing shared",
        "deviation 0.0": "accuracies",
    }.items():
        powers = [
            _percent(
                [
                    cell["crossed"]["power"]
                    for name, cell in still.items()
                    if name.startswith(f"{seeds} seeds") and name.endswith(end)
                ]
            )
            for seeds in (3, 5, 10)
        ]
        assert f"| {row} | {' | '.join(powers)} |" in page
    for who in ("blocks alone", "questions alone"):
        assert _percent([cell[who]["power"] for cell in still.values() if who in cell]) in page
    looks = found["looks"]["cells"]

    def saved(start):
        return _percent([cell["seeds saved"] for name, cell in looks.items() if name.startswith(start)])

    assert (
        f"{saved('2 orderings 2.0')} of the trainings of two orderings and {saved('8 orderings 2.0')}" in page
    )
    assert _percent([cell["seeds saved"] for name, cell in looks.items() if "0.0 apart" in name]) in page
    n_cells = sum(len(found[claim]["cells"]) for claim in found if claim != "again")
    measured = " ".join(words["docs/measured.md"].split())
    assert f"{n_cells} cells of 1,000 studies" in measured and f"at least {set_}, and in {looked}" in measured
    assert f"{saved('8 orderings 2.0')} of the trainings" in measured
    often, seldom = worst(few, "false")[0], worst(more, "false")[0]
    assert (
        f"{seldom} of simulated studies with 5 or more seeds and {often} with 3" in words["README.md"]
        and f"gives up to {alone[0]}" in words["README.md"]
    )
    assert worst(few, "coverage")[0] in measured
    most = saved("8 orderings 2.0").rpartition(" ")[2]
    assert (
        f"holds it in at least {set_}, and" in words["README.md"]
        and f"saves up to {most}" in words["README.md"]
    )

"""Random studies on an engine that is made up: what a report says of them holds together."""

import itertools
import re
import tempfile
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pftools import report
from tests.made_up import seal_study

WORDS = ["base", "finetune", "F", "prune", "P", "prune_finetune", "P F", "finetune_prune", "(P F)*2"]


def some(values, most):
    return st.lists(st.sampled_from(values), min_size=1, max_size=most, unique=True)


STUDIES = st.fixed_dictionaries(
    {
        "orderings": some(WORDS, 4),
        "methods": some(["wanda", "magnitude"], 2),
        "merges": some(["masked", "dense"], 2),
        "sparsities": some([0.3, 0.5, 0.505], 2),
        "seeds": some([0, 1, 2], 3),
    }
)
LOSSES = st.tuples(st.sampled_from([0.0, 0.001, 0.05, 0.3, 9.0]), st.sampled_from([0.0, 0.0, 0.08]))


class Engine:
    """What a row's model loses, the share of zeros that its dense merge loses, and whether its evaluation is
    lacking: drawn once a run."""

    def __init__(self, draws):
        self.draws, self.known = draws, {}

    def of(self, row):
        if row.evaluation not in self.known:
            self.known[row.evaluation] = self.draws.draw(LOSSES)
        return self.known[row.evaluation]

    def lacks(self, row):
        """Whether an evaluation failed; never the first one."""
        return (
            bool(self.known) and row.evaluation not in self.known and self.draws.draw(st.integers(0, 5)) == 0
        )

    def harm(self, row):
        return self.of(row)[0]

    def measured(self, row):
        lost = self.of(row)[1] if row.merge == "dense" and row.n_finetunes else 0.0
        return max(row.asked - lost, 0.0)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(study=STUDIES, draws=st.data())
def test_rows_pairs_and_answers_of_any_study_hold_together(study, draws):
    engine = Engine(draws)
    with tempfile.TemporaryDirectory() as folder:
        file = seal_study(
            Path(folder), harm=engine.harm, measured=engine.measured, skip=engine.lacks, **study
        )
        table = report.study_results(file, runs=Path(folder) / "runs")
        every_result_is_shown_once(table)
        every_pair_is_compared_once(table)
        all_places_name_the_same_best(table)
        sentences_intervals_matrix_and_chart_agree(table)


def every_result_is_shown_once(table):
    ends = report.final_states(table)
    entries = report.entry_table(ends)
    shown = [run for runs in entries["runs"] for run in runs]
    assert sorted(shown) == sorted(set(ends["run"]))
    assert not entries.duplicated(["label", "asked"]).any()
    assert report.result_table(table).to_html().count("<tr>") == 1 + len(entries)


def seeds_of(table):
    """{(label, asked): {seed: perplexity}}"""
    ends = report.final_states(table)
    return {
        (entry["label"], entry["asked"]): dict(
            ends[ends["run"].isin(entry["runs"])].groupby("seed")["perplexity"].first()
        )
        for _, entry in report.entry_table(ends).iterrows()
    }


def every_pair_is_compared_once(table):
    entries = report.entry_table(report.final_states(table))
    seeds = seeds_of(table)
    expected = {
        (asked, frozenset(pair))
        for asked, group in entries.groupby("asked")
        for pair in itertools.combinations(group["label"], 2)
        if set(seeds[pair[0], asked]) & set(seeds[pair[1], asked])
    }
    pairs = report.pair_table(table)
    compared = list(zip(pairs["asked"], map(frozenset, zip(pairs["first"], pairs["second"]))))
    assert len(compared) == len(set(compared)) and set(compared) == expected
    assert all(len(pair) == 2 for _, pair in compared)
    tasks = report.task_pairs(table)
    assert not tasks.duplicated(["task", "pair"]).any() and (tasks["first"] != tasks["second"]).all()


def all_places_name_the_same_best(table):
    entries = report.entry_table(report.final_states(table))
    pairs = report.pair_table(table)
    said = report.headline(table)
    for asked, group in entries.groupby("asked"):
        best = group[group["best"]]
        assert len(best) == (not group["collapsed"].all())
        ours = pairs[pairs["asked"] == asked]
        assert set(ours["best"]) <= ({*best["label"]} or {""})
        for row in ours.itertuples():
            beaten = re.match(r"(.*) (?:is better than|came out ahead of) (.*) at ", row.verdict)
            assert beaten is None or beaten.group(2) != row.best  # nobody beats the best
        if len(best) and (asked > 0 or entries["asked"].nunique() == 1):
            assert best["label"].iloc[0] in unescape(said)
    contested = [asked for asked, group in entries.groupby("asked") if len(group) > 1 and group["best"].any()]
    styles = re.findall(r"font-weight: 600", report.result_table(table).to_html())
    assert bool(styles) == bool(contested)


TOLD = re.compile(r"\((\S+) vs (\S+), ratio (\S+) \[(\S+), (\S+)\], corrected p ")


def sentences_intervals_matrix_and_chart_agree(table):
    pairs, perplexities = report.pair_table(table), seeds_of(table)
    names, ends = report.ordering_names(table), report.entry_table(report.final_states(table))
    matrix = unescape(report.verdict_matrix(pairs, names, ends))
    for row in pairs[pairs["n"] > 0].itertuples():
        better, worse = (row.first, row.second) if row.ratio <= 1 else (row.second, row.first)
        told = TOLD.search(row.verdict)
        ratio = min(row.ratio, 1 / row.ratio)
        assert row.verdict.startswith(better) and worse in row.verdict
        assert float(told[3]) == pytest.approx(ratio, abs=6e-4)
        mine, theirs = perplexities[better, row.asked], perplexities[worse, row.asked]
        shared = sorted(set(mine) & set(theirs))
        for value, found in zip(told.groups(), (mine, theirs)):
            mean = np.exp(np.mean([np.log(found[seed]) for seed in shared]))
            assert float(value.replace(",", "")) == pytest.approx(mean, rel=1e-3, abs=6e-3)
        assert np.log(ratio) == pytest.approx(
            np.mean([np.log(mine[s] / theirs[s]) for s in shared]), abs=1e-6
        )
        outside = row.low > 1 or row.high < 1
        assert outside == (row.p < 0.05) and row.p <= row.p_holm
        assert (row.verdict_kind == "differs") == (row.p_holm < 0.05)
        assert (outside and row.verdict_kind != "differs") == ("before the correction" in row.verdict)
        assert ("that both have" in row.verdict) == (len(mine) + len(theirs) > 2 * len(shared))
        cells = re.findall(rf'<td class="(\w+) [^>]*title="{re.escape(row.verdict)}">', matrix)
        kinds = {"better", "worse"} if row.verdict_kind == "differs" else {"unsure"}
        assert len(cells) == 2 and set(cells) == kinds
    chart = report.ratio_chart(pairs)
    drawn = [] if chart is None else [r for rows in chart.to_dict()["datasets"].values() for r in rows]
    for mark in (mark for mark in drawn if "verdict" in mark):
        assert mark["low"] <= mark["ratio"] <= mark["high"] and mark["ratio"] >= 1
        (row,) = [row for row in pairs.itertuples() if row.verdict == mark["verdict"]]
        assert mark["verdict_kind"] == row.verdict_kind
    for found in report.best_sets(table):
        if found.metric != "perplexity":
            continue
        best = ends[(ends["asked"] == found.asked) & ends["best"]]["label"].iloc[0]
        seeds = [set(perplexities[label, found.asked]) for label in found.labels]
        common = set.intersection(*seeds)
        assert found.n_seeds == len(common) and found.unequal == any(one != common for one in seeds)
        assert found.unequal or best in found.members

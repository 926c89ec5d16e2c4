"""Random studies on an engine that is made up: what a report says of them holds together."""

import itertools
import re
import tempfile
from html import unescape
from pathlib import Path

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
        "seeds": some([0, 1, 2], 2),
    }
)
LOSSES = st.tuples(st.sampled_from([0.0, 0.001, 0.05, 0.3, 9.0]), st.sampled_from([0.0, 0.0, 0.08]))


class Engine:
    """What a row's model loses, and the share of zeros that its dense merge loses: drawn once a run."""

    def __init__(self, draws):
        self.draws, self.known = draws, {}

    def of(self, row):
        if row.evaluation not in self.known:
            self.known[row.evaluation] = self.draws.draw(LOSSES)
        return self.known[row.evaluation]

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
        file = seal_study(Path(folder), harm=engine.harm, measured=engine.measured, **study)
        table = report.study_results(file, runs=Path(folder) / "runs")
        every_result_is_shown_once(table)
        every_pair_is_compared_once(table)
        all_places_name_the_same_best(table)


def every_result_is_shown_once(table):
    ends = report.final_states(table)
    entries = report.entry_table(ends)
    shown = [run for runs in entries["runs"] for run in runs]
    assert sorted(shown) == sorted(set(ends["run"]))
    assert not entries.duplicated(["label", "asked"]).any()
    assert report.result_table(table).to_html().count("<tr>") == 1 + len(entries)


def every_pair_is_compared_once(table):
    entries = report.entry_table(report.final_states(table))
    expected = {
        (asked, frozenset(pair))
        for asked, group in entries.groupby("asked")
        for pair in itertools.combinations(group["label"], 2)
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
            beaten = re.match(r"(.*) (?:beats|came out ahead of) (.*) at ", row.verdict)
            assert beaten is None or beaten.group(2) != row.best  # nobody beats the best
        if len(best) and (asked > 0 or entries["asked"].nunique() == 1):
            assert best["label"].iloc[0] in unescape(said)
    contested = [asked for asked, group in entries.groupby("asked") if len(group) > 1 and group["best"].any()]
    styles = re.findall(r"font-weight: 600", report.result_table(table).to_html())
    assert bool(styles) == bool(contested)

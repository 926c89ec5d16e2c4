"""What is said of the numbers is what they show: each test is named for a sentence that once did not."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from pftools import cli, compare, run_folder, shipped
from pftools.report import pair_table, study_results, visible_differences
from pftools.study import load_study, plan_study
from pftools.study.layout import plan_layout
from tests.made_up import seal_study


def results_of(names, perplexity):
    """A row an ordering, as `study.results` has them: one seed, all else the same."""
    return pd.DataFrame(
        {
            "ordering": names,
            "asked": 0.5,
            "measured": 0.5,
            "perplexity": perplexity,
            "finetune_tokens": 0,
            "seed": 0,
            "method": "wanda",
            "pattern": "unstructured",
            "merge": "auto",
            "run": names,
        }
    )


def test_of_six_hundred_pairs_those_of_far_apart_models_are_all_told_apart():
    """p has to resolve what its correction needs: 1/10,001 times 630 pairs is more than 5%."""
    generator, names = np.random.default_rng(0), [f"F*{number}" for number in range(1, 37)]
    text = generator.normal(0, 0.5, 40)
    perplexities = [7.22 * 1.06**number for number in range(len(names))]  # 7.22 to 55
    results = results_of(names, perplexities)
    losses = {
        name: math.log(perplexity) + text - text.mean() + generator.normal(0, 0.01, 40)
        for name, perplexity in zip(names, perplexities)
    }
    pairs = compare.compare_orderings(results, losses)
    assert len(pairs) == 630 and (pairs["verdict_kind"] == "differs").all()
    assert pairs["p_holm"].max() < 1e-6


def test_the_base_of_a_planned_study_is_not_finished_before_any_step_is(tmp_path):
    (tmp_path / "mine.yaml").write_text("orderings: [P]\nmodel: somebody/model\n")
    plan = plan_study(load_study(tmp_path / "mine.yaml"), runs=tmp_path / "runs")
    assert set(plan_layout(plan)["state"]) == {"to do"}
    run_folder.start(next(iter(plan.steps.values())).parameters).seal([])
    assert plan_layout(plan).set_index("key")["state"].to_dict()["base"] == "finished"


def test_rows_of_two_methods_are_told_apart_where_run_prints_them(tmp_path, monkeypatch):
    file = seal_study(tmp_path, methods=["wanda", "magnitude"], orderings=["base", "prune"])
    monkeypatch.setattr(cli.out, "width", 300)
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(cli.app, ["run", str(file), "--runs", "runs", "--no-report"]).output
    rows = [line for line in shown.splitlines() if "│ prune" in line or "│ base" in line]
    assert len(rows) == len(set(rows)) == 3
    assert [word in row for row, word in zip(rows, ("all", "wanda", "magnitude"))] == [True] * 3, rows


def test_a_difference_that_power_would_miss_is_not_called_invisible():
    """80% power is no threshold: rows below it are found, only less often."""
    names, tables = ["prune", "finetune_prune"], []
    results = results_of(names, 20.0)
    for lost in range(10, 40):  # of 200 questions, beside the 10 that only the second answers
        right = np.arange(200) >= 60
        other = right.copy()
        other[:10], other[60 : 60 + lost] = True, False
        answers = {
            name: pd.DataFrame({"task": "facts", "question": range(200), "correct": correct * 1.0})
            for name, correct in zip(names, (right, other))
        }
        tables.append(compare.compare_tasks(results, answers))
    compared = pd.concat(tables, ignore_index=True)
    found = compared["verdict_kind"] == "differs"
    assert (found & (compared["difference"].abs() < compared["visible"])).any() and not found.all()
    words = [*compared["verdict"], visible_differences(compared).to_html()]
    words += [path.read_text() for path in sorted(Path(shipped.NOTEBOOKS).glob("06*.ipynb"))]
    assert not any("not visible" in text or "invisible" in text for text in words)
    assert "A smaller one is seen less often" in words[-1] and "seen four times in five" in words[-2]
    assert all("less than four times in five" in text for text in compared.loc[~found, "verdict"])


@pytest.mark.parametrize("swapped", [False, True])
def test_tokens_stand_with_the_names_that_they_belong_to(tmp_path, swapped):
    ahead, behind = ("finetune_prune", "prune") if swapped else ("prune", "finetune_prune")
    file = seal_study(
        tmp_path, orderings=["prune", "finetune_prune"], harm=lambda row: 0.5 * (row.ordering == behind)
    )
    pairs = pair_table(study_results(file, runs=tmp_path / "runs"))
    tokens = {"prune": "0", "finetune_prune": "1,000"}
    (verdict,) = pairs["verdict"]
    assert f"{ahead} came out ahead of {behind}" in verdict
    assert f"({tokens[ahead]} and {tokens[behind]} tokens)" in verdict

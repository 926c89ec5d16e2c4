"""The report of a study whose runs are made up here: sealed, but computed by nobody."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from pftools import report, run_folder, study
from pftools.errors import PftoolsError

GAIN = {"prune": 0.25, "finetune_prune": 0.12, "prune_finetune": 0.02}
WORDS = {
    "name": "made_up",
    "description": "Does it matter?",
    "evaluate": {"tasks": ["facts", "wikitext2"]},
    "tokens": 1000,
    "finetune": {"block_length": 10},
}


def made_up(folder, **words):
    """A study file and its finished runs."""
    (folder / "made_up.yaml").write_text(json.dumps({**WORDS, "orderings": ["base", *GAIN], **words}))
    plan = study.plan_study(study.load_study(folder / "made_up.yaml"), runs=folder / "runs")
    generator = np.random.default_rng(0)
    text, skill = generator.normal(0, 0.4, 30), generator.beta(2, 2, 120)
    rows = {row.evaluation: row for row in plan.rows}
    for step in plan.steps.values():
        run = run_folder.start(step.parameters)
        if step.parameters.step != "evaluate":
            run.seal([], measured=0.5)
            continue
        row = rows[str(step.folder)]
        harm = GAIN.get(row.ordering, 0.0) * row.asked * 2
        losses = np.log(20) + harm + text - text.mean() + generator.normal(0, 0.01, 30)
        correct = (generator.random(120) < np.clip(skill - 1.2 * harm, 0.1, 1)).astype(float)
        pd.DataFrame({"block": range(30), "nll": losses}).to_parquet(run.path("block_nll.parquet"))
        pd.DataFrame(
            {"task": "facts", "subject": "facts", "question": range(120), "correct": correct}
        ).to_parquet(run.path("samples.parquet"))
        interval = stats.binomtest(int(correct.sum()), 120).proportion_ci(method="wilson")
        facts = {
            "metric": "acc",
            "value": correct.mean(),
            "low": interval.low,
            "high": interval.high,
            "n": 120,
            "chance": 0.25,
        }
        words_perplexity = {
            "metric": "word_perplexity",
            "value": 61.0 + row.asked,
            "low": None,
            "high": None,
            "n": 62,
            "chance": None,
        }
        run.seal(
            ["block_nll.parquet", "samples.parquet"],
            perplexity=float(np.exp(losses.mean())),
            measured=row.asked,
            n_blocks=30,
            block_length=512,
            corpus="pydocs",
            tasks={"facts": facts, "wikitext2": words_perplexity},
            dtype="float32",
        )
    return report.study_results(folder / "made_up.yaml", runs=folder / "runs")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return made_up(tmp_path_factory.mktemp("quick"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return made_up(
        tmp_path_factory.mktemp("wide"),
        orderings=["base", *GAIN, "iter_pf"],
        sparsities=[0.3, 0.6],
        seeds=[0, 1],
    )


def test_the_headline_names_the_best_and_doubts_it_against_its_rival(quick):
    words = report.headline(quick)
    assert words.startswith("**Does it matter?**") and "`prune_finetune` has the lowest perplexity" in words
    assert (
        "prune_finetune beats finetune_prune at 50%" in words
        and "both were fine-tuned on 1,000 tokens" in words
    )


def test_tables_are_pooled_over_seeds_and_hold_the_ends_of_chains(wide):
    html = report.result_table(wide).to_html()
    assert html.count("iter_pf") == 2 and "font-weight: 600" in html
    ends = report.final_states(wide)
    assert set(ends["asked"].round(3)) == {0.0, 0.3, 0.6} and len(wide) > len(ends) == 2 * (1 + 4 * 2)
    pooled = report.entry_table(ends)
    one = pooled[(pooled["ordering"] == "prune") & (pooled["asked"] == 0.6)].iloc[0]
    own = ends[(ends["ordering"] == "prune") & (ends["asked"] == 0.6)]
    assert one["seeds"] == 2 and one["perplexity"] == pytest.approx(np.exp(np.log(own["perplexity"]).mean()))


def test_verdicts_stand_by_sparsity_the_best_against_the_others_first(wide):
    pairs = report.pair_table(wide)
    words = report.verdict_list(pairs)
    assert len(pairs) == 2 * 6 and words.index("**At 60%**") < words.index("**At 30%**")
    assert words.count("<summary>The other 3 pairs at") == 2 and "in 2 of 2 seeds" in words
    drawn = report.ratio_chart(pairs, most=8).to_dict()
    ratios = [row["ratio"] for rows in drawn["datasets"].values() for row in rows if "ratio" in row]
    assert len(ratios) == 6 and min(ratios) >= 1


def test_tasks_have_charts_a_level_of_guessing_and_a_table_of_what_is_visible(quick, wide):
    for table in (quick, wide):
        first, second = (chart.to_dict() for chart in report.task_charts(table))
        assert "120 questions" in first["title"]["subtitle"][0] if "title" in first else True
        assert "dashed" in json.dumps(first) and "word perplexity" in json.dumps(second)
    guessing = report.guessing_table(quick).to_html()
    assert "facts" in guessing and "wikitext2" not in guessing and "17.5% to 33.3%" in guessing
    compared = report.task_pairs(quick)
    assert compared["task"].tolist() == ["facts"] * 3
    apart = int((compared["verdict_kind"] == "differs").sum())
    assert report.told_apart(compared).count("\n- ") + report.told_apart(compared).startswith("- ") == apart
    assert report.visible_differences(compared).to_html().count("<tr>") == 4


def test_a_study_without_results_says_what_to_run(tmp_path):
    (tmp_path / "empty.yaml").write_text("orderings: [prune]\n")
    with pytest.raises(PftoolsError, match="has no finished result.*pftools run"):
        report.study_results(tmp_path / "empty.yaml", runs=tmp_path / "runs")


def test_a_study_without_tasks_has_a_report_too(tmp_path):
    table = made_up(tmp_path, evaluate={"tasks": []})
    assert report.task_charts(table) == [] and report.guessing_table(table) is None
    assert "Perplexity" in json.dumps(report.perplexity_chart(table).to_dict())

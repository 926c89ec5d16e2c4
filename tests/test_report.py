"""The report of a study whose runs are made up here: sealed, but computed by nobody."""

import json
import re
from html import unescape
from io import StringIO

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbconvert.filters.markdown_mistune import markdown2html_mistune

from pftools import figures, memory, report
from pftools.errors import PftoolsError
from pftools.report import tables
from tests.made_up import GAIN, published_harm, seal_study


def made_up(folder, **options):
    """The results of a made-up study."""
    return report.study_results(seal_study(folder, **options), runs=folder / "runs")


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
    assert words.startswith("**Does it matter?**")
    assert "of these 3 models, prune_finetune has the lowest perplexity" in words
    assert (
        "prune_finetune came out ahead of finetune_prune at 50%" in words
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


# Two methods, two names of one word: what shares its runs is one entry.
SHARED = {
    "orderings": ["base", "finetune", "prune", "prune_finetune", "P F"],
    "methods": ["wanda", "magnitude"],
    "merges": ["masked", "dense"],
}


def test_results_that_share_a_run_are_one_row_and_keep_their_comparisons(tmp_path):
    table = made_up(tmp_path, **SHARED)
    entries = report.entry_table(report.final_states(table))
    trained = {f"prune_finetune ({a}, {b})" for a in ("wanda", "magnitude") for b in ("masked", "dense")}
    assert set(entries["label"]) == {"base", "finetune", "prune (wanda)", "prune (magnitude)"} | trained
    assert len(entries) == 8
    assert set(entries.loc[entries["ordering"] == "prune_finetune", "also"]) == {"P F"}
    html = report.result_table(table).to_html()
    assert html.count("<tr>") == 1 + len(entries) and html.count("prune_finetune, also P F") == 4
    for pairs in (report.pair_table(table), report.task_pairs(table)):
        assert len(pairs) == 1 + 6 * 5 // 2 and (pairs["first"] != pairs["second"]).all()
    assert "No two orderings" not in report.told_apart(report.task_pairs(table))
    assert (report.pair_table(table)["p_holm"] <= 1).all()


def test_sparsities_that_round_alike_keep_their_own_headings(tmp_path):
    table = made_up(tmp_path, orderings=["base", *GAIN], sparsities=[0.5, 0.505, 0.995])
    pairs = report.pair_table(table)
    words = report.verdict_list(pairs)
    assert [words.count(f"**At {where}**") for where in ("50%", "50.5%", "99.5%")] == [1, 1, 1]
    assert words.count("prune_finetune came out ahead of") == 6 and len(pairs) == 9
    shown = report.result_table(table).to_html()
    assert ">50.5%<" in shown and ">99.5%<" in shown and ">100%<" not in shown


@pytest.mark.parametrize("loss", [12.0, 800.0])
def test_a_collapsed_model_is_called_so_and_never_ranked(tmp_path, loss):
    table = made_up(tmp_path, harm=lambda row: loss if row.ordering == "prune" else 0.01 * row.asked)
    pairs = report.pair_table(table).set_index("pair")
    with_prune = pairs[(pairs["first"] == "prune") | (pairs["second"] == "prune")]
    assert set(with_prune["verdict_kind"]) == {"collapsed"} and with_prune["p"].isna().all()
    assert "prune has collapsed at 50%" in with_prune["verdict"].iloc[0]
    words = report.headline(table)
    assert "The nearest rival: " in words and "Collapsed: `prune`" in words and "prune came out" not in words
    assert "(collapsed)" in report.result_table(table).to_html()
    assert '"text": {"value": "collapsed"}' in json.dumps(report.perplexity_chart(table).to_dict())


def test_when_all_models_have_collapsed_the_headline_says_so(tmp_path):
    table = made_up(tmp_path, harm=lambda row: 20.0 * row.asked)
    assert "At 50% every model has collapsed" in report.headline(table)
    assert report.ratio_chart(report.pair_table(table)) is None
    assert "font-weight: 600" not in report.result_table(table).to_html()


def test_what_decided_the_numbers_stands_in_the_report(tmp_path):
    table = made_up(
        tmp_path, merges=["masked", "dense"], finetune={"learning_rate": 0.003, "block_length": 10}
    )
    html = report.settings_table(table).to_html()
    for words in ("learning_rate", "0.003", "corpus", "pydocs", "adapter", "lora", "dtype", "block_length"):
        assert words in html
    cells = pd.read_html(StringIO(html))[0]
    merges = cells[(cells["step"] == "finetune") & (cells["setting"] == "merge")]
    assert dict(zip(merges["value"], merges["of"]))["dense"] == "prune_finetune (dense)"
    assert (cells.loc[cells["setting"] == "learning_rate", "of"] == "all").all()


def test_names_and_descriptions_of_others_are_shown_as_they_are(tmp_path):
    evil = "<img src=x onerror=alert(1)> **not bold** [a](b) $x$ _y_"
    table = made_up(tmp_path, orderings=["base", "P F*2", "(P F)*2"], description=evil)
    words = report.headline(table)
    rendered = markdown2html_mistune(words)
    assert "<img" not in rendered and "<strong>not" not in rendered and "<a " not in rendered
    assert unescape(rendered).count(evil) == 1
    verdicts = markdown2html_mistune(report.verdict_list(report.pair_table(table)))
    assert "P F*2 " in unescape(verdicts) and "(P F)*2" in unescape(verdicts) and "<em>" not in verdicts


def test_the_best_is_the_best_at_equal_measured_sparsity_everywhere(tmp_path):
    """A dense merge loses zeros and has the lowest perplexity: it is another kind of model."""

    def dense(row):
        return row.ordering == "prune_finetune" and row.merge == "dense"

    table = made_up(
        tmp_path,
        merges=["masked", "dense"],
        harm=lambda row: 0.0 if dense(row) else published_harm(row),
        measured=lambda row: 0.42 if dense(row) else row.asked,
    )
    entries = report.entry_table(report.final_states(table))
    assert entries.loc[entries["best"] & (entries["asked"] > 0), "label"].tolist() == [
        "prune_finetune (masked)"
    ]
    words = report.headline(table)
    assert "prune_finetune (masked) has the lowest perplexity" in words
    assert "another: prune_finetune (dense)" in words
    pairs = report.pair_table(table)
    assert set(pairs.loc[pairs["asked"] > 0, "best"]) == {"prune_finetune (masked)"}
    drawn = json.dumps(report.ratio_chart(pairs, most=1).to_dict())
    assert "prune_finetune (masked)" in drawn and "prune_finetune (dense) /" not in drawn


def test_names_and_tokens_stand_in_one_order(tmp_path):
    table = made_up(tmp_path)
    pairs = report.pair_table(table).set_index("pair")
    verdict = pairs.loc["prune / prune_finetune, 50%", "verdict"]
    assert (
        verdict.startswith("prune_finetune came out ahead of prune at 50%")
        and "(1,000 and 0 tokens)" in verdict
    )


def test_a_report_is_rendered_again_only_where_something_changed(tmp_path, monkeypatch):
    file = seal_study(tmp_path)
    rendered = []

    def executed(study, parameters):
        rendered.append(parameters)
        return nbformat.v4.new_notebook()

    monkeypatch.setattr(report.page, "_executed", executed)
    monkeypatch.setattr(
        report.page, "_html", lambda notebook, name, state, orderings: f'<meta content="{state}">'
    )
    path = tmp_path / "report.html"
    for _ in range(2):
        assert report.render(file, runs=tmp_path / "runs", output=path) == path
    assert len(rendered) == 1
    run = next((tmp_path / "runs").glob("evaluate-*/run.json"))
    run.write_text(run.read_text() + "\n")
    report.render(file, runs=tmp_path / "runs", output=path)
    assert len(rendered) == 2


def test_the_page_answers_first_and_holds_all_it_needs():
    """Cells' tags, not their source, say what becomes of them; charts have names, and ids of their own."""
    svg = '<svg><g aria-label="Title text \'Perplexity\'" id="a"></g><path clip-path="url(#a)"/></svg>'
    cells = [
        nbformat.v4.new_markdown_cell(
            "# 6 · Compare: which order is better?\nThree words.", metadata={"tags": ["opening"]}
        ),
        shown({"text/html": "<table><tr><td>1</td></tr></table>"}),
        shown({"image/svg+xml": svg}, "main-chart"),
        shown({"image/svg+xml": svg}),
        shown({"text/markdown": "It **won**."}, "answer"),
    ]
    html = report.page._html(nbformat.v4.new_notebook(cells=cells), "<b>name</b>", "state", ["base"])
    places = [html.index(words) for words in (">Which order", "<strong>won", "<figure", "How to read it")]
    assert places == sorted(places) and "<title>&lt;b&gt;name" in html
    assert html.count('aria-label="Perplexity"') == 2 and html.count('<div class="wide"') == 1
    ids = re.findall(r'<g [^>]*id="([^"]*)"', html)
    assert len(ids) == len(set(ids)) == 2 and all(f"url(#{name})" in html for name in ids)
    assert "<script src" not in html and "http" not in html


def shown(data, *tags):
    output = nbformat.v4.new_output("display_data", data)
    return nbformat.v4.new_code_cell("code", outputs=[output], metadata={"tags": list(tags)})


def test_results_that_are_missing_are_named_with_their_step(tmp_path):
    table = made_up(tmp_path, skip=lambda row: row.ordering == "prune")
    words = report.headline(table)
    assert "3 of 4 results are finished" in words
    assert re.search(r"prune at 50% \(wanda, auto, seed 0\): evaluate-[0-9a-f]+ has not begun", words)


def test_the_answer_is_a_set_and_stands_first(wide):
    """The lowest number was the answer, however close the next one was."""
    sets = report.best_sets(wide)
    assert {found.asked for found in sets if found.metric == "perplexity"} >= {0.3, 0.6}
    (highest,) = [found for found in sets if found.asked == 0.6 and found.metric == "perplexity"]
    (answer, *_) = [line for line in report.headline(wide).split("\n\n") if line.startswith("> ")]
    assert answer.startswith("> At 60%, ") and "(95% confidence, 2 seeds" in answer
    assert answer.count("has the lowest perplexity") == 1
    assert highest.members[0] in answer
    html = report.result_table(wide).to_html()
    marked = sum(len(found.members) for found in sets if found.metric == "perplexity")
    assert "may be best" in html and html.count(">yes<") == marked


def test_one_training_each_makes_no_ordering_the_best(quick):
    answer = report.headline(quick).split("> ", 1)[1]
    assert "which ordering is best, one training each cannot say" in answer


def test_the_readers_margin_reaches_the_verdicts(wide):
    """A study says what does not matter: equivalent_within."""
    table = wide.copy()
    table.attrs = {**wide.attrs, "study": {**wide.attrs["study"], "equivalent_within": 0.9}}
    assert (report.pair_table(table)["verdict_kind"] == "equivalent").any()
    assert not (report.pair_table(wide)["verdict_kind"] == "equivalent").any()


def test_the_executed_notebook_of_a_step_is_a_page_with_the_values_it_was_given(tmp_path):
    file = seal_study(tmp_path)
    plan = report.page.plan_study(report.page.load_study(file), runs=tmp_path / "runs")
    (step,) = [step for step in plan.steps.values() if step.label == "wanda 50%"][:1]
    parameters = "# Parameters: change them\nmethod = 'magnitude'  # the criterion"
    cells = [
        nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("injected", metadata={"tags": ["injected-parameters"]}),
        nbformat.v4.new_markdown_cell("## Two\nlines"),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), step.folder / "notebook.ipynb")
    assert report.page.notebooks.write_pages(plan, tmp_path / "steps") == {step.name}
    html = (tmp_path / "steps" / f"{step.name}.html").read_text()
    words = unescape(re.sub(r"<[^>]+>", "", html))
    assert "method = 'wanda'  # the criterion" in words and "injected" not in words
    assert '<h2 id="two">Two' in html and f'href="../index.html#{step.name}"' in html


def test_what_a_step_made_smaller_when_memory_ran_out_stands_in_its_row(tmp_path):
    def short_of_memory(row):
        if row.ordering == "prune":
            memory.relieve("calibration blocks", 4)
        return published_harm(row)

    table = made_up(tmp_path, orderings=["base", "prune"], sparsities=[0.5], harm=short_of_memory)
    html = tables.step_table(table).to_html()
    assert html.count("finished; calibration blocks were read 4 at a time") == 1


def test_a_training_that_collapsed_does_not_set_the_scale(tmp_path):
    """One of 1e88 pressed all others into a line of pixels, with a hundred ticks."""
    table = made_up(
        tmp_path,
        seeds=[0, 1],
        harm=lambda row: 200.0 if row.ordering == "prune" and row.seed else published_harm(row),
    )
    for chart, axis in ((report.quality_chart(table), "y"), (report.perplexity_chart(table), "x")):
        drawn = chart.to_dict()
        scales = [
            layer["encoding"][axis]["scale"]["domain"]
            for layer in drawn["layer"]
            if axis in layer.get("encoding", {})
        ]
        assert max(domain[1] for domain in scales if len(domain) == 2) < 100
        singly = [row for rows in drawn["datasets"].values() for row in rows if "seed" in row]
        assert len(singly) == len(table) - 1
    ticks, _ = figures.theme.ticks_of(1e-5, 1e90, log=True)
    assert 4 <= len(ticks) <= 8


def test_what_shares_no_seed_is_not_tested_and_said_so(tmp_path):
    table = made_up(
        tmp_path,
        orderings=["prune", "prune_finetune"],
        seeds=[0, 1],
        skip=lambda row: row.seed == (row.ordering == "prune"),
    )
    assert len(table) == 2
    assert "prune_finetune has the lowest perplexity, " in (said := report.headline(table))
    assert "This is not tested: no seed is that of another training, too." in said
    assert "nothing to compare" in report.verdict_list(report.pair_table(table))


def test_a_collapse_of_one_seed_is_told_as_that(tmp_path):
    """Its pooled perplexity, below the vocabulary's size, was called worse than guessing."""
    table = made_up(
        tmp_path, seeds=[0, 1, 2], harm=lambda row: 9.0 if row.ordering == "prune" and row.seed == 1 else 0.1
    )
    assert re.search(r"`prune` \(perplexity \d+\.\d\d; 1 of 3 seeds\), worse than", report.headline(table))


def test_nearly_all_is_not_called_all(tmp_path):
    table = made_up(tmp_path, orderings=["prune", "prune_finetune"], sparsities=[0.999999])
    assert "At 99.9999%" in (said := report.headline(table)) and "at a measured" not in said

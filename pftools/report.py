"""The report of a study: what `06_compare_orderings` says, in words and tables, and the HTML file that it becomes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from pftools import compare, runs
from pftools.errors import PftoolsError
from pftools.executors import NOTEBOOKS, redact
from pftools.study import Plan, load_study, plan_study, results, run_state

if TYPE_CHECKING:
    import altair as alt

_STYLE = """
:root { color-scheme: light; }
body { font-family: Inter, "Helvetica Neue", Arial, sans-serif; color: #22262b; line-height: 1.55; background: #fff; margin: 0; }
main { max-width: 800px; margin: 48px auto 96px; padding: 0 24px; }
h1 { font-size: 28px; line-height: 1.25; margin: 0 0 16px; } h2 { font-size: 19px; margin: 44px 0 8px; }
p, li { font-size: 15.5px; } li { margin: 6px 0; } code { background: #f3f4f6; padding: 1px 5px; border-radius: 4px; font-size: 13.5px; }
table { border-collapse: collapse; font-size: 14px; margin: 12px 0; } th, td { padding: 6px 14px 6px 0; text-align: right; border: 0; }
th { color: #6a737d; font-weight: 500; border-bottom: 1px solid #d5dade; } th:first-child, td:first-child { text-align: left; }
tbody tr { border-bottom: 1px solid #eef0f2; } figure { margin: 20px 0; overflow-x: auto; } svg, img { max-width: 100%; height: auto; }
blockquote { margin: 20px 0; padding: 14px 20px; background: #f2f7fc; border-left: 4px solid #1f6fb2; } blockquote p { margin: 0; font-size: 17px; }
footer { margin-top: 60px; color: #6a737d; font-size: 13px; }
"""


def study_results(study: str | Path, *, runs: str | Path = "runs") -> pd.DataFrame:
    """The finished results of a study, a row each; `attrs` hold the study and how many results it plans.

    Raises:
        PftoolsError: nothing is finished yet.
    """
    plan = plan_study(load_study(study), runs=runs)
    table = results(plan)
    if not len(table):
        raise PftoolsError(f"the study {plan.study.name!r} has no finished result in {runs}: run it first, with `pftools run {study}`.")
    table.attrs = {"study": plan.study.model_dump(mode="json"), "planned": len(plan.rows), "runs": str(runs)}
    return table


def headline(table: pd.DataFrame) -> str:
    """The first thing to read: which ordering won, in a sentence or two."""
    study = table.attrs["study"]
    lines = [f"**{study['description'] or study['name']}**"]
    if len(table) < table.attrs["planned"]:
        lines.append(f"*{len(table)} of {table.attrs['planned']} results are finished; this is what they say.*")
    lines.append(f"> {_winner(table)}")
    return "\n\n".join(lines)


def _winner(table: pd.DataFrame) -> str:
    pairs = pair_table(table)
    sparse = table[table["asked"] == table["asked"].max()]
    best = sparse.sort_values("perplexity").iloc[0]
    dense = table[table["measured"] < 0.01]
    against = f" (the dense model has {dense['perplexity'].iloc[0]:.2f})" if len(dense) else ""
    sentence = f"At {best['measured']:.0%} measured sparsity, `{best['ordering']}` has the lowest perplexity: {best['perplexity']:.2f}{against}."
    if not len(pairs):
        return sentence
    own = pairs[(pairs["asked"] == best["asked"]) & ((pairs["first"] == best["ordering"]) | (pairs["second"] == best["ordering"]))]
    rivals = own.assign(rival=[row.second if row.first == best["ordering"] else row.first for row in own.itertuples()])
    rest = sparse[sparse["ordering"] != best["ordering"]].sort_values("perplexity")
    if not len(rest):
        return sentence
    verdict = rivals[rivals["rival"] == rest["ordering"].iloc[0]]
    return f"{sentence} The nearest rival: {verdict['verdict'].iloc[0]}" if len(verdict) else sentence


def result_table(table: pd.DataFrame) -> Any:
    """The orderings as a styled table."""
    tasks = task_names(table)
    shown = table[["ordering", "asked", "measured", "perplexity", *tasks, "finetune_tokens", "seed"]]
    shown = shown.rename(columns={"finetune_tokens": "training tokens"})
    formats = {"asked": "{:.0%}", "measured": "{:.2%}", "perplexity": "{:.2f}", "training tokens": "{:,}", **{task: "{:.1%}" for task in tasks}}
    return shown.style.format(formats, na_rep="").hide(axis="index")


def task_names(table: pd.DataFrame) -> list[str]:
    """The tasks that the table has an accuracy of."""
    return [name for name in table.attrs["study"]["evaluate"].get("tasks", ["facts", "reading"]) if name in table]


def pair_table(table: pd.DataFrame) -> pd.DataFrame:
    """`compare.compare_orderings` on the losses that the evaluation runs keep, checked against their seals."""
    losses = {}
    for run in table["run"]:
        runs.verify(run)
        losses[run] = pd.read_parquet(Path(run) / "block_nll.parquet")["nll"].to_numpy()
    return compare.compare_orderings(table, losses)


def verdict_list(pairs: pd.DataFrame) -> str:
    """The verdicts as a list."""
    if not len(pairs):
        return "Only one ordering is finished at each sparsity: there is nothing to compare yet."
    return "\n".join(f"- {row.verdict}" for row in pairs.itertuples())


def ratio_chart(pairs: pd.DataFrame) -> alt.LayerChart | None:
    """The pairs with an interval, drawn."""
    from pftools import figures

    tested = pairs.dropna(subset=["ratio"]) if len(pairs) else pairs
    return figures.pair_ratios(tested, title="Which differences are real") if len(tested) else None


def perplexity_subtitle(table: pd.DataFrame) -> str:
    """On which text, and in blocks of which length: without that, a perplexity says nothing."""
    found = runs.read_record(table["run"].iloc[0])["results"]
    dense = table[table["measured"] < 0.01]
    baseline = f" Dense: {dense['perplexity'].iloc[0]:.2f}." if len(dense) else ""
    return f"Test split of {found['corpus']}, {found['n_blocks']} blocks of {found['block_length']} tokens; logarithmic.{baseline}"


def task_charts(table: pd.DataFrame) -> list[alt.LayerChart]:
    """A chart a task: accuracy against measured sparsity, with intervals and the level of guessing."""
    from pftools import figures

    charts = []
    for task in task_names(table):
        scores = [runs.read_record(run)["results"]["tasks"].get(task, {}) for run in table["run"]]
        shown = table.assign(**{f"{task}_{end}": [score.get(end) for score in scores] for end in ("low", "high")})
        charts.append(
            figures.metric_by_sparsity(
                shown, task, title=f"{task}, accuracy", percent=True, label="accuracy", chance=scores[0].get("chance"),
                subtitle=f"{scores[0].get('n')} questions; dashed: the level of guessing.",
            )
        )  # fmt: skip
    return charts


def visible_differences(table: pd.DataFrame) -> pd.DataFrame:
    """Every comparable pair by every task, and what could have been seen."""
    samples = {run: pd.read_parquet(Path(run) / "samples.parquet") for run in table["run"] if (Path(run) / "samples.parquet").exists()}
    if len(samples) < len(table):
        return pd.DataFrame({"": ["No tasks were asked in this study."]})
    compared = compare.compare_tasks(table, samples)
    return compared[["pair", "task", "difference", "low", "high", "p_holm", "verdict"]].round(3)


def circumstances(table: pd.DataFrame) -> str:
    """Model, settings, machine and versions, as a paragraph."""
    study = table.attrs["study"]
    records = [runs.read_record(run) for run in table["run"]]
    dtypes = sorted({record["results"].get("dtype", "unknown") for record in records})
    machine, versions = records[0]["machine"], records[0]["versions"]
    lines = [
        f"- Model `{study['model']}`, computed in {' and '.join(dtypes)}" + (" (**mixed: compare with care**)" if len(dtypes) > 1 else ""),
        f"- Budget: {study['tokens']:,} fine-tuning tokens " + ("an ordering, split over its F's" if study["budget"] == "total" else "each F"),
        f"- Machine: {machine['platform']}, {machine['cores']} cores, " + (f"GPU {machine['gpu']}" if machine["gpu"] else "no GPU"),
        "- Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "- Intervals: 95%, paired bootstrap over blocks; p-values: corrected by Holm over all pairs",
        f"- Runs: {', '.join(f'`{Path(run).name}`' for run in table['run'])}",
    ]
    return "\n".join(lines)


def plan_layout(plan: Plan) -> pd.DataFrame:
    """Where `figures.plan_chart` draws every model of a plan: a step to the right of the model it starts from, and on its
    line or, where that has gone on already, on the next free one."""
    models = {"base": ("", "base", "base", "finished")}
    for name, step in plan.steps.items():
        if step.parameters.step in ("prune", "finetune"):
            parent = Path(step.parameters.model).name
            kind = step.parameters.step[0].upper()
            state = run_state(step.folder)
            label = step.label.partition(",")[0]
            models[name] = (parent if parent in plan.steps else "base", kind, label, state if state in ("finished", "failed") else "to do")
    evaluated = {Path(row.model).name for row in plan.rows}
    children: dict[str, list[str]] = {}
    for name, (parent, *_) in models.items():
        children.setdefault(parent, []).append(name)
    rows, branches, lane = [], [("base", 0, 0)], 0
    while branches:  # depth first, the first child on its parent's line
        name, depth, level = branches.pop()
        parent, kind, label, state = models[name]
        if parent and name != children[parent][0]:
            lane = level = lane + 1
        rows.append(
            {
                "key": name, "parent": parent, "depth": depth, "lane": level, "kind": kind, "label": label, "state": state,
                "evaluated": name in evaluated or (name == "base" and plan.study.model in {row.model for row in plan.rows}),
            }
        )  # fmt: skip
        branches += [(child, depth + 1, level) for child in reversed(children.get(name, []))]
    return pd.DataFrame(rows)


# ---------------------------------------------------------------------------------------------------------------------
# The file


def render(study: str | Path, *, runs: str | Path = "runs", output: str | Path | None = None, figures: str | Path | None = None) -> Path:
    """Execute `06_compare_orderings` and write it as one HTML file with everything inside: no network is needed to read it.

    Args:
        output: the file; default `reports/<study>.html`.
        figures: a folder for the figures as files.
    """
    import tempfile

    import nbformat
    import papermill

    name = load_study(study).name
    path = Path(output) if output else Path("reports") / f"{name}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    parameters = {"study": str(study), "runs": str(runs), "save_figures": str(figures or "")}
    with tempfile.TemporaryDirectory() as scratch:
        executed = Path(scratch) / "report.ipynb"
        try:
            papermill.execute_notebook(
                str(NOTEBOOKS / "06_compare_orderings.ipynb"), str(executed), parameters, kernel_name="python3", progress_bar=False
            )
        except papermill.PapermillExecutionError as error:
            raise PftoolsError(f"the report of {study} could not be made: {error.evalue}") from None
        html = redact(_html(nbformat.read(executed, as_version=4), name))
    partial = path.with_suffix(".partial")
    partial.write_text(html, encoding="utf-8")
    partial.replace(path)
    return path


def _html(notebook: Any, name: str) -> str:
    """The notebook's words and outputs, without its code, in a page of our own: nbconvert's has scripts from elsewhere."""
    from html import escape

    import nbformat
    from nbconvert import HTMLExporter

    kept = [cell for cell in notebook.cells if cell.cell_type == "markdown" or cell.get("outputs")]
    for cell in kept:
        cell.setdefault("metadata", {}).pop("tags", None)
        if cell.cell_type == "code":  # what the kernel warns of belongs to the run's notebook, not to the report
            cell.outputs = [output for output in cell.outputs if output.output_type != "stream" or output.get("name") == "stdout"]
    outputs = [output for cell in kept for output in cell.get("outputs", []) if "image/svg+xml" in output.get("data", {})]
    for number, output in enumerate(outputs):
        output.data = nbformat.from_dict({"text/html": _figure(output.data["image/svg+xml"], f"chart{number}")})
    notebook.cells = kept
    exporter = HTMLExporter(template_name="basic", exclude_input=True, exclude_input_prompt=True, exclude_output_prompt=True, exclude_anchor_links=True)
    body, _ = exporter.from_notebook_node(notebook)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)} · order of pruning and fine-tuning</title><style>{_STYLE}</style></head>"
        f"<body><main>{body}<footer>Made by pftools from 06_compare_orderings.</footer></main></body></html>"
    )


def _figure(svg: str, prefix: str) -> str:
    """A chart as part of the page: its words can be selected and are read aloud; its ids are its own among the others'."""
    svg = re.sub(r'(\bid="|url\(#|href="#)', lambda found: f"{found.group(1)}{prefix}-", svg)
    return f"<figure>{svg}</figure>"

"""The report of a study: what `06_compare_orderings` says, in words and tables, and the HTML file that it becomes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pftools import compare, run_folder
from pftools.errors import PftoolsError
from pftools.executors import NOTEBOOKS, kernel_options, redact
from pftools.orderings import parse_ordering
from pftools.study import load_study, plan_study, results

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
        raise PftoolsError(
            f"the study {plan.study.name!r} has no finished result in {runs}: run it first, with `pftools run {study}`."
        )
    table.attrs = {"study": plan.study.model_dump(mode="json"), "planned": len(plan.rows), "runs": str(runs)}
    return table


def headline(table: pd.DataFrame) -> str:
    """The first thing to read: which ordering won, in a sentence or two."""
    study = table.attrs["study"]
    lines = [f"**{study['description'] or study['name']}**"]
    if len(table) < table.attrs["planned"]:
        lines.append(
            f"*{len(table)} of {table.attrs['planned']} results are finished; this is what they say.*"
        )
    lines.append(f"> {_winner(table)}")
    return "\n\n".join(lines)


def _winner(table: pd.DataFrame) -> str:
    """The best ordering at the highest sparsity, how far it is from the dense model, and whether its nearest rival is really behind."""
    pooled = _pooled(final_states(table))
    sparse = pooled[pooled["asked"] == pooled["asked"].max()].sort_values("perplexity")
    # Ranked are the models that are as sparse as asked: one that lost its zeros in a merge is another kind of model.
    kept = sparse[(sparse["measured"] - sparse["asked"]).abs() <= compare.SPARSITY_TOLERANCE]
    sparse = kept if len(kept) else sparse
    best = sparse.iloc[0]
    dense = pooled[pooled["ordering"] == "base"]
    against = f" (dense: {dense['perplexity'].iloc[0]:.2f})" if len(dense) else ""
    varied = _varied(table)
    named = "".join(f", {best[name]}" for name in varied)
    sentence = f"At {best['measured']:.0%} measured sparsity `{best['ordering']}`{named} has the lowest perplexity, {best['perplexity']:.2f}{against}."
    alike = sparse[(sparse[varied] == best[varied]).all(axis=1)]  # rivals by ordering alone
    if len(alike) < 2:
        return sentence
    pairs = pair_table(table)
    names = {best["ordering"], alike["ordering"].iloc[1]}
    rival = [
        row.verdict
        for row in pairs.itertuples()
        if row.asked == best["asked"]
        and {row.first, row.second} == names
        and all(str(best[name]) in row.where for name in varied)
    ]
    return f"{sentence} Against its nearest rival: {rival[0]}" if rival else sentence


def final_states(table: pd.DataFrame) -> pd.DataFrame:
    """The results at the sparsities that orderings end at, of an ordering with several the one with the most training. The states between, which an ordering with several P's passes through,
    are points of its line in the charts; as pairs they would only cost the others power."""
    ends = [parse_ordering(name).n_prunes <= 1 for name in table["ordering"]]
    asked = (
        set(table["asked"][ends].round(6))
        if table["asked"][ends].max() > 0
        else set(table.attrs["study"]["sparsities"])
    )
    ends = table[table["asked"].round(6).isin(asked | {0.0})].sort_values("finetune_tokens", kind="stable")
    last = ends.drop_duplicates(["ordering", "asked", "method", "pattern", "merge", "seed"], keep="last")
    return last.sort_index()


def _pooled(table: pd.DataFrame, *, extra: dict[str, str] | None = None) -> pd.DataFrame:
    """One row for the seeds of a result: means, of a perplexity the geometric one, and ``extra`` {column: aggregation}."""
    same = ["ordering", "asked", *_varied(table), "finetune_tokens", "n_finetunes"]
    means = {
        "measured": "mean",
        "perplexity": _geometric_mean,
        **{task: _geometric_mean if _is_perplexity(table, task) else "mean" for task in task_names(table)},
    }
    return (
        table.groupby(same, sort=False, dropna=False)
        .agg({**means, **(extra or {}), "seed": "size"})
        .reset_index()
        .rename(columns={"seed": "seeds"})
    )


def _varied(table: pd.DataFrame) -> list[str]:
    return [name for name in ("method", "pattern", "merge") if table[name].nunique() > 1]


def _geometric_mean(values: pd.Series) -> float:
    return float(np.exp(np.log(values.astype(float)).mean()))


def _is_perplexity(table: pd.DataFrame, task: str) -> bool:
    return "perplexity" in _task_record(table["run"].iloc[0], task).get("metric", "")


def _task_record(run: str, task: str) -> dict[str, Any]:
    return run_folder.read_record(run)["results"]["tasks"].get(task, {})


def result_table(table: pd.DataFrame) -> Any:
    """The orderings as a styled table, pooled over seeds; the lowest perplexity of each sparsity is bold."""
    shown = _pooled(final_states(table)).sort_values("asked", kind="stable")
    tasks = task_names(table)
    formats = {"asked": "{:.0%}", "measured": "{:.2%}", "perplexity": "{:.2f}", "training tokens": "{:,}"}
    formats |= {task: "{:.2f}" if _is_perplexity(table, task) else "{:.1%}" for task in tasks}
    best = set(shown.groupby("asked")["perplexity"].idxmin())
    columns = [
        "ordering",
        *_varied(table),
        "asked",
        "measured",
        "perplexity",
        *tasks,
        "finetune_tokens",
        *(["seeds"] if shown["seeds"].max() > 1 else []),
    ]
    shown = shown[columns].rename(columns={"finetune_tokens": "training tokens"})
    bold = lambda column: [  # noqa: E731
        "font-weight: 600" if index in best and shown["asked"][index] > 0 else "" for index in column.index
    ]
    return _styled(shown, formats).apply(bold, subset=["ordering", "perplexity"])


def _styled(table: pd.DataFrame, formats: dict[str, Any]) -> Any:
    numbers = list(table.columns[1:])  # a number that wraps is hard to read
    return (
        table.style.format(formats, na_rep="")
        .hide(axis="index")
        .set_properties(numbers, **{"white-space": "nowrap"})
    )


def task_names(table: pd.DataFrame) -> list[str]:
    """The tasks that the table has an accuracy of."""
    return [
        name for name in table.attrs["study"]["evaluate"].get("tasks", ["facts", "reading"]) if name in table
    ]


def pair_table(table: pd.DataFrame) -> pd.DataFrame:
    """`compare.compare_orderings` on the losses that the evaluation runs keep, checked against their seals."""
    ends = final_states(table)
    losses = {}
    for run in ends["run"]:
        run_folder.verify(run)
        losses[run] = pd.read_parquet(Path(run) / "block_nll.parquet")["nll"].to_numpy()
    return compare.compare_orderings(ends, losses)


def verdict_list(pairs: pd.DataFrame) -> str:
    """The verdicts, by sparsity, the highest first: the best ordering against the others, and the other pairs folded away."""
    if not len(pairs):
        return "Only one ordering is finished at each sparsity: there is nothing to compare yet."
    parts = []
    for where, group in sorted(
        pairs.groupby("where", sort=False), key=lambda item: -item[1]["asked"].iloc[0]
    ):
        best = _best_of(group)
        own = group[(group["first"] == best) | (group["second"] == best)]
        rest = group.drop(own.index)
        parts.append(f"**At {where}**\n\n" + _bullets(own["verdict"]))
        if len(rest):
            others = f"The other {len(rest)} pairs" if len(rest) > 1 else "The other pair"
            parts.append(
                f"<details><summary>{others} at {where}</summary>\n\n{_bullets(rest['verdict'])}\n\n</details>"
            )
    return "\n\n".join(parts)


def _bullets(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _best_of(pairs: pd.DataFrame) -> str:
    """The ordering with the lowest perplexity among these pairs."""
    ends = [
        pairs[[side, f"perplexity_{side}"]].set_axis(["ordering", "perplexity"], axis=1)
        for side in ("first", "second")
    ]
    return str(pd.concat(ends).sort_values("perplexity")["ordering"].iloc[0])


def ratio_chart(pairs: pd.DataFrame, *, most: int = 15) -> alt.LayerChart | None:
    """The pairs with an interval, drawn; where there are many, the best ordering of each sparsity against the others."""
    from pftools import figures

    tested = pairs.dropna(subset=["ratio"]) if len(pairs) else pairs
    if len(tested) > most:
        groups = [group for _, group in tested.groupby("where", sort=False)]
        tested = pd.concat(
            [
                group[(group["first"] == _best_of(group)) | (group["second"] == _best_of(group))]
                for group in groups
            ]
        )
    if not len(tested):
        return None
    # The worse over the better, so that all dots are on one side.
    worse = tested["ratio"] >= 1
    drawn = tested.assign(
        pair=[
            f"{row.first if ahead else row.second} / {row.second if ahead else row.first}, {row.where}"
            for row, ahead in zip(tested.itertuples(), worse)
        ],
        ratio=tested["ratio"].where(worse, 1 / tested["ratio"]),
        low=tested["low"].where(worse, 1 / tested["high"]),
        high=tested["high"].where(worse, 1 / tested["low"]),
    )
    return figures.pair_ratios(
        drawn.sort_values(["asked", "ratio"], ascending=[False, True]), title="Which differences are real"
    )


def perplexity_subtitle(table: pd.DataFrame) -> str:
    """On which text, and in blocks of which length: without that, a perplexity says nothing."""
    found = run_folder.read_record(table["run"].iloc[0])["results"]
    dense = table[table["ordering"] == "base"]
    baseline = f" Dense: {dense['perplexity'].iloc[0]:.2f}." if len(dense) else ""
    return f"{found.get('split', 'test').capitalize()} split of {found['corpus']}, {found['n_blocks']} blocks of {found['block_length']} tokens; logarithmic.{baseline}"


def perplexity_chart(table: pd.DataFrame) -> alt.LayerChart:
    """Perplexity against measured sparsity; where all orderings end at one sparsity, a row an ordering."""
    return _metric_chart(
        _pooled(table),
        "perplexity",
        title="Perplexity",
        subtitle=perplexity_subtitle(table),
        label="perplexity",
        log=True,
    )


def _metric_chart(table: pd.DataFrame, metric: str, *, title: str, **options: Any) -> alt.LayerChart:
    from pftools import figures

    if (table["asked"] > 0).any() and table["asked"][table["asked"] > 0].nunique() == 1:
        return figures.metric_chart(table, metric, by="ordering", title=title, **options)
    return figures.metric_chart(
        table, metric, by="sparsity", title=f"{title} against measured sparsity", **options
    )


def task_charts(table: pd.DataFrame) -> list[alt.LayerChart]:
    """A chart a task: accuracy against measured sparsity, with intervals and the level of guessing; a perplexity as one."""
    charts = []
    ends = final_states(table)
    for task in task_names(table):
        first = _task_record(ends["run"].iloc[0], task)
        if _is_perplexity(table, task):
            charts.append(
                _metric_chart(
                    _pooled(ends),
                    task,
                    title=f"{task}, {first['metric'].replace('_', ' ')}",
                    label=first["metric"].replace("_", " "),
                    log=True,
                )
            )
            continue
        scores = [_task_record(run, task) for run in ends["run"]]
        bounds = {f"{task}_{end}": [score.get(end) for score in scores] for end in ("low", "high")}
        shown = _pooled(ends.assign(**bounds), extra=dict.fromkeys(bounds, "mean"))
        seeds = " of one seed" if shown["seeds"].max() > 1 else ""
        chance = first.get("chance") or None
        guessing = "; dashed: the level of guessing" if chance else ""
        charts.append(
            _metric_chart(
                shown,
                task,
                title=f"{task}, accuracy",
                percent=True,
                label="accuracy",
                chance=chance,
                subtitle=f"{first['n']:,} questions, 95% intervals{seeds}{guessing}",
            )
        )
    return charts


def guessing_table(table: pd.DataFrame) -> Any:
    """By task: where 95% of all guessers land, and which orderings are in there, so that their accuracy says nothing."""
    rows = []
    ends = final_states(table)
    for task in task_names(table):
        scores = [
            (name, asked, _task_record(run, task))
            for name, asked, run in zip(ends["ordering"], ends["asked"], ends["run"])
        ]
        chance, n = scores[0][2].get("chance"), scores[0][2].get("n")
        if not chance:
            continue
        low, high = compare.chance_interval(chance, n)
        inside = dict.fromkeys(
            f"{name} at {asked:.0%}" for name, asked, score in scores if score and score["value"] <= high
        )
        rows.append(
            {
                "task": task,
                "questions": n,
                "guessing": chance,
                "95% of guessers": f"{low:.1%} to {high:.1%}",
                "not better than guessing": ", ".join(inside) or "none",
            }
        )
    return _styled(pd.DataFrame(rows), {"guessing": "{:.0%}", "questions": "{:,}"}) if rows else None


def task_pairs(table: pd.DataFrame) -> pd.DataFrame:
    """`compare.compare_tasks` on the answers that the evaluation runs keep; empty where no task counts right answers."""
    ends = final_states(table)
    samples = {
        run: pd.read_parquet(Path(run) / "samples.parquet")
        for run in ends["run"]
        if (Path(run) / "samples.parquet").exists()
    }
    return (
        compare.compare_tasks(ends, samples)
        if len(samples) == len(ends)
        else compare.compare_tasks(ends.iloc[:0], {})
    )


def told_apart(compared: pd.DataFrame) -> str:
    """What the tasks say, in a sentence for each real difference, and a count of the others."""
    if not len(compared):
        return "No two orderings have answered the same questions."
    real = compared[compared["verdict_kind"] == "differs"]
    rest = len(compared) - len(real)
    lines = [_bullets(real["verdict"])] if len(real) else []
    if rest:
        lines.append(
            f"{rest} of {len(compared)} comparisons cannot be told apart: whatever the dots above suggest, the questions are too few."
        )
    return "\n\n".join(lines)


def visible_differences(compared: pd.DataFrame) -> Any:
    """Every comparable pair by every task: the difference, its interval, and what could have been seen. In points of per cent."""
    shown = pd.DataFrame(
        {
            "pair": compared["pair"],
            "task": compared["task"],
            "questions": compared["n"],
            "difference": compared["difference"] * 100,
            "95% interval": [
                f"{low * 100:+.1f} to {high * 100:+.1f}"
                for low, high in zip(compared["low"], compared["high"])
            ],
            "corrected p": compared["p_holm"],
            "visible from": compared["visible"] * 100,
            "told apart": ["yes" if kind == "differs" else "no" for kind in compared["verdict_kind"]],
        }
    )
    bold = lambda row: ["font-weight: 600" if row["told apart"] == "yes" else ""] * len(row)  # noqa: E731
    return _styled(
        shown,
        {
            "difference": "{:+.1f}",
            "corrected p": compare.p_in_words,
            "visible from": "{:.1f}",
            "questions": "{:,}",
        },
    ).apply(bold, axis=1)


def circumstances(table: pd.DataFrame) -> str:
    """Model, settings, machine and versions, as a paragraph."""
    study = table.attrs["study"]
    records = [run_folder.read_record(run) for run in table["run"]]
    dtypes = sorted({record["results"].get("dtype", "unknown") for record in records})
    machine, versions = records[0]["machine"], records[0]["versions"]
    cut = max(record["results"].get("truncated", 0) for record in records)
    lines = [
        f"- Model `{study['model']}`, computed in {' and '.join(dtypes)}"
        + (" (**mixed: compare with care**)" if len(dtypes) > 1 else ""),
        f"- Budget: {study['tokens']:,} fine-tuning tokens "
        + ("an ordering, split over its F's" if study["budget"] == "total" else "each F"),
        f"- Machine: {machine['platform']}, {machine['cores']} cores, "
        + (f"GPU {machine['gpu']}" if machine["gpu"] else "no GPU"),
        "- Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "- Intervals: 95%, paired bootstrap over blocks or questions, pooled over seeds; p-values: corrected by Holm over the pairs of a metric",
        f"- Runs: the evaluations are the folders `evaluate-*` of `{table.attrs['runs']}`; each holds its losses, answers and executed notebook",
    ]
    if cut:
        lines.append(
            f"- **{cut} prompts of a model were longer than its context, and cut at their beginning**"
        )
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# The file


def render(
    study: str | Path,
    *,
    runs: str | Path = "runs",
    output: str | Path | None = None,
    figures: str | Path | None = None,
) -> Path:
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
                str(NOTEBOOKS / "06_compare_orderings.ipynb"), str(executed), parameters, **kernel_options()
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

    _answer_first(notebook)
    kept = [cell for cell in notebook.cells if cell.cell_type == "markdown" or cell.get("outputs")]
    for cell in kept:
        cell.setdefault("metadata", {}).pop("tags", None)
        if (
            cell.cell_type == "code"
        ):  # what the kernel warns of belongs to the run's notebook, not to the report
            cell.outputs = [
                output
                for output in cell.outputs
                if output.output_type != "stream" or output.get("name") == "stdout"
            ]
    outputs = [
        output
        for cell in kept
        for output in cell.get("outputs", [])
        if "image/svg+xml" in output.get("data", {})
    ]
    for number, output in enumerate(outputs):
        output.data = nbformat.from_dict(
            {"text/html": _figure(output.data["image/svg+xml"], f"chart{number}")}
        )
    notebook.cells = kept
    exporter = HTMLExporter(
        template_name="basic",
        exclude_input=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        exclude_anchor_links=True,
    )
    body, _ = exporter.from_notebook_node(notebook)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)} · order of pruning and fine-tuning</title><style>{_STYLE}</style></head>"
        f"<body><main>{body}<footer>Made by pftools from 06_compare_orderings.</footer></main></body></html>"
    )


def _answer_first(notebook: Any) -> None:
    """Who opens a report wants its answer: the headline comes under the title, what the report is about after it."""
    import nbformat

    opening = notebook.cells[0]
    title, _, words = opening.source.partition("\n")
    place = next(index for index, cell in enumerate(notebook.cells) if "report.headline" in cell.source)
    opening.source = f"# {title.partition(':')[2].strip().capitalize()}" if ":" in title else title
    notebook.cells.insert(1, notebook.cells.pop(place))
    notebook.cells.insert(2, nbformat.v4.new_markdown_cell(f"## How to read it\n{words}"))


def _figure(svg: str, prefix: str) -> str:
    """A chart as part of the page: its words can be selected and are read aloud; its ids are its own among the others'."""
    svg = re.sub(r'(\bid="|url\(#|href="#)', lambda found: f"{found.group(1)}{prefix}-", svg)
    return f"<figure>{svg}</figure>"

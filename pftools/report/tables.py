"""The tables of a report, styled; names in them are escaped."""

from __future__ import annotations

from typing import Any

import pandas as pd
from pandas.io.formats.style import Styler

from pftools import compare, run_folder
from pftools.compare import perplexity_in_words, sparsity_words
from pftools.execute.steps import read_failure
from pftools.files import as_bytes, size_of
from pftools.report.results import (
    best_sets,
    entry_table,
    final_states,
    is_perplexity,
    missing_results,
    ordering_names,
    plan_of,
    task_names,
    task_record,
)
from pftools.study import run_state

# Of a column of words, which are many: as wide as a line of text, and on several lines.
WORDS = {"white-space": "normal", "min-width": "14em", "text-align": "left"}


def result_table(table: pd.DataFrame) -> Styler:
    """The entries, pooled over seeds; the lowest perplexity of each sparsity is bold.

    Marked are those that may be the best with 95% confidence; a collapsed model is called so.
    """
    entries = entry_table(final_states(table)).sort_values("asked", kind="stable").reset_index(drop=True)
    tasks = task_names(table)
    shown = pd.DataFrame({"ordering": [_name(row) for _, row in entries.iterrows()]})
    for choice in ("method", "pattern", "merge"):
        if table[choice].nunique() > 1:
            shown[choice] = entries[choice].replace("", "any")
    shown["asked"] = entries["asked"].map(sparsity_words(entries["asked"]))
    shown["measured"] = entries["measured"]
    shown["perplexity"] = [
        perplexity_in_words(value) + (" (collapsed)" if gone else "")
        for value, gone in zip(entries["perplexity"], entries["collapsed"])
    ]
    shown[tasks] = entries[tasks]
    shown["training tokens"] = entries["finetune_tokens"]
    if entries["seeds"].max() > 1:
        shown["seeds"] = entries["seeds"]
    sets = [found for found in best_sets(table) if found.metric == "perplexity"]
    if sets:
        inside = {(found.asked, label) for found in sets for label in found.members}
        marks = [(asked, label) in inside for asked, label in zip(entries["asked"], entries["label"])]
        shown["may be best"] = ["yes" if mark else "" for mark in marks]
    formats = {"measured": "{:.2%}", "training tokens": "{:,}"}
    formats |= {task: "{:.2f}" if is_perplexity(table, task) else "{:.1%}" for task in tasks}
    rivals = entries.groupby("asked")["asked"].transform("size") > 1
    bold = ["font-weight: 600" if best else "" for best in entries["best"] & rivals]
    names = ordering_names(table)
    looks = [f"o-{names.index(name)}" for name in entries["ordering"]]
    classes = pd.DataFrame({"ordering": looks}, index=shown.index)
    style = styled(shown, formats).set_td_classes(classes).set_table_attributes('class="orderings"')
    return style.apply(lambda _: bold, subset=["ordering", "perplexity"])


def missing_table(table: pd.DataFrame) -> Styler | None:
    """The results that are not there, each with the step that failed or is to do; None where all are."""
    rows = missing_results(plan_of(table))
    if not rows:
        return None
    shown = pd.DataFrame(rows)
    told = [name for name in ("method", "pattern", "merge", "seed") if table[name].nunique() > 1]
    return styled(shown[["ordering", "asked", *told, "why"]], {}).set_properties(["why"], **WORDS)


def training_table(table: pd.DataFrame) -> Styler | None:
    """Every training singly, a row a seed; None where each entry has one."""
    if table["seed"].nunique() < 2:
        return None
    rows = final_states(table).reset_index(drop=True)
    tasks = task_names(table)
    told = [name for name in ("method", "pattern", "merge") if rows[name].nunique() > 1]
    shown = rows[["ordering", *told, "asked", "seed", "measured", "perplexity", *tasks]]
    shown = shown.assign(asked=rows["asked"].map(sparsity_words(rows["asked"])))
    formats: dict[str, Any] = {"measured": "{:.2%}", "perplexity": perplexity_in_words}
    formats |= {task: "{:.2f}" if is_perplexity(table, task) else "{:.1%}" for task in tasks}
    names = ordering_names(table)
    classes = pd.DataFrame({"ordering": [f"o-{names.index(name)}" for name in rows["ordering"]]})
    return styled(shown, formats).set_td_classes(classes).set_table_attributes('class="orderings"')


def cost_table(costs: pd.DataFrame, table: pd.DataFrame) -> Styler:
    """What each entry took: time, memory, disk and training tokens."""
    words = sparsity_words(costs["asked"])
    shown = pd.DataFrame(
        {
            "ordering": costs["label"],
            "asked": costs["asked"].map(words),
            "minutes to make": costs["seconds"] / 60,
            "minutes to evaluate": costs["evaluation"] / 60,
            "most memory": [as_bytes(value) for value in costs["memory"]],
            "disk": [as_bytes(value) for value in costs["disk"]],
            "training tokens": costs["tokens"],
            "perplexity": [perplexity_in_words(value) for value in costs["perplexity"]],
        }
    )
    names = ordering_names(table)
    classes = pd.DataFrame({"ordering": [f"o-{names.index(name)}" for name in costs["ordering"]]})
    formats = {"minutes to make": "{:.1f}", "minutes to evaluate": "{:.1f}", "training tokens": "{:,}"}
    return styled(shown, formats).set_td_classes(classes).set_table_attributes('class="orderings"')


def step_table(table: pd.DataFrame) -> Styler:
    """Every step of the study: what it does, its state, what it took, and why it failed where it did."""
    plan = plan_of(table)
    rows = []
    for name, step in plan.steps.items():
        record = run_folder.read_record(step.folder) if run_folder.is_finished(step.folder) else {}
        failed = not record and run_state(step.folder) == "failed"
        state = "; ".join([run_state(step.folder), *record.get("relieved", ())])
        rows.append(
            {
                "run": name,
                "does": step.label,
                "state": read_failure(step.folder).cause if failed else state,
                "seed": step.parameters.seed,
                "seconds": record.get("seconds"),
                "peak memory": as_bytes(record["peak_memory_bytes"]) if record else "",
                "disk": as_bytes(size_of(step.folder)) if record else "",
                "shared by": len(step.orderings),
            }
        )
    return styled(pd.DataFrame(rows), {"seconds": "{:.1f}"}).set_properties(["state"], **WORDS)


def _name(entry: pd.Series) -> str:
    return f"{entry['ordering']}, also {entry['also']}" if entry["also"] else str(entry["ordering"])


def styled(table: pd.DataFrame, formats: dict[str, Any]) -> Styler:
    """A table without its index, escaped; numbers do not wrap."""
    numbers: Any = list(table.columns[1:])
    style = table.style.format(formats, na_rep="", escape="html").hide(axis="index")
    return style.set_properties(numbers, **{"white-space": "nowrap"})


def guessing_table(table: pd.DataFrame) -> Styler | None:
    """By task: where 95% of guessers land, and which entries are in there: their accuracy says nothing."""
    rows = []
    ends = entry_table(final_states(table))
    words = sparsity_words(ends["asked"])
    for task in task_names(table):
        score = task_record(ends["runs"].iloc[0][0], task)
        if not score.get("chance"):
            continue
        low, high = compare.chance_interval(score["chance"], score["n"])
        inside = ends[ends[task] <= high + 1e-9]  # a mean over seeds may be a rounding above
        names = [f"{label} at {words[asked]}" for label, asked in zip(inside["label"], inside["asked"])]
        rows.append(
            {
                "task": task,
                "questions": score["n"],
                "guessing": score["chance"],
                "95% of guessers": f"{low:.1%} to {high:.1%}",
                "not better than guessing": ", ".join(names) or "none",
            }
        )
    if not rows:
        return None
    shown = styled(pd.DataFrame(rows), {"guessing": "{:.0%}", "questions": "{:,}"})
    return shown.set_properties(["not better than guessing"], **WORDS)


def visible_differences(compared: pd.DataFrame) -> Styler:
    """Every comparable pair by task, in points of per cent: difference, interval, what would be seen."""
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
            "seen four times in five": [
                f"{100 * visible:.1f}" if visible <= 1 else "none" for visible in compared["visible"]
            ],
            "told apart": ["yes" if kind == "differs" else "no" for kind in compared["verdict_kind"]],
        }
    )
    formats = {
        "difference": "{:+.1f}",
        "corrected p": compare.p_in_words,
        "questions": "{:,}",
    }
    return styled(shown, formats).apply(_bold_where_told_apart, axis=1)


def _bold_where_told_apart(row: pd.Series) -> list[str]:
    return ["font-weight: 600" if row["told apart"] == "yes" else ""] * len(row)

"""The charts of a report, from the table of its results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from pftools import compare, run_folder
from pftools.report.results import (
    best_sets,
    entry_table,
    final_states,
    is_perplexity,
    task_names,
    task_record,
)

if TYPE_CHECKING:
    import altair as alt


def perplexity_chart(table: pd.DataFrame) -> alt.LayerChart:
    """Perplexity against measured sparsity; where all orderings end at one sparsity, a row an ordering."""
    subtitle, entries = perplexity_subtitle(table), entry_table(table)
    sets = [found for found in best_sets(table) if found.metric == compare.PERPLEXITY]
    if sets:
        inside = {(found.asked, label) for found in sets for label in found.members}
        places = zip(entries["asked"], entries["label"])
        entries = entries.assign(may_be_best=[place in inside for place in places])
        subtitle += " Ringed: may be the best."
    return _metric_chart(
        entries, "perplexity", title="Perplexity", subtitle=subtitle, label="perplexity", log=True
    )


def perplexity_subtitle(table: pd.DataFrame) -> str:
    """On which text, and in blocks of which length: without that, a perplexity says nothing."""
    found = run_folder.read_record(table["run"].iloc[0])["results"]
    dense = table[table["ordering"] == "base"]
    baseline = f" Dense: {dense['perplexity'].iloc[0]:.2f}." if len(dense) else ""
    text = f"{found.get('split', 'test').capitalize()} split of {found['corpus']}"
    blocks = f"{found['n_blocks']} blocks of {found['block_length']} tokens"
    return f"{text}, {blocks}; logarithmic.{baseline}"


def _metric_chart(entries: pd.DataFrame, metric: str, *, title: str, **options: Any) -> alt.LayerChart:
    from pftools import figures

    if entries.loc[entries["asked"] > 0, "asked"].nunique() == 1:
        return figures.metric_chart(entries, metric, by="ordering", title=title, **options)
    title = f"{title} against measured sparsity"
    return figures.metric_chart(_lines(entries), metric, by="sparsity", title=title, **options)


def _lines(entries: pd.DataFrame) -> pd.DataFrame:
    """The entries as points of lines: one that two lines share (their beginnings are alike) is on both."""
    lines = set(entries["ordering"])
    shared = [
        row.assign(
            ordering=name, label=name + str(row["label"].iloc[0]).removeprefix(row["ordering"].iloc[0])
        )
        for place in range(len(entries))
        for row in [entries.iloc[[place]]]
        for name in str(row["also"].iloc[0]).split(", ")
        if name in lines
    ]
    return pd.concat([entries, *shared], ignore_index=True)


def task_charts(table: pd.DataFrame) -> list[alt.LayerChart]:
    """A chart a task: accuracy with intervals and the level of guessing, or a perplexity."""
    return [
        (_task_perplexity_chart if is_perplexity(table, task) else _accuracy_chart)(table, task)
        for task in task_names(table)
    ]


def _task_perplexity_chart(table: pd.DataFrame, task: str) -> alt.LayerChart:
    metric = task_record(table["run"].iloc[0], task)["metric"].replace("_", " ")
    entries = entry_table(final_states(table)).drop(columns="collapsed")
    return _metric_chart(entries, task, title=f"{task}, {metric}", label=metric, log=True)


def _accuracy_chart(table: pd.DataFrame, task: str) -> alt.LayerChart:
    ends = final_states(table)
    scores = [task_record(run, task) for run in ends["run"]]
    low, high = f"{task}_low", f"{task}_high"
    bounds: dict[str, Any] = {
        column: pd.Series([score.get(end) for score in scores], ends.index, dtype=float)
        for column, end in ((low, "low"), (high, "high"))
    }
    entries = entry_table(ends.assign(**bounds), **{low: "mean", high: "mean"}).drop(columns="collapsed")
    chance = scores[0].get("chance") or None
    seeds = " of one seed" if entries["seeds"].max() > 1 else ""
    guessing = "; dashed: the level of guessing" if chance else ""
    return _metric_chart(
        entries,
        task,
        title=f"{task}, accuracy",
        subtitle=f"{scores[0]['n']:,} questions, 95% intervals{seeds}{guessing}",
        label="accuracy",
        chance=chance,
        percent=True,
    )


def sparsity_chart(table: pd.DataFrame) -> alt.LayerChart:
    """What each entry was asked and what it has."""
    from pftools import figures

    return figures.asked_and_measured(entry_table(table))


def ratio_chart(pairs: pd.DataFrame, *, most: int = 15) -> alt.LayerChart | None:
    """The pairs with an interval; where there are many, the best of each sparsity against the others."""
    from pftools import figures

    tested = pairs.dropna(subset=["ratio"])
    if len(tested) > most:
        tested = tested[(tested["first"] == tested["best"]) | (tested["second"] == tested["best"])]
    if not len(tested):
        return None
    # The worse over the better, so that all dots are on one side.
    worse = tested["ratio"] >= 1
    drawn = tested.assign(
        pair=[
            f"{first if ahead else second} / {second if ahead else first}, {where}"
            for first, second, where, ahead in zip(tested["first"], tested["second"], tested["where"], worse)
        ],
        ratio=tested["ratio"].where(worse, 1 / tested["ratio"]),
        low=tested["low"].where(worse, 1 / tested["high"]),
        high=tested["high"].where(worse, 1 / tested["low"]),
    )
    ordered = drawn.sort_values(["asked", "ratio"], ascending=[False, True])
    return figures.pair_ratios(ordered, title="Which differences are real")

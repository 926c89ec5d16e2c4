"""The charts of a report, from the table of its results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from pftools import compare, run_folder
from pftools.report import published
from pftools.report.lineage import in_words
from pftools.report.results import (
    best_sets,
    entry_table,
    final_states,
    is_perplexity,
    ordering_names,
    task_names,
    task_record,
)

if TYPE_CHECKING:
    import altair as alt


def perplexity_chart(table: pd.DataFrame) -> alt.LayerChart:
    """Perplexity against measured sparsity; where all orderings end at one sparsity, a row an ordering."""
    subtitle, entries = perplexity_subtitle(table), _ringed(table)
    if "may_be_best" in entries:
        subtitle += " Ringed: may be the best."
    seeds = trainings(table) if table["seed"].nunique() > 1 else None
    if seeds is not None:
        subtitle += " Faint: single trainings."
    return _metric_chart(
        table,
        entries,
        "perplexity",
        title="Perplexity",
        subtitle=subtitle,
        label="perplexity",
        log=True,
        seeds=seeds,
    ).properties(description=described(table, "perplexity"))


def _ringed(table: pd.DataFrame) -> pd.DataFrame:
    """The entries, those marked that may be the best of their sparsity."""
    entries = entry_table(table)
    sets = [found for found in best_sets(table) if found.metric == compare.PERPLEXITY]
    if not sets:
        return entries
    inside = {(found.asked, label) for found in sets for label in found.members}
    places = zip(entries["asked"], entries["label"])
    return entries.assign(may_be_best=[place in inside for place in places])


def quality_chart(table: pd.DataFrame) -> alt.LayerChart:
    """Perplexity against measured sparsity, with every training singly and the published numbers beside."""
    from pftools import figures

    entries = _lines(_ringed(table))
    beside = published.beside("perplexity", _corpus(table))
    words = [perplexity_subtitle(table)]
    seeds = trainings(table) if table["seed"].nunique() > 1 else None
    if seeds is not None:
        words.append("Faint: single trainings.")
    if beside is not None:
        words.append(f"Hollow: published numbers ({published.STUDY}; {published.WANDA}), {beside[1]}.")
    return figures.metric_chart(
        entries,
        "perplexity",
        by="sparsity",
        title="Perplexity against measured sparsity",
        subtitle=" ".join(words),
        log=True,
        orderings=ordering_names(table),
        seeds=seeds,
        published=None if beside is None else beside[0],
    ).properties(description=described(table, "perplexity"))


def trainings(table: pd.DataFrame) -> pd.DataFrame:
    """The results singly, a row a training, with the labels of their entries, and whether each collapsed."""
    labels = {run: row["label"] for _, row in entry_table(table).iterrows() for run in row["runs"]}
    singly = table.assign(label=table["run"].map(labels), collapsed=compare.is_collapsed(table))
    return singly.dropna(subset=["label"])


def described(table: pd.DataFrame, metric: str) -> str:
    """A chart in words, for readers who do not see it: what the best set of each sparsity says of it."""
    sets = [compare.set_in_words(found) for found in best_sets(table) if found.metric == metric]
    if sets:
        return " ".join(sets)
    entries = entry_table(final_states(table))
    words = compare.sparsity_words(entries["asked"])
    told = [
        f"{row['label']} at {words[round(row['asked'], 10)]}: {row[metric]:.4g}"
        for _, row in entries.dropna(subset=[metric]).iterrows()
    ]
    return f"{metric}: {'; '.join(told)}."


def _corpus(table: pd.DataFrame) -> str:
    return str(run_folder.read_record(table["run"].iloc[0])["results"]["corpus"])


def perplexity_subtitle(table: pd.DataFrame) -> str:
    """On which text, and in blocks of which length: without that, a perplexity says nothing."""
    found = run_folder.read_record(table["run"].iloc[0])["results"]
    dense = table[table["ordering"] == "base"]
    baseline = f" Dense: {dense['perplexity'].iloc[0]:.2f}." if len(dense) else ""
    text = f"{found.get('split', 'test').capitalize()} split of {found['corpus']}"
    blocks = f"{found['n_blocks']} blocks of {found['block_length']} tokens"
    return f"{text}, {blocks}; logarithmic.{baseline}"


def _metric_chart(
    table: pd.DataFrame, entries: pd.DataFrame, metric: str, *, title: str, **options: Any
) -> alt.LayerChart:
    from pftools import figures

    options["orderings"] = ordering_names(table)
    if entries.loc[entries["asked"] > 0, "asked"].nunique() == 1:
        return figures.metric_chart(entries, metric, by="ordering", title=title, **options)
    title = f"{title} against measured sparsity"
    return figures.metric_chart(_lines(entries), metric, by="sparsity", title=title, **options)


def _lines(entries: pd.DataFrame) -> pd.DataFrame:
    """The entries as points of lines: one that two lines share (their beginnings are alike) is on both."""
    lines = set(entries["ordering"])
    entries = entries.assign(
        choices=[
            label.removeprefix(name).strip(" ()")
            for label, name in zip(entries["label"], entries["ordering"])
        ]
    )
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
    chart = _metric_chart(table, entries, task, title=f"{task}, {metric}", label=metric, log=True)
    return chart.properties(description=described(table, task))


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
    beside = published.beside(task)
    hollow = f"; hollow: {published.STUDY}, {beside[1]}" if beside else ""
    return _metric_chart(
        table,
        entries,
        task,
        title=f"{task}, accuracy",
        subtitle=f"{scores[0]['n']:,} questions, 95% intervals{seeds}{guessing}{hollow}",
        label="accuracy",
        chance=chance,
        percent=True,
        published=beside[0] if beside else None,
    ).properties(description=described(table, task))


def sparsity_chart(table: pd.DataFrame) -> alt.LayerChart:
    """What each entry was asked and what it has, and the same of the published study, hollow."""
    from pftools import figures

    numbers = published.published_numbers()
    theirs = numbers[numbers["source"] == published.STUDY]
    return figures.asked_and_measured(
        entry_table(table),
        orderings=ordering_names(table),
        published=theirs,
        subtitle=f"On the diagonal no zero was lost. Hollow: {published.STUDY}.",
    ).properties(description=published.lost_zeros())


def published_chart(table: pd.DataFrame) -> alt.LayerChart | None:
    """The published perplexities by themselves; None where they stand in the study's own chart."""
    from pftools import figures

    corpus = _corpus(table)
    if published.beside("perplexity", corpus) is not None:
        return None
    numbers = published.published_numbers()
    return figures.published_metric(
        numbers,
        "perplexity",
        title="Published perplexities",
        subtitle=f"WikiText-2 test, blocks of 2,048 tokens: {published.STUDY} and {published.WANDA}. "
        f"This study reads {corpus}: another scale, so another chart.",
        orderings=ordering_names(table),
    )


def cost_chart(costs: pd.DataFrame, table: pd.DataFrame) -> alt.LayerChart | None:
    """Perplexity against the time that a model took to make; None where nothing was made."""
    from pftools import figures

    made = costs[(costs["seconds"] > 0) & ~costs["collapsed"]]
    if len(made) < 2:
        return None
    cheapest = made.sort_values("seconds", kind="stable").iloc[0]
    best = made.sort_values("perplexity", kind="stable").iloc[0]
    words = (
        f"The cheapest model is {cheapest['label']} ({in_words(cheapest['seconds'])}, perplexity "
        f"{cheapest['perplexity']:.2f}); the lowest perplexity has {best['label']} "
        f"({in_words(best['seconds'])}, {best['perplexity']:.2f})."
    )
    chart = figures.quality_and_cost(made, orderings=ordering_names(table))
    return chart.properties(description=words)


def ratio_chart(pairs: pd.DataFrame, *, most: int = 15) -> alt.LayerChart | None:
    """The pairs with an interval; where there are many, the best of each sparsity against the others.

    Where these are still more than twice as many, those of the highest sparsity.
    """
    from pftools import figures

    tested = pairs.dropna(subset=["ratio"])
    if len(tested) > most:
        tested = tested[(tested["first"] == tested["best"]) | (tested["second"] == tested["best"])]
    if not len(tested):
        return None
    title = "Which differences are real"
    if len(tested) > 2 * most:
        tested = tested[tested["asked"] == tested["asked"].max()]
        title += f", at {tested['where'].iloc[0]}"
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
    chart = figures.pair_ratios(ordered, title=title)
    apart = int((ordered["verdict_kind"] == "differs").sum())
    told = f"{apart} of the {len(ordered)} pairs that are drawn differ. {ordered['verdict'].iloc[-1]}"
    return chart.properties(description=told)

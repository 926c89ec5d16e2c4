"""How learning rates were chosen: each ordering's curve, and a word where a choice is at the grid's edge."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from pftools.report.markdown import bullets

if TYPE_CHECKING:
    import altair as alt


def tuning_words(table: pd.DataFrame) -> str:
    """What was chosen, in Markdown; empty where nothing was tuned."""
    trials = pd.DataFrame(table.attrs["trials"])
    if not len(trials):
        return ""
    chosen = trials[trials["chosen"]]
    sentences = [_choice(row) for _, row in chosen.iterrows()]
    return (
        "## How the learning rates were chosen\n\n"
        f"Every ordering tried the same {trials['learning_rate'].nunique()} rates, with seeds that no result "
        "has, and was judged on the validation split, which no result is of. The results above are fresh "
        f"trainings with its own choice.\n\n{bullets(sentences)}"
    )


def _choice(row: pd.Series) -> str:
    edge = ", which is the edge of the grid, so that a better one may lie outside" if row["edge"] else ""
    return f"{row['label']}: {row['learning_rate']:g}{edge}."


def tuning_chart(table: pd.DataFrame) -> alt.LayerChart | None:
    """The curve of every ordering; None where nothing was tuned."""
    from pftools import figures

    trials = pd.DataFrame(table.attrs["trials"])
    return figures.tuning_curves(trials, title="Learning rates, tried") if len(trials) else None

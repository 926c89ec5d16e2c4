"""An evaluation of one model: the loss of each block, the accuracy of each task."""

from __future__ import annotations

import altair as alt
import pandas as pd

from pftools.figures.theme import BLUE, ORANGE, title_of


def block_losses(table: pd.DataFrame, *, title: str, subtitle: str = "") -> alt.LayerChart:
    """Loss of each block in text order, with their mean. ``table`` has columns block and nll."""
    base = alt.Chart(table, title=title_of(title, subtitle), height=180)
    bars = base.mark_bar(color=BLUE, opacity=0.75).encode(
        x=alt.X("block:O", title="block of the test text", axis=alt.Axis(labelOverlap=True, labelAngle=0)),
        y=alt.Y("nll:Q", title="nats a token"),
        tooltip=["block", alt.Tooltip("nll:Q", format=".3f")],
    )
    return bars + base.mark_rule(color=ORANGE, strokeWidth=2).encode(y="mean(nll):Q")


def task_scores(scores: pd.DataFrame, *, title: str = "Tasks") -> alt.LayerChart:
    """One dot a task with its 95% interval, and a tick at the level of guessing.

    Args:
        scores: columns task, value, low, high and chance (missing where guessing has no level).
    """
    base = alt.Chart(
        scores, title=title_of(title, "dot: accuracy with 95% interval; tick: the level of guessing")
    )
    y = alt.Y("task:N", title=None)
    percent = alt.Axis(format="%")
    interval = base.mark_rule(color=BLUE, strokeWidth=2).encode(
        x=alt.X("low:Q", title=None, axis=percent), x2="high:Q", y=y
    )
    dots = base.mark_circle(color=BLUE, size=90, opacity=1).encode(
        x=alt.X("value:Q", scale=alt.Scale(domainMin=0)), y=y
    )
    chance = base.mark_tick(color=ORANGE, thickness=2, size=18).encode(x="chance:Q", y=y)
    return (interval + dots + chance).properties(height=alt.Step(34))

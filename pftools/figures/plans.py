"""An ordering as stairs, a plan as a tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import altair as alt
import pandas as pd

from pftools.figures.theme import BLUE, GREEN, GREY, INK, ORANGE, WIDTH, title_of

if TYPE_CHECKING:
    from pftools.orderings import OrderingStep


def ordering_chart(steps: Sequence[OrderingStep]) -> alt.LayerChart:
    """An ordering as stairs: the sparsity after each of its steps, pruning in orange, fine-tuning in blue."""
    rows = [{"place": 0, "step": "base", "sparsity": 0.0}]
    rows += [
        {"place": place, "step": step.kind, "sparsity": step.sparsity} for place, step in enumerate(steps, 1)
    ]
    table = pd.DataFrame(rows)
    base = alt.Chart(
        table,
        title=title_of("The way to the target", "P prunes to the level shown; F trains at it"),
        height=150,
    )
    x = alt.X("place:O", title="step", axis=alt.Axis(labelAngle=0))
    y = alt.Y("sparsity:Q", axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1]))
    colour = alt.Color(
        "step:N", title=None, scale=alt.Scale(domain=["base", "P", "F"], range=[INK, ORANGE, BLUE])
    )
    line = base.mark_line(interpolate="step-after", color=GREY, strokeWidth=1.6).encode(x=x, y=y)
    return line + base.mark_circle(size=130, opacity=1).encode(x=x, y=y, color=colour)


def plan_chart(table: pd.DataFrame) -> alt.LayerChart:
    """The models of a plan as a tree from left to right: what two branches have in common is made once.

    Args:
        table: columns key, parent (a key or empty), depth, lane (both counts), kind ("base", "P" or "F"),
            label, state ("finished", "to do", "failed") and evaluated (whether a result is reported of it).
    """
    shapes = alt.Scale(domain=["base", "P", "F"], range=["diamond", "square", "circle"])
    states = alt.Scale(domain=["finished", "to do", "failed"], range=[GREEN, "#cfd5da", ORANGE])
    places = table.set_index("key")[["depth", "lane"]]
    links = table[table["parent"].isin(places.index)]
    links = links.assign(
        from_depth=links["parent"].map(places["depth"]), from_lane=links["parent"].map(places["lane"])
    )
    # A branch leaves its parent's line at once and then runs level, so that no line crosses a label.
    x, y = (
        alt.X("depth:Q", axis=None, scale=alt.Scale(padding=30)),
        alt.Y("lane:Q", axis=None, scale=alt.Scale(reverse=True, padding=18)),
    )
    start = {"x": alt.X("from_depth:Q", axis=None), "y": alt.Y("from_lane:Q", axis=None)}
    rules = alt.Chart(links).mark_rule(color="#cfd5da", strokeWidth=1.4)
    lines = rules.encode(**start, y2="lane:Q") + rules.encode(x=start["x"], x2="depth:Q", y=y)
    base = alt.Chart(table).encode(x=x, y=y)
    marks = base.mark_point(size=110, filled=True, opacity=1, strokeWidth=1.6).encode(
        shape=alt.Shape("kind:N", title=None, scale=shapes),
        fill=alt.Fill("state:N", title=None, scale=states),
        stroke=alt.condition("datum.evaluated", alt.value(INK), alt.value("transparent")),
    )
    words = base.mark_text(dy=-12, fontSize=10, color=INK).encode(text="label:N")
    width = max(WIDTH, 62 * (int(table["depth"].max()) + 1))
    title = title_of(
        "The plan",
        "Squares prune (to the level written there), circles fine-tune; what has an outline is evaluated.",
    )
    return (lines + marks + words).properties(
        width=width, height=max(120, 32 * (int(table["lane"].max()) + 1)), title=title
    )

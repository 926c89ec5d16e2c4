"""A training: its loss and its learning rate; many of them, to choose a rate by."""

from __future__ import annotations

import math

import altair as alt
import pandas as pd

from pftools.figures.theme import BLUE, GREY, INK, ORANGE, colours_of, title_of


def loss_curve(losses: pd.DataFrame, *, title: str = "Training loss", subtitle: str = "") -> alt.LayerChart:
    """Loss of every logged step (dots) and its running mean (line), against tokens seen."""
    smooth = losses.assign(mean=losses["loss"].ewm(alpha=0.25).mean())
    base = alt.Chart(smooth, title=title_of(title, subtitle)).encode(
        x=alt.X("tokens:Q", title="training tokens", axis=alt.Axis(format="~s", grid=False))
    )
    dots = base.mark_circle(color=GREY, size=28, opacity=0.8).encode(
        y=alt.Y("loss:Q", title="loss (nats a token)", scale=alt.Scale(zero=False))
    )
    return dots + base.mark_line(color=BLUE, strokeWidth=2.4).encode(y="mean:Q")


def learning_rate_curve(losses: pd.DataFrame) -> alt.Chart:
    """Warm-up and schedule, as they were."""
    return (
        alt.Chart(losses, title=title_of("Learning rate"), height=110)
        .mark_line(color=ORANGE, strokeWidth=2)
        .encode(
            x=alt.X("step:Q", title="optimizer step", axis=alt.Axis(grid=False, tickMinStep=1)),
            y=alt.Y("learning_rate:Q", title=None, axis=alt.Axis(format=".1e", tickCount=3)),
        )
    )


def tuning_curves(trials: pd.DataFrame, *, title: str) -> alt.LayerChart:
    """Validation loss against learning rate, a line an ordering; what was chosen is ringed.

    Args:
        trials: columns ordering, label, learning_rate, loss, low, high, chosen; a row a rate. Infinite losses
            are left out.
    """
    shown = trials[trials["loss"].map(math.isfinite)]
    names = list(dict.fromkeys(shown["ordering"]))
    rates = sorted(shown["learning_rate"].unique().tolist())
    x = alt.X(
        "learning_rate:Q",
        title="learning rate",
        scale=alt.Scale(type="log", nice=False, padding=20),
        axis=alt.Axis(values=rates, format="~g", grid=False),
    )
    y = alt.Y("loss:Q", title="validation loss (nats a token)", scale=alt.Scale(zero=False))
    subtitle = "Ringed: chosen. A choice at the end of a line may not be the best there is."
    base = alt.Chart(shown, title=title_of(title, subtitle)).encode(
        x=x, color=alt.Color("ordering:N", title=None, sort=names, scale=colours_of(names)), detail="label:N"
    )
    rings = base.transform_filter("datum.chosen").mark_point(filled=False, size=260, strokeWidth=1.6)
    layers = [
        base.mark_line(strokeWidth=2.2).encode(y=y),
        base.mark_rule(strokeWidth=2, opacity=0.6).encode(y=alt.Y("low:Q"), y2="high:Q"),
        base.mark_point(filled=True, size=70, opacity=1).encode(y=y),
        rings.encode(y=y, color=alt.value(INK)),
    ]
    chart = alt.layer(*layers)
    assert isinstance(chart, alt.LayerChart)  # a FacetChart only where a layer has facets
    return chart

"""A training: its loss and its learning rate."""

from __future__ import annotations

import altair as alt
import pandas as pd

from pftools.figures.theme import BLUE, GREY, ORANGE, title_of


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

"""Orderings beside each other: metrics, pairs, sparsities."""

from __future__ import annotations

from typing import Any, Literal

import altair as alt
import numpy as np
import pandas as pd

from pftools.figures.theme import (
    BLUE,
    GREY,
    GRID,
    INK,
    SOFT,
    colours_of,
    scale_of,
    shapes_of,
    tenths,
    title_of,
)


def metric_chart(
    results: pd.DataFrame,
    metric: str,
    *,
    by: Literal["sparsity", "ordering"],
    title: str,
    subtitle: str = "",
    label: str = "",
    log: bool = False,
    chance: float | None = None,
    percent: bool = False,
) -> alt.LayerChart:
    """A metric of every ordering, with intervals where the table has them.

    Args:
        results: columns ordering, measured and ``metric``. Optional: ``metric``_low and ``metric``_high (an
            interval), label (how a row is called, else its ordering),
            collapsed (true for a model worse than guessing: drawn as a cross at the end of the scale) and
            may_be_best (true: a ring is drawn around the dot).
        by: "sparsity" draws a line an ordering against *measured* sparsity; "ordering" a row an ordering,
            for studies of a single sparsity.
        chance: the level of guessing, drawn as a dashed line.
        percent: the metric is a share, written in per cent.
    """
    shown = _shown(results, metric)
    scale = _scale_of(shown, metric, chance, log=log)
    # The end of the scale is the place of what has no number that compares.
    shown["drawn"] = shown[metric].mask(shown["collapsed"], scale["domain"][1]).astype(float)
    axis = alt.Axis(format="%" if percent else "~g", tickCount=6)
    values, places = (alt.X, alt.Y) if by == "ordering" else (alt.Y, alt.X)
    own, other = ("x", "y") if by == "ordering" else ("y", "x")
    at = {own: values("drawn:Q", title=label or metric, scale=scale, axis=axis)}
    place = _rows(shown, places) if by == "ordering" else _measured(shown, places)
    colour, shape = _colour_and_shape(shown, legend=by == "sparsity")
    base = alt.Chart(shown).encode(**{other: place}, color=colour)
    layers: list[alt.Chart | alt.LayerChart] = []
    if chance is not None:
        rule = alt.Chart(pd.DataFrame({"chance": [chance]})).mark_rule(color=SOFT, strokeDash=[5, 4])
        layers.append(rule.encode(**{own: values("chance:Q", scale=scale)}))
    if f"{metric}_low" in shown:
        ends = {own: values(f"{metric}_low:Q", scale=scale), f"{own}2": f"{metric}_high:Q"}
        layers.append(base.mark_rule(strokeWidth=2, opacity=0.6).encode(**ends))
    if by == "sparsity":
        line = base.transform_filter("!datum.collapsed").mark_line(strokeWidth=2.2)
        layers.append(line.encode(**at, order="measured:Q", detail="label:N"))
    tooltip = [name for name in ("label", "asked", "measured", metric) if name in shown]
    dots = base.transform_filter("!datum.collapsed").mark_point(filled=True, size=90, opacity=1)
    layers.append(dots.encode(**at, shape=shape, tooltip=tooltip))
    if shown["may_be_best"].any():
        layers.append(_rings(base, at))
    if by == "ordering":
        layers.append(_numbers(base, at, metric, percent=percent))
    if shown["collapsed"].any():
        layers.append(_collapsed(base, at, tooltip))
    height = alt.Step(44) if by == "ordering" else 320
    return _layered(*layers).properties(title=title_of(title, subtitle), height=height)


def _shown(results: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The rows that are drawn, with all columns that the chart reads."""
    shown = results.dropna(subset=[metric])
    if "label" not in shown:
        shown = shown.assign(label=shown["ordering"])
    if "collapsed" not in shown:
        shown = shown.assign(collapsed=~np.isfinite(shown[metric].astype(float)))
    if "may_be_best" not in shown:
        shown = shown.assign(may_be_best=False)
    return shown


def _scale_of(shown: pd.DataFrame, metric: str, chance: float | None, *, log: bool) -> alt.Scale:
    present = [column for column in (f"{metric}_low", metric, f"{metric}_high") if column in shown]
    values = shown.loc[~shown["collapsed"], present].to_numpy(dtype=float).ravel()
    return scale_of(pd.Series([*values, *([] if chance is None else [chance])], dtype=float), log=log)


def _colour_and_shape(shown: pd.DataFrame, *, legend: bool) -> tuple[alt.Color, alt.Shape]:
    names = list(dict.fromkeys(shown["ordering"]))
    key = alt.Legend() if legend else None
    return (
        alt.Color("ordering:N", title=None, sort=names, scale=colours_of(names), legend=key),
        alt.Shape("ordering:N", title=None, sort=names, scale=shapes_of(names), legend=key),
    )


def _rows(shown: pd.DataFrame, channel: Any) -> Any:
    axis = alt.Axis(labelFontSize=12, labelColor=INK, labelLimit=320)
    return channel("label:N", title=None, sort=list(dict.fromkeys(shown["label"])), axis=axis)


def _measured(shown: pd.DataFrame, channel: Any) -> Any:
    top = float(shown["measured"].max())
    axis = alt.Axis(format="%", grid=False, values=tenths(top))
    scale = alt.Scale(domain=[-0.02, top + 0.02], nice=False)
    return channel("measured:Q", title="measured sparsity", axis=axis, scale=scale)


def _rings(base: alt.Chart, at: dict[str, Any]) -> alt.Chart:
    marks = base.transform_filter("datum.may_be_best && !datum.collapsed")
    return marks.mark_point(shape="circle", filled=False, size=260, strokeWidth=1.6, opacity=1).encode(
        **at, color=alt.value(INK)
    )


def _numbers(base: alt.Chart, at: dict[str, Any], metric: str, *, percent: bool) -> alt.Chart:
    text = alt.Text(f"{metric}:Q", format=".1%" if percent else ".2f")
    words = base.transform_filter("!datum.collapsed").mark_text(dy=-16, fontSize=11)
    return words.encode(
        **at, text=text, color=alt.value(INK)
    )  # an ordering's own colour may be too pale to read


def _collapsed(base: alt.Chart, at: dict[str, Any], tooltip: list[str]) -> alt.LayerChart:
    marks = base.transform_filter("datum.collapsed")
    cross = marks.mark_point(shape="cross", angle=45, filled=True, size=110, opacity=1)
    words = marks.mark_text(align="right", dx=-10, fontSize=11, fontStyle="italic")
    return _layered(cross.encode(**at, tooltip=tooltip), words.encode(**at, text=alt.value("collapsed")))


def _layered(*layers: alt.Chart | alt.LayerChart) -> alt.LayerChart:
    chart = alt.layer(*layers)
    assert isinstance(chart, alt.LayerChart)  # a FacetChart only where a layer has facets
    return chart


def pair_ratios(pairs: pd.DataFrame, *, title: str) -> alt.LayerChart:
    """Each pair's perplexity ratio with its interval; an interval that holds 1 cannot be told apart.

    Args:
        pairs: columns pair, ratio, low, high, verdict_kind ("differs" or "cannot be told apart").
    """
    base = alt.Chart(
        pairs,
        title=title_of(title, "Ratio of two perplexities with its 95% interval; 1 is no difference."),
        width=520,
    )
    y = alt.Y("pair:N", title=None, sort=None, axis=alt.Axis(labelLimit=320))
    kinds = alt.Scale(domain=["differs", "cannot be told apart"], range=[BLUE, GREY])
    colour = alt.Color("verdict_kind:N", title=None, scale=kinds, legend=alt.Legend(orient="top", offset=4))
    scale = scale_of(pd.concat([pairs["low"], pairs["high"], pd.Series([1.0])]), log=True)
    x = alt.X("low:Q", title="ratio of perplexities", scale=scale, axis=alt.Axis(format=".3~g", tickCount=7))
    one = alt.Chart(pd.DataFrame({"one": [1.0]})).mark_rule(color=SOFT, strokeDash=[5, 4]).encode(x="one:Q")
    interval = base.mark_rule(strokeWidth=3).encode(x=x, x2="high:Q", y=y, color=colour)
    dots = base.mark_circle(size=90, opacity=1).encode(x="ratio:Q", y=y, color=colour)
    return (one + interval + dots).properties(height=alt.Step(34))


def asked_and_measured(results: pd.DataFrame) -> alt.LayerChart:
    """What each ordering was asked and what it has: a dot on the diagonal kept its zeros."""
    orderings = list(dict.fromkeys(results["ordering"]))
    top = float(max(results["asked"].max(), results["measured"].max(), 0.1))
    diagonal = alt.Chart(pd.DataFrame({"asked": [0, top], "measured": [0, top]})).mark_line(
        color=GRID, strokeWidth=2
    )
    dots = alt.Chart(
        results, title=title_of("Sparsity, asked and measured", "on the diagonal: no zero was lost")
    ).mark_circle(size=90, opacity=0.9)
    percent = alt.Axis(format="%")
    x, y = alt.X("asked:Q", title="asked", axis=percent), alt.Y("measured:Q", title="measured", axis=percent)
    colour = alt.Color("ordering:N", title=None, sort=orderings, scale=colours_of(orderings))
    return (diagonal.encode(x=x, y=y) + dots.encode(x=x, y=y, color=colour)).properties(width=300, height=300)

"""Orderings beside each other: a metric against sparsity or cost, pairs, zeros asked and measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import altair as alt
import numpy as np
import pandas as pd

from pftools.figures.labels import free_ends, names_at_ends
from pftools.figures.theme import (
    BLUE,
    GREY,
    INK,
    SOFT,
    colours_of,
    layer_ticks,
    scale_of,
    shapes_of,
    tenths,
    ticks_of,
    title_of,
)

_DASHES = [[1, 0], [7, 3], [2, 3], [10, 3, 2, 3], [4, 2, 1, 2]]
_ROW = 54  # pixels of a row: its name above, its mark, its number below


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
    orderings: Sequence[str] | None = None,
    seeds: pd.DataFrame | None = None,
    published: pd.DataFrame | None = None,
) -> alt.LayerChart:
    """A metric of every ordering, with intervals where the table has them.

    Args:
        results: columns ordering, measured and ``metric``. Optional: ``metric``_low and ``metric``_high (an
            interval), label (how a row is called, else its ordering), choices (what tells the rows of an
            ordering apart: a dash of the line each) and collapsed (true for a model worse than guessing:
            drawn as a cross at the end of the scale) and may_be_best (true: a ring is drawn around the mark).
        by: "sparsity" draws a line an ordering against *measured* sparsity; "ordering" a row an ordering,
            for studies of a single sparsity.
        chance: the level of guessing, drawn as a dashed line.
        percent: the metric is a share, written in per cent.
        orderings: all of the study, which decide colours and shapes; None: those of ``results``.
        seeds: single trainings, drawn small: columns ordering, label, measured, seed and ``metric``;
            optional: collapsed, which are left out.
        published: numbers of others, drawn hollow: columns ordering, source, measured and ``metric``.
    """
    shown = _shown(results, metric)
    others = [table for table in (seeds, published) if table is not None]
    scale, axis = _values_of([shown, *others], metric, chance, log=log, percent=percent)
    # The end of the scale is the place of what has no number that compares.
    shown["drawn"] = shown[metric].mask(shown["collapsed"], scale["domain"][1]).astype(float)
    shown["value"] = shown[metric].astype(float).where(~shown["collapsed"])
    names = list(dict.fromkeys(orderings or shown["ordering"]))
    own, other, values = ("x", "y", alt.X) if by == "ordering" else ("y", "x", alt.Y)
    at = {own: values("drawn:Q", title=label or metric, scale=scale, axis=axis)}
    place: dict[str, Any] = {other: _rows(shown) if by == "ordering" else _measured([shown, *others])}
    height = _ROW * shown["label"].nunique() if by == "ordering" else 340
    ends = shown[~shown["collapsed"]].sort_values("measured").drop_duplicates("label", keep="last")
    named, in_key = None, shown
    if by == "sparsity":
        ends = free_ends(shown[~shown["collapsed"]], ends, "measured", metric, scale)
        named = names_at_ends(ends, place["x"], metric, scale=scale, height=height, tells="ordering")
    if named is not None:
        in_key = shown[~shown["ordering"].isin(ends["ordering"])]
    legend = by == "sparsity" and len(in_key) > 0
    colour, shape = _colour_and_shape(names, in_key, legend=legend, under=named is not None)
    base = alt.Chart(shown).encode(**place, color=colour)
    standing = base.transform_filter("!datum.collapsed")
    layers: list[alt.Chart | alt.LayerChart] = []
    if chance is not None:
        rule = alt.Chart(pd.DataFrame({"chance": [chance]})).mark_rule(color=SOFT, strokeDash=[5, 4])
        layers.append(rule.encode(**{own: values("chance:Q", scale=scale)}))
    if published is not None and by == "sparsity":
        layers.append(_hollow(published, metric, names, place, {own: (values, scale)}))
    if f"{metric}_low" in shown:
        between = {own: values(f"{metric}_low:Q", scale=scale), f"{own}2": f"{metric}_high:Q"}
        layers.append(base.mark_rule(strokeWidth=2, opacity=0.6).encode(**between))
    if by == "sparsity":
        line = standing.mark_line(strokeWidth=2.2)
        layers.append(line.encode(**at, order="measured:Q", detail="label:N", **_dash(shown)))
    if seeds is not None:
        layers.append(_singly(seeds, metric, names, place, {own: (values, scale)}))
    tooltip = _tooltip(shown, metric, label or metric, percent=percent)
    dots = standing.mark_point(filled=True, size=110, opacity=1)
    layers.append(dots.encode(**at, shape=shape, tooltip=tooltip))
    if shown["may_be_best"].any():
        layers.append(_rings(base, at))
    if named is not None:
        layers.append(named)
    if by == "ordering":
        text = alt.Text("value:Q", format=".1%" if percent else ",.2f")
        words = standing.mark_text(dy=18, fontSize=11)
        layers.append(words.encode(**at, text=text, color=alt.value(INK)))
    if shown["collapsed"].any():
        layers.append(_collapsed(base, at, tooltip))
    return _layered(*layers).properties(title=title_of(title, subtitle), height=height)


def _shown(results: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The rows that are drawn, with the columns that the chart reads and no others."""
    shown = results.dropna(subset=[metric])
    if "label" not in shown:
        shown = shown.assign(label=shown["ordering"])
    if "collapsed" not in shown:
        shown = shown.assign(collapsed=~np.isfinite(shown[metric].astype(float)))
    if "may_be_best" not in shown:
        shown = shown.assign(may_be_best=False)
    read = ("ordering", "label", "choices", "may_be_best", "asked", "measured", "seeds", "collapsed", metric)
    kept = [column for column in (*read, f"{metric}_low", f"{metric}_high") if column in shown]
    return shown[kept].copy()


def _values_of(
    tables: list[pd.DataFrame], metric: str, chance: float | None, *, log: bool, percent: bool
) -> tuple[alt.Scale, alt.Axis]:
    """The scale of all values that are drawn, and its axis."""
    found = [] if chance is None else [chance]
    for table in tables:
        standing = table[~table["collapsed"]] if "collapsed" in table else table
        present = [column for column in (f"{metric}_low", metric, f"{metric}_high") if column in table]
        found += standing[present].to_numpy(dtype=float).ravel().tolist()
    finite = pd.Series(found, dtype=float).replace([np.inf, -np.inf], np.nan).dropna()
    scale = scale_of(finite, log=log)
    low, high = scale["domain"]
    ticks, digits = ticks_of(low, high, log=log)
    if percent:
        digits = f".{max(0, int(digits.strip(',.f~g') or 0) - 2)}%"
    return scale, alt.Axis(format=digits, values=ticks)


def _colour_and_shape(
    names: list[str], shown: pd.DataFrame, *, legend: bool, under: bool = False
) -> tuple[alt.Color, alt.Shape]:
    """The looks of a study's orderings; the key, beside the chart or under it, names those that are shown."""
    present = [name for name in names if name in set(shown["ordering"])]
    key = alt.Legend(values=present, orient="bottom" if under else "right") if legend else None
    return (
        alt.Color("ordering:N", title=None, sort=names, scale=colours_of(names), legend=key),
        alt.Shape("ordering:N", title=None, sort=names, scale=shapes_of(names), legend=key),
    )


def _dash(shown: pd.DataFrame) -> dict[str, Any]:
    """A dash for each choice of method, pattern and merge, where there are several."""
    choices = [choice for choice in dict.fromkeys(shown.get("choices", [])) if choice]
    if len(choices) < 2:
        return {}
    dashes = [_DASHES[number % len(_DASHES)] for number in range(len(choices))]
    scale = alt.Scale(domain=choices, range=dashes)
    legend = alt.Legend(orient="bottom", columns=2, symbolSize=400, labelLimit=0)
    return {"strokeDash": alt.StrokeDash("choices:N", title=None, scale=scale, legend=legend)}


def _rows(shown: pd.DataFrame, column: str = "label") -> alt.Y:
    """A row a name, written over its mark, where it takes no width from the plot."""
    axis = alt.Axis(
        labelFontSize=12,
        labelColor=INK,
        labelAlign="left",
        labelPadding=0,
        labelOffset=-17,
        zindex=1,
        grid=False,
    )
    return alt.Y(f"{column}:N", title=None, sort=list(dict.fromkeys(shown[column])), axis=axis)


def _measured(tables: list[pd.DataFrame]) -> alt.X:
    top = max(float(table["measured"].max()) for table in tables)
    axis = alt.Axis(format="%", grid=False, values=tenths(top))
    scale = alt.Scale(domain=[-0.02, max(top, 0.1) + 0.03], nice=False)
    return alt.X("measured:Q", title="measured sparsity", axis=axis, scale=scale)


def _rings(base: alt.Chart, at: dict[str, Any]) -> alt.Chart:
    marks = base.transform_filter("datum.may_be_best && !datum.collapsed")
    return marks.mark_point(shape="circle", filled=False, size=300, strokeWidth=1.6, opacity=1).encode(
        **at, color=alt.value(INK)
    )


def _tooltip(shown: pd.DataFrame, metric: str, label: str, *, percent: bool) -> list[alt.Tooltip]:
    number = ".1%" if percent else ",.2f"
    told = {
        "label": alt.Tooltip("label:N", title="ordering"),
        "asked": alt.Tooltip("asked:Q", title="asked", format=".1%"),
        "measured": alt.Tooltip("measured:Q", title="measured", format=".2%"),
        metric: alt.Tooltip(f"{metric}:Q", title=label, format=number),
        f"{metric}_low": alt.Tooltip(f"{metric}_low:Q", title="interval from", format=number),
        f"{metric}_high": alt.Tooltip(f"{metric}_high:Q", title="to", format=number),
        "seeds": alt.Tooltip("seeds:Q", title="seeds"),
    }
    return [tooltip for column, tooltip in told.items() if column in shown]


def _singly(
    seeds: pd.DataFrame, metric: str, names: list[str], place: dict[str, Any], at: dict[str, Any]
) -> alt.Chart:
    """One small mark a training, so that the spread over seeds is seen."""
    (axis, (channel, scale)) = next(iter(at.items()))
    standing = seeds[~seeds["collapsed"]] if "collapsed" in seeds else seeds
    kept = standing[["ordering", "label", "measured", "seed", metric]]
    marks = alt.Chart(kept.replace([np.inf, -np.inf], np.nan).dropna()).mark_point(
        filled=True, size=26, opacity=0.5, clip=True
    )
    colour = alt.Color("ordering:N", sort=names, scale=colours_of(names), legend=None)
    shape = alt.Shape("ordering:N", sort=names, scale=shapes_of(names), legend=None)
    told = [alt.Tooltip("label:N", title="ordering"), alt.Tooltip("seed:N"), alt.Tooltip(f"{metric}:Q")]
    where = {axis: channel(f"{metric}:Q", scale=scale)}
    return marks.encode(**place, **where, color=colour, shape=shape, tooltip=told)


def _hollow(
    published: pd.DataFrame, metric: str, names: list[str], place: dict[str, Any], at: dict[str, Any]
) -> alt.LayerChart:
    """Numbers of others: hollow marks on thin lines, in the colours and shapes of the same orderings."""
    (axis, (channel, scale)) = next(iter(at.items()))
    kept = published[["ordering", "source", "asked", "measured", metric]].dropna()
    names = list(dict.fromkeys([*names, *kept["ordering"]]))
    base = alt.Chart(kept).encode(
        **place,
        **{axis: channel(f"{metric}:Q", scale=scale)},
        color=alt.Color("ordering:N", sort=names, scale=colours_of(names), legend=None),
    )
    line = base.mark_line(strokeWidth=1, strokeDash=[2, 3], opacity=0.7)
    marks = base.mark_point(filled=False, size=70, strokeWidth=1.4)
    shape = alt.Shape("ordering:N", sort=names, scale=shapes_of(names), legend=None)
    told = [
        alt.Tooltip("source:N", title="published by"),
        alt.Tooltip("ordering:N"),
        alt.Tooltip("asked:Q", format=".0%"),
        alt.Tooltip("measured:Q", format=".0%"),
        alt.Tooltip(f"{metric}:Q", title="value", format=".3~g"),
    ]
    return _layered(
        line.encode(detail=["ordering:N", "source:N"], order="measured:Q"),
        marks.encode(shape=shape, tooltip=told),
    )


def _collapsed(base: alt.Chart, at: dict[str, Any], tooltip: list[alt.Tooltip]) -> alt.LayerChart:
    marks = base.transform_filter("datum.collapsed")
    cross = marks.mark_point(shape="cross", angle=45, filled=True, size=110, opacity=1)
    words = marks.mark_text(align="right", dx=-10, fontSize=11, fontStyle="italic")
    said = words.encode(**at, text=alt.value("collapsed"), color=alt.value(INK))
    return _layered(cross.encode(**at, tooltip=tooltip), said)


def _layered(*layers: alt.Chart | alt.LayerChart) -> alt.LayerChart:
    chart = alt.layer(*layers)
    assert isinstance(chart, alt.LayerChart)  # a FacetChart only where a layer has facets
    return chart


def pair_ratios(pairs: pd.DataFrame, *, title: str) -> alt.LayerChart:
    """Each pair's perplexity ratio with its interval; an interval that holds 1 cannot be told apart.

    Args:
        pairs: columns pair, ratio, low, high, verdict_kind ("differs" or another kind); optional: verdict, a
            sentence that is shown under the pointer.
    """
    read = [name for name in ("pair", "ratio", "low", "high", "verdict_kind", "verdict") if name in pairs]
    drawn = pairs[read]
    kinds = list(dict.fromkeys(["differs", "cannot be told apart", *drawn["verdict_kind"]]))
    colours = alt.Scale(domain=kinds, range=[BLUE, GREY, "#2f8f6b", SOFT][: len(kinds)])
    ends = pd.concat([drawn["low"], drawn["high"], pd.Series([1.0])])
    scale = scale_of(ends, log=True)
    ticks, digits = ticks_of(*scale["domain"], log=True)
    axis = alt.Axis(format=digits, values=ticks)
    base = alt.Chart(drawn).encode(
        y=_rows(drawn, "pair"),
        color=alt.Color(
            "verdict_kind:N", title=None, scale=colours, legend=alt.Legend(orient="top", offset=4)
        ),
        tooltip=[alt.Tooltip("verdict:N", title="verdict")] if "verdict" in drawn else ["pair:N", "ratio:Q"],
    )
    x = alt.X("low:Q", title="ratio of perplexities", scale=scale, axis=axis)
    one = alt.Chart(pd.DataFrame({"one": [1.0]})).mark_rule(color=SOFT, strokeDash=[5, 4]).encode(x="one:Q")
    interval = base.mark_rule(strokeWidth=3).encode(x=x, x2="high:Q")
    dots = base.mark_circle(size=90, opacity=1).encode(x="ratio:Q")
    words = title_of(
        title,
        "Ratio of two perplexities with its own 95% interval; 1 is no difference. Colours are after the "
        "correction for all pairs.",
    )
    return _layered(one, interval, dots).properties(title=words, height=44 * len(drawn))


def asked_and_measured(
    results: pd.DataFrame,
    *,
    orderings: Sequence[str] | None = None,
    published: pd.DataFrame | None = None,
    subtitle: str = "on the diagonal: no zero was lost",
) -> alt.LayerChart:
    """What each ordering was asked and what it has: a mark on the diagonal kept its zeros.

    Args:
        results: columns ordering, asked, measured; optional: label.
        orderings: all of the study, which decide colours and shapes; None: those of ``results``.
        published: numbers of others, drawn hollow: columns ordering, source, asked, measured.
    """
    ours = results.assign(source="this study", label=results.get("label", results["ordering"]))
    tables = [ours] if published is None else [ours, published.assign(label=published["ordering"])]
    drawn = pd.concat(tables)[["ordering", "label", "source", "asked", "measured"]].drop_duplicates()
    # Marks that coincide are drawn one around the other: none is moved from its place.
    rank = drawn.groupby(["source", "asked", drawn["measured"].round(3)]).cumcount()
    drawn["size"] = 50 + 90 * rank
    names = list(dict.fromkeys([*(orderings or []), *drawn["ordering"]]))
    top = float(max(drawn["asked"].max(), drawn["measured"].max(), 0.1)) + 0.03
    ticks = alt.Axis(format="%", values=tenths(top))
    scale = alt.Scale(domain=[-0.02, top], nice=False)
    x = alt.X("asked:Q", title="asked sparsity", axis=ticks, scale=scale)
    y = alt.Y("measured:Q", title="measured sparsity", axis=ticks, scale=scale)
    colour, shape = _colour_and_shape(names, drawn, legend=True)
    ends = pd.DataFrame({"asked": [0, top], "measured": [0, top]})
    diagonal = alt.Chart(ends).mark_line(color=SOFT, strokeWidth=1, strokeDash=[5, 4]).encode(x=x, y=y)
    told = [
        alt.Tooltip("source:N", title="of"),
        alt.Tooltip("label:N", title="ordering"),
        alt.Tooltip("asked:Q", format=".1%"),
        alt.Tooltip("measured:Q", format=".2%"),
    ]
    base = alt.Chart(drawn).encode(
        x=x, y=y, color=colour, shape=shape, tooltip=told, size=alt.Size("size:Q", scale=None, legend=None)
    )
    layers = [
        diagonal,
        base.transform_filter("datum.source == 'this study'").mark_point(filled=True, opacity=1),
    ]
    if published is not None:
        others = base.transform_filter("datum.source != 'this study'")
        layers.insert(1, others.mark_point(filled=False, strokeWidth=1.4))
    title = title_of("Sparsity, asked and measured", subtitle)
    return _layered(*layers).properties(title=title, width=420, height=380)


def quality_and_cost(
    costs: pd.DataFrame, *, orderings: Sequence[str], label: str = "perplexity"
) -> alt.LayerChart:
    """Perplexity against the seconds that a model takes to make: what lies lower left is better and cheaper.

    Args:
        costs: columns ordering, label, seconds, perplexity, asked, tokens; collapsed models are left out.
    """
    names = list(dict.fromkeys(orderings))
    kept = costs[np.isfinite(costs["perplexity"].astype(float)) & (costs["seconds"] > 0)]
    kept = kept[["ordering", "label", "seconds", "perplexity", "asked", "tokens"]].assign(
        minutes=kept["seconds"] / 60
    )
    across, up = scale_of(kept["minutes"], log=True), scale_of(kept["perplexity"], log=True)
    colour, shape = _colour_and_shape(names, kept, legend=True)
    axes = []
    for scale in (across, up):
        ticks, digits = ticks_of(*scale["domain"], log=True)
        axes.append(alt.Axis(format=digits, values=ticks))
    told = [
        alt.Tooltip("label:N", title="ordering"),
        alt.Tooltip("asked:Q", format=".1%"),
        alt.Tooltip("perplexity:Q", format=",.2f"),
        alt.Tooltip("minutes:Q", format=",.1f"),
        alt.Tooltip("tokens:Q", title="training tokens", format=","),
    ]
    marks = (
        alt.Chart(kept)
        .mark_point(filled=True, size=110, opacity=1)
        .encode(
            x=alt.X("minutes:Q", title="minutes to make the model", scale=across, axis=axes[0]),
            y=alt.Y("perplexity:Q", title=label, scale=up, axis=axes[1]),
            color=colour,
            shape=shape,
            tooltip=told,
        )
    )
    title = title_of("Quality against cost", "lower left is better and cheaper; both axes are logarithmic")
    return _layered(marks).properties(title=title, height=300)


def published_metric(
    published: pd.DataFrame, metric: str, *, title: str, subtitle: str, orderings: Sequence[str] = ()
) -> alt.LayerChart:
    """Numbers of others by themselves, hollow, against measured sparsity.

    Args:
        published: columns ordering, source, asked, measured and ``metric``.
        orderings: all of the reader's own study, whose looks are kept.
    """
    kept = published.dropna(subset=[metric])
    scale, axis = _values_of([kept], metric, None, log=True, percent=False)
    names = list(dict.fromkeys([*orderings, *kept["ordering"]]))
    colour, shape = _colour_and_shape(names, kept, legend=True)
    place: dict[str, Any] = {"x": _measured([kept])}
    marks = _hollow(kept, metric, names, place, {"y": (alt.Y, scale)})
    key = (
        alt.Chart(kept)
        .mark_point(filled=False, size=70, opacity=0)
        .encode(
            **place, y=alt.Y(f"{metric}:Q", title=metric, scale=scale, axis=axis), color=colour, shape=shape
        )
    )
    return _layered(key, marks).properties(title=title_of(title, subtitle), height=320)


def orderings_by_layer(
    table: pd.DataFrame,
    value: str,
    *,
    title: str,
    subtitle: str = "",
    orderings: Sequence[str] = (),
    percent: bool = False,
) -> alt.LayerChart:
    """One line an entry over the decoder layers, in its ordering's colour.

    Args:
        table: columns ordering, label, layer and ``value``, a row an entry and layer.
        orderings: all of the study, which decide colours; empty: those of ``table``.
        percent: the value is a share.
    """
    names = list(dict.fromkeys(orderings or table["ordering"]))
    scale = scale_of(table[value], log=False)
    ticks, digits = ticks_of(*scale["domain"], log=False)
    layers_named = alt.Axis(values=layer_ticks(table["layer"]), grid=False, format="d")
    x = alt.X("layer:Q", title="decoder layer", axis=layers_named)
    ends, height = table.sort_values("layer").drop_duplicates("label", keep="last"), 220
    named = names_at_ends(ends, x, value, scale=scale, height=height, tells="ordering")
    colour, shape = _colour_and_shape(names, table, legend=named is None)
    base = alt.Chart(table).encode(
        x=x,
        y=alt.Y(
            f"{value}:Q",
            title=None,
            scale=scale,
            axis=alt.Axis(format="%" if percent else digits, values=ticks),
        ),
        color=colour,
        detail="label:N",
    )
    told = [
        alt.Tooltip("label:N", title="ordering"),
        alt.Tooltip("layer:Q"),
        alt.Tooltip(f"{value}:Q", format=".2%" if percent else ".3~g"),
    ]
    marks = base.mark_point(filled=True, size=36, opacity=1).encode(shape=shape, tooltip=told)
    layers = [base.mark_line(strokeWidth=1.8), marks, *([named] if named is not None else [])]
    return _layered(*layers).properties(title=title_of(title, subtitle), height=height)

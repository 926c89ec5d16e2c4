"""What is drawn layer by layer: pruning, its errors, and the weights of adapters."""

from __future__ import annotations

import altair as alt
import pandas as pd

from pftools.figures.labels import names_at_ends
from pftools.figures.theme import BLUE, HEIGHT, ORANGE, WIDTH, layer_ticks, scale_of, title_of


def heat_map(
    table: pd.DataFrame, value: str, *, title: str, subtitle: str = "", label: str = "", percent: bool = False
) -> alt.Chart:
    """One cell a layer and module.

    Args:
        table: columns layer, module and ``value``.
        percent: ``value`` is a share, coloured from 0% to 100%; anything else is coloured by its own range.
    """
    order = list(dict.fromkeys(table["module"]))
    scale = (
        alt.Scale(scheme="tealblues", domain=[0, 1])
        if percent
        else alt.Scale(scheme="tealblues", type="symlog")
    )
    legend = alt.Legend(format="%" if percent else "~g")
    return (
        alt.Chart(table, title=title_of(title, subtitle), width=WIDTH, height=26 * len(order))
        .mark_rect(stroke="white", strokeWidth=1)
        .encode(
            x=alt.X("layer:O", title="decoder layer", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
            y=alt.Y("module:N", title=None, sort=order),
            color=alt.Color(f"{value}:Q", title=label or value, scale=scale, legend=legend),
            tooltip=list(table.columns),
        )
    )


def lines_by_layer(
    table: pd.DataFrame,
    value: str,
    *,
    title: str,
    subtitle: str = "",
    label: str = "",
    colour: str = "module",
    log: bool = False,
    percent: bool = False,
) -> alt.LayerChart:
    """One line a module (or whatever column ``colour`` names) over the decoder layers, named at its end."""
    means = table.groupby([colour, "layer"], sort=False)[value].mean().reset_index()
    sorted_by_model = list(dict.fromkeys(table[colour]))
    scale = scale_of(means[value], log=log)
    x = alt.X(
        "layer:Q",
        title="decoder layer",
        axis=alt.Axis(values=layer_ticks(table["layer"]), grid=False, format="d"),
        scale=alt.Scale(nice=False),
    )
    ends = means.sort_values("layer").drop_duplicates(colour, keep="last").assign(label=lambda t: t[colour])
    named = names_at_ends(ends, x, value, scale=scale, height=HEIGHT, tells=colour)
    legend = alt.Legend() if named is None else None
    axis = alt.Axis(format="%" if percent else _number_format(table[value]), labelExpr=_ZERO)
    lines = (
        alt.Chart(means)
        .mark_line(point=alt.OverlayMarkDef(size=22), strokeWidth=1.8)
        .encode(
            x=x,
            y=alt.Y(f"{value}:Q", title=label or value, scale=scale, axis=axis),
            color=alt.Color(f"{colour}:N", title=None, sort=sorted_by_model, legend=legend),
        )
    )
    chart = alt.layer(*([lines] if named is None else [lines, named]), title=title_of(title, subtitle))
    assert isinstance(chart, alt.LayerChart)  # a FacetChart only where a layer has facets
    return chart


def adapter_matrices(table: pd.DataFrame, *, title: str, subtitle: str = "") -> alt.VConcatChart:
    """The study's figure of an adapter, by layer: mean, deviation, range and share outside of A and B.

    Args:
        table: columns layer, module, matrix ("A" or "B"), mean, std, minimum, maximum, outside_share,
            outside_share_normal.
    """
    rows = [
        _of_both_matrices(table, ["mean"], "mean", heading=True),
        _of_both_matrices(table, ["std"], "standard deviation"),
        _of_both_matrices(table, ["minimum", "maximum"], "smallest, largest"),
        _of_both_matrices(
            table, ["outside_share"], "share outside", dashed="outside_share_normal", last=True
        ),
    ]
    return alt.vconcat(*rows, spacing=12, title=title_of(title, subtitle))


def _of_both_matrices(
    table: pd.DataFrame,
    values: list[str],
    words: str,
    *,
    dashed: str = "",
    heading: bool = False,
    last: bool = False,
) -> alt.HConcatChart:
    modules = list(dict.fromkeys(table["module"]))
    pair = []
    for matrix in ("A", "B"):
        part = table[table["matrix"] == matrix]
        axis = alt.Axis(
            format=".1%" if dashed else _number_format(part[values[-1]]), labelExpr=_ZERO, tickCount=4
        )
        base = alt.Chart(part, width=WIDTH // 2 - 50, height=105).encode(
            x=alt.X(
                "layer:Q",
                title="decoder layer" if last else None,
                scale=alt.Scale(nice=False),
                axis=alt.Axis(values=layer_ticks(table["layer"])[::2], grid=False, labels=last, format="d"),
            ),
            color=alt.Color("module:N", title=None, sort=modules, scale=alt.Scale(domain=modules)),
        )
        lines = [
            base.mark_line(strokeWidth=1.6).encode(
                y=alt.Y(
                    f"{value}:Q",
                    title=words if matrix == "A" else None,
                    axis=axis,
                    scale=alt.Scale(zero=False),
                )
            )
            for value in values
        ]
        if dashed:
            lines.append(base.mark_line(strokeWidth=1.2, strokeDash=[3, 3]).encode(y=f"{dashed}:Q"))
        title = alt.TitleParams(f"Matrix {matrix}", fontSize=12, offset=6) if heading else alt.TitleParams("")
        pair.append(alt.layer(*lines, title=title))
    return alt.hconcat(*pair, spacing=20)


_ZERO = "datum.value == 0 ? '0' : datum.label"  # not 0e+0


def _number_format(values: pd.Series) -> str:
    """Small numbers with an exponent: 9e-5, not 0.00009."""
    return "~e" if values.abs().max() < 5e-3 else "~g"


def score_histogram(histogram: pd.DataFrame, *, title: str) -> alt.LayerChart:
    """The distribution of one weight's scores, what is kept and what goes, and the threshold between.

    Args:
        histogram: columns low, high (bin edges, in log10 of the score), kept and pruned (counts).
    """
    tall = histogram.melt(["low", "high"], ["pruned", "kept"], "fate", "weights")
    colours = alt.Scale(domain=["kept", "pruned"], range=[BLUE, "#d5dade"])
    return (
        alt.Chart(
            tall,
            title=title_of(
                title, "how many weights have which score (log10); each output row has its own threshold"
            ),
        )
        .mark_bar(binSpacing=0)
        .encode(
            x=alt.X("low:Q", bin="binned", title="log10 of the score"),
            x2="high:Q",
            y=alt.Y("weights:Q", title="weights", axis=alt.Axis(format="~s")),
            color=alt.Color("fate:N", title=None, scale=colours),
            order=alt.Order("fate:N", sort="descending"),
        )
    )


def output_error(layers: pd.DataFrame) -> alt.LayerChart:
    """The relative error of every weight's output, by depth; the subtitle says how it was found.

    Args:
        layers: the table of a pruning (`PruneResult.layers`).
    """
    kinds = sorted(set(layers["error_is"]))
    how = {
        "measured": "measured over all calibration tokens",
        "sampled": "measured on a sample of the calibration tokens",
        "estimated": "estimated, as if input columns were uncorrelated",
    }
    found = " or ".join(how[kind] for kind in kinds)
    return lines_by_layer(
        layers,
        "output_error",
        title="Error of each output",
        label="relative error",
        percent=True,
        subtitle=f"Norm of the lost part of a weight's output, relative to the whole; {found}.",
    )


def sparsity_by_layer(layers: pd.DataFrame) -> alt.LayerChart:
    """Zeros of every decoder layer: asked (line), measured in the layer (bars) and in its weights (dots).

    Args:
        layers: the table of a pruning (`PruneResult.layers`).
    """
    x = alt.X("layer:O", title="decoder layer", axis=alt.Axis(labelAngle=0, labelOverlap=True))
    percent = alt.Axis(format="%")
    base = alt.Chart(
        layers,
        title=title_of(
            "Where the zeros are", "bars: mean of a layer's weights; dots: each weight; line: asked"
        ),
    ).encode(x=x)
    bars = base.mark_bar(color="#c9d7e6").encode(
        y=alt.Y("mean(measured):Q", title="measured share of zeros", axis=percent)
    )
    dots = base.mark_circle(size=26, opacity=0.9).encode(
        y="measured:Q",
        color=alt.Color("module:N", title=None, sort=list(dict.fromkeys(layers["module"]))),
        tooltip=["weight", "asked", "measured"],
    )
    return (
        bars
        + dots
        + base.mark_line(color=ORANGE, interpolate="step", strokeWidth=2).encode(y="mean(asked):Q")
    )


def score_slider(steps: pd.DataFrame, *, chosen: float = 0.5) -> alt.HConcatChart:
    """A slider over the sparsity of one weight: which scores go, and the error that is left.

    It moves where charts are live, without a kernel; elsewhere it shows ``chosen``.

    Args:
        steps: columns percent, error, low, high, kept and pruned (`prune.score_steps`).
        chosen: the sparsity to begin with; the nearest of the steps.
    """
    percents = sorted(steps["percent"].unique().tolist())
    first = min(percents, key=lambda percent: abs(percent - 100 * chosen))
    bounds = {"min": percents[0], "max": percents[-1], "step": percents[1] - percents[0]}
    slider = alt.param("percent", value=first, bind=alt.binding_range(name="sparsity, % ", **bounds))
    tall = steps.melt(["percent", "low", "high"], ["pruned", "kept"], "fate", "weights")
    colours = alt.Scale(domain=["kept", "pruned"], range=[BLUE, "#d5dade"])
    top = alt.Scale(domain=[0, float((steps["kept"] + steps["pruned"]).max())])
    scores = (
        alt.Chart(tall, title=title_of("Which scores go"), width=WIDTH // 2 - 40, height=200)
        .transform_filter("datum.percent == percent")
        .mark_bar(binSpacing=0)
        .encode(
            x=alt.X("low:Q", bin="binned", title="log10 of the score"),
            x2="high:Q",
            y=alt.Y("weights:Q", title="weights", axis=alt.Axis(format="~s"), scale=top),
            color=alt.Color("fate:N", title=None, scale=colours, legend=alt.Legend(orient="top")),
            order=alt.Order("fate:N", sort="descending"),
        )
    )
    errors = steps.drop_duplicates("percent")[["percent", "error"]]
    base = alt.Chart(errors, width=WIDTH // 2 - 40, height=200).encode(
        x=alt.X("percent:Q", title="sparsity, %", axis=alt.Axis(grid=False)),
        y=alt.Y("error:Q", title="relative error of the output", axis=alt.Axis(format="%")),
        tooltip=["percent", alt.Tooltip("error:Q", format=".1%")],
    )
    here = base.transform_filter("datum.percent == percent")
    curve = alt.layer(
        base.mark_line(color=BLUE, strokeWidth=2),
        here.mark_point(filled=True, size=120, color=ORANGE, opacity=1),
        here.mark_text(dy=-14, fontSize=12).encode(text=alt.Text("error:Q", format=".1%")),
        title=title_of("What it costs"),
    )
    return alt.hconcat(scores, curve, spacing=30).add_params(slider)

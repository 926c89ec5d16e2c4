"""Every chart of the notebooks, the report and the README: tidy DataFrame in, altair chart out.

Charts are shown as SVG, so that they look the same in JupyterLab, in a rendered report and on a code-hosting page, with no
network. One theme; an ordering has the same colour in every chart.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import altair as alt
import pandas as pd

if TYPE_CHECKING:
    from pftools.orderings import OrderingStep

INK, SOFT, GRID = "#22262b", "#6a737d", "#e7e9ec"
BLUE, ORANGE, GREEN, GREY = "#1f6fb2", "#d9662c", "#2f8f6b", "#9aa3ad"
# Colours stay apart for colour-blind readers; what is only pruned, or not touched, is drawn in greys.
ORDERING_COLOURS = {
    "base": "#22262b",
    "prune": "#9aa3ad",
    "finetune": "#b08d57",
    "finetune_iter": "#7d6608",
    "finetune_prune": ORANGE,
    "prune_finetune": BLUE,
    "finetune_iter_prune": "#c2408f",
    "prune_finetune_iter": "#58a6d6",
    "iter_pf": GREEN,
    "iter_fp": "#7d55c7",
}
_SPARE_COLOURS = ["#a63603", "#08519c", "#006d2c", "#54278f", "#99000d", "#636363"]
_WIDTH = 640


@alt.theme.register("pftools", enable=True)
def _theme() -> alt.theme.ThemeConfig:
    font = "Inter, 'Helvetica Neue', Arial, sans-serif"
    return {
        "config": {
            "font": font,
            "background": "white",
            "view": {"stroke": None, "continuousWidth": _WIDTH, "continuousHeight": 260},
            "title": {
                "anchor": "start",
                "color": INK,
                "fontSize": 14,
                "fontWeight": 600,
                "offset": 12,
                "subtitleColor": SOFT,
                "subtitleFontSize": 12,
                "subtitlePadding": 5,
            },
            "axis": {
                "labelColor": SOFT,
                "titleColor": SOFT,
                "titleFontWeight": "normal",
                "labelFontSize": 11,
                "titleFontSize": 12,
                "gridColor": GRID,
                "domain": False,
                "ticks": False,
                "labelPadding": 6,
            },
            "legend": {
                "labelColor": INK,
                "titleColor": SOFT,
                "titleFontWeight": "normal",
                "symbolStrokeWidth": 3,
            },
            "header": {"labelColor": INK, "titleColor": SOFT, "labelFontSize": 12},
            "range": {"category": [BLUE, ORANGE, GREEN, "#7d55c7", "#c2408f", "#b08d57", "#58a6d6", GREY]},
        }
    }


alt.renderers.enable("svg")
alt.data_transformers.disable_max_rows()


def save(chart: alt.TopLevelMixin, path: str | Path) -> Path:
    """Write a chart as .svg, .png (at twice the size, for sharp screens) or .html with everything inside."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".html":
        chart.save(path, inline=True)
    else:
        chart.save(path, **({"scale_factor": 2} if path.suffix == ".png" else {}))
    return path


def as_svg(chart: alt.TopLevelMixin) -> str:
    """A chart as SVG text."""
    text = io.StringIO()
    chart.save(text, format="svg")
    return text.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Layer by layer


def heat_map(
    table: pd.DataFrame, value: str, *, title: str, subtitle: str = "", label: str = "", percent: bool = False
) -> alt.Chart:
    """One cell a layer and module. ``table`` has columns layer, module and ``value``; a share (``percent``) is coloured
    from 0% to 100%, anything else by its own range."""
    order = list(dict.fromkeys(table["module"]))
    scale = (
        alt.Scale(scheme="tealblues", domain=[0, 1])
        if percent
        else alt.Scale(scheme="tealblues", type="symlog")
    )
    legend = alt.Legend(format="%" if percent else "~g")
    return (
        alt.Chart(table, title=_title(title, subtitle), width=_WIDTH, height=26 * len(order))
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
) -> alt.Chart:
    """One line a module (or whatever column ``colour`` names) over the decoder layers."""
    scale = alt.Scale(type="log") if log else alt.Scale(zero=False)
    return (
        alt.Chart(table, title=_title(title, subtitle))
        .mark_line(point=alt.OverlayMarkDef(size=22), strokeWidth=1.8)
        .encode(
            x=alt.X(
                "layer:Q",
                title="decoder layer",
                axis=alt.Axis(tickMinStep=1, grid=False),
                scale=alt.Scale(nice=False),
            ),
            y=alt.Y(
                f"mean({value}):Q",
                title=label or value,
                scale=scale,
                axis=alt.Axis(format="%" if percent else _number_format(table[value]), labelExpr=_ZERO),
            ),
            color=alt.Color(f"{colour}:N", title=None, sort=list(dict.fromkeys(table[colour]))),
        )
    )


def adapter_matrices(table: pd.DataFrame, *, title: str, subtitle: str = "") -> alt.VConcatChart:
    """The study's figure of an adapter: mean, standard deviation, range and share outside of its matrices A and B, by layer.

    Args:
        table: columns layer, module, matrix ("A" or "B"), mean, std, minimum, maximum, outside_share, outside_share_normal.
    """
    rows = [
        _of_both_matrices(table, ["mean"], "mean", heading=True),
        _of_both_matrices(table, ["std"], "standard deviation"),
        _of_both_matrices(table, ["minimum", "maximum"], "smallest, largest"),
        _of_both_matrices(
            table, ["outside_share"], "share outside", dashed="outside_share_normal", last=True
        ),
    ]
    return alt.vconcat(*rows, spacing=12, title=_title(title, subtitle))


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
        base = alt.Chart(part, width=_WIDTH // 2 - 50, height=105).encode(
            x=alt.X(
                "layer:Q",
                title="decoder layer" if last else None,
                scale=alt.Scale(nice=False),
                axis=alt.Axis(tickMinStep=1, grid=False, labels=last),
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


# ---------------------------------------------------------------------------------------------------------------------
# Pruning


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
            title=_title(
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


def output_error(layers: pd.DataFrame) -> alt.Chart:
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
    return lines_by_layer(
        layers,
        "output_error",
        title="Error of each output",
        label="relative error",
        percent=True,
        subtitle=f"Norm of the lost part of a weight's output, relative to the whole; {' or '.join(how[kind] for kind in kinds)}.",
    )


def sparsity_by_layer(layers: pd.DataFrame) -> alt.LayerChart:
    """Zeros of every decoder layer: what was asked (line), the layer as a whole (bars) and its weights (dots).

    Args:
        layers: the table of a pruning (`PruneResult.layers`).
    """
    x = alt.X("layer:O", title="decoder layer", axis=alt.Axis(labelAngle=0, labelOverlap=True))
    percent = alt.Axis(format="%")
    base = alt.Chart(
        layers,
        title=_title(
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


# ---------------------------------------------------------------------------------------------------------------------
# Fine-tuning


def loss_curve(losses: pd.DataFrame, *, title: str = "Training loss", subtitle: str = "") -> alt.LayerChart:
    """Loss of every logged step (dots) and its running mean (line), against tokens seen."""
    smooth = losses.assign(mean=losses["loss"].ewm(alpha=0.25).mean())
    base = alt.Chart(smooth, title=_title(title, subtitle)).encode(
        x=alt.X("tokens:Q", title="training tokens", axis=alt.Axis(format="~s", grid=False))
    )
    dots = base.mark_circle(color=GREY, size=28, opacity=0.8).encode(
        y=alt.Y("loss:Q", title="loss (nats a token)", scale=alt.Scale(zero=False))
    )
    return dots + base.mark_line(color=BLUE, strokeWidth=2.4).encode(y="mean:Q")


def learning_rate_curve(losses: pd.DataFrame) -> alt.Chart:
    """Warm-up and schedule, as they were."""
    return (
        alt.Chart(losses, title=_title("Learning rate"), height=110)
        .mark_line(color=ORANGE, strokeWidth=2)
        .encode(
            x=alt.X("step:Q", title="optimizer step", axis=alt.Axis(grid=False, tickMinStep=1)),
            y=alt.Y("learning_rate:Q", title=None, axis=alt.Axis(format=".1e", tickCount=3)),
        )
    )


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def block_losses(table: pd.DataFrame, *, title: str, subtitle: str = "") -> alt.LayerChart:
    """Loss of each block in text order, with their mean. ``table`` has columns block and nll."""
    base = alt.Chart(table, title=_title(title, subtitle), height=180)
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
        scores, title=_title(title, "dot: accuracy with 95% interval; tick: the level of guessing")
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


# ---------------------------------------------------------------------------------------------------------------------
# Orderings


def metric_by_sparsity(
    results: pd.DataFrame,
    metric: str,
    *,
    title: str,
    subtitle: str = "",
    label: str = "",
    log: bool = False,
    chance: float | None = None,
    percent: bool = False,
) -> alt.LayerChart:
    """A metric against *measured* sparsity, one line an ordering, with intervals where the table has them.

    Args:
        results: columns ordering, measured and ``metric``; optionally ``metric``_low and ``metric``_high.
        chance: the level of guessing, drawn as a dashed line.
    """
    shown = results.dropna(subset=[metric])
    orderings = list(dict.fromkeys(shown["ordering"]))
    ends = [column for column in (f"{metric}_low", metric, f"{metric}_high") if column in shown]
    axis = alt.Axis(format="%" if percent else "~g", tickCount=7)
    scale = _scale(
        pd.concat([shown[column] for column in ends] + [pd.Series([chance], dtype=float)]), log=log
    )
    colour = alt.Color("ordering:N", title=None, sort=orderings, scale=colours_of(orderings))
    top = float(shown["measured"].max())
    x = alt.X(
        "measured:Q",
        title="measured sparsity",
        axis=alt.Axis(format="%", grid=False, values=_tenths(top)),
        scale=alt.Scale(domain=[-0.02, top + 0.02], nice=False),
    )
    y = alt.Y(f"{metric}:Q", title=label or metric, scale=scale, axis=axis)
    layers: list[alt.Chart] = []
    if chance is not None:
        rule = alt.Chart(pd.DataFrame({"chance": [chance]})).mark_rule(color=SOFT, strokeDash=[5, 4])
        layers.append(rule.encode(y=alt.Y("chance:Q", scale=scale)))
    intervals = f"{metric}_low" in shown
    for number, ordering in enumerate(orderings):
        base = alt.Chart(shown[shown["ordering"] == ordering]).encode(x=x, color=colour)
        # Intervals of orderings at one sparsity would hide each other: they stand side by side, a few pixels apart.
        aside = 8 * (number - (len(orderings) - 1) / 2) if intervals else 0
        if intervals:
            rule = base.mark_rule(strokeWidth=1.5, opacity=0.6, xOffset=aside)
            layers.append(rule.encode(y=alt.Y(f"{metric}_low:Q", scale=scale), y2=f"{metric}_high:Q"))
        layers.append(base.mark_line(strokeWidth=2.2, xOffset=aside).encode(y=y, order="measured:Q"))
        layers.append(
            base.mark_circle(size=80, opacity=1, xOffset=aside).encode(
                y=y, tooltip=["ordering", "asked", "measured", metric]
            )
        )
    return alt.layer(*layers).properties(title=_title(title, subtitle), height=320)


def metric_by_ordering(
    results: pd.DataFrame,
    metric: str,
    *,
    title: str,
    subtitle: str = "",
    label: str = "",
    log: bool = False,
    chance: float | None = None,
    percent: bool = False,
) -> alt.LayerChart:
    """A metric with one row an ordering, for studies of a single sparsity; a dot a seed, and intervals where the table has them.

    Args:
        results: as in `metric_by_sparsity`.
    """
    shown = results.dropna(subset=[metric])
    orderings = list(dict.fromkeys(shown["ordering"]))
    ends = [column for column in (f"{metric}_low", metric, f"{metric}_high") if column in shown]
    scale = _scale(
        pd.concat([shown[column] for column in ends] + [pd.Series([chance], dtype=float)]), log=log
    )
    x = alt.X(
        f"{metric}:Q",
        title=label or metric,
        scale=scale,
        axis=alt.Axis(format="%" if percent else "~g", tickCount=6),
    )
    base = alt.Chart(shown, title=_title(title, subtitle)).encode(
        y=alt.Y("ordering:N", title=None, sort=orderings, axis=alt.Axis(labelFontSize=12, labelColor=INK)),
        color=alt.Color("ordering:N", legend=None, sort=orderings, scale=colours_of(orderings)),
    )
    layers: list[alt.Chart] = []
    if chance is not None:
        rule = alt.Chart(pd.DataFrame({"chance": [chance]})).mark_rule(color=SOFT, strokeDash=[5, 4])
        layers.append(rule.encode(x=alt.X("chance:Q", scale=scale)))
    if f"{metric}_low" in shown:
        layers.append(
            base.mark_rule(strokeWidth=2).encode(
                x=alt.X(f"{metric}_low:Q", scale=scale), x2=f"{metric}_high:Q"
            )
        )
    layers.append(base.mark_circle(size=110, opacity=1).encode(x=x, tooltip=["ordering", "measured", metric]))
    words = base.mark_text(dy=-13, fontSize=11).encode(
        x=x, text=alt.Text(f"{metric}:Q", format=".1%" if percent else ".2f")
    )
    return alt.layer(*layers, words).properties(height=alt.Step(44))


def pair_ratios(pairs: pd.DataFrame, *, title: str) -> alt.LayerChart:
    """Each pair's perplexity ratio with its interval; an interval that holds 1 cannot be told apart.

    Args:
        pairs: columns pair, ratio, low, high, verdict_kind ("differs" or "cannot be told apart").
    """
    base = alt.Chart(
        pairs,
        title=_title(title, "Ratio of two perplexities with its 95% interval; 1 is no difference."),
        width=520,
    )
    y = alt.Y("pair:N", title=None, sort=None, axis=alt.Axis(labelLimit=320))
    kinds = alt.Scale(domain=["differs", "cannot be told apart"], range=[BLUE, GREY])
    colour = alt.Color("verdict_kind:N", title=None, scale=kinds, legend=alt.Legend(orient="top", offset=4))
    scale = _scale(pd.concat([pairs["low"], pairs["high"], pd.Series([1.0])]), log=True)
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
        results, title=_title("Sparsity, asked and measured", "on the diagonal: no zero was lost")
    ).mark_circle(size=90, opacity=0.9)
    percent = alt.Axis(format="%")
    x, y = alt.X("asked:Q", title="asked", axis=percent), alt.Y("measured:Q", title="measured", axis=percent)
    colour = alt.Color("ordering:N", title=None, sort=orderings, scale=colours_of(orderings))
    return (diagonal.encode(x=x, y=y) + dots.encode(x=x, y=y, color=colour)).properties(width=300, height=300)


def ordering_chart(steps: Sequence[OrderingStep]) -> alt.LayerChart:
    """An ordering as stairs: the sparsity after each of its steps, pruning in orange, fine-tuning in blue."""
    rows = [{"place": 0, "step": "base", "sparsity": 0.0}]
    rows += [
        {"place": place, "step": step.kind, "sparsity": step.sparsity} for place, step in enumerate(steps, 1)
    ]
    table = pd.DataFrame(rows)
    base = alt.Chart(
        table,
        title=_title("The way to the target", "P prunes to the level shown; F trains at it"),
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
        table: columns key, parent (a key or empty), depth, lane (both counts), kind ("base", "P" or "F"), label,
            state ("finished", "to do", "failed") and evaluated (whether a result is reported of it).
    """
    shapes = alt.Scale(domain=["base", "P", "F"], range=["diamond", "square", "circle"])
    states = alt.Scale(domain=["finished", "to do", "failed"], range=[GREEN, "#cfd5da", ORANGE])
    places = table.set_index("key")[["depth", "lane"]]
    links = table[table["parent"].isin(places.index)]
    links = links.assign(
        from_depth=links["parent"].map(places["depth"]), from_lane=links["parent"].map(places["lane"])
    )
    # A branch leaves its parent's line at once and then runs level, so that no line crosses another's labels.
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
    width = max(_WIDTH, 62 * (int(table["depth"].max()) + 1))
    title = _title(
        "The plan",
        "Squares prune (to the level written there), circles fine-tune; what has an outline is evaluated.",
    )
    return (lines + marks + words).properties(
        width=width, height=max(120, 32 * (int(table["lane"].max()) + 1)), title=title
    )


def colours_of(orderings: list[str]) -> alt.Scale:
    """The fixed colours of the published orderings; custom ones get the spare colours in their order."""
    spare = iter(_SPARE_COLOURS * (1 + len(orderings) // len(_SPARE_COLOURS)))
    return alt.Scale(
        domain=orderings, range=[ORDERING_COLOURS.get(name) or next(spare) for name in orderings]
    )


def _scale(values: pd.Series, *, log: bool) -> alt.Scale:
    """A scale that spans the values and a little more: vega would round a logarithmic one to whole powers of ten."""
    low, high = float(values.min()), float(values.max())
    if log and low > 0:
        room = (high / low) ** 0.08 if high > low else 1.1
        return alt.Scale(type="log", domain=[low / room, high * room], nice=False)
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return alt.Scale(domain=[low - room, high + room], nice=False)


def _tenths(top: float) -> list[float]:
    """0%, 10%, ... up to the highest sparsity."""
    return [tenth / 10 for tenth in range(int(top * 10 + 1e-6) + 1)]


def _title(text: str, subtitle: str = "") -> alt.TitleParams:
    return alt.TitleParams(text, subtitle=[subtitle]) if subtitle else alt.TitleParams(text)

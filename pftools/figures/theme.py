"""One theme for every chart, the colours of orderings, scales, and charts as files."""

from __future__ import annotations

import io
from pathlib import Path

import altair as alt
import pandas as pd

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
WIDTH = 640


@alt.theme.register("pftools", enable=True)
def _theme() -> alt.theme.ThemeConfig:
    font = "Inter, 'Helvetica Neue', Arial, sans-serif"
    return {
        "config": {
            "font": font,
            "background": "white",
            "view": {"stroke": None, "continuousWidth": WIDTH, "continuousHeight": 260},
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
        chart.save(path, scale_factor=2 if path.suffix == ".png" else 1)
    return path


def as_svg(chart: alt.TopLevelMixin) -> str:
    """A chart as SVG text."""
    text = io.StringIO()
    chart.save(text, format="svg")
    return text.getvalue()


def colours_of(orderings: list[str]) -> alt.Scale:
    """The fixed colours of the published orderings; custom ones get the spare colours in their order."""
    spare = iter(_SPARE_COLOURS * (1 + len(orderings) // len(_SPARE_COLOURS)))
    return alt.Scale(
        domain=orderings, range=[ORDERING_COLOURS.get(name) or next(spare) for name in orderings]
    )


def shapes_of(orderings: list[str]) -> alt.Scale:
    """A shape beside the colour, for readers who do not see colours apart and for print."""
    kinds = ["circle", "square", "triangle-up", "diamond", "triangle-down", "stroke", "triangle-right"]
    return alt.Scale(domain=orderings, range=[kinds[number % len(kinds)] for number in range(len(orderings))])


def scale_of(values: pd.Series, *, log: bool) -> alt.Scale:
    """A scale that spans the values and a little more. Vega would round a logarithmic one to decades."""
    if not len(values):
        return alt.Scale(domain=[0, 1])
    low, high = float(values.min()), float(values.max())
    if log and low > 0:
        room = (high / low) ** 0.08 if high > low else 1.1
        return alt.Scale(type="log", domain=[low / room, high * room], nice=False)
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return alt.Scale(domain=[low - room, high + room], nice=False)


def tenths(top: float) -> list[float]:
    """0%, 10%, ... up to the highest sparsity."""
    return [tenth / 10 for tenth in range(int(top * 10 + 1e-6) + 1)]


def title_of(text: str, subtitle: str = "") -> alt.TitleParams:
    return alt.TitleParams(text, subtitle=[subtitle]) if subtitle else alt.TitleParams(text)

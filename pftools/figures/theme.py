"""One theme for every chart, the colours of orderings, scales, and charts as files."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd

INK, SOFT, GRID = "#22262b", "#5f6872", "#e7e9ec"
BLUE, ORANGE, GREEN, GREY = "#286cab", "#d9662c", "#2f8f6b", "#848d97"
# Cool colours begin with P, warm ones with F. Any two are at least 23 apart (CIE 1976), also for readers who
# do not see red or green; a shape beside the colour tells them apart in grey.
ORDERING_COLOURS = {
    "base": INK,
    "prune": GREY,
    "finetune": "#f36451",
    "finetune_iter": "#a3484b",
    "finetune_prune": "#ec6f00",
    "prune_finetune": BLUE,
    "finetune_iter_prune": "#9f3501",
    "prune_finetune_iter": "#6381f8",
    "iter_pf": "#341f97",
    "iter_fp": "#572263",
}
_SPARE_COLOURS = ["#00796b", "#8a6d00", "#0b7fab", "#b0307e", "#4d7c0f", "#6b4f3a"]
# What a colour of a chart becomes on dark ground.
DARK = {
    INK: "#e6e8eb",
    SOFT: "#a9b1ba",
    GRID: "#31373e",
    GREY: "#9aa3ad",
    BLUE: "#5984ae",
    GREEN: "#5fbf99",
    ORANGE: "#ef8a56",
    "#f36451": "#d05320",
    "#a3484b": "#b9645d",
    "#ec6f00": "#fbc10f",
    "#9f3501": "#f2bf96",
    "#6381f8": "#796ce0",
    "#341f97": "#be9cfd",
    "#572263": "#d6bef5",
    "#00796b": "#4db6a8",
    "#8a6d00": "#d0b24a",
    "#0b7fab": "#5cbde4",
    "#b0307e": "#ec7fc0",
    "#4d7c0f": "#93c457",
    "#6b4f3a": "#bd9c84",
    "#cfd5da": "#4a525b",
    "#d5dade": "#4a525b",
    "#c9d7e6": "#33465a",
    "white": "#16191d",
}
# Outlines in a box from -1 to 1, as SVG and Vega both read them.
SHAPES = {
    "circle": "M1,0A1,1,0,1,1,-1,0A1,1,0,1,1,1,0Z",
    "square": "M-0.9,-0.9H0.9V0.9H-0.9Z",
    "diamond": "M0,-1.25L1.1,0L0,1.25L-1.1,0Z",
    "pentagon": "M0,-1.1L1.1,-0.3L0.68,1H-0.68L-1.1,-0.3Z",
    "up": "M0,-1.15L1.15,0.9H-1.15Z",
    "down": "M0,1.15L1.15,-0.9H-1.15Z",
    "right": "M1.15,0L-0.9,1.15V-1.15Z",
    "left": "M-1.15,0L0.9,1.15V-1.15Z",
    "cross": "M-0.4,-1.15H0.4V-0.4H1.15V0.4H0.4V1.15H-0.4V0.4H-1.15V-0.4H-0.4Z",
    "star": "M0,-1.3L0.35,-0.45L1.24,-0.4L0.55,0.18L0.76,1.05L0,0.58L-0.76,1.05L-0.55,0.18L-1.24,-0.4"
    "L-0.35,-0.45Z",
}
_ORDERING_SHAPES = {
    "base": "circle",
    "prune": "square",
    "finetune": "pentagon",
    "finetune_iter": "diamond",
    "finetune_prune": "up",
    "prune_finetune": "down",
    "finetune_iter_prune": "right",
    "prune_finetune_iter": "left",
    "iter_pf": "cross",
    "iter_fp": "star",
}
_SPARE_SHAPES = ["circle", "square", "diamond", "up", "cross", "down", "star"]
WIDTH, HEIGHT = 640, 260


@alt.theme.register("pftools", enable=True)
def _theme() -> alt.theme.ThemeConfig:
    font = "Inter, 'Helvetica Neue', Arial, sans-serif"
    return {
        "config": {
            "font": font,
            "background": "white",
            "view": {"stroke": None, "continuousWidth": WIDTH, "continuousHeight": HEIGHT},
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
                "labelLimit": 0,
            },
            "legend": {
                "labelColor": INK,
                "titleColor": SOFT,
                "titleFontWeight": "normal",
                "symbolStrokeWidth": 3,
            },
            "text": {"color": INK},
            "header": {"labelColor": INK, "titleColor": SOFT, "labelFontSize": 12},
            "range": {"category": [BLUE, ORANGE, GREEN, "#341f97", "#b0307e", "#8a6d00", "#6381f8", GREY]},
        }
    }


# What JupyterLab draws with its own Vega-Lite, one version older than Altair's: these charts read the same in
# both.
LIVE = "application/vnd.vegalite.v5+json"
_SCHEMA = "https://vega.github.io/schema/vega-lite/v5.json"
_EMBEDDED = {"embedOptions": {"renderer": "svg", "actions": False}}


def _both(spec: dict[str, Any], **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A chart as a cell's output: live where there is a script for it, and as SVG everywhere else."""
    import vl_convert

    svg = vl_convert.vegalite_to_svg(spec, vl_version=".".join(alt.SCHEMA_VERSION.split(".")[:2]))
    live = _of_both_grounds(spec) | {"$schema": _SCHEMA, "usermeta": _EMBEDDED}
    return {LIVE: live, "image/svg+xml": svg}, {}


def _of_both_grounds(part: Any) -> Any:
    """A part of a chart whose colours follow its place, light or dark; the data are as they were."""
    if isinstance(part, dict):
        kept = ("datasets", "values")
        return {key: value if key in kept else _of_both_grounds(value) for key, value in part.items()}
    if isinstance(part, list):
        return [_of_both_grounds(value) for value in part]
    return light_or_dark(part) if isinstance(part, str) else part


def light_or_dark(colour: str) -> str:
    """A colour as CSS that follows the colour scheme of its place; what is none of ours, as it is."""
    return f"light-dark({colour}, {DARK[colour]})" if colour in DARK else colour


def drawn_on_both_grounds(svg: str) -> str:
    """A drawing of a chart, in SVG, for a place that may be light or dark."""
    return re.sub(r'(?<=fill="|roke=")[^"]+', lambda found: light_or_dark(found.group()), svg)


alt.renderers.register("pftools", _both)
alt.renderers.enable("pftools")
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


def looks_of(orderings: Sequence[str]) -> dict[str, tuple[str, str]]:
    """{ordering: (colour, outline)} of a study: fixed for published orderings, else the spare ones in order.

    Give it all orderings of a study, so that one looks alike in every chart, whichever a chart shows.
    """
    looks: dict[str, tuple[str, str]] = {}
    others = 0
    for name in dict.fromkeys(orderings):
        if name in ORDERING_COLOURS:
            looks[name] = (ORDERING_COLOURS[name], SHAPES[_ORDERING_SHAPES[name]])
        else:
            shape = SHAPES[_SPARE_SHAPES[others % len(_SPARE_SHAPES)]]
            looks[name] = (_SPARE_COLOURS[others % len(_SPARE_COLOURS)], shape)
            others += 1
    return looks


def colours_of(orderings: Sequence[str]) -> alt.Scale:
    """The colours of a study's orderings, as a scale."""
    looks = looks_of(orderings)
    return alt.Scale(domain=list(looks), range=[colour for colour, _ in looks.values()])


def shapes_of(orderings: Sequence[str]) -> alt.Scale:
    """The shapes of a study's orderings, as a scale."""
    looks = looks_of(orderings)
    return alt.Scale(domain=list(looks), range=[shape for _, shape in looks.values()])


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


def layer_ticks(layers: pd.Series) -> list[int]:
    """The decoder layers that an axis names: all, or every second one, or fewer."""
    found = sorted(layers.unique().tolist())
    return found[:: math.ceil(len(found) / 16)]


def ticks_of(low: float, high: float, *, log: bool) -> tuple[list[float], str]:
    """Round numbers between two, about six, and a format with enough digits that no two look alike."""
    if not 0 < high - low < math.inf:
        return [low], ",~g"
    if log and low > 0 and high / low > 4:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for factors in ((1, 2, 5), (1, 3), (1,)):
            found = [factor * 10.0**decade for decade in decades for factor in factors]
            found = [value for value in found if low <= value <= high]
            if len(found) <= 8:
                break
        return found[:: math.ceil(len(found) / 8) or 1], ",~g"
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    first = math.ceil(low / step - 1e-9)
    found = [round(number * step, digits + 1) for number in range(first, math.floor(high / step + 1e-9) + 1)]
    return found, f",.{digits}f"


def title_of(text: str, subtitle: str = "") -> alt.TitleParams:
    return alt.TitleParams(text, subtitle=[subtitle]) if subtitle else alt.TitleParams(text)

"""Charts of a notebook's outputs made ready for a page: alive where there is a script, drawings elsewhere."""

from __future__ import annotations

import copy
import json
import re
from html import escape
from importlib import metadata
from typing import Any

from pftools import figures, files
from pftools.pretrained.base_models import cache_folder

_HIDDEN = "hidden"  # the signal that names the orderings that a reader has switched off
_FILTER = {"filter": f"indexof({_HIDDEN}, datum.ordering) < 0"}


def figure(data: dict[str, Any], prefix: str) -> str:
    """A chart as part of a page: a drawing, for paper and without scripts, and what the live one needs.

    Args:
        data: a cell's output, by media type.
        prefix: of the ids within the drawing, which are unique in a page.
    """
    svg = re.sub(
        r'(\bid="|url\(#|href="#)', lambda found: f"{found.group(1)}{escape(prefix)}-", data["image/svg+xml"]
    )
    spec = data.get(figures.LIVE)
    title, subtitle = titles_of(spec) if spec else (_title_in(svg), "")
    words = str(spec.get("description") or f"{title}. {subtitle}") if spec else title
    drawing = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(words)}" ', 1)
    drawn = f'<div class="drawing">{drawing}</div>'
    if not spec:
        return f'<figure role="group" aria-label="{escape(title)}" tabindex="0">{drawn}</figure>'
    caption = f"<b>{escape(title)}</b>" + (f" <span>{escape(subtitle)}</span>" if subtitle else "")
    return (
        f'<figure role="group" aria-label="{escape(title)}" data-says="{escape(words)}">'
        f'<figcaption>{caption}</figcaption><div class="chart"></div>{drawn}'
        f'<script type="application/json">{_json(prepared(spec))}</script></figure>'
    )


def _title_in(svg: str) -> str:
    words = re.search(r"(?:Title text|Subtitle text) '([^\"]*)'\"", svg)
    return words.group(1) if words else "Chart"


def titles_of(spec: dict[str, Any]) -> tuple[str, str]:
    """(title, subtitle) of a chart."""
    title = _titled(spec).get("title") or {}
    if isinstance(title, str):
        return title, ""
    subtitle = title.get("subtitle") or ""
    lines = subtitle if isinstance(subtitle, list) else [subtitle]
    text = title.get("text") or "Chart"
    return text if isinstance(text, str) else " ".join(text), " ".join(lines)


def _titled(spec: dict[str, Any]) -> dict[str, Any]:
    """The part of a chart that has its title: the whole, or one of its layers."""
    parts = [spec, *spec.get("layer", [])]
    return next((part for part in parts if part.get("title")), spec)


def _json(spec: dict[str, Any]) -> str:
    """JSON that cannot end the element that it stands in."""
    return json.dumps(spec, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def prepared(spec: dict[str, Any]) -> dict[str, Any]:
    """A chart for a page: as wide as its place, without title and key, which are the page's own words.

    What has a column `ordering` can be switched off by the signal `hidden`.
    """
    spec = copy.deepcopy(spec)
    spec.pop("$schema", None)
    _titled(spec).pop("title", None)
    spec.get("config", {}).pop("background", None)
    spec["background"] = None
    if not any(name in spec for name in ("hconcat", "vconcat", "concat", "facet", "repeat")):
        spec["width"] = "container"
    if _can_be_switched_off(spec):
        spec["params"] = [*spec.get("params", []), {"name": _HIDDEN, "value": []}]
    return spec


def _can_be_switched_off(spec: dict[str, Any]) -> bool:
    """Let the signal decide about the marks of every unit with an ordering; False: there is none."""
    found = False
    for part in [part for name in ("layer", "hconcat", "vconcat", "concat") for part in spec.get(name, [])]:
        found = _can_be_switched_off(part) or found
    encoding = spec.get("encoding", {})
    own = False
    for channel in ("color", "shape", "fill", "detail"):
        if isinstance(encoding.get(channel), dict) and encoding[channel].get("field") == "ordering":
            if channel != "detail":
                encoding[channel]["legend"] = None
            own = True
    if own and "mark" in spec:
        spec["transform"] = [_FILTER, *spec.get("transform", [])]
    return own or found


def script() -> str:
    """Vega, Vega-Lite and Vega-Embed in one text, which vl-convert brings; it asks nothing of any network."""
    import vl_convert

    version = metadata.version("vl-convert-python")
    kept = cache_folder() / f"vega-embed-{version}.js"
    if kept.exists():
        return kept.read_text(encoding="utf-8")
    text: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    text = text.replace("</script", "<\\/script")
    kept.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(kept, text)
    return text

"""Names at the ends of lines, moved apart where they would lie on each other."""

from __future__ import annotations

from typing import Any, cast

import altair as alt
import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from pftools.figures.theme import INK

_GAP = 13.0  # pixels from one name to the next
_LETTER, _NEAR = 0.011, 0.05  # of a chart's width and height: a letter, and what is too near to a name
_NARROW = 520  # pixels: on a chart that is narrower names would take the room of the lines
# Where nothing is known of its place, as in a drawing, a chart is as wide as it says.
_WIDE = f"width > 0 && (containerSize()[0] || {_NARROW}) >= {_NARROW}"


def names_at_ends(
    ends: pd.DataFrame, x: alt.X, value: str, *, scale: alt.Scale, height: int, tells: str
) -> alt.Chart | None:
    """The name of each line right of its end; None where there are more than have room.

    Args:
        ends: the last point of every line: columns label, ``value`` and those of ``x`` and ``tells``.
        x: the channel that the lines have.
        value: the column on the other axis.
        scale: of that axis, with its domain.
        height: of the chart, in pixels.
        tells: the column that gives lines their colour.
    """
    field = str(cast(dict[str, Any], x.to_dict())["field"].partition(":")[0])
    placed = []
    for _, group in ends.groupby(ends[field].round(2)):
        if len(group) * _GAP > height:
            return None
        pixels = apart(_pixels(group[value], scale, height), height)
        placed.append(group.assign(place=_values(pixels, scale, height)))
    if not placed:
        return None
    shown = pd.concat(placed)[list(dict.fromkeys([field, "label", tells, "place"]))]
    words = alt.Chart(shown).transform_calculate(name=f"{_WIDE} ? datum.label : ''")
    return words.mark_text(align="left", dx=11, fontSize=11, color=INK).encode(
        x=x, y=alt.Y("place:Q", scale=scale), text="name:N", detail=f"{tells}:N"
    )


def free_ends(points: pd.DataFrame, ends: pd.DataFrame, x: str, value: str, scale: alt.Scale) -> pd.DataFrame:
    """The ends that have room for a name: no point of another line lies right of them, at that height.

    Args:
        points: of all lines: columns label, ``x`` and ``value``.
        ends: the last point of every line.
        scale: of ``value``, with its domain.
    """
    span = points[x].max() - points[x].min() or 1.0
    heights = _pixels(points[value], scale, 1)
    free = []
    for label, at, height in zip(ends["label"], ends[x], _pixels(ends[value], scale, 1)):
        reach = at + span * _LETTER * (len(label) + 3)
        near = (points[x] > at) & (points[x] <= reach) & (abs(heights - height) < _NEAR)
        free.append(not (near & (points["label"] != label)).any())
    return ends[np.array(free, dtype=bool)]


def apart(wished: ArrayLike, height: float) -> np.ndarray:
    """Places within a height that are a line of text apart, and as near as can be to those wished for."""
    from scipy.optimize import isotonic_regression

    wished = np.asarray(wished, dtype=float)
    order = np.argsort(wished, kind="stable")
    steps = _GAP * np.arange(len(wished))
    found = isotonic_regression(wished[order] - steps).x
    places = np.empty(len(wished))
    places[order] = found.clip(0, max(height - steps[-1], 0)) + steps
    return places


def _pixels(values: pd.Series, scale: alt.Scale, height: int) -> np.ndarray:
    low, high = scale["domain"]
    return height * (1 - _share(values.to_numpy(dtype=float), low, high, scale))


def _values(pixels: np.ndarray, scale: alt.Scale, height: int) -> np.ndarray:
    low, high = scale["domain"]
    share = 1 - pixels / height
    return low * (high / low) ** share if _is_log(scale) else low + share * (high - low)


def _share(values: np.ndarray, low: float, high: float, scale: alt.Scale) -> np.ndarray:
    if _is_log(scale):
        return np.log(values / low) / np.log(high / low)
    return (values - low) / (high - low)


def _is_log(scale: alt.Scale) -> bool:
    return bool(scale.to_dict().get("type") == "log")

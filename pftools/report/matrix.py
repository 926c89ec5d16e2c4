"""The verdicts of a sparsity as a matrix: row against column, coloured by the ratio of perplexities."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import pandas as pd

from pftools.figures import light_or_dark, looks_of

# In a notebook the matrix brings its own looks, light or dark; a page has the colours as variables.
STYLE = """<style>
.matrix { border-collapse: separate; border-spacing: 2px; font-size: 12px; width: auto; margin: 6px 0 2px; }
.matrix caption { text-align: left; font-weight: 600; padding: 4px 0; }
.matrix th { font-weight: 500; text-align: left; padding: 0 8px 0 0; border: 0; white-space: nowrap; }
.matrix thead th { text-align: center; padding: 0; }
.matrix td { min-width: 44px; height: 28px; padding: 0 4px; text-align: center; border: 0; border-radius: 3px;
  font-variant-numeric: tabular-nums; cursor: default; white-space: nowrap; }
.matrix td.better { background: color-mix(in srgb, var(--cool, light-dark(#286cab, #5984ae)) var(--w),
  var(--paper, light-dark(#fff, #16191d))); }
.matrix td.worse { background: color-mix(in srgb, var(--warm, light-dark(#ec6f00, #b9645d)) var(--w),
  var(--paper, light-dark(#fff, #16191d))); }
.matrix td.unsure { background: repeating-linear-gradient(135deg,
  var(--faint, light-dark(#eef0f2, #262b31)) 0 4px,
  var(--paper, light-dark(#fff, #16191d)) 4px 8px); }
.matrix td.alike { background: var(--faint, light-dark(#eef0f2, #262b31)); }
.matrix td.none { color: var(--soft, light-dark(#5f6872, #a9b1ba)); }
.matrix-key { font-size: 12.5px; color: var(--soft, light-dark(#5f6872, #a9b1ba)); }
</style>"""
_KINDS = {
    "cannot be told apart": "unsure",
    "equivalent": "alike",
    "not comparable": "none",
    "collapsed": "none",
}
NOTHING = (
    "No two orderings have a finished training of one seed at one sparsity: there is nothing to compare yet."
)
KEY = (
    "A cell is the perplexity of its row over that of its column: blue is lower, so better, orange higher; "
    "hatched: cannot be told apart; plain grey: equivalent within the study's margin; – not comparable; "
    "× collapsed."
)


def verdict_matrix(pairs: pd.DataFrame, orderings: Sequence[str], order: pd.DataFrame) -> str:
    """A matrix a sparsity, the highest first; its rows and columns run from the best perplexity to the worst.

    Args:
        pairs: what `compare.compare_orderings` returns.
        orderings: all of the study, which decide the marks.
        order: the entries: columns label, ordering, asked, perplexity.

    Returns:
        HTML. A cell's `title` is the verdict's sentence.
    """
    if not len(pairs):
        return f"<p>{NOTHING}</p>"
    verdicts: dict[tuple[float, str, str], Any] = {}
    for row in pairs.to_dict("records"):
        verdicts[(row["asked"], row["first"], row["second"])] = {**row, "turned": False}
        verdicts[(row["asked"], row["second"], row["first"])] = {**row, "turned": True}
    tables = []
    for asked in sorted(pairs["asked"].unique(), reverse=True):
        there = order[order["asked"].round(10) == round(asked, 10)].sort_values("perplexity")
        labels = list(zip(there["label"].tolist(), there["ordering"].tolist()))
        where = pairs.loc[pairs["asked"] == asked, "where"].iloc[0]

        def cell(label: str, other: str, column: int, asked: float = asked) -> str:
            return _cell(verdicts.get((asked, label, other)), column)

        tables.append(square(f"At {where}", f"Verdicts at {where}", labels, cell, orderings))
    return f'{STYLE}<div class="matrices">{"".join(tables)}</div><p class="matrix-key">{KEY}</p>'


def square(
    caption: str,
    what: str,
    labels: Sequence[tuple[str, str]],
    cell: Callable[[str, str, int], str],
    orderings: Sequence[str],
) -> str:
    """A table with a row and a column a label.

    Args:
        caption: over the table. what: of the cells, for readers who listen.
        labels: (label, ordering), in the order of rows and columns.
        cell: makes the cell of a row's and a column's label; it is given the number of the column's ordering.
        orderings: all of the study, which decide the marks.
    """
    numbers = {name: place for place, name in enumerate(orderings)}
    head = "".join(
        f'<th scope="col" class="o-{numbers[ordering]}" title="{escape(label)}">{glyph(ordering, orderings)}'
        f"<br>{place}</th>"
        for place, (label, ordering) in enumerate(labels, 1)
    )
    body = "".join(
        f'<tr class="row o-{numbers[ordering]}"><th scope="row">{glyph(ordering, orderings)} {place} '
        f"{escape(label)}</th>"
        + "".join(cell(label, other, numbers[column]) for other, column in labels)
        + "</tr>"
        for place, (label, ordering) in enumerate(labels, 1)
    )
    return (
        f'<div class="wide" tabindex="0" role="group" aria-label="{escape(what)}">'
        f'<table class="matrix"><caption>{escape(caption)}</caption>'
        f'<thead><tr><th scope="col"></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _cell(verdict: dict[str, Any] | None, column: int) -> str:
    if verdict is None:
        return f'<td class="o-{column}"></td>'
    kind = _KINDS.get(verdict["verdict_kind"], "")
    ratio = verdict["ratio"]
    if verdict["turned"] and ratio == ratio and ratio:
        ratio = 1 / ratio
    shown = {"collapsed": "×", "not comparable": "–"}.get(verdict["verdict_kind"]) or ratio_in_words(ratio)
    kind = kind or ("better" if ratio < 1 else "worse")
    weight = f"{12 + 36 * min(1.0, abs(math.log(ratio)) / 0.4):.0f}%" if kind in ("better", "worse") else "0%"
    says = escape(verdict["verdict"])
    return f'<td class="{kind} o-{column}" style="--w:{weight}" tabindex="0" title="{says}">{shown}</td>'


def ratio_in_words(ratio: float) -> str:
    """A ratio with as many digits as tell it from 1: 0.832, 1.08, 0.9987."""
    if ratio > 100:
        return "> 100"
    if ratio < 0.01:
        return "< 0.01"
    for digits in (2, 3, 4):
        if abs(ratio - 1) >= 3 * 10.0**-digits:
            return f"{ratio:.{digits}f}"
    return f"{ratio:.4f}"


def glyph(ordering: str, orderings: Sequence[str], size: int = 12) -> str:
    """The mark of an ordering as a small drawing: its colour and its shape in all charts."""
    looks = looks_of(orderings)
    colour, outline = looks[ordering]
    number = list(looks).index(ordering)
    return (
        f'<svg class="glyph" width="{size}" height="{size}" viewBox="-1.4 -1.4 2.8 2.8" aria-hidden="true">'
        f'<path d="{outline}" style="fill:var(--o{number}, {light_or_dark(colour)})"/></svg>'
    )

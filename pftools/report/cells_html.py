"""Cells of an executed notebook as HTML of our own: nbconvert's own page loads scripts from elsewhere."""

from __future__ import annotations

import re
from typing import Any

from pftools.colab import without_badge
from pftools.report.live import figure

_HEADING = re.compile(r"<h([1-6])( [^>]*)?>(.*?)</h\1>", re.DOTALL)


class Exporter:
    """Turns cells into HTML; one for many notebooks, as it takes long to make.

    code: whether the cells' code is shown too.
    """

    def __init__(self, *, code: bool = False) -> None:
        from nbconvert import HTMLExporter

        self._exporter = HTMLExporter(
            template_name="basic",
            exclude_input=not code,
            exclude_input_prompt=True,
            exclude_output_prompt=True,
            exclude_anchor_links=True,
        )

    def __call__(self, cells: list[Any]) -> str:
        """These cells, with headings that have ids and tables whose headings have a scope."""
        import nbformat

        bare = [nbformat.from_dict({**cell, "metadata": {}}) for cell in cells]
        body, _ = self._exporter.from_notebook_node(nbformat.v4.new_notebook(cells=bare))
        return with_ids(re.sub(r"<th (?!scope)(?=[^>]*class=\"col_heading)", '<th scope="col" ', body))


def with_ids(html: str) -> str:
    """Every heading with an id that is made of its words."""
    taken: set[str] = set()

    def named(found: re.Match[str]) -> str:
        level, _, words = found.groups()
        base = "-".join(re.findall(r"[a-z0-9]+", re.sub(r"<[^>]+>|&\S+?;", "", words).lower())) or "part"
        name, number = base, 2
        while name in taken:
            name, number = f"{base}-{number}", number + 1
        taken.add(name)
        return f'<h{level} id="{name}">{words}</h{level}>'

    return _HEADING.sub(named, html)


def sections(html: str) -> list[tuple[str, str]]:
    """(id, words) of the second-level headings."""
    found = re.findall(r'<h2 id="([^"]*)">(.*?)</h2>', html, re.DOTALL)
    return [(name, re.sub(r"<[^>]+>", "", words)) for name, words in found]


def tidy(cell: Any, prefix: str) -> None:
    """Charts become part of the page; what the kernel warns of belongs to a notebook, not to a report."""
    if cell.cell_type != "code":
        cell.source = without_badge(cell.source)
        return
    cell.outputs = [
        output for output in cell.outputs if output.output_type != "stream" or output.get("name") == "stdout"
    ]
    for number, output in enumerate(cell.outputs):
        data = output.get("data", {})
        if "image/svg+xml" in data:
            output.data = type(data)({"text/html": figure(data, f"{prefix}-{number}")})
        elif "<table" in data.get("text/html", "") and 'class="wide"' not in data["text/html"]:
            output.data = type(data)(
                {"text/html": f'<div class="wide" tabindex="0">{data["text/html"]}</div>'}
            )


def has_words(cell: Any) -> bool:
    """Whether anything of a cell is to be shown where code is not."""
    return cell.cell_type == "markdown" or bool(cell.get("outputs"))


def tags_of(cell: Any) -> list[str]:
    return list(cell.metadata.get("tags", []))

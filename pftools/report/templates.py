"""The templates of pages: one sheet, and what a report and a step put on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
FILES = sorted(path for path in _HERE.iterdir() if path.suffix in (".html", ".css", ".js"))


def filled(template: str, /, *styles: str, **values: Any) -> str:
    """A template with these values in their places; what is put in is escaped where the template lets it.

    Args:
        template: the name of a file here, such as `page.html`.
        styles: style sheets, the last of which wins.
        values: for the template.
    """
    from jinja2 import Environment, FileSystemLoader

    found = Environment(autoescape=True, loader=FileSystemLoader(_HERE)).get_template(template)
    return found.render(style="\n".join(styles), **values)


def text_of(name: str) -> str:
    """The text of a file here."""
    return (_HERE / name).read_text(encoding="utf-8")

"""Words of others (names, descriptions, paths) inside Markdown of our own."""

from __future__ import annotations

import re

# What neither Markdown nor HTML nor TeX reads as more than itself, within a line.
_SPECIAL = re.compile(r"[^\w\s.,:;()/%?!'’=-]|(?<!\w)_|_(?!\w)|\A-|(?<=\A\d)[.)]")


def plain(text: str) -> str:
    """The text as it is, in one line: nothing in it is a heading, an emphasis, a formula or a tag."""
    return _SPECIAL.sub(lambda found: f"&#{ord(found.group())};", " ".join(str(text).split()))


def code(text: str) -> str:
    """A name in the type of code."""
    text = " ".join(str(text).split())
    fence = "`" * (1 + max((len(ticks) for ticks in re.findall("`+", text)), default=0))
    room = " " if len(fence) > 1 else ""
    return f"{fence}{room}{text}{room}{fence}"


def bullets(sentences: list[str]) -> str:
    """A list of plain sentences."""
    return "\n".join(f"- {plain(sentence)}" for sentence in sentences)

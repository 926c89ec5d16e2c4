"""Python's own language reference as a corpus: `pydoc_data.topics`, which is inside every Python.

It is split by topic, and topics that repeat each other's paragraphs go to the same split: the chapter
"compound" contains the section "if", and a model calibrated on one must not be tested on the other.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from functools import cache

from pftools.corpora.splits import deal

SHARES = {"calibration": 0.36, "train": 0.34, "validation": 0.06, "test": 0.24}


def digest() -> str:
    """The sha256 of all topics, in hexadecimal digits: each Python has its own."""
    from pydoc_data.topics import topics

    text = "\0".join(f"{name}\0{topics[name]}" for name in sorted(topics))
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def documents() -> dict[str, list[str]]:
    """{split: topics}.

    Groups of overlapping topics are dealt whole, the largest first. Of sections that a chapter of the same
    group repeats, only the chapter is kept.
    """
    from pydoc_data.topics import topics

    groups = sorted(
        _overlapping(topics), key=lambda group: (-sum(len(topics[name]) for name in group), group)
    )
    return deal([_without_repeats({name: topics[name] for name in group}) for group in groups], SHARES)


def paragraphs(text: str) -> set[str]:
    """The paragraphs of a text that are longer than a heading or a short line."""
    found = (paragraph.strip() for paragraph in text.split("\n\n"))
    return {paragraph for paragraph in found if len(paragraph) > 60}


def _overlapping(topics: dict[str, str]) -> list[list[str]]:
    """Sorted groups of topics, linked where two share a paragraph."""
    group_of = {name: {name} for name in topics}
    holders = defaultdict(list)
    for name, text in topics.items():
        for paragraph in paragraphs(text):
            holders[paragraph].append(name)
    for first, *others in holders.values():
        for other in others:
            if group_of[first] is not group_of[other]:
                group_of[first] |= group_of[other]
                for name in group_of[other]:
                    group_of[name] = group_of[first]
    return [sorted(group) for group in {id(group): group for group in group_of.values()}.values()]


def _without_repeats(topics: dict[str, str]) -> list[str]:
    """The texts of a group, longest first, less those whose paragraphs mostly stand in one already kept."""
    kept: list[str] = []
    seen: set[str] = set()
    for text in sorted(topics.values(), key=lambda text: (-len(text), text)):
        own = paragraphs(text)
        if not own or len(own & seen) <= len(own) / 2:
            kept.append(text)
            seen |= own
    return kept

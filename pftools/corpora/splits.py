"""From one heap of documents to calibration, train, validation and test, always in the same way."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from pftools.errors import PftoolsError

SPLITS = ("calibration", "train", "validation", "test")
_SHARES = {"calibration": 0.15, "train": 0.6, "validation": 0.05, "test": 0.2}
_FEWEST = 20  # documents, as one of twenty is the share of validation
_PIECE = 2000  # characters of a piece of a text, about a block of 512 tokens


def deal(groups: Iterable[list[str]], shares: Mapping[str, float]) -> dict[str, list[str]]:
    """{split: documents}: each group goes to the split that is furthest below its share of characters.

    Args:
        groups: documents that may not be parted, in the order in which they are dealt.
        shares: {split: share}, which add up to 1.
    """
    groups = list(groups)
    room = {split: share * sum(map(_size, groups)) for split, share in shares.items()}
    dealt: dict[str, list[str]] = {split: [] for split in shares}
    for group in groups:
        split = max(room, key=lambda name: room[name])
        dealt[split] += group
        room[split] -= _size(group)
    return dealt


def split_documents(documents: list[str], place: str) -> dict[str, list[str]]:
    """{split: documents in their order}. Equal documents stay together, so none is in two splits.

    They are dealt in the order of their sha256: neither a seed nor their order in the file decides.

    Args:
        documents: all of them; empty ones are left out.
        place: where they are from, for the message.

    Raises:
        PftoolsError: there are too few.
    """
    copies: dict[str, list[str]] = {}
    for document in documents:
        if document.strip():
            copies.setdefault(document, []).append(document)
    if len(copies) < _FEWEST:
        raise PftoolsError(
            f"{place} holds {len(copies)} different documents, too few for {', '.join(SPLITS)}: give "
            f"at least {_FEWEST}, or a folder with a file for each split, such as train.txt and test.txt."
        )
    order = sorted(copies, key=lambda document: hashlib.sha256(document.encode()).hexdigest())
    dealt = deal([copies[document] for document in order], _SHARES)
    home = {document: split for split, found in dealt.items() for document in found}
    return {split: [text for text in documents if home.get(text) == split] for split in SPLITS}


def pieces(text: str) -> list[str]:
    """A text as pieces of whole paragraphs, each about as long as a block, or shorter where the text is."""
    longest = min(_PIECE, len(text) // (2 * _FEWEST))
    found: list[str] = []
    room = 0
    for paragraph in filter(str.strip, text.split("\n\n")):
        if room <= 0:
            found.append(paragraph)
            room = longest
        else:
            found[-1] += "\n\n" + paragraph
        room -= len(paragraph)
    return found


def _size(group: list[str]) -> int:
    return sum(map(len, group))

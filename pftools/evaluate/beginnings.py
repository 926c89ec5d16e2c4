"""Which prompts share a beginning that is worth reading once. Plain lists of tokens: no model, no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Reading a beginning on its own is one more forward, of a batch of one. It has to save at least this many
# tokens.
WORTH_TOKENS = 512


@dataclass
class Row:
    """One sequence to read.

    requests: what is answered from it, as pairs (request's place, continuation tokens).
    """

    tokens: tuple[int, ...]
    requests: list[tuple[int, list[int]]]

    @property
    def needed(self) -> int:
        """How many of the last positions have a logit that is asked for."""
        return max(len(continuation) for _, continuation in self.requests)


@dataclass
class Group:
    """Rows that begin with the same ``shared`` tokens; 0 where no beginning is worth a forward of its own."""

    rows: list[Row]
    shared: int = 0

    @property
    def longest(self) -> Row:
        """The row with most tokens."""
        return max(self.rows, key=lambda row: len(row.tokens))


@dataclass
class _Stretch:
    """Neighbouring rows [start, stop): what is saved at best, and the (start, stop, shared tokens) that save
    it.

    room: how long a shared beginning may be for all of them.
    """

    start: int
    stop: int
    room: int
    saved: int
    best: list[tuple[int, int, int]]


def group_rows(rows: Sequence[Row]) -> list[Group]:
    """The rows in groups, so that the most tokens are saved; those that share nothing are the last group."""
    rows = sorted(rows, key=lambda row: row.tokens)
    common = [common_length(one.tokens, other.tokens) for one, other in zip(rows, rows[1:])]
    # A beginning must leave every row the positions whose logits are asked for.
    room = [len(row.tokens) - row.needed for row in rows]
    stretches = best_stretches(common, room)
    groups = [Group(rows[start:stop], shared) for start, stop, shared in stretches]
    taken = {place for start, stop, _ in stretches for place in range(start, stop)}
    alone = [row for place, row in enumerate(rows) if place not in taken]
    return groups + ([Group(alone)] if alone else [])


def best_stretches(common: Sequence[int], room: Sequence[int]) -> list[tuple[int, int, int]]:
    """Disjoint (start, stop, shared tokens) of sorted rows that save the most reading.

    Neighbours are joined, those with the longest common beginning first. A joint stretch reads its beginning
    once instead of once a row; it is taken if that saves more than the best of its two parts together.

    Args:
        common: how many tokens each row has in common with the next; one fewer than there are rows.
        room: how long a shared beginning may be for each row.
    """
    by_start = {row: _Stretch(row, row + 1, limit, 0, []) for row, limit in enumerate(room)}
    by_stop = {stretch.stop: stretch for stretch in by_start.values()}
    for row in sorted(range(len(common)), key=lambda row: -common[row]):
        left, right = by_stop.pop(row + 1), by_start.pop(row + 1)
        joint = _join(left, right, common[row])
        by_start[joint.start] = by_stop[joint.stop] = joint
    return [found for stretch in by_start.values() for found in stretch.best]


def _join(left: _Stretch, right: _Stretch, common: int) -> _Stretch:
    """Two neighbouring stretches as one: read together, or apart as they were, whichever saves more."""
    start, stop, room = left.start, right.stop, min(left.room, right.room)
    shared = min(common, room)
    together, apart = shared * (stop - start - 1) - WORTH_TOKENS, left.saved + right.saved
    if together > apart:
        return _Stretch(start, stop, room, together, [(start, stop, shared)])
    return _Stretch(start, stop, room, apart, left.best + right.best)


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # slices compare fast, so the place of the first difference is halved in on
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low

"""From scores to masks. A pattern says where zeros may be; within it, the lowest scores go.

No full sort is made where a partial one is exact. On the CPU numpy does the sorting: its vectorised partition
is ten times faster than torch's `kthvalue`, and its sort thirty times faster than torch's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pftools.errors import PftoolsError
from pftools.settings import parse_nm


@dataclass(frozen=True)
class Pattern:
    """Unstructured (``group`` is 0), or N:M: in every ``group`` neighbours of a row, ``kept`` stay."""

    kept: int = 0
    group: int = 0

    @property
    def sparsity(self) -> float | None:
        """The share of zeros that the pattern fixes; None where it leaves it open."""
        return 1 - self.kept / self.group if self.group else None

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}" if self.group else "unstructured"


def parse_pattern(text: str) -> Pattern:
    """`unstructured`, or N:M with 0 < N < M; see `settings.parse_nm`."""
    return Pattern(*(parse_nm(text) or ()))


def check_width(name: str, columns: int, pattern: Pattern) -> None:
    """Refuse a pattern whose groups do not divide the width of a weight."""
    if pattern.group and columns % pattern.group:
        raise PftoolsError(
            f"the pattern {pattern} does not fit {name}: its {columns} input columns are no multiple of "
            f"{pattern.group}; choose a pattern whose M divides every width, or 'unstructured'."
        )


def choose(scores: torch.Tensor, sparsity: float, pattern: Pattern, *, compare: str = "row") -> torch.Tensor:
    """Which weights go: bool, True = pruned.

    Unstructured, every row loses int(columns x sparsity) weights, as in the published code; compared over the
    `matrix`, the whole loses int(size x sparsity), wherever they are (the published code takes one more, and
    all that equal it); by `share`, about as much (`lowest_by_share`).

    Args:
        scores: (rows, columns), float32.
        sparsity: asked, for an unstructured pattern.
        compare: see `criteria.Method`; an N:M pattern compares neighbours, whatever it says.

    Returns:
        (rows, columns).
    """
    if pattern.group:
        return lowest_per_group(scores, pattern)
    if sparsity == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if compare == "share":
        return lowest_by_share(scores, sparsity)
    if compare == "matrix":
        return lowest_per_row(scores.reshape(1, -1), int(scores.numel() * sparsity)).view_as(scores)
    return lowest_per_row(scores, int(scores.shape[1] * sparsity))


def lowest_per_row(scores: torch.Tensor, count: int) -> torch.Tensor:
    """True at the ``count`` lowest scores of every row; among equal scores the first columns are taken.

    The same choice as a stable full sort makes, found by partial selection.

    Args:
        scores: (rows, columns), float.

    Returns:
        bool, (rows, columns), exactly ``count`` True in every row.
    """
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    return _up_to(scores, _kth_smallest(scores, count), count, dim=1)


def lowest_per_group(scores: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """True at the M - N lowest scores of every M neighbours; among equal scores the first are taken.

    Args:
        scores: (rows, columns); M divides columns.
    """
    count = pattern.group - pattern.kept
    planes = scores.reshape(-1, pattern.group).t().contiguous()  # plane j holds the j-th score of every group
    smallest: list[torch.Tensor] = []  # the ``count`` smallest so far, in order: each new plane is inserted
    for plane in planes:
        for place, low in enumerate(smallest):
            smallest[place], plane = torch.minimum(low, plane), torch.maximum(low, plane)
        if len(smallest) < count:
            smallest.append(plane)
    return _up_to(planes, smallest[-1][None], count, dim=0).t().reshape(scores.shape)


def lowest_by_share(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Wanda's variant (Sun et al., 2024, appendix; the published code's cumulative threshold search).

    Of every row go the lowest scores whose sum is at most alpha times the row's sum (and all that equal the
    last of them). alpha, one for the matrix, starts at 0.4 and is bisected in [0, 0.8] until the matrix is
    within 0.001 of the sparsity asked, or the interval is narrower than that. So rows differ in their
    sparsity, and the matrix may miss its own slightly.
    """
    ordered = _sorted_rows(scores)
    cumulative, total = ordered.cumsum(dim=1), scores.sum(dim=1, keepdim=True)

    def at(alpha: float) -> tuple[torch.Tensor, float]:
        count = torch.searchsorted(cumulative, total * alpha, right=True)
        threshold = ordered.gather(1, (count - 1).clamp_min(0)).masked_fill_(count == 0, -1)
        return threshold, int(torch.searchsorted(ordered, threshold, right=True).sum()) / scores.numel()

    alpha, low, high = 0.4, 0.0, 0.8
    threshold, found = at(alpha)
    while abs(found - sparsity) > 0.001 and high - low >= 0.001:
        if found > sparsity:
            alpha, high = (alpha + low) / 2, alpha
        else:
            alpha, low = (alpha + high) / 2, alpha
        threshold, found = at(alpha)
    return scores <= threshold


def _up_to(scores: torch.Tensor, threshold: torch.Tensor, count: int, *, dim: int) -> torch.Tensor:
    """True at the ``count`` scores along ``dim`` that are up to the threshold, the ``count``-th smallest; of
    equal ones the first.

    Args:
        scores: two-dimensional. threshold: the same with size 1 along ``dim``.
    """
    chosen = scores <= threshold
    if count_true(chosen) > count * (scores.numel() // scores.shape[dim]):
        # Some lines hold more scores equal to their threshold than may go. Only these are looked at again.
        crowded = (chosen.sum(dim=dim) > count).nonzero().flatten()
        lines, limits = scores.index_select(1 - dim, crowded), threshold.index_select(1 - dim, crowded)
        below, equal = lines < limits, lines == limits
        room = count - below.sum(dim=dim, keepdim=True)
        chosen.index_copy_(1 - dim, crowded, below | (equal & (equal.cumsum(dim=dim) <= room)))
    return chosen


def count_true(mask: torch.Tensor) -> int:
    """How many are True; on the CPU by numpy, which counts them many times faster than torch."""
    return (
        int(np.count_nonzero(mask.numpy())) if mask.device.type == "cpu" else int(torch.count_nonzero(mask))
    )


def _kth_smallest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count``-th smallest score of every row, (rows, 1)."""
    if scores.device.type != "cpu":
        return scores.kthvalue(count, dim=1, keepdim=True).values
    return torch.from_numpy(np.partition(scores.numpy(), count - 1, axis=1)[:, count - 1 : count])


def _sorted_rows(scores: torch.Tensor) -> torch.Tensor:
    if scores.device.type != "cpu":
        return scores.sort(dim=1).values
    return torch.from_numpy(np.sort(scores.numpy(), axis=1))

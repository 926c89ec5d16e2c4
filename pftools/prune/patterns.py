"""From scores to masks. A pattern says where zeros may be; within it, the lowest scores go."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from pftools.errors import PftoolsError


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
    """`unstructured`, or N:M with 0 < N < M (N of every M weights are kept; Mishra et al. 2021, arXiv 2104.08378).

    Raises:
        PftoolsError: neither of the two.
    """
    if text == "unstructured":
        return Pattern()
    found = re.fullmatch(r"(\d+):(\d+)", text.strip())
    if not found or not 0 < int(found[1]) < int(found[2]):
        raise PftoolsError(f"the pattern {text!r} is unknown: give 'unstructured', or N:M with N < M such as '2:4'.")
    return Pattern(int(found[1]), int(found[2]))


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
    threshold = scores.kthvalue(count, dim=1, keepdim=True).values
    chosen = scores <= threshold
    surplus = chosen.sum(dim=1) > count
    if surplus.any():  # equal scores at the threshold: only some of them may go
        rows = scores[surplus]
        below = rows < threshold[surplus]
        equal = rows == threshold[surplus]
        room = count - below.sum(dim=1, keepdim=True)
        chosen[surplus] = below | (equal & (equal.cumsum(dim=1) <= room))
    return chosen


def lowest_per_group(scores: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """True at the M - N lowest scores of every M neighbours; among equal scores the first are taken.

    Args:
        scores: (rows, columns); M divides columns.
    """
    groups = scores.view(scores.shape[0], -1, pattern.group)
    order = groups.argsort(dim=-1, stable=True)[..., : pattern.group - pattern.kept]
    chosen = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True)
    return chosen.view_as(scores)


def check_width(name: str, columns: int, pattern: Pattern) -> None:
    """Refuse a pattern whose groups do not divide the width of a weight."""
    if pattern.group and columns % pattern.group:
        raise PftoolsError(
            f"the pattern {pattern} does not fit {name}: its {columns} input columns are no multiple of {pattern.group}; "
            "choose a pattern whose M divides every width, or 'unstructured'."
        )

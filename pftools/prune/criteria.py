"""How much a weight matters: one function a criterion, all in one registry.

A criterion takes a weight W (rows are outputs, columns inputs; float32) and the Euclidean norms of its input columns over all
calibration tokens, ||X_j||, and gives scores of W's shape: the lowest go. A new criterion is one function here and one
test against a naive restatement in `tests/oracles.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pftools.errors import PftoolsError, nearest

Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def magnitude(weight: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """|W|: the size of the weight alone (Han et al., 2015, arXiv 1506.02626). Inputs are ignored."""
    return weight.abs()


def wanda(weight: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """|W_ij| ||X_j||_2 (Sun et al., 2024, arXiv 2306.11695, equation 1)."""
    return weight.abs() * norms


def ria(weight: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """(|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) ||X_j||_2^0.5: relative importance and activations (Zhang et al.,
    2024, "Plug-and-Play", equation 5, with the paper's a = 0.5). A weight counts by its share of its row and of its column."""
    size = weight.abs()
    relative = size / size.sum(dim=0, keepdim=True).clamp_min(1e-30) + size / size.sum(dim=1, keepdim=True).clamp_min(1e-30)
    return relative * norms.sqrt()


@dataclass(frozen=True)
class Method:
    """A criterion and how its scores are compared.

    score: the criterion. per_matrix: compare over the whole matrix instead of row by row (unstructured only), as the
    published code does for magnitude. needs_inputs: whether calibration inputs have any effect.
    """

    score: Score
    per_matrix: bool = False
    needs_inputs: bool = True


METHODS: dict[str, Method] = {
    "magnitude": Method(magnitude, per_matrix=True, needs_inputs=False),
    "wanda": Method(wanda),
    "ria": Method(ria),
}


def find_method(name: str) -> Method:
    """The method of that name.

    Raises:
        PftoolsError: unknown; the nearest name is offered.
    """
    if name not in METHODS:
        raise PftoolsError(f"unknown pruning method {name!r}: {nearest(name, METHODS)}.")
    return METHODS[name]

"""How much a weight matters: one function a criterion, all in one registry.

A criterion takes a weight W (rows are outputs, columns inputs; float32) and one number for every input
column, and gives scores of W's shape: the lowest go. The number is the Euclidean norm of the column over all
calibration tokens, ||X_j||, or what SparseGPT knows instead. A new criterion is one function here, a line in
`METHODS`, and one test against a naive restatement in `tests/oracles.py`. Nothing here loads torch, so that a
plan knows the names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pftools.errors import PftoolsError, nearest

if TYPE_CHECKING:
    import pandas as pd
    import torch


def magnitude(weight: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """|W_ij| (the size of the weight alone: Han et al., 2015, arXiv 1506.02626). Inputs are ignored."""
    return weight.abs()


def wanda(weight: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """|W_ij| ||X_j||_2 (Sun et al., 2024, arXiv 2306.11695, equation 1)."""
    return (weight * columns).abs_()


def ria(weight: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Share of its row plus share of its column, times ||X_j||_2^0.5 (relative importance and activations).

    (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) ||X_j||_2^0.5:
    A weight counts by its share of its row and of its column (Zhang et al., 2024, "Plug-and-Play", equation
    5, with the paper's a = 0.5).
    """
    size = weight.abs()
    share = (
        size.sum(dim=0, keepdim=True).clamp_min(1e-30).reciprocal()
        + size.sum(dim=1, keepdim=True).clamp_min(1e-30).reciprocal()
    )
    return size.mul_(share).mul_(columns.sqrt())


def sparsegpt(weight: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """w_j^2 / [U_jj]^2 (the growth of the output's squared error when later columns make up for w_j).

    Frantar and Alistarh, 2023, arXiv 2301.00774, equation 3 and algorithm 1. Here ``columns`` is 1 / U_jj,
    with U the upper Cholesky factor of the inverse Hessian. Were the input columns uncorrelated, it would be
    ||X_j||.
    """
    return (weight * columns).square_()


@dataclass(frozen=True)
class Method:
    """A criterion, and what is done with its scores.

    Attributes:
        score: the criterion.
        compare: what a weight is compared with in an unstructured pattern: its `row`; its whole `matrix`
            (every block of 128 columns, where ``renew`` is set); or its row by `share`: see
            `patterns.lowest_by_share`.
        needs_inputs: whether calibration inputs have any effect.
        update: mend the kept weights as SparseGPT does.
        renew: with ``update``: choose anew every 128 columns, by weights that are already mended.
        columns: the number for every input column that the criterion is given: its `norm`, or its `curvature`
            1 / U_jj.
    """

    score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    compare: Literal["row", "matrix", "share"] = "row"
    needs_inputs: bool = True
    update: bool = False
    renew: bool = False
    columns: Literal["norm", "curvature"] = "norm"


# The last four are the ablations of the Wanda paper (section 5), under the names of its code: which weights
# go by magnitude or Wanda, what is kept is mended by SparseGPT; the choice is made once, or iteratively, anew
# every 128 columns.
METHODS: dict[str, Method] = {
    "magnitude": Method(magnitude, compare="matrix", needs_inputs=False),
    "wanda": Method(wanda),
    "wanda_variant": Method(wanda, compare="share"),
    "ria": Method(ria),
    "sparsegpt": Method(sparsegpt, compare="matrix", update=True, renew=True, columns="curvature"),
    "ablate_mag_seq": Method(magnitude, compare="matrix", update=True),
    "ablate_wanda_seq": Method(wanda, update=True),
    "ablate_mag_iter": Method(magnitude, compare="matrix", update=True, renew=True),
    "ablate_wanda_iter": Method(wanda, compare="matrix", update=True, renew=True),
}


def methods_table() -> pd.DataFrame:
    """A row a method: its score (from the criterion's docstring), and what is done with it."""
    import pandas as pd

    compared = {"row": "its row", "matrix": "its matrix", "share": "its row, which may differ in sparsity"}
    kept = {
        (False, False): "stays as it is",
        (True, False): "is mended",
        (True, True): "is mended as it goes",
    }
    rows = [
        {
            "method": name,
            "a weight's score": (method.score.__doc__ or "").split("\n")[0].split(" (")[0].strip(),
            "is compared with": compared[method.compare],
            "what is kept": kept[method.update, method.renew],
        }
        for name, method in METHODS.items()
    ]
    return pd.DataFrame(rows).set_index("method")


def find_method(name: str) -> Method:
    """The method of that name.

    Raises:
        PftoolsError: unknown; the nearest name is offered.
    """
    if name not in METHODS:
        raise PftoolsError(f"unknown pruning method {name!r}: {nearest(name, METHODS)}.")
    return METHODS[name]

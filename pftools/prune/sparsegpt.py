"""SparseGPT's weight update: what goes is made up for by the columns that come after it.

Frantar and Alistarh, 2023, arXiv 2301.00774, algorithm 1. With H = X X^T and U the upper Cholesky factor of its inverse, taking w_j
out of a row changes the columns after j by -(w_j / U_jj) U_j: the least squared error of the row's output on the
calibration tokens. Rows do not meet, so that weights with the same input share H, U and one solve.

The published code handles one column at a time, and after each corrects all columns left in its block of 128. Here a column is
corrected when its turn comes, by one product with the errors made so far: within a panel of 32 columns a vector at a
time, between panels and blocks as matrices. The arithmetic is the same and its order differs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pftools.errors import PftoolsError
from pftools.prune.criteria import Method
from pftools.prune.patterns import Pattern, choose

BLOCK = 128  # columns for which one choice is made (the paper's blocksize B and B_s)
DAMPING = 0.01  # of the mean diagonal, added to the diagonal of H
_PANEL = 32


@dataclass
class Solved:
    """One weight after the solve: the mended weight (float32, zeros where pruned), which weights went (bool), the scores they were
    judged by first, the relative error of its output ||(W - W') X|| / ||W X|| over all calibration tokens, and a note."""

    weight: torch.Tensor
    pruned: torch.Tensor
    scores: torch.Tensor
    output_error: float
    note: str = ""
    error_is: str = "measured"


def inverse_root(hessian: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The upper Cholesky factor U of the damped inverse, (H + damping mean(H_jj) I)^-1 = U^T U, and the damping that was needed.

    With J the reversal of all columns and J H J = L L^T, J L J is an upper R with H = R R^T, and U = R^-1: one factorisation
    and one triangular solve, where the published code makes two factorisations and an inverse.

    Args:
        hessian: (columns, columns), float32, symmetric; columns that were always zero have a 1 on the diagonal.
    """
    mean = float(hessian.diagonal().mean())
    for damping in (DAMPING, 10 * DAMPING, 100 * DAMPING):
        damped = hessian.flip(0, 1)
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            identity = torch.eye(len(hessian), device=hessian.device)
            return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True), damping
    raise PftoolsError(
        "the inputs' second moments could not be inverted even with a damping of 1: use more calibration blocks."
    )


def solve(
    weights: list[torch.Tensor], hessian: torch.Tensor, method: Method, sparsity: float, pattern: Pattern
) -> list[Solved]:
    """Choose which weights go, and mend the others.

    Args:
        weights: matrices (rows, columns), float32, that read the same input.
        hessian: X X^T over the calibration tokens, (columns, columns), float32; changed in place.
    """
    rows = [len(weight) for weight in weights]
    energy = [float((weight @ hessian * weight).sum()) for weight in weights]
    norms = hessian.diagonal().clamp_min(0).sqrt()
    dead = norms == 0
    hessian.diagonal()[dead] = 1
    root, damping = inverse_root(hessian)
    columns = root.diagonal().reciprocal() if method.columns == "curvature" else norms
    scores = [method.score(weight, columns) for weight in weights]

    before = torch.cat(weights).t().contiguous()  # (columns, rows): an input column is one stretch of memory
    before[dead] = 0
    after, pruned = before.clone(), torch.zeros_like(before, dtype=torch.bool)
    if not method.renew:
        pruned = (
            torch.cat([choose(score, sparsity, pattern, compare=method.compare) for score in scores])
            .t()
            .contiguous()
        )
    errors = torch.zeros_like(before)
    width = BLOCK // pattern.group * pattern.group or pattern.group if pattern.group else BLOCK
    for start in range(0, len(before), width):
        here = slice(start, min(start + width, len(before)))
        if method.renew and not pattern.group:
            block = after[here].t().split(rows)
            picked = [
                choose(method.score(part, columns[here]).contiguous(), sparsity, pattern, compare="matrix")
                for part in block
            ]
            pruned[here] = torch.cat(picked).t()
        _solve_block(
            after[here], root[here, here], pruned[here], errors[here], columns[here], method, pattern
        )
        after[here.stop :].addmm_(root[here, here.stop :].t(), errors[here], alpha=-1)
    after.masked_fill_(pruned, 0)

    # Each error is the loss of one optimal step, so their squares add up to the whole, tr(D (H + added I) D^T) with D = W - W'.
    added = damping * float(hessian.diagonal().mean())
    lost = errors.square().sum(dim=0) - added * (before - after).square().sum(dim=0)
    note = f"its inputs are nearly dependent: damping raised to {damping:.0%}" if damping > DAMPING else ""
    results = []
    for place, (kept, gone, loss) in enumerate(
        zip(after.t().split(rows), pruned.t().split(rows), lost.split(rows))
    ):
        relative = (max(float(loss.sum()), 0.0) / max(energy[place], 1e-30)) ** 0.5
        results.append(Solved(kept.contiguous(), gone.contiguous(), scores[place], relative, note))
    return results


def _solve_block(
    block: torch.Tensor,
    root: torch.Tensor,
    pruned: torch.Tensor,
    errors: torch.Tensor,
    columns: torch.Tensor,
    method: Method,
    pattern: Pattern,
) -> None:
    """The columns of one block, in place: ``block`` is corrected, ``errors`` filled, and for N:M ``pruned`` chosen group by group."""
    choosing = method.renew and pattern.group
    step = pattern.group if choosing else _PANEL
    for start in range(0, len(block), step):
        stop = min(start + step, len(block))
        panel = block[start:stop]
        panel.addmm_(root[:start, start:stop].t(), errors[:start], alpha=-1)
        if choosing:
            scores = method.score(panel.t(), columns[start:stop]).contiguous()
            pruned[start:stop] = choose(scores, 0.0, pattern).t()
        share = pruned[start:stop] / root.diagonal()[start:stop, None]
        for place in range(stop - start):
            column = start + place
            torch.addmv(
                panel[place], errors[start:column].t(), root[start:column, column], alpha=-1, out=panel[place]
            )
            torch.mul(panel[place], share[place], out=errors[column])

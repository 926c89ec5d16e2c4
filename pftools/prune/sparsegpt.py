"""SparseGPT's weight update: what goes is made up for by the columns that come after it.

Frantar and Alistarh, 2023, arXiv 2301.00774, algorithm 1. With H = X X^T and U the upper Cholesky factor of
its inverse, taking w_j out of a row changes the columns after j by -(w_j / U_jj) U_j: the least squared error
of the row's output on the calibration tokens. Rows are independent, so weights with the same input share H, U
and one solve.

The published code handles one column at a time, and after each corrects all columns left in its block of 128.
Here a column is corrected when its turn comes, by one product with the errors made so far: within a panel of
32 columns a vector at a time, between panels and blocks as matrices. The arithmetic is the same and its order
differs.
"""

from __future__ import annotations

import torch

from pftools.criteria import Method
from pftools.errors import PftoolsError
from pftools.prune.patterns import Pattern, choose, count_true, lowest_per_row
from pftools.prune.result import Choice

BLOCK = 128  # columns for which one choice is made (the paper's blocksize B and B_s)
DAMPING = 0.01  # of the mean diagonal, added to the diagonal of H
_PANEL = 32


def inverse_root(hessian: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The upper Cholesky factor U of the damped inverse, (H + damping mean(H_jj) I)^-1 = U^T U.

    With J the reversal of all columns and J H J = L L^T, J L J is an upper R with H = R R^T, and U = R^-1:
    one factorisation and one triangular solve, where the published code makes two factorisations and an
    inverse.

    Args:
        hessian: (columns, columns), float32, symmetric; columns that were always zero have a 1 on the
            diagonal.

    Returns:
        U (columns, columns), float32, and the damping that was needed.

    Raises:
        PftoolsError: no damping up to 1 makes it invertible.
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
        "the inputs' second moments could not be inverted even with a damping of 1: "
        "use more calibration blocks."
    )


def solve(
    weights: list[torch.Tensor], hessian: torch.Tensor, method: Method, sparsity: float, pattern: Pattern
) -> list[Choice]:
    """Choose which weights go, and mend the others.

    Args:
        weights: matrices (rows, columns), float32, that read the same input.
        hessian: X X^T over the calibration tokens, (columns, columns), float32; changed in place.
        sparsity: asked, for an unstructured pattern.

    Returns:
        A choice for each weight, with the mended weight and the error of its output over all calibration
        tokens.
    """
    energy = [float((weight @ hessian * weight).sum()) for weight in weights]
    norms = hessian.diagonal().clamp_min(0).sqrt()
    dead = norms == 0
    hessian.diagonal()[dead] = 1
    root, damping = inverse_root(hessian)
    columns = root.diagonal().reciprocal() if method.columns == "curvature" else norms
    scores = [method.score(weight, columns) for weight in weights]

    # All weights as one (columns, rows) matrix: an input column is one stretch of memory.
    before = torch.cat(weights).t().contiguous()
    old = before == 0
    before[dead] = 0
    sweep = _Sweep(before, old, root, columns, [len(weight) for weight in weights], method, sparsity, pattern)
    if not method.renew:
        first = [score.masked_fill(weight == 0, -1) for score, weight in zip(scores, weights)]
        chosen = [choose(score, sparsity, pattern, compare=method.compare) for score in first]
        sweep.pruned = torch.cat(chosen).t().contiguous()
    sweep.run()
    lost = sweep.losses(before, added=damping * float(hessian.diagonal().mean()))
    note = f"its inputs are nearly dependent: damping raised to {damping:.0%}" if damping > DAMPING else ""
    choices = []
    for place, loss in enumerate(sweep.by_weight(lost)):
        mended, pruned = (sweep.by_weight(each)[place].contiguous() for each in (sweep.after, sweep.pruned))
        error = (max(float(loss.sum()), 0.0) / max(energy[place], 1e-30)) ** 0.5
        returned = count_true((weights[place] == 0) & (mended != 0))
        choices.append(Choice(pruned, scores[place], mended, error, "measured", note, returned))
    return choices


class _Budget:
    """How many weights of a matrix go in each block of columns, in turn.

    As published, int(size x sparsity) of every block. Where the matrix has zeros already, and no more than it
    may have: all of these, and a proportional part of what is left, so that no block brings back zeros that
    another one has room for.
    """

    def __init__(self, old: torch.Tensor, sparsity: float) -> None:
        self.sparsity, self.size, self.zeros = sparsity, old.numel(), count_true(old)
        self.free = int(old.numel() * sparsity) - self.zeros
        self.uneven = self.zeros > 0 and self.free >= 0

    def spend(self, old: torch.Tensor) -> int:
        """How many of this block's weights go. old: bool (rows, columns), those that were zero before."""
        if not self.uneven:
            return int(old.numel() * self.sparsity)
        zeros = count_true(old)
        others = old.numel() - zeros
        share = self.free * others // max(self.size - self.zeros, 1)
        self.free, self.size, self.zeros = self.free - share, self.size - old.numel(), self.zeros - zeros
        return zeros + share


class _Sweep:
    """One pass over the columns, in blocks of 128 and panels of 32 (or of a pattern's groups).

    Weights that are zero already go first, wherever the pattern has room. All matrices are (columns, rows).

    Attributes:
        after: the weight on its way.
        pruned: bool, what goes.
        errors: w_j / U_jj of what went.
    """

    def __init__(
        self,
        before: torch.Tensor,
        old: torch.Tensor,
        root: torch.Tensor,
        columns: torch.Tensor,
        rows: list[int],
        method: Method,
        sparsity: float,
        pattern: Pattern,
    ) -> None:
        self.old, self.root, self.columns, self.rows = old, root, columns, rows
        self.method, self.sparsity, self.pattern = method, sparsity, pattern
        self.after, self.errors = before.clone(), torch.zeros_like(before)
        self.pruned = torch.zeros_like(before, dtype=torch.bool)
        self.budgets = [_Budget(part, sparsity) for part in self.by_weight(old)]

    def by_weight(self, matrix: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(columns, all rows) or (all rows,) apart again: one matrix (rows, columns) or (rows,) a weight."""
        return matrix.t().split(self.rows)

    def run(self) -> None:
        """Correct all columns in their order."""
        group = self.pattern.group
        width = BLOCK // group * group or group if group else BLOCK
        for start in range(0, len(self.after), width):
            here = slice(start, min(start + width, len(self.after)))
            if self.method.renew and not group:
                self._choose_block(here)
            self._solve_block(here)
            after = slice(here.stop, None)
            self.after[after].addmm_(self.root[here, after].t(), self.errors[here], alpha=-1)
        self.after.masked_fill_(self.pruned, 0)

    def _choose_block(self, here: slice) -> None:
        """What goes of a block, weight by weight, by what is already mended."""
        chosen = []
        parts = zip(self.by_weight(self.after[here]), self.by_weight(self.old[here]), self.budgets)
        for part, old, budget in parts:
            scores = self.method.score(part, self.columns[here]).contiguous().masked_fill_(old, -1)
            lowest = lowest_per_row(scores.reshape(1, -1), budget.spend(old))
            chosen.append(lowest.view_as(scores))
        self.pruned[here] = torch.cat(chosen).t()

    def _solve_block(self, here: slice) -> None:
        """Correct the columns of one block, panel by panel; an N:M pattern is chosen group by group."""
        block, root = self.after[here], self.root[here, here]
        pruned, errors, columns = self.pruned[here], self.errors[here], self.columns[here]
        choosing = self.method.renew and self.pattern.group
        step = self.pattern.group if choosing else _PANEL
        for start in range(0, len(block), step):
            stop = min(start + step, len(block))
            panel = block[start:stop]
            panel.addmm_(root[:start, start:stop].t(), errors[:start], alpha=-1)
            if choosing:
                scores = self.method.score(panel.t(), columns[start:stop]).contiguous()
                scores.masked_fill_(self.old[here][start:stop].t(), -1)
                pruned[start:stop] = choose(scores, self.sparsity, self.pattern).t()
            share = pruned[start:stop] / root.diagonal()[start:stop, None]
            for place, row in enumerate(panel):
                column = start + place
                torch.addmv(row, errors[start:column].t(), root[start:column, column], alpha=-1, out=row)
                torch.mul(row, share[place], out=errors[column])

    def losses(self, before: torch.Tensor, *, added: float) -> torch.Tensor:
        """The squared error of every row's output, (rows,).

        Each error is the loss of one optimal step, so their squares add up to tr(D (H + added I) D^T), D = W
        - W'.
        """
        return self.errors.square().sum(dim=0) - added * (before - self.after).square().sum(dim=0)

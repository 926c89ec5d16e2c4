"""What a pruning leaves: masks, and a table that says what was done to every weight."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch

from pftools.criteria import find_method
from pftools.prune.patterns import choose, count_true, parse_pattern


@dataclass
class PruneResult:
    """What `prune_model` returns.

    Attributes:
        masks: {weight name: bool tensor on the CPU, True = kept}, held as bits; empty where they went to a
            file.
        layers: a row a weight: layer, module, weight, asked and measured sparsity, score_kept, output_error,
            error_is, zeros_returned (weights that were zero before and no longer are), note, seconds; with
            reconstruction also block_error_before and block_error.
        seconds: wall time of the whole walk.
        weights: {weight name: tensor}, whole weights where the method changed kept ones, of a streamed model
            its own; empty for methods that only choose.
    """

    masks: MutableMapping[str, torch.Tensor]
    layers: pd.DataFrame
    seconds: float
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def zeros_returned(self) -> int:
        """How many weights were zero before and no longer are."""
        return int(self.layers["zeros_returned"].sum())


@dataclass
class Choice:
    """What was decided about one weight matrix (rows, columns).

    Attributes:
        pruned: bool, True = goes.
        scores: float32, the scores that it was first judged by.
        weight: float32, the mended weight; None: what is kept stays as it is.
        output_error: relative error of the module's output, ||(W - W') X|| / ||W X||; None: not computed.
        error_is: `measured` over all calibration tokens, or `sampled` on some 256 of them.
        note: what a reader of the table should know; often empty.
        returned: how many weights were zero before and no longer are.
    """

    pruned: torch.Tensor
    scores: torch.Tensor
    weight: torch.Tensor | None = None
    output_error: float | None = None
    error_is: str = "sampled"
    note: str = ""
    returned: int = 0


def judge(choice: Choice, weight: torch.Tensor, norms: torch.Tensor, asked: float) -> dict[str, Any]:
    """Columns score_kept, output_error, error_is, zeros_returned and note of a weight's row in the table.

    Where the choice has no output error it is `estimated`, with the input columns taken as uncorrelated: the
    norm of the removed |W_ij| ||X_j|| over the norm of all of them.

    Args:
        weight: (rows, columns), float32, as it was before.
        norms: (columns,), the norms of its input columns.
        asked: the sparsity asked of it.
    """
    gone = choice.pruned.flatten().float()
    total, lost = float(choice.scores.sum()), float(choice.scores.flatten().dot(gone))
    error, error_is = choice.output_error, choice.error_is
    if error is None:
        effect = (weight * norms).square_().flatten()
        error, error_is = (float(effect.dot(gone)) / max(float(effect.sum()), 1e-30)) ** 0.5, "estimated"
    already, notes = zeros(weight), [choice.note] if choice.note else []
    if already > asked + 0.005:
        notes.append(f"was {already:.1%} sparse before, more than asked")
    if choice.returned:
        notes.append(returned_note(choice.returned, already * weight.numel()))
    return {
        "score_kept": 1 - lost / max(total, 1e-30),
        "output_error": error,
        "error_is": error_is,
        "zeros_returned": choice.returned,
        "note": "; ".join(notes),
    }


def returned_note(returned: int, before: float) -> str:
    """The sentence about zeros that came back. before: how many zeros there were."""
    return f"{returned:,} of its {before:,.0f} zeros came back: the pattern has no room for them"


def output_error_on(x: torch.Tensor, weight: torch.Tensor, pruned: torch.Tensor) -> float:
    """||(W - W') X|| / ||W X|| on a sample of inputs ``x`` (tokens, columns), computed in their dtype."""
    lost = x @ (weight * pruned).to(x.dtype).t()
    return float(lost.float().norm() / (x @ weight.to(x.dtype).t()).float().norm().clamp_min(1e-30))


def zeros(weight: torch.Tensor) -> float:
    """The share of zeros, between 0 and 1."""
    return count_true(weight == 0) / weight.numel()


def mask_of(
    weight: torch.Tensor,
    norms: torch.Tensor,
    *,
    method: str = "wanda",
    sparsity: float = 0.5,
    pattern: str = "unstructured",
) -> torch.Tensor:
    """What a criterion keeps of one weight: bool of its shape, True = kept. Arguments: `score_histogram`."""
    compare = find_method(method).compare
    return ~choose(_scores(weight, norms, method), sparsity, parse_pattern(pattern), compare=compare)


def _scores(weight: torch.Tensor, norms: torch.Tensor, method: str) -> torch.Tensor:
    return find_method(method).score(weight.detach().float(), norms.to(weight.device))


def score_steps(weight: torch.Tensor, norms: torch.Tensor, *, method: str = "wanda") -> pd.DataFrame:
    """`score_histogram` for sparsities from 5% to 95%, and the error that each leaves in the output.

    The error is relative, and estimated as if the input columns were uncorrelated: the norm of what is cut of
    W diag(||X_j||), over the norm of the whole.

    Returns:
        Columns percent, error, low, high, kept and pruned, a row a sparsity and bin.
    """
    signal = (weight.detach().float() * norms.to(weight.device)).square()
    tables = []
    for percent in range(5, 100, 5):
        asked: dict[str, Any] = {"method": method, "sparsity": percent / 100}
        lost = signal[~mask_of(weight, norms, **asked)].sum() / signal.sum().clamp_min(1e-30)
        table = score_histogram(weight, norms, bins=50, **asked)
        tables.append(table.assign(percent=percent, error=float(lost.sqrt())))
    return pd.concat(tables, ignore_index=True)


def score_histogram(
    weight: torch.Tensor,
    norms: torch.Tensor,
    *,
    method: str = "wanda",
    sparsity: float = 0.5,
    pattern: str = "unstructured",
    bins: int = 80,
) -> pd.DataFrame:
    """The distribution of the scores of one weight, and which would go.

    SparseGPT's score is shown as if the input columns were uncorrelated, and before any weight is mended.

    Args:
        weight: (rows, columns).
        norms: (columns,), the norms of its input columns.
        method, sparsity, pattern: as in `prune_model`.

    Returns:
        Columns low and high (log10 of the score), kept and pruned (counts), a row a bin.
    """
    scores = _scores(weight, norms, method)
    pruned = ~mask_of(weight, norms, method=method, sparsity=sparsity, pattern=pattern).flatten()
    logs = scores.flatten().clamp_min(1e-12).log10()
    low, high = float(logs.min()), float(logs.max())
    if logs.numel() < 2**24:  # as many as torch's quantile takes
        low = float(logs.quantile(0.001))
    edges = np.linspace(low, high, bins + 1)
    counts = [np.histogram(logs[chosen].cpu().numpy(), edges)[0] for chosen in (~pruned, pruned)]
    return pd.DataFrame({"low": edges[:-1], "high": edges[1:], "kept": counts[0], "pruned": counts[1]})

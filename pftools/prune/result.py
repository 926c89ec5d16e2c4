"""What a pruning leaves: masks, and a table that says what was done to every weight."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch

from pftools.prune.criteria import find_method
from pftools.prune.patterns import choose, count_true, parse_pattern


@dataclass
class PruneResult:
    """masks: {weight name: bool tensor on the CPU, True = kept}; empty where they went to a file. layers: a row a weight (layer,
    module, weight, asked, measured, score_kept, output_error, error_is, seconds, note). seconds: wall time of the whole walk.
    weights: kept weights that the method changed, whole; empty for methods that only choose."""

    masks: dict[str, torch.Tensor]
    layers: pd.DataFrame
    seconds: float
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


def table_row(
    place: str,
    name: str,
    pruned: torch.Tensor,
    weight: torch.Tensor,
    scores: torch.Tensor,
    norms: torch.Tensor,
    asked: float,
    note: str,
    output_error: float | None = None,
    error_is: str = "",
) -> dict[str, Any]:
    """One line of the table of a pruning.

    output_error is the relative error of the module's output, ||(W - W') X|| / ||W X||. Column error_is says how it was found:
    `measured` over all calibration tokens, as SparseGPT's update does anyway; `sampled`, on some 256 of them; or `estimated`,
    where no token was at hand, with the input columns taken as uncorrelated: then it is the norm of the removed
    |W_ij| ||X_j|| over the norm of all of them.

    Args:
        weight, scores: (rows, columns), float32, as they were before. norms: (columns,).
    """
    already = zeros(weight)
    gone = pruned.flatten().float()
    total, lost = float(scores.sum()), float(scores.flatten().dot(gone))
    if output_error is None:
        error_is = "estimated"
        effect = (weight * norms).square_().flatten()
        output_error = (float(effect.dot(gone)) / max(float(effect.sum()), 1e-30)) ** 0.5
    if already > asked + 0.005:
        note = f"{note}; " * bool(note) + f"was {already:.1%} sparse before, more than asked"
    return {
        "layer": next((int(part) for part in place.split(".") if part.isdigit()), -1),
        "module": name.rpartition(".")[2],
        "weight": f"{place}.{name}.weight",
        "asked": asked,
        "measured": 0.0,  # filled in once the weight is written
        "score_kept": 1 - lost / max(total, 1e-30),
        "output_error": output_error,
        "error_is": error_is,
        "note": note,
    }


def output_error_on(x: torch.Tensor, weight: torch.Tensor, pruned: torch.Tensor) -> float:
    """||(W - W') X|| / ||W X|| on a sample of inputs, (tokens, columns), computed in their dtype."""
    lost = x @ (weight * pruned).to(x.dtype).t()
    return float(lost.float().norm() / (x @ weight.to(x.dtype).t()).float().norm().clamp_min(1e-30))


def zeros(weight: torch.Tensor) -> float:
    """The share of zeros."""
    return count_true(weight == 0) / weight.numel()


def score_histogram(
    weight: torch.Tensor,
    norms: torch.Tensor,
    *,
    method: str = "wanda",
    sparsity: float = 0.5,
    pattern: str = "unstructured",
    bins: int = 80,
) -> pd.DataFrame:
    """How the scores of one weight lie, and which would go: columns low, high (log10 of the score), kept, pruned (counts).

    SparseGPT's score is shown as it would be if the input columns were uncorrelated, and before any weight is mended.

    Args:
        weight: (rows, columns). norms: (columns,), the norms of its input columns.
    """
    rule = find_method(method)
    scores = rule.score(weight.detach().float(), norms.to(weight.device))
    pruned = choose(scores, sparsity, parse_pattern(pattern), compare=rule.compare).flatten()
    logs = scores.flatten().clamp_min(1e-12).log10()
    low, high = (
        (float(logs.quantile(q)) for q in (0.001, 1.0))
        if logs.numel() < 2**24
        else (float(logs.min()), float(logs.max()))
    )
    edges = np.linspace(low, high, bins + 1)
    counts = [np.histogram(logs[chosen].cpu().numpy(), edges)[0] for chosen in (~pruned, pruned)]
    return pd.DataFrame({"low": edges[:-1], "high": edges[1:], "kept": counts[0], "pruned": counts[1]})

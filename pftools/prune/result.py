"""What a pruning leaves: masks, and a table that says what was done to every weight."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch

from pftools.prune.criteria import find_method
from pftools.prune.patterns import Pattern, lowest_per_group, lowest_per_row, parse_pattern


@dataclass
class PruneResult:
    """masks: {weight name: bool tensor on the CPU, True = kept}. layers: a row a weight (layer, module, weight, asked, measured,
    score_kept, output_error, seconds, note). seconds: wall time of the whole walk. weights: kept weights that the method
    changed, whole; empty for methods that only choose."""

    masks: dict[str, torch.Tensor]
    layers: pd.DataFrame
    seconds: float
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


def choose(scores: torch.Tensor, sparsity: float, pattern: Pattern, *, per_matrix: bool = False) -> torch.Tensor:
    """Which weights go: bool, True = pruned.

    Unstructured, every row loses int(columns x sparsity) weights, as in the published code; with ``per_matrix`` the matrix
    loses int(size x sparsity) wherever they are.
    """
    if pattern.group:
        return lowest_per_group(scores, pattern)
    if per_matrix:
        return lowest_per_row(scores.reshape(1, -1), int(scores.numel() * sparsity)).view_as(scores)
    return lowest_per_row(scores, int(scores.shape[1] * sparsity))


def table_row(place: str, name: str, pruned: torch.Tensor, weight: torch.Tensor, scores: torch.Tensor, norms: torch.Tensor,
              asked: float, note: str) -> dict[str, Any]:  # fmt: skip
    """One line of the table of a pruning.

    output_error is the relative error of the module's output, ||(W - W') X|| / ||W X||, with the input columns taken
    as uncorrelated: then it is the norm of the removed |W_ij| ||X_j|| over the norm of all of them, and costs nothing.
    """
    energy = (weight * norms).square()
    return {
        "layer": next((int(part) for part in place.split(".") if part.isdigit()), -1),
        "module": name.rpartition(".")[2],
        "weight": f"{place}.{name}.weight",
        "asked": asked,
        "measured": float((pruned | (weight == 0)).float().mean()),
        "score_kept": float(1 - scores[pruned].sum() / scores.sum().clamp_min(1e-30)),
        "output_error": float((energy[pruned].sum() / energy.sum().clamp_min(1e-30)).sqrt()),
        "note": note,
    }


def score_histogram(
    weight: torch.Tensor, norms: torch.Tensor, *, method: str = "wanda", sparsity: float = 0.5, pattern: str = "unstructured",
    bins: int = 80,
) -> pd.DataFrame:  # fmt: skip
    """How the scores of one weight lie, and which would go: columns low, high (log10 of the score), kept, pruned (counts).

    Args:
        weight: (rows, columns). norms: (columns,), the norms of its input columns.
    """
    rule = find_method(method)
    scores = rule.score(weight.detach().float(), norms.to(weight.device))
    pruned = choose(scores, sparsity, parse_pattern(pattern), per_matrix=rule.per_matrix).flatten()
    logs = scores.flatten().clamp_min(1e-12).log10()
    low, high = (float(logs.quantile(q)) for q in (0.001, 1.0)) if logs.numel() < 2**24 else (float(logs.min()), float(logs.max()))
    edges = np.linspace(low, high, bins + 1)
    counts = [np.histogram(logs[chosen].cpu().numpy(), edges)[0] for chosen in (~pruned, pruned)]
    return pd.DataFrame({"low": edges[:-1], "high": edges[1:], "kept": counts[0], "pruned": counts[1]})

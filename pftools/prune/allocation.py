"""How sparse each decoder layer becomes: all alike, or less where outliers are many."""

from __future__ import annotations

import torch

from pftools.criteria import wanda
from pftools.errors import PftoolsError
from pftools.prune.patterns import count_true


def outlier_share(weights: dict[str, torch.Tensor], norms: dict[str, torch.Tensor], m: float) -> float:
    """The share of a layer's Wanda scores |W_ij| ||X_j|| above ``m`` times their mean.

    The layerwise outlier distribution of Yin et al., 2024, arXiv 2310.05175, equation 1.

    Args:
        weights: {module: matrix (rows, columns)} of the layer, counted together.
        norms: {module: norms of its input columns (columns,)}.
    """

    def scores(name: str) -> torch.Tensor:
        # Computed twice, so that one matrix of scores is held and not a whole layer.
        return wanda(weights[name].float(), norms[name].to(weights[name].device))

    size = sum(weight.numel() for weight in weights.values())
    mean = sum(float(scores(name).sum()) for name in weights) / size
    return sum(count_true(scores(name) > m * mean) for name in weights) / size


def owl(shares: list[float], sizes: list[int], sparsity: float, spread: float) -> list[float]:
    """Sparsities of the layers, at most ``spread`` (lambda) from their mean, the lower the more outliers.

    Yin et al., 2024, section 4: outlier shares are scaled to [0, 2 lambda]. A layer keeps what it has above
    the mean.

    Args:
        shares: `outlier_share` of every layer of the unpruned model.
        sizes: their numbers of weights, so that the whole is exactly as sparse as asked where layers differ
            in size (in the paper they do not).
        sparsity: asked of all layers together.

    Raises:
        PftoolsError: a layer would have to be emptied.
    """
    lowest, highest = min(shares), max(shares)
    if highest == lowest:
        return [sparsity] * len(shares)
    extra = [2 * spread * (share - lowest) / (highest - lowest) for share in shares]
    mean = sum(one * size for one, size in zip(extra, sizes)) / sum(sizes)
    found = [sparsity - one + mean for one in extra]
    for index, one in enumerate(found):
        if not 0 <= one < 1:
            raise PftoolsError(
                f"OWL would make layer {index} {one:.1%} sparse: choose a smaller owl_lambda (now "
                f"{spread:g}), or another sparsity."
            )
    return found

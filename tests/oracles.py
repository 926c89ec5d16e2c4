"""Naive restatements of the papers, in loops and float64, against which the fast code is compared."""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
from scipy import stats

from pftools.layers import decoder_layers


def wanda_mask(weight: torch.Tensor, inputs: torch.Tensor, sparsity: float) -> torch.Tensor:
    """True = kept. Straight from the formula |W_ij| ||X_j||_2, compared within each output row (Wanda,
    equation 1).

    weight: (rows, columns). inputs: (tokens, columns).
    """
    rows, columns = weight.shape
    kept = torch.ones(rows, columns, dtype=torch.bool)
    norms = [float(inputs[:, column].double().square().sum().sqrt()) for column in range(columns)]
    for row in range(rows):
        scores = [
            abs(float(weight[row, column].detach().double())) * norms[column] for column in range(columns)
        ]
        order = sorted(range(columns), key=lambda column: scores[column])
        for column in order[: int(columns * sparsity)]:
            kept[row, column] = False
    return kept


def wanda_nm_mask(weight: torch.Tensor, inputs: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """True = kept: the n largest scores of every m neighbours."""
    rows, columns = weight.shape
    kept = torch.zeros(rows, columns, dtype=torch.bool)
    norms = inputs.double().square().sum(dim=0).sqrt()
    for row in range(rows):
        for start in range(0, columns, m):
            scores = [
                abs(float(weight[row, start + place])) * float(norms[start + place]) for place in range(m)
            ]
            for place in sorted(range(m), key=lambda place: scores[place])[m - n :]:
                kept[row, start + place] = True
    return kept


def ria_scores(weight: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """Relative importance and activations (Zhang et al., 2024), entry by entry."""
    rows, columns = weight.shape
    scores = torch.zeros(rows, columns, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            size = abs(float(weight[row, column]))
            share_of_row = size / sum(abs(float(value)) for value in weight[row])
            share_of_column = size / sum(abs(float(value)) for value in weight[:, column])
            scores[row, column] = (share_of_row + share_of_column) * float(norms[column]) ** 0.5
    return scores


def wanda_walk(model: torch.nn.Module, blocks: torch.Tensor, sparsity: float) -> dict[str, torch.Tensor]:
    """Masks of the published walk, in the slowest way: for each layer, the whole model is run on every block
    with one hook a module, its inputs are kept, and the layer is pruned before the next is looked at. Prunes
    a copy."""
    model = copy.deepcopy(model)
    prefix, layers = decoder_layers(model)
    masks = {}
    for index, layer in enumerate(layers):
        modules = {
            name: module for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)
        }
        seen = {name: [] for name in modules}
        hooks = [
            module.register_forward_hook(
                lambda _, args, __, seen=seen, name=name: seen[name].append(args[0].flatten(0, -2))
            )
            for name, module in modules.items()
        ]
        with torch.no_grad():
            for block in blocks:
                model(block[None])
        for hook in hooks:
            hook.remove()
        for name, module in modules.items():
            mask = wanda_mask(module.weight, torch.cat(seen[name]), sparsity)
            module.weight.data[~mask] = 0
            masks[f"{prefix}.{index}.{name}.weight"] = mask
    return masks


def perplexity(model: torch.nn.Module, blocks: torch.Tensor) -> float:
    """e to the mean loss a token, one block and one token at a time, float64."""
    losses = []
    for block in blocks:
        with torch.no_grad():
            logits = model(block[None]).logits[0].double()
        for place in range(len(block) - 1):
            losses.append(-float(logits[place].log_softmax(-1)[block[place + 1]]))
    return float(torch.tensor(losses, dtype=torch.float64).mean().exp())


# ------------------------------------------------------------------------------------------------------------
# Pruning methods beyond Wanda


def variant_mask(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """True = kept. Wanda's variant as in its published code (`return_given_alpha`, its search), in loops."""
    rows, columns = scores.shape
    values = scores.double().tolist()

    def at(alpha: float) -> list[list[bool]]:
        gone = []
        for row in values:
            ordered, running, count = sorted(row), 0.0, 0
            for value in ordered:
                running += value
                if running <= sum(row) * alpha:
                    count += 1
            threshold = ordered[count - 1] if count else -1.0
            gone.append([value <= threshold for value in row])
        return gone

    alpha, bounds = 0.4, [0.0, 0.8]
    gone = at(alpha)
    while True:
        found = sum(map(sum, gone)) / (rows * columns)
        if abs(found - sparsity) <= 0.001 or bounds[1] - bounds[0] < 0.001:
            return ~torch.tensor(gone)
        if found > sparsity:
            bounds[1], alpha = alpha, (alpha + bounds[0]) / 2
        else:
            bounds[0], alpha = alpha, (alpha + bounds[1]) / 2
        gone = at(alpha)


def sparsegpt(
    weight: torch.Tensor,
    inputs: torch.Tensor,
    sparsity: float,
    *,
    n: int = 0,
    m: int = 0,
    mask: torch.Tensor | None = None,
    scores: str = "curvature",
    block: int = 128,
) -> torch.Tensor:
    """The mended weight, float64: SparseGPT (Frantar and Alistarh, algorithm 1) column by column, each time
    correcting all columns that are left; and, with ``mask`` (True = goes) or other ``scores``, the ablations
    of the Wanda paper.

    Of every block of 128 columns the int(size x sparsity) lowest scores go, or of every m neighbours the m -
    n lowest.
    """
    weight, inputs = weight.double().clone(), inputs.double()
    hessian = inputs.T @ inputs
    norms = hessian.diagonal().sqrt()
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    root = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    known = {"curvature": 1 / root.diagonal(), "wanda": norms, "mag": torch.ones_like(norms)}[scores]
    gone = torch.zeros_like(weight, dtype=torch.bool) if mask is None else mask
    rows, columns = weight.shape
    for column in range(columns):
        if mask is None and not m and column % block == 0:
            here = slice(column, min(column + block, columns))
            part = (weight[:, here] * known[here]).abs()
            lowest = part.flatten().argsort(stable=True)[: int(part.numel() * sparsity)]
            gone[:, here] = torch.zeros(part.numel(), dtype=torch.bool).scatter(0, lowest, True).view_as(part)
        if mask is None and m and column % m == 0:
            here = slice(column, column + m)
            lowest = (weight[:, here] * known[here]).abs().argsort(dim=1, stable=True)[:, : m - n]
            gone[:, here] = torch.zeros(rows, m, dtype=torch.bool).scatter(1, lowest, True)
        for row in range(rows):
            if gone[row, column]:
                error = weight[row, column] / root[column, column]
                weight[row, column:] -= error * root[column, column:]
                weight[row, column] = 0
    return weight


def owl_sparsities(scores: list[torch.Tensor], sparsity: float, spread: float, m: float) -> list[float]:
    """OWL for layers of equal size (Yin et al., 2024): one flat tensor of Wanda scores a layer."""
    shares = [
        sum(float(value) > m * float(layer.double().mean()) for value in layer) / len(layer)
        for layer in scores
    ]
    kept = [(share - min(shares)) / (max(shares) - min(shares)) * 2 * spread for share in shares]
    return [1 - (one - sum(kept) / len(kept) + 1 - sparsity) for one in kept]


# ------------------------------------------------------------------------------------------------------------
# Statistics over seeds and blocks


def crossed_mean_squares(d: np.ndarray) -> tuple[float, float, float]:
    """Mean squares of seeds, blocks and the rest of d[s][b], each divided by seeds x blocks, in loops."""
    seeds, blocks = d.shape
    mean = sum(float(value) for row in d for value in row) / (seeds * blocks)
    rows = [sum(map(float, d[s])) / blocks for s in range(seeds)]
    columns = [sum(float(d[s][b]) for s in range(seeds)) / seeds for b in range(blocks)]
    by_seed = blocks * sum((row - mean) ** 2 for row in rows) / (seeds - 1)
    by_block = seeds * sum((column - mean) ** 2 for column in columns) / (blocks - 1)
    rest = sum(
        (float(d[s][b]) - rows[s] - columns[b] + mean) ** 2 for s in range(seeds) for b in range(blocks)
    )
    by_both = rest / ((seeds - 1) * (blocks - 1))
    return tuple(square / (seeds * blocks) for square in (by_seed, by_block, by_both))


def crossed_half_width(d: np.ndarray, level: float) -> float:
    """Half of the interval for the mean of d[s][b], straight from the definition."""
    seeds, blocks = d.shape
    of_blocks = stats.t.ppf(1 - level / 2, blocks - 1) ** 2
    if seeds == 1:
        return math.sqrt(of_blocks * np.var(d[0], ddof=1) / blocks)
    by_seed, by_block, by_both = crossed_mean_squares(d)
    of_seeds = stats.t.ppf(1 - level / 2, seeds - 1) ** 2
    widths = [of_seeds * max(by_seed - by_both, 0) + of_blocks * by_block]
    if by_seed >= by_block:
        widths.append(of_seeds * by_seed)
    return math.sqrt(max(widths))


def best_set(losses: np.ndarray, level: float) -> list[int]:
    """Whoever is most clearly behind the mean of the others leaves, while that is beyond doubt."""
    left = list(range(len(losses)))
    while len(left) > 1:
        behind = {}
        for one in left:
            others = [losses[other] for other in left if other != one]
            d = losses[one] - sum(others) / len(others)
            behind[one] = (float(d.mean()) / crossed_half_width(d, 2 * 0.75 * 0.05), d)
        worst = max(left, key=lambda one: behind[one][0])
        d = behind[worst][1]
        if float(d.mean()) <= crossed_half_width(d, 2 * 0.75 * level):
            break
        left.remove(worst)
    return left

"""Naive restatements of the papers, in loops and float64, against which the fast code is compared."""

from __future__ import annotations

import copy

import torch

from pftools.models import decoder_layers


def wanda_mask(weight: torch.Tensor, inputs: torch.Tensor, sparsity: float) -> torch.Tensor:
    """True = kept. Straight from the formula |W_ij| ||X_j||_2, compared within each output row (Wanda, equation 1).

    weight: (rows, columns). inputs: (tokens, columns).
    """
    rows, columns = weight.shape
    kept = torch.ones(rows, columns, dtype=torch.bool)
    norms = [float(inputs[:, column].double().square().sum().sqrt()) for column in range(columns)]
    for row in range(rows):
        scores = [abs(float(weight[row, column].detach().double())) * norms[column] for column in range(columns)]
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
            scores = [abs(float(weight[row, start + place])) * float(norms[start + place]) for place in range(m)]
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
    """Masks of the published walk, in the slowest way: for each layer, the whole model is run on every block with one hook a
    module, its inputs are kept, and the layer is pruned before the next is looked at. Prunes a copy."""
    model = copy.deepcopy(model)
    prefix, layers = decoder_layers(model)
    masks = {}
    for index, layer in enumerate(layers):
        modules = {name: module for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}
        seen = {name: [] for name in modules}
        hooks = [
            module.register_forward_hook(lambda _, args, __, seen=seen, name=name: seen[name].append(args[0].flatten(0, -2)))
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

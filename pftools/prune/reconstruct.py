"""Local recovery: after a decoder layer is pruned, its kept weights are trained until it gives what the dense
model gives there.

Roux et al., 2025, "A Free Lunch in LLM Compression" (arXiv 2510.14444), find that reconstructing one part of
the model at a time against the dense model's activations does as well as retraining, on far less data, as
long as the part holds a nonlinearity: a decoder layer does, a single matrix does not. Errors of earlier
layers are seen in the inputs, so that they are mended too.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from pftools.errors import PftoolsError
from pftools.prune.inputs import LayerCall, linears_of

# An early step of Adam moves each kept weight by this share of its matrix' root mean square; it falls
# linearly to zero.
STEP = 0.005
_TOKENS = 2048  # a step


def reconstruct(
    layer: nn.Module,
    call: LayerCall,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    kept: dict[str, torch.Tensor],
    *,
    steps: int,
    place: str,
) -> tuple[float, float]:
    """Train a pruned layer's kept linear weights, in place, to the least mean squared error of its output.

    The weights are trained in float32; a layer of lower precision computes in bfloat16. Blocks are taken in
    order, over and over.

    Args:
        inputs, targets: (n_blocks, block_length, width): the layer's input in the pruned model; its output in
            the dense one.
        kept: {linear module's name: bool mask, True = kept}.

    Returns:
        the mean squared error before and after, relative to the targets' mean square, over all blocks.

    Raises:
        PftoolsError: the loss is not finite.
    """
    twin = copy.deepcopy(layer).float().requires_grad_(False)
    linears = {name: module for name, module in linears_of(twin).items() if name in kept}
    weights = [module.weight.requires_grad_(True) for module in linears.values()]
    masks = [kept[name].to(weight.device) for name, weight in zip(linears, weights)]
    groups = [
        {"params": [weight], "lr": STEP * float(weight.detach().square().mean().sqrt())} for weight in weights
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    size = max(1, _TOKENS // inputs.shape[1])
    scale = float(targets.float().square().mean()) or 1.0
    low = inputs.dtype != torch.float32

    def loss_of(start: int) -> torch.Tensor:
        batch = slice(start, start + size)
        with torch.autocast(
            inputs.device.type, dtype=torch.bfloat16, enabled=low
        ):  # float16 would lose small gradients
            output = call(twin, inputs[batch])
        return (output.float() - targets[batch].float()).square().mean() / scale

    def mean_loss() -> float:
        losses = [
            float(loss_of(start)) * min(size, len(inputs) - start) for start in range(0, len(inputs), size)
        ]
        return sum(losses) / len(inputs)

    before = mean_loss()
    for step in range(steps):
        with torch.enable_grad():
            loss = loss_of(step * size % len(inputs))
            if not torch.isfinite(loss):
                raise PftoolsError(
                    f"reconstructing {place} diverged at step {step}: use dtype float32, or reconstruct_steps=0."
                )
            loss.backward()
        for weight, mask in zip(weights, masks):
            weight.grad.mul_(mask)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    after = mean_loss()
    if after < before:
        for name, module in linears_of(layer).items():
            if name in linears:
                module.weight.data.copy_(linears[name].weight.detach())
    return before, min(after, before)

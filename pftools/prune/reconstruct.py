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
from pftools.prune.calls import Batch

# An early step of Adam moves each kept weight by this share of its matrix' root mean square; it falls
# linearly to zero.
STEP = 0.005
TOKENS = 2048  # a step, about


def reconstruct(
    layer: nn.Module,
    index: int,
    inputs: list[Batch],
    targets: list[Batch],
    kept: dict[str, torch.Tensor],
    *,
    steps: int,
    place: str,
) -> tuple[float, float]:
    """Train a pruned layer's kept linear weights, in place, to the least mean squared error of its output.

    The weights are trained in float32; a layer of lower precision computes in bfloat16. A step is a batch;
    batches are taken in order, over and over.

    Args:
        index: of the layer.
        inputs: its inputs in the pruned model.
        targets: its outputs in the dense one, in the same batches.
        kept: {parameter within the layer: bool mask, True = kept}.

    Returns:
        the mean squared error before and after, relative to the targets' mean square, over all blocks.

    Raises:
        PftoolsError: the loss is not finite.
    """
    twin = copy.deepcopy(layer).float().requires_grad_(False)
    weights = {name: twin.get_parameter(name).requires_grad_(True) for name in kept}
    masks = {name: mask.to(weights[name].device) for name, mask in kept.items()}
    groups = [
        {"params": [weight], "lr": STEP * float(weight.detach().square().mean().sqrt())}
        for weight in weights.values()
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    sizes = [len(target.hidden) for target in targets]
    squares = [float(target.hidden.float().square().mean()) for target in targets]
    scale = sum(size * square for size, square in zip(sizes, squares)) / sum(sizes) or 1.0
    device, low = inputs[0].hidden.device, inputs[0].hidden.dtype != torch.float32

    def loss_of(number: int) -> torch.Tensor:
        batch, wanted = inputs[number], targets[number].hidden
        call = batch.calls[index].to(device)
        with torch.autocast(
            device.type, dtype=torch.bfloat16, enabled=low
        ):  # float16 would lose small gradients
            output = call(twin, batch.hidden)
        return (output.float() - wanted.float()).square().mean() / scale

    def mean_loss() -> float:
        return sum(size * float(loss_of(number)) for number, size in enumerate(sizes)) / sum(sizes)

    before = mean_loss()
    for step in range(steps):
        with torch.enable_grad():
            loss = loss_of(step % len(inputs))
            if not torch.isfinite(loss):
                raise PftoolsError(
                    f"reconstructing {place} diverged at step {step}: use dtype float32, or "
                    "reconstruct_steps=0."
                )
            loss.backward()
        for name, weight in weights.items():
            if weight.grad is not None:
                weight.grad.mul_(masks[name])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    after = mean_loss()
    if after < before:
        for name, weight in weights.items():
            layer.get_parameter(name).data.copy_(weight.detach())
    return before, min(after, before)

"""The updated weight of a linear layer, and one product with it: the arithmetic that training and merging share.

    y = x (W + s K * (B A))^T        K = M = (W != 0)    masked LoRA (MaskLoRA in "PERP", Zimmer et al. 2023, arXiv 2312.15230)
                                     K = W               HiRA (Huang et al., ICLR 2025)
                                     K = 1               plain LoRA, whose dense merge fills zeros: here only to be merged

The first two leave a zero where it is. The sum is formed in float32 and cast once to the dtype that the model computes in, here as in the
merge: so training sees exactly the weights that are merged.

The cast is dithered. Rounding to the nearest would lose most of an update: a bf16 weight moves only if it is changed by more than 1/512 of
itself, and a short fine-tuning changes most weights by less. So a fixed pattern decides which weights of many are rounded up and which down, in
proportion to what is left over: each is off by less than one unit in the last place, and their mean is right (Roberts, 1962, for images;
Gupta et al., 2015, for weights). Where nothing is added, nothing changes.

Cost. Plain LoRA never forms B A; here it has to be formed, to be multiplied by K entry by entry. So it is added to the weight, and
forward, gradient of the input and gradient of the update are one product of full size each. Plain LoRA has the first two: the third
is the price, since no thin form of (K * G) A^T exists. The sum itself is formed a few rows at a time, which stay in the processor's cache, and
formed anew in the backward pass: nothing of the weight's size is kept for it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from pftools.adapters import Kind, row_slices, updated_weight


class _UpdatedLinear(torch.autograd.Function):
    """(x, A, B) -> x W'^T + bias, with W' the updated weight. The layer's own weight is frozen, so it gets no gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, layer: nn.Module, options: dict[str, Any]
    ) -> torch.Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.layer, ctx.options = layer, options
        bias = None if layer.bias is None or options["alone"] else layer.bias.to(x.dtype)
        return F.linear(x, _updated(ctx, a, b, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, a, b = ctx.saved_tensors
        # Through the cast as if it were exact, as mixed-precision training does.
        grad_x = grad @ _updated(ctx, a, b, x.dtype) if ctx.needs_input_grad[0] else None
        grad_a, grad_b = _factor_gradients(ctx, grad.flatten(0, -2).T @ x.flatten(0, -2), a, b)
        return grad_x, grad_a, grad_b, None, None


def _updated(ctx: Any, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return updated_weight(dense_weight(ctx.layer), a, b, kept=kept_of(ctx.layer), dtype=dtype, **ctx.options)


def _factor_gradients(
    ctx: Any, grad: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of A and B, (rank, columns) and (rows, rank), from that of the updated weight, (rows, columns); in float32."""
    weight, kept = dense_weight(ctx.layer), kept_of(ctx.layer)
    scaling, hira = ctx.options["scaling"], ctx.options["kind"] == "hira"
    grad_a, grad_b = torch.zeros_like(a, dtype=torch.float32), torch.empty_like(b, dtype=torch.float32)
    with torch.autocast(grad.device.type, enabled=False):
        for rows in row_slices(weight):
            part = weight[rows]
            factor = part if hira else part != 0 if kept is None else kept[rows]
            through = grad[rows].float() * factor  # a new tensor, also where grad is float32 already
            grad_b[rows] = through @ a.float().T
            grad_a.addmm_(b[rows].float().T, through)
    return grad_a.mul_(scaling).to(a.dtype), grad_b.mul_(scaling).to(b.dtype)


def updated_linear(
    x: torch.Tensor,
    layer: nn.Module,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    kind: Kind,
    *,
    dropout: nn.Module | None = None,
) -> torch.Tensor:
    """x (W + s K * (B A))^T + bias, with gradients for x, A and B.

    Args:
        x: (..., columns). layer: a frozen linear layer, plain or of bitsandbytes; its weight is (rows, columns).
        dropout: acts on the input of the update alone, so that the two products cannot be one.
    """
    x = x.to(layer.weight.dtype if layer.weight.is_floating_point() else x.dtype)
    options = {"scaling": scaling, "kind": kind, "alone": dropout is not None}
    if dropout is None:
        return _UpdatedLinear.apply(x, a, b, layer, options)
    return layer(x) + _UpdatedLinear.apply(dropout(x), a, b, layer, options)


def dense_weight(layer: nn.Module) -> torch.Tensor:
    """(rows, columns), floating point: the layer's weight itself, or what its 8-bit or NF4 weight stands for."""
    weight = layer.weight
    if type(weight).__name__ not in ("Int8Params", "Params4bit"):
        return weight.detach()
    from peft.utils.integrations import dequantize_bnb_weight

    return dequantize_bnb_weight(weight, state=getattr(layer, "state", None))


# ---------------------------------------------------------------------------------------------------------------------
# The mask of a quantized layer: quantizing rounds small kept weights to zero too, so it is kept beside, one bit a weight.

_BITS = torch.arange(7, -1, -1, dtype=torch.uint8)


def remember_kept(layer: nn.Module, kept: torch.Tensor) -> None:
    """Keep the mask of a layer whose weight is about to be quantized. kept: bool (rows, columns)."""
    layer.kept_bits = torch.from_numpy(np.packbits(kept.cpu().numpy())).to(kept.device)
    layer.kept_shape = kept.shape


def kept_of(layer: nn.Module) -> torch.Tensor | None:
    """The mask that was kept beside a layer, bool (rows, columns); None: it is where the weight is not zero."""
    bits = getattr(layer, "kept_bits", None)
    if bits is None:
        return None
    spread = bits[:, None].bitwise_right_shift(_BITS.to(bits.device)).bitwise_and_(1)
    return spread.flatten()[: layer.kept_shape.numel()].view(layer.kept_shape).bool()

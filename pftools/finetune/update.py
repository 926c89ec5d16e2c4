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

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

Kind = Literal["masked", "hira", "dense"]
# Bits of a float32's fraction that the smaller formats do not have.
_SPARE_BITS = {torch.bfloat16: 16, torch.float16: 13}


def updated_weight(
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float = 1.0,
    *,
    kind: Kind = "masked",
    kept: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    alone: bool = False,
) -> torch.Tensor:
    """W + s K * (B A), computed in float32 and cast once.

    But for `dense`, a kept weight that would become zero becomes the smallest number of its dtype instead, so that the number of zeros is
    the same before and after, always.

    Args:
        weight: (rows, columns), any float dtype. a: (rank, columns). b: (rows, rank).
        kept: bool (rows, columns), the mask M; None: where the weight is not zero.
        dtype: of the result; None: the weight's.
        alone: s K * (B A) without W.
    """
    result = torch.empty_like(weight, dtype=dtype or weight.dtype)
    limits = torch.finfo(result.dtype)
    least = max(
        limits.tiny * limits.eps, torch.finfo(torch.float32).tiny
    )  # a subnormal where float16 has one
    a, b = a.float(), b.float() * scaling
    with torch.autocast(weight.device.type, enabled=False):
        for rows in _slices(weight):
            part = weight[rows]
            new = b[rows] @ a
            if kind == "hira":
                new.mul_(part)
            if not alone:
                new.add_(part)
            if kind != "dense":
                if not alone:
                    new.add_(new.abs().lt_(least), alpha=2 * least)
                new.mul_(part != 0 if kept is None else kept[rows])
            result[rows] = _dithered(new, rows.start, result.dtype)
    return result


def _slices(weight: torch.Tensor) -> Iterator[slice]:
    """Rows that are worked on together: few enough for a processor's cache; a GPU wants many."""
    numbers = 2**17 if weight.device.type == "cpu" else 2**24
    step = max(1, numbers // weight.shape[1])
    return (slice(start, start + step) for start in range(0, weight.shape[0], step))


def _dithered(values: torch.Tensor, first_row: int, dtype: torch.dtype) -> torch.Tensor:
    """float32 ``values``, changed in place into numbers that ``dtype`` holds: to one of the two neighbours, by a pattern of row and column that
    is spread evenly over all fractions (Roberts' R2 sequence)."""
    spare = _SPARE_BITS.get(dtype, 0)
    if spare:
        steps = [
            (torch.arange(start, start + size, device=values.device) * factor & 0xFFFF).int()
            for start, size, factor in zip((first_row, 0), values.shape, (49471, 37345))
        ]
        pattern = (steps[0][:, None] + steps[1]).bitwise_and_(0xFFFF)
        if spare < 16:
            pattern.bitwise_right_shift_(16 - spare)
        values.view(torch.int32).add_(pattern).bitwise_and_(-(2**spare))
    return values


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
        for rows in _slices(weight):
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

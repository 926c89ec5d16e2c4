"""One product with the updated weight of a linear layer, and its gradients: what training computes.

    y = x (W + s K * (B A))^T

    K = M = (W != 0)   masked LoRA: MaskLoRA in "PERP", Zimmer et al. 2023, arXiv 2312.15230
    K = W              HiRA: Huang et al., ICLR 2025

Both leave a zero where it is. The sum is formed by `adapters.updated_weight`, in float32, and cast once to
the dtype that the model computes in, as in the merge: training sees exactly the weights that are merged.

Cost. Plain LoRA never forms B A; here it has to be formed, to be multiplied by K entry by entry. So it is
added to the weight, and the forward pass, the gradient of the input and the gradient of the update are one
product of full size each. Plain LoRA has the first two. The third is the price, since no thin form of (K * G)
A^T exists. The sum is formed a few rows at a time, which stay in the processor's cache, and formed again in
the backward pass: nothing of the weight's size is kept for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pftools.adapters import Kind, row_slices, updated_weight
from pftools.layers import rows_of
from pftools.masks import pack, unpack_on_device


class _UpdatedLinear(torch.autograd.Function):
    """(x, A, B) -> x W'^T + bias, with W' the updated weight. The layer's own weight is frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, layer: nn.Linear, options: dict[str, Any]
    ) -> torch.Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.layer, ctx.options = layer, options
        bias = None if layer.bias is None or options["alone"] else layer.bias.to(x.dtype)
        weight = _updated(ctx, a, b, x.dtype)
        # Not a view, as F.linear would give: models such as Falcon add to what a layer returns, in place.
        result = x.new_empty(*x.shape[:-1], len(weight))
        flat, rows = x.flatten(0, -2), result.view(-1, len(weight))
        if bias is None:
            torch.mm(flat, weight.t(), out=rows)
        else:
            torch.addmm(bias, flat, weight.t(), out=rows)
        return result

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
    """Gradients of A (rank, columns) and B (rows, rank), in float32.

    Args:
        grad: the gradient of the updated weight, (rows, columns).
    """
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
    layer: nn.Linear,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    kind: Kind,
    *,
    dropout: nn.Module | None = None,
) -> torch.Tensor:
    """x (W + s K * (B A))^T + bias, with gradients for x, A and B.

    Args:
        x: (..., columns), any float dtype; the product has the layer's, if that is a float dtype too.
        layer: a frozen linear layer, plain or of bitsandbytes; its weight is (rows, columns).
        a, b: the factors (rank, columns) and (rows, rank), float32.
        scaling: s; 1 for HiRA.
        dropout: acts on the input of the update alone, so that there are two products instead of one.
    """
    x = x.to(layer.weight.dtype if layer.weight.is_floating_point() else x.dtype)
    options = {"scaling": scaling, "kind": kind, "alone": dropout is not None}
    if dropout is None:
        return _UpdatedLinear.apply(x, a, b, layer, options)
    return layer(x) + _UpdatedLinear.apply(dropout(x), a, b, layer, options)


def dense_weight(layer: nn.Linear) -> torch.Tensor:
    """(rows, columns), floating point: the layer's weight, or what its 8-bit or NF4 weight stands for."""
    if type(layer.weight).__name__ not in ("Int8Params", "Params4bit"):
        return rows_of(layer).detach()
    from peft.utils.integrations import dequantize_bnb_weight

    weight: Any = layer.weight
    return dequantize_bnb_weight(weight, state=getattr(layer, "state", None))


# ------------------------------------------------------------------------------------------------------------
# The mask of a quantized layer, kept beside it as bits: quantizing rounds small kept weights to zero too.


def remember_kept(layer: nn.Module, kept: torch.Tensor) -> None:
    """Keep the mask of a layer whose weight is about to be quantized. kept: bool (rows, columns)."""
    vars(layer)["kept"] = (torch.from_numpy(pack(kept)).to(kept.device), kept.shape)


def kept_of(layer: nn.Module) -> torch.Tensor | None:
    """The mask kept beside a layer, bool (rows, columns); None: it is where the weight is not zero."""
    bits, shape = vars(layer).get("kept", (None, None))
    return None if bits is None else unpack_on_device(bits, shape)

"""Masked LoRA: the update of a weight is zero wherever the weight is zero (MaskLoRA in "PERP", Zimmer et al. 2023, arXiv
2312.15230).

    y = x (W + s M * (B A))^T,    M = (W != 0)

The mask is applied in the forward pass, so training sees exactly the weights that a masked merge gives, cast to the model's dtype and
all. It needs no storage on a plain base: it is where the weight is not zero. A quantized base keeps it as bits, taken before
quantization.

Cost. Plain LoRA never forms B A; here it has to be formed to be masked. So on a plain base the update is added to the weight and one product is
done with the sum, instead of one with the weight and one with the update: forward, gradient of the input and gradient of
the update are one product each, where plain LoRA has two. Nothing of the weight's size is kept for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import nn
from torch.nn import functional as F


def add_masked(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """W + s M * (B A) with M = (W != 0): computed in float32, cast once to W's dtype.

    A kept weight that the cast would round to zero becomes the smallest normal number of its dtype instead, so that the number of
    zeros is the same before and after, always.

    Args:
        weight: (rows, columns), any float dtype. a: (rank, columns). b: (rows, rank).
    """
    kept = weight != 0
    update = torch.addmm(weight.float(), b.float(), a.float(), alpha=scaling)
    result = torch.where(kept, update, 0.0).to(weight.dtype)
    lost = kept & (result == 0)
    return result.masked_fill(lost, torch.finfo(weight.dtype).tiny) if lost.any() else result


class _MaskedLinear(torch.autograd.Function):
    """x -> x (W + s M * (B A))^T + bias. Gradients for x, A and B; W is frozen. The sum is formed anew in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scaling = scaling
        return F.linear(x, add_masked(weight, a, b, scaling), bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        grad_x = grad @ add_masked(weight, a, b, ctx.scaling) if ctx.needs_input_grad[0] else None
        # Through the cast as if it were exact, as mixed-precision training does.
        grad_update = (grad.flatten(0, -2).T @ x.flatten(0, -2)).float().mul_(weight != 0).mul_(ctx.scaling)
        return grad_x, None, None, b.float().T @ grad_update, grad_update @ a.float().T, None


class MaskedLoraVariant(LoraVariant):
    """What PEFT asks of a variant. `module.kept` is the mask of a quantized base; None: where the base is not zero."""

    def supports_lora_conversion(self) -> bool:
        return False  # a plain LoRA would fill the zeros

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        module.kept = None

    @staticmethod
    def masked_update(module: LoraLayer, adapter_name: str) -> torch.Tensor:
        """s M * (B A), (rows, columns), in the adapter's dtype."""
        a, b = module.lora_A[adapter_name].weight, module.lora_B[adapter_name].weight
        kept = module.get_base_layer().weight != 0 if module.kept is None else module.kept.to(a.device)
        return (b @ a) * module.scaling[adapter_name] * kept

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        update = MaskedLoraVariant.masked_update(module, active_adapter)
        return result + F.linear(module.lora_dropout[active_adapter](x), update.to(x.dtype))

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        if module.kept is None:
            a, b = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
            return add_masked(orig_weight, a, b, module.scaling[active_adapter])
        return (orig_weight.float() + MaskedLoraVariant.masked_update(module, active_adapter).float()).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> None:
        orig_weight.data.copy_(MaskedLoraVariant.merge_safe(module, active_adapter, orig_weight.data))

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        return (orig_weight.float() - MaskedLoraVariant.masked_update(module, active_adapter).float()).to(orig_weight.dtype)


class MaskedLinear(lora.Linear):
    """A masked LoRA layer on a plain `nn.Linear`."""

    def resolve_lora_variant(self, **kwargs: Any) -> LoraVariant:
        return MaskedLoraVariant()

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else None
        dropout = self.lora_dropout[name] if name in self.lora_A else None
        no_dropout = not self.training or isinstance(dropout, nn.Identity)
        if dropout is None or self.disable_adapters or self.merged or not no_dropout:
            return super().forward(x, *args, **kwargs)
        base, a, b = self.get_base_layer(), self.lora_A[name].weight, self.lora_B[name].weight
        return _MaskedLinear.apply(x.to(base.weight.dtype), base.weight, base.bias, a, b, self.scaling[name])


def masked_modules() -> dict[type[nn.Module], type[nn.Module]]:
    """The PEFT layer for every kind of linear layer: what `LoraConfig._register_custom_module` takes.

    Quantized layers come first: they are subclasses of `nn.Linear`, and PEFT takes the first that fits.
    """
    mapping: dict[type[nn.Module], type[nn.Module]] = {}
    try:
        import bitsandbytes as bnb
        from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
    except ImportError:
        pass
    else:

        class MaskedLinear8bit(Linear8bitLt):
            def resolve_lora_variant(self, **kwargs: Any) -> LoraVariant:
                return MaskedLoraVariant()

        class MaskedLinear4bit(Linear4bit):
            def resolve_lora_variant(self, **kwargs: Any) -> LoraVariant:
                return MaskedLoraVariant()

        mapping |= {bnb.nn.Linear8bitLt: MaskedLinear8bit, bnb.nn.Linear4bit: MaskedLinear4bit}
    return mapping | {nn.Linear: MaskedLinear}

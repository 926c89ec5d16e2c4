"""Masked LoRA and HiRA as PEFT layers: what PEFT asks of them, and one fused product instead of its two (see `update`)."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import hira, lora
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import nn
from torch.nn import functional as F

from pftools.finetune.update import kept_of, updated_linear, updated_weight


class MaskedLoraVariant(LoraVariant):
    """The update is zero wherever the weight is, in PEFT's own forward pass and merge."""

    def supports_lora_conversion(self) -> bool:
        return False  # a plain LoRA would fill the zeros

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        pass  # nothing to learn or to store but A and B

    @staticmethod
    def masked_update(module: LoraLayer, adapter_name: str) -> torch.Tensor:
        """s M * (B A), (rows, columns), in the adapter's dtype."""
        a, b = module.lora_A[adapter_name].weight, module.lora_B[adapter_name].weight
        kept = kept_of(module.get_base_layer())
        kept = module.get_base_layer().weight != 0 if kept is None else kept
        return (b @ a) * module.scaling[adapter_name] * kept

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        update = MaskedLoraVariant.masked_update(module, active_adapter)
        return result + F.linear(module.lora_dropout[active_adapter](x), update.to(x.dtype))

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        a, b = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        return updated_weight(
            orig_weight, a, b, module.scaling[active_adapter], kept=kept_of(module.get_base_layer())
        )

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> None:
        orig_weight.data.copy_(MaskedLoraVariant.merge_safe(module, active_adapter, orig_weight.data))

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        return (orig_weight.float() - MaskedLoraVariant.masked_update(module, active_adapter).float()).to(
            orig_weight.dtype
        )


class _Masked:
    """The fused forward pass of a masked LoRA layer, for every kind of base."""

    def resolve_lora_variant(self, **kwargs: Any) -> LoraVariant:
        return MaskedLoraVariant()

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        name = _only_adapter(self, self.lora_A)
        if name is None:
            return super().forward(x, *args, **kwargs)
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return updated_linear(
            x,
            self.get_base_layer(),
            a,
            b,
            self.scaling[name],
            "masked",
            dropout=_active(self.lora_dropout[name]),
        )


class MaskedLinear(_Masked, lora.Linear):
    """A masked LoRA layer on a plain `nn.Linear`."""


class HiraLinear(hira.Linear):
    """PEFT's HiRA layer with the fused forward pass. PEFT's own computes in float32 (three times slower where bf16 is fast) and multiplies
    the raw codes of a quantized weight."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        name = _only_adapter(self, self.hira_A)
        if name is None:
            return super().forward(x, *args, **kwargs)
        a, b = self.hira_A[name], self.hira_B[name]
        return updated_linear(
            x, self.get_base_layer(), a, b, 1.0, "hira", dropout=_active(self.hira_dropout[name])
        )


def _only_adapter(layer: Any, factors: nn.Module) -> str | None:
    """The one active adapter of a layer; None: PEFT's own forward pass has to decide."""
    names = [name for name in layer.active_adapters if name in factors]
    return names[0] if len(names) == 1 and not layer.disable_adapters and not layer.merged else None


def _active(dropout: nn.Module) -> nn.Module | None:
    return dropout if isinstance(dropout, nn.Dropout) and dropout.training else None


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

        class MaskedLinear8bit(_Masked, Linear8bitLt):
            """A masked LoRA layer on an 8-bit base."""

        class MaskedLinear4bit(_Masked, Linear4bit):
            """A masked LoRA layer on an NF4 base."""

        mapping |= {bnb.nn.Linear8bitLt: MaskedLinear8bit, bnb.nn.Linear4bit: MaskedLinear4bit}
    return mapping | {nn.Linear: MaskedLinear}


def fuse_hira(model: nn.Module) -> None:
    """Give PEFT's HiRA layers the fused forward pass; PEFT has no other way in."""
    for module in model.modules():
        if type(module) is hira.Linear:
            module.__class__ = HiraLinear

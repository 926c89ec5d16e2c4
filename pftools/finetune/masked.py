"""Masked LoRA and HiRA as PEFT layers, with one fused product instead of PEFT's two (see `update`)."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from peft.tuners import hira, lora
from torch import nn
from transformers.pytorch_utils import Conv1D

from pftools.errors import PftoolsError
from pftools.finetune.update import updated_linear


class _Masked(lora.LoraLayer):
    """A masked LoRA layer, for every kind of base: the update is zero wherever the weight is.

    Everything that PEFT would do with the plain product B A is refused, since it would fill the zeros.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base: Any = self.get_base_layer()
        if self.disable_adapters:
            return base(x, *args, **kwargs)
        if len(self.active_adapters) != 1:
            raise PftoolsError(
                f"a masked adapter is trained alone, and {', '.join(self.active_adapters)} are active: "
                "activate one adapter."
            )
        name = self.active_adapters[0]
        a: Any = self.lora_A[name]
        b: Any = self.lora_B[name]
        dropout = _active(self.lora_dropout[name])
        return updated_linear(x, base, a.weight, b.weight, self.scaling[name], "masked", dropout=dropout)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False  # a plain LoRA would fill the zeros

    def merge(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise PftoolsError(
            "PEFT's merge would fill the zeros: give the adapter to pftools.finetune.merge_adapter instead."
        )


class MaskedLinear(_Masked, lora.Linear):
    """A masked LoRA layer on a plain `nn.Linear`."""


class MaskedConv1D(_Masked, lora.Linear):
    """A masked LoRA layer on GPT-2's `Conv1D`, whose weight is (inputs, outputs)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "fan_in_fan_out": True})


class HiraLinear(hira.Linear):
    """PEFT's HiRA layer with the fused forward pass.

    PEFT's own computes in float32 (three times slower where bf16 is fast), and multiplies the raw codes of a
    quantized weight.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        names = [name for name in self.active_adapters if name in self.hira_A]
        if len(names) != 1 or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        base: Any = self.get_base_layer()
        a, b = self.hira_A[names[0]], self.hira_B[names[0]]
        return updated_linear(x, base, a, b, 1.0, "hira", dropout=_active(self.hira_dropout[names[0]]))


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
    return mapping | {nn.Linear: MaskedLinear, Conv1D: MaskedConv1D}


def fuse_hira(model: nn.Module) -> None:
    """Give PEFT's HiRA layers the fused forward pass; PEFT has no other way in."""
    for module in model.modules():
        if type(module) is hira.Linear:
            module.__class__ = HiraLinear

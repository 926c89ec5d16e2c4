"""Mixtures of experts whose weights transformers holds in one 3-D parameter: for a walk, each expert becomes
linear modules.

The modules' weights are views of the parameter, so that what is set to zero in one is zero in the other, and
the masks are those of the parameter. Each expert is measured on the tokens that the router sends it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

import torch
from torch import nn

from pftools.errors import PftoolsError
from pftools.layers import fused_experts


class _View(nn.Linear):
    """A linear module on a part of a fused parameter: ``parameter`` is its name within the layer, ``index`` the part."""

    def __init__(self, weight: torch.Tensor, parameter: str, index: tuple) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None
        self.parameter, self.index = parameter, index


def home(name: str, module: nn.Linear) -> tuple[str, tuple]:
    """The parameter (named within the layer) that holds a linear module's weight, and which part of it."""
    return (module.parameter, module.index) if isinstance(module, _View) else (f"{name}.weight", (...,))


@contextmanager
def split(layer: nn.Module) -> Iterator[nn.Module]:
    """The layer with every fused expert as linear modules gate_proj, up_proj and down_proj; undone
    afterwards.

    Raises:
        PftoolsError: the experts are laid out in a way that is not known here.
    """
    found = fused_experts(layer)
    try:
        for name, module in found.items():
            _check_layout(name, module)
            for expert in range(len(module.down_proj)):
                module.add_module(str(expert), _expert(module, name, expert))
            module.forward = MethodType(_forward, module)
        yield layer
    finally:
        for module in found.values():
            module.__dict__.pop("forward", None)
            for expert in range(len(module.down_proj)):
                module._modules.pop(str(expert), None)


def _check_layout(name: str, module: nn.Module) -> None:
    strange = [
        flag
        for flag, plain in (
            ("is_transposed", False),
            ("has_bias", False),
            ("has_post_expert_norm", False),
            ("is_concatenated", True),
        )
        if getattr(module, flag, plain) != plain
    ]
    if strange:
        raise PftoolsError(
            f"the experts in {name} ({type(module).__name__}) have a layout that is not known here ({', '.join(strange)})."
        )


def _expert(module: nn.Module, name: str, expert: int) -> nn.Module:
    parts = nn.Module()
    if hasattr(module, "gate_up_proj"):
        fused, half = module.gate_up_proj.data, module.gate_up_proj.shape[1] // 2
        for part, rows in (("gate_proj", slice(0, half)), ("up_proj", slice(half, 2 * half))):
            parts.add_module(part, _View(fused[expert, rows], f"{name}.gate_up_proj", (expert, rows)))
    else:
        parts.add_module("up_proj", _View(module.up_proj.data[expert], f"{name}.up_proj", (expert,)))
    parts.add_module("down_proj", _View(module.down_proj.data[expert], f"{name}.down_proj", (expert,)))
    return parts


def _forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What transformers' experts compute: each hit expert on its tokens, weighted by the router, added up."""
    total = torch.zeros_like(hidden_states)
    for expert in top_k_index.unique().tolist():
        if expert >= len(self.down_proj):  # the mark of a token that no expert takes
            continue
        token, place = torch.where(top_k_index == expert)
        parts, tokens = self._modules[str(expert)], hidden_states[token]
        if hasattr(parts, "gate_proj"):
            inner = self._apply_gate(torch.cat([parts.gate_proj(tokens), parts.up_proj(tokens)], dim=-1))
        else:
            inner = self.act_fn(parts.up_proj(tokens))
        output = parts.down_proj(inner) * top_k_weights[token, place, None]
        total.index_add_(0, token, output.to(total.dtype))
    return total

"""Linear modules whose weight a model reads itself, past the module: what must stay plain while it is
trained.

Mamba multiplies with `dt_proj.weight`, DeepSeek's indexer casts its inputs to `weights_proj.weight.dtype`. An
adapter beside such a weight would have no effect, and the codes of a quantized weight would be taken for
numbers. No list of families says where; so one short row is read, and every use of a weight is watched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pftools.causal import without_cache
from pftools.layers import linear_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENS = 16
# PEFT refuses these modules of these families, whose kernels on a GPU read the weight past the module.
_READ_BY_KERNELS = ("out_proj",)
_KERNEL_FAMILIES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")


class _Watch(TorchFunctionMode):
    """Notes the linear modules whose weight is used while they do not run."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self.owners = {id(module.weight): name for name, module in modules.items()}
        self.running: set[str] = set()
        self.found: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for value in args:
            name = self.owners.get(id(value))
            if name is not None and name not in self.running:
                self.found.add(name)
        return func(*args, **(kwargs or {}))

    def entering(self, name: str) -> Callable[..., None]:
        """A hook for before the module runs."""
        return lambda *_: self.running.add(name)

    def leaving(self, name: str) -> Callable[..., None]:
        """A hook for after it has run."""
        return lambda *_: self.running.discard(name)


def read_by_model(model: PreTrainedModel, tokens: torch.Tensor) -> set[str]:
    """Full names of the linear modules whose weight the model reads itself.

    Args:
        tokens: LongTensor (rows, length), of which a few are read.
    """
    modules = linear_modules(model)
    watch = _Watch(modules)
    hooks = []
    for name, module in modules.items():
        hooks.append(module.register_forward_pre_hook(watch.entering(name)))
        hooks.append(module.register_forward_hook(watch.leaving(name)))
    training = model.training
    try:
        for mode in (True, False):  # some models look at a weight only while they are trained
            model.train(mode)
            with torch.no_grad(), watch:
                model(input_ids=tokens[:1, :_TOKENS].to(model.device), **without_cache(model))
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    if getattr(model.config, "model_type", None) in _KERNEL_FAMILIES:
        watch.found |= {name for name in modules if name.rpartition(".")[2] in _READ_BY_KERNELS}
    return watch.found

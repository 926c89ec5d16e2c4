"""Where a model's weights are while it is walked: in memory here, on disk in `on_disk`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from pftools.layers import decoder_layers
from pftools.mapped import release
from pftools.pretrained.streamed import source_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Source(Protocol):
    """A model whose layers are opened one at a time."""

    model: PreTrainedModel  # the skeleton, with or without weights

    def entrance(self) -> AbstractContextManager[None]:
        """Context in which all pre-layer weights are loaded."""

    def layer(self, index: int) -> AbstractContextManager[nn.Module]:
        """Context in which a layer's weights are loaded, on the device that computes it."""


class InMemory:
    """A model in memory, or streamed. With a ``device``, each layer is moved there while it is open."""

    def __init__(self, model: PreTrainedModel, device: str | torch.device | None = None) -> None:
        self.model, self.device = model, device
        if device is None and source_of(model) is not None:
            self.device = model.device

    def entrance(self) -> AbstractContextManager[None]:
        return nullcontext()

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        layer = decoder_layers(self.model)[1][index]
        homes = [(weight, weight.data) for weight in layer.parameters()]
        buffers = [(module, dict(module._buffers)) for module in layer.modules()]
        if self.device is not None:
            layer.to(self.device)
        try:
            yield layer
        finally:
            for weight, home in homes:
                if weight.device != home.device:
                    weight.data = home.copy_(weight.data)
                release(home)
            for module, before in buffers:
                module._buffers.update(before)


def device_of(layer: nn.Module) -> torch.device:
    """The device of a layer's first parameter."""
    return next(layer.parameters()).device

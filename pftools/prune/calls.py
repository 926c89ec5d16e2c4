"""What decoder layers are called with, batch by batch; and the check that replaying it is what the model
does.

Layers of different families take different arguments (masks, position embeddings), layers of one model may
take different ones, and some depend on the tokens or on how many rows a batch has. So nothing is assumed: the
real model runs on every batch, with layers that only note how they are called and pass the hidden states on.
That costs embeddings and masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from pftools.causal import without_cache
from pftools.errors import PftoolsError
from pftools.layers import decoder_layers
from pftools.prune.source import device_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Enough(Exception):
    """Ends a forward whose rest is not needed. Never leaves this package."""


@dataclass
class LayerCall:
    """How one decoder layer is called for one batch. args, kwargs: everything but the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, device: torch.device) -> LayerCall:
        """The same call with its tensors on ``device``."""

        def move(value: Any) -> Any:
            return value.to(device) if isinstance(value, torch.Tensor) else value

        if all(
            value.device == device
            for value in tree_leaves((self.args, self.kwargs))
            if torch.is_tensor(value)
        ):
            return self  # also keeps what layers hand on to each other in a dictionary
        return LayerCall(tree_map(move, self.args), tree_map(move, self.kwargs))

    def __call__(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        return hidden_of(layer(hidden, *self.args, **self.kwargs))


def _copy_calls(calls: list[LayerCall]) -> list[LayerCall]:
    """The same calls, with dictionaries of their own; one that several layers share is one afterwards too."""
    copies: dict[int, dict[Any, Any]] = {}

    def own(value: Any) -> Any:
        return copies.setdefault(id(value), dict(value)) if isinstance(value, dict) else value

    return [
        LayerCall(tuple(map(own, call.args)), {name: own(value) for name, value in call.kwargs.items()})
        for call in calls
    ]


@dataclass
class Batch:
    """One batch of the calibration blocks on its way through the layers.

    Attributes:
        hidden: what the next layer is given, (rows, block_length, width) in most families.
        calls: how each layer is called.
    """

    hidden: torch.Tensor
    calls: list[LayerCall]


def copies(batches: list[Batch]) -> list[Batch]:
    """The same batches with hidden states of their own, and with all that layers hand on to each other."""
    return [Batch(batch.hidden.clone(), _copy_calls(batch.calls)) for batch in batches]


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden states among what a layer returns."""
    return output[0] if isinstance(output, (tuple, list)) else output


@contextmanager
def inference(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients and caches, experts one by one; everything is put back afterwards."""
    training, config = model.training, getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    caches, experts = getattr(text, "use_cache", None), getattr(config, "_experts_implementation", None)
    model.eval()
    try:
        if text is not None:
            text.use_cache = False
        if experts not in (None, "eager"):
            model.set_experts_implementation("eager")  # the others multiply with copies of the weights
        with torch.no_grad():
            yield
    finally:
        if text is not None:
            text.use_cache = caches
        if experts not in (None, "eager"):
            model.set_experts_implementation(experts)
        model.train(training)


def record_batches(model: PreTrainedModel, blocks: torch.Tensor, batch_size: int) -> list[Batch]:
    """Every batch of the calibration blocks as the first layer is given it, with the arguments of all layers.

    No layer is computed, and their weights need not be there. Arguments that are the same for all batches are
    kept once.

    Args:
        blocks: LongTensor (n_blocks, block_length).

    Raises:
        PftoolsError: the model does not call each of its layers once, in order.
    """
    device = device_of(model.get_input_embeddings())
    returns = returned_by_layers(model, blocks[:1].to(device))
    batches = [record(model, rows.to(device), returns) for rows in blocks.split(batch_size)]
    for batch in batches[1:]:
        share = _Sharing()
        for first, call in zip(batches[0].calls, batch.calls):
            call.args = share(first.args, call.args)
            call.kwargs = {name: share(first.kwargs.get(name), value) for name, value in call.kwargs.items()}
    return batches


class _Sharing:
    """Replaces the tensors of one batch's arguments by those of the first batch that equal them."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, first: Any, value: Any) -> Any:
        # Not within dictionaries: layers may hand something on to each other in one.
        if type(value) is tuple and type(first) is tuple and len(first) == len(value):
            return tuple(self(one, other) for one, other in zip(first, value))
        if not (torch.is_tensor(value) and torch.is_tensor(first)):
            return value
        if id(value) not in self.seen:
            same = first.shape == value.shape and first.device == value.device and torch.equal(first, value)
            self.seen[id(value)] = (value, first if same else value)
        return self.seen[id(value)][1]


def returned_by_layers(model: PreTrainedModel, block: torch.Tensor) -> int | None:
    """What the model takes from a layer: None, the hidden states alone; else a tuple of so many values, they
    first."""
    failure: Exception | None = None
    for returns in (None, 1, 2, 3):
        try:
            record(model, block, returns)
        except _Unlike as error:
            failure = failure or error
        except (TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
            failure = failure or error
        else:
            return returns
    raise PftoolsError(
        f"{type(model).__name__} does not pass hidden states through each of its layers once and in order "
        f"({' '.join(str(failure).split())[:120]}), so its layers cannot be pruned one after the other."
    ) from failure


class _Unlike(Exception):
    """The layers were not called as a walk would call them."""


def record(model: PreTrainedModel, rows: torch.Tensor, returns: int | None) -> Batch:
    """One batch, (rows, block_length), recorded. returns: see `returned_by_layers`."""
    layers = decoder_layers(model)[1]
    calls: list[LayerCall] = []
    given: list[torch.Tensor] = []

    def note(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            if index != len(calls):
                raise _Unlike(f"layer {index} is called where layer {len(calls)} is due")
            if given and hidden.shape != given[0].shape:
                raise _Unlike(f"layer {index} is given another shape than the first")
            given.append(hidden)
            calls.append(LayerCall(args[1:], kwargs))
            if len(calls) == len(layers):
                raise Enough
            return hidden if returns is None else (hidden, *[None] * (returns - 1))

        return forward

    with _replaced(layers, note):
        try:
            body_of(model)(rows, **without_cache(body_of(model)))
        except Enough:
            return Batch(given[0].clone(), calls)  # it will be overwritten, and arguments may hold it too
    raise _Unlike(f"only {len(calls)} of its {len(layers)} layers are called")


@contextmanager
def _replaced(layers: nn.ModuleList, forward_of: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """The layers' forwards replaced within."""
    before = {layer: layer.__dict__.get("forward") for layer in layers}
    try:
        for index, layer in enumerate(layers):
            layer.forward = forward_of(index)
        yield
    finally:
        for layer, forward in before.items():
            layer.__dict__.pop("forward", None)
            if forward is not None:  # a hook of accelerate's, which is kept on the module itself
                layer.forward = forward


def body_of(model: PreTrainedModel) -> nn.Module:
    """The model without its head: the head's product over the whole vocabulary is never needed here."""
    return getattr(model, getattr(model, "base_model_prefix", ""), model)

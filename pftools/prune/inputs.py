"""What decoder layers are called with, and how large the inputs of their linear weights are.

Layers of different families take different arguments (masks, position embeddings, cache positions), and
layers of one model may take different ones (Gemma alternates sliding and full attention). So nothing is
assumed: the real model runs once on one block, with layers that only note how they are called and pass the
hidden states on. Every layer's own arguments are kept and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from pftools.errors import PftoolsError
from pftools.layers import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Numbers that the widest activation of one forward may hold: on a CPU, few enough for its caches.
_BATCH_BUDGET = 1_000_000
_BATCH_BUDGET_ELSEWHERE = 32_000_000
# Tokens squared at a time: few enough to stay in a core's cache.
_CHUNK = 256
# About so many calibration tokens are kept to measure the error of outputs on.
_SAMPLE = 256
# Columns of a block of X^T X: of the symmetric product, only blocks on and above the diagonal are computed.
_GRAM_BLOCK = 256


class _Enough(Exception):
    """Ends a forward whose rest is not needed. Never leaves this package."""


@dataclass
class LayerCall:
    """How one decoder layer is called. args, kwargs: everything but the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, device: torch.device) -> LayerCall:
        """The same call with its tensors on ``device``."""

        def move(value: Any) -> Any:
            return value.to(device) if isinstance(value, torch.Tensor) else value

        return LayerCall(tree_map(move, self.args), tree_map(move, self.kwargs))

    def __call__(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        output = layer(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output


def widest_output(layer: nn.Module) -> int:
    """Numbers that the widest linear module of a layer gives for a token."""
    return max(module.out_features for module in layer.modules() if isinstance(module, nn.Linear))


def batch_size_for(model: PreTrainedModel, block_length: int, n_blocks: int) -> int:
    """Blocks a forward: as many as keep a layer's widest activation within its device's budget."""
    layer = decoder_layers(model)[1][0]
    budget = (
        _BATCH_BUDGET if next(layer.parameters()).device.type in ("cpu", "meta") else _BATCH_BUDGET_ELSEWHERE
    )
    return max(1, min(n_blocks, budget // (block_length * widest_output(layer))))


def linears_of(layer: nn.Module) -> dict[str, nn.Linear]:
    """The linear modules of a layer by their name within it."""
    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}


@contextmanager
def inference(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients and caches; everything is put back afterwards, whatever happens."""
    training, config = model.training, model.config
    use_cache = getattr(config, "use_cache", None)
    model.eval()
    config.use_cache = False
    try:
        with torch.no_grad():
            yield
    finally:
        config.use_cache = use_cache
        model.train(training)


def record_calls(model: PreTrainedModel, block: torch.Tensor) -> list[LayerCall]:
    """How every decoder layer is called for one block. No layer is computed or needs its weights.

    Args:
        block: LongTensor (1, block_length).
    """
    calls = _run_without_layers(model, block, as_tuple=False)
    # A model that takes the first of what a layer returns cuts the batch off hidden states that came alone.
    return calls or _run_without_layers(model, block, as_tuple=True)


def _run_without_layers(model: PreTrainedModel, block: torch.Tensor, *, as_tuple: bool) -> list[LayerCall]:
    layers = decoder_layers(model)[1]
    calls: list[LayerCall] = []
    shapes: set[torch.Size] = set()

    def note(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        shapes.add(hidden.shape)
        calls.append(
            LayerCall(args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"})
        )
        if len(shapes) > 1 or len(calls) == len(layers):
            raise _Enough
        return (hidden,) if as_tuple else hidden

    replaced = {layer: layer.__dict__.get("forward") for layer in layers}
    try:
        for layer in layers:
            layer.forward = note
        try:
            _body(model)(block)
        except _Enough:
            pass
    finally:
        for layer, forward in replaced.items():
            del layer.forward
            if forward is not None:  # a hook of accelerate's, which is kept on the module itself
                layer.forward = forward
    return calls if len(shapes) == 1 else []


def first_hidden_states(model: PreTrainedModel, blocks: torch.Tensor, batch_size: int) -> torch.Tensor:
    """What the first decoder layer is given: (n_blocks, block_length, width), in the model's dtype.

    The forward ends there: embeddings, and whatever a family does to them, are computed, and nothing else.
    """
    layer = decoder_layers(model)[1][0]
    device = model.get_input_embeddings().weight.device
    caught: list[torch.Tensor] = []

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(args[0] if args else kwargs["hidden_states"])
        raise _Enough

    hook = layer.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for batch in blocks.split(batch_size):
            try:
                _body(model)(batch.to(device))
            except _Enough:
                pass
    finally:
        hook.remove()
    return torch.cat(caught)


def _body(model: PreTrainedModel) -> nn.Module:
    """The model without its head: the head's product over the whole vocabulary is never needed here."""
    return getattr(model, getattr(model, "base_model_prefix", ""), model)


# ------------------------------------------------------------------------------------------------------------
# Measuring


def squared_column_sums(x: torch.Tensor) -> torch.Tensor:
    """Sum of squares of every column over all tokens, in float32: (..., columns) -> (columns,)."""
    total = torch.zeros(x.shape[-1], device=x.device)
    for part in x.reshape(-1, x.shape[-1]).split(_CHUNK if x.device.type == "cpu" else x.numel()):
        total += part.float().square().sum(dim=0)
    return total


def add_gram(total: torch.Tensor, x: torch.Tensor) -> None:
    """Add X^T X to ``total`` (columns, columns), float32, on and above the diagonal blocks only.

    Products and sums are float32. On a CPU that multiplies bf16, its faster unit forms them from bf16 inputs:
    these products are exact and summed in float32, so nothing is lost.
    """
    flat = x.reshape(-1, x.shape[-1])
    with _bf16_unit(flat):
        flat = flat.float()
        for start in range(0, flat.shape[1], _GRAM_BLOCK):
            stop = start + _GRAM_BLOCK
            total[start:stop, start:].addmm_(flat[:, start:stop].t(), flat[:, start:])


@contextmanager
def _bf16_unit(x: torch.Tensor) -> Iterator[None]:
    if x.dtype != torch.bfloat16 or x.device.type != "cpu":
        yield
        return
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # set at import
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


class InputMeter:
    """Measures the inputs of a layer's linear modules while the layer runs: column norms, or X^T X.

    Modules that are given the same tensor (q, k and v; gate and up) are measured once, under the name of the
    first. Where the layer's output is not wanted, the forward ends once every module has been reached: before
    the product of the last one.
    """

    def __init__(self, linears: dict[str, nn.Linear], *, gram: bool = False, sample_of: int = 0) -> None:
        """gram: X^T X instead of norms. sample_of: of how many tokens to keep a sample; 0: none."""
        self.linears, self.gram = linears, gram
        # An odd distance, so that a sample does not hold the same positions of every block.
        self.every = max(1, sample_of // _SAMPLE) | 1 if sample_of else 0
        self.samples: dict[str, list[torch.Tensor]] = {}
        self.totals: dict[str, torch.Tensor] = {}
        self.leader: dict[str, str] = {}
        self.tokens: dict[str, int] = dict.fromkeys(linears, 0)
        self._now: dict[str, torch.Tensor] = {}
        self._reached: set[str] = set()

    @contextmanager
    def attached(self, *, stop_early: bool) -> Iterator[None]:
        """The linear modules are hooked within."""
        hooks = [
            module.register_forward_pre_hook(self._hook(name, stop_early))
            for name, module in self.linears.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._now = {}

    def begin(self) -> None:
        """A new forward begins."""
        self._now, self._reached = {}, set()

    def _hook(self, name: str, stop_early: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            leader = next((other for other, tensor in self._now.items() if tensor is x), name)
            if self.leader.setdefault(name, leader) != leader:
                raise PftoolsError(
                    f"{name} shares its input with {leader} in some batches and not in others: "
                    "give batch_size=1."
                )
            if leader == name:
                self._now[name] = x
                self._measure(name, x)
            self.tokens[name] += x.numel() // x.shape[-1]
            self._reached.add(name)
            if stop_early and len(self._reached) == len(self.linears):
                raise _Enough

        return hook

    def _measure(self, name: str, x: torch.Tensor) -> None:
        if not self.gram:
            self.totals[name] = self.totals.get(name, 0) + squared_column_sums(x)
            if self.every:
                first = -self.tokens[name] % self.every
                self.samples.setdefault(name, []).append(
                    x.reshape(-1, x.shape[-1])[first :: self.every].clone()
                )
            return
        if name not in self.totals:
            self.totals[name] = torch.zeros(x.shape[-1], x.shape[-1], device=x.device)
        add_gram(self.totals[name], x)

    def finish(self, place: str) -> Measured:
        """What was measured.

        Raises:
            PftoolsError: an input held NaN or infinity.
        """
        norms, grams = {}, {}
        for name, total in self.totals.items():
            if self.gram:
                total = total.triu_()
                grams[name] = total + total.triu(1).t()
                total = total.diagonal()
            if not torch.isfinite(total).all():
                raise PftoolsError(
                    f"the input of {place}.{name} holds NaN or infinity on the calibration blocks: use dtype "
                    "float32 or bfloat16 (float16 overflows above 65,504), or check the model."
                )
            norms[name] = total.sqrt()
        shared = {name: norms[leader] for name, leader in self.leader.items()}
        samples = {name: torch.cat(parts) for name, parts in self.samples.items()}
        return Measured(shared, grams, self.leader, self.tokens, samples)


@dataclass
class Measured:
    """The inputs of a layer's linear modules. Modules that saw no token are in ``tokens`` only.

    Attributes:
        norms: {module: Euclidean norms of its input columns (columns,), float32}.
        grams: {first module of those with this input: X^T X (columns, columns), float32}.
        leader: {module: the first module with the same input}.
        tokens: {module: how many tokens it saw}.
        samples: {first module: some of these inputs, (tokens, columns), in their own dtype}.
    """

    norms: dict[str, torch.Tensor] = field(default_factory=dict)
    grams: dict[str, torch.Tensor] = field(default_factory=dict)
    leader: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    samples: dict[str, torch.Tensor] = field(default_factory=dict)


def run_layer(
    layer: nn.Module,
    call: LayerCall,
    hidden: torch.Tensor,
    batch_size: int,
    *,
    replace: bool,
    meter: InputMeter | None = None,
) -> None:
    """Run all hidden states through a layer.

    Args:
        hidden: (n_blocks, block_length, width); with ``replace`` it is overwritten by the layer's outputs.
        replace: False: the outputs are not wanted, and each forward ends as soon as ``meter`` has all inputs.
        meter: measures the linear modules' inputs meanwhile.
    """
    meter = meter or InputMeter({})
    with meter.attached(stop_early=not replace):
        for start in range(0, len(hidden), batch_size):
            batch = hidden[start : start + batch_size]
            meter.begin()
            try:
                output = call(layer, batch)
                if replace:
                    batch.copy_(output)
            except _Enough:
                pass

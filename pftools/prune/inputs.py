"""What decoder layers are called with, and how large the inputs of their linear weights are.

Layers of different families take different arguments (masks, position embeddings, cache positions), and layers of one
model may take different ones (Gemma alternates sliding and full attention). So nothing is assumed: one block goes
through the real model with its layers cut out, and every layer's own arguments are kept and replayed.

Linear modules that read the same tensor (q, k and v; gate and up) are found while they run, by the identity of that
tensor, and it is measured once. The forward of a measuring pass ends as soon as the last of a layer's linear modules has
been given its input: the product of that one (down_proj, the widest) is never computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pftools.errors import PftoolsError
from pftools.models import decoder_layers

# Numbers in the widest activation of one forward: batches are chosen to stay below it. On a CPU, activations
# that fit its caches are faster than large batches; a GPU wants more work at a time.
_BATCH_BUDGET = {"cpu": 4_000_000, "cuda": 64_000_000}


class _Enough(Exception):
    """Ends a forward whose rest is not needed. Never leaves this package."""


@dataclass
class LayerCall:
    """How one decoder layer is called: everything but the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        output = layer(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output


@dataclass
class InputStatistics:
    """One linear module's input X over all calibration tokens (rows are tokens).

    norms: (columns,), float32, the Euclidean norm of every column. tokens: how many rows. hessian: X^T X, (columns, columns),
    float32, where it was asked for.
    """

    norms: torch.Tensor
    tokens: int
    hessian: torch.Tensor | None = None


def batch_size_for(model: nn.Module, block_length: int, n_blocks: int, device: str = "cpu") -> int:
    """Blocks a forward: as many as keep the widest activation of a layer within a fixed budget, at least 1."""
    linears = linears_of(decoder_layers(model)[1][0]).values()
    widest = max(max(module.out_features, module.in_features) for module in linears)
    budget = _BATCH_BUDGET.get(torch.device(device).type, _BATCH_BUDGET["cuda"])
    return max(1, min(n_blocks, budget // (block_length * widest)))


def linears_of(layer: nn.Module) -> dict[str, nn.Linear]:
    """The linear modules of a layer by their name within it."""
    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients and caches; everything is put back afterwards, whatever happens."""
    modes = {module: module.training for module in model.modules()}
    use_cache = getattr(model.config, "use_cache", None)
    model.eval()
    model.config.use_cache = False
    try:
        with torch.no_grad():
            yield
    finally:
        model.config.use_cache = use_cache
        for module, training in modes.items():
            module.training = training


@contextmanager
def memory_advice(batch_size: int, blocks: torch.Tensor) -> Iterator[None]:
    """Turns running out of memory into an error that names the levers, and sizes worth trying."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        n_blocks, length = blocks.shape
        raise PftoolsError(
            f"out of memory with batch_size {batch_size} and {n_blocks} blocks of {length} tokens: try "
            f"batch_size={max(1, batch_size // 2)}, then n_blocks={max(1, n_blocks // 2)} or "
            f"block_length={max(2, length // 2)} (the activations held are n_blocks x block_length x width), or "
            "prune_checkpoint, which holds one layer at a time."
        ) from error


def capture(model: nn.Module, blocks: torch.Tensor, batch_size: int) -> tuple[torch.Tensor, list[LayerCall]]:
    """What the first decoder layer is given, and how every layer is called.

    Embeddings, and whatever a family does to them, are computed by the model itself; the layers are cut out, so this
    costs next to nothing and their weights need not be there.

    Args:
        blocks: LongTensor (n_blocks, block_length).

    Returns:
        The hidden states (n_blocks, block_length, width), in the model's dtype and on its device, and a call a layer.
    """
    layers = decoder_layers(model)[1]
    device = model.get_input_embeddings().weight.device
    hidden: list[torch.Tensor] = []
    calls: list[LayerCall] = []

    def keep_hidden(*args: Any, **kwargs: Any) -> None:
        hidden.append((args[0] if args else kwargs["hidden_states"]).detach())
        raise _Enough

    def keep_call(*args: Any, **kwargs: Any) -> torch.Tensor:
        state = args[0] if args else kwargs.pop("hidden_states")
        calls.append(LayerCall(args[1:], kwargs))
        if len(calls) == len(layers):
            raise _Enough
        return state

    with _replaced_forwards(layers, keep_call):
        _run(model, blocks[:1].to(device))
    with _replaced_forwards(layers[:1], keep_hidden):
        for batch in blocks.split(batch_size):
            _run(model, batch.to(device))
    return torch.cat(hidden), calls


@contextmanager
def _replaced_forwards(layers: nn.ModuleList, forward: Callable[..., Any]) -> Iterator[None]:
    had_own = [vars(layer).get("forward") for layer in layers]  # accelerate puts one on the instance
    for layer in layers:
        layer.forward = forward
    try:
        yield
    finally:
        for layer, own in zip(layers, had_own):
            del layer.forward
            if own is not None:
                layer.forward = own


def _run(model: nn.Module, tokens: torch.Tensor) -> None:
    # The model without its head: the product over the whole vocabulary is never needed here.
    body = getattr(model, getattr(model, "base_model_prefix", ""), model)
    try:
        body(tokens)
    except _Enough:
        pass


class _Sums:
    """Running sums over the rows of one input."""

    def __init__(self, hessian: bool):
        self.tokens, self.squares, self.products, self.hessian = 0, None, None, hessian

    def add(self, x: torch.Tensor) -> None:
        x = x.reshape(-1, x.shape[-1])
        self.tokens += len(x)
        if not len(x):
            return
        if not self.hessian:
            squares = squared_column_sums(x)
            self.squares = squares if self.squares is None else self.squares.add_(squares)
            return
        if self.products is None:
            self.products = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        add_gram(self.products, x)

    def finish(self) -> InputStatistics | None:
        if self.hessian and self.products is not None:
            mirror_upper(self.products)
            self.squares = self.products.diagonal().clone()
        return None if self.squares is None else InputStatistics(self.squares.sqrt(), self.tokens, self.products)


def squared_column_sums(x: torch.Tensor) -> torch.Tensor:
    """Sum of squares of every column, accumulated in float32: (rows, columns) -> (columns,)."""
    if x.dtype == torch.float32:
        return torch.linalg.vector_norm(x, dim=0).square_()
    total = torch.zeros(x.shape[1], device=x.device)
    for rows in x.split(max(1, 2**20 // x.shape[1]) if x.device.type == "cpu" else len(x)):
        total += rows.float().square_().sum(dim=0)  # in chunks, so that the float32 copy stays in the cache
    return total


def add_gram(total: torch.Tensor, x: torch.Tensor) -> None:
    """Add X^T X to ``total`` in place, in float32, its upper triangle only: block rows start at the diagonal, which saves
    about 40% of the products. `mirror_upper` fills in the rest once, at the end."""
    x = x.float()
    step = math.ceil(x.shape[1] / 6 / 16) * 16
    for start in range(0, x.shape[1], step):
        stop = start + step
        total[start:stop, start:] += x[:, start:stop].T @ x[:, start:]


def mirror_upper(matrix: torch.Tensor) -> None:
    """Copy the upper triangle of a square matrix to the lower one, in place."""
    matrix.triu_()
    matrix += matrix.triu(1).T


def measure_layer(
    layer: nn.Module,
    call: LayerCall,
    hidden: torch.Tensor,
    batch_size: int,
    *,
    place: str,
    output: torch.Tensor | None = None,
    hessians: bool = False,
) -> dict[str, InputStatistics]:
    """Run all hidden states through a layer and measure the inputs of its linear modules.

    Args:
        hidden: (n_blocks, block_length, width).
        output: where the layer's outputs go (it may be ``hidden`` itself); None: nobody needs them, and each forward ends
            where its last linear module would begin.
        place: the layer's name, for messages.
        hessians: also keep X^T X of every input.

    Returns:
        {linear module name: its input}; modules that share an input share the object. Modules that no token reached
        (experts) are missing.

    Raises:
        PftoolsError: an input holds NaN or infinity.
    """
    linears = linears_of(layer)
    sums: dict[str, _Sums] = {}
    leader_of: dict[str, str] = {}
    held: dict[int, tuple[torch.Tensor, str]] = {}  # this forward's inputs: held, so that an id is one tensor's own
    reached: set[str] = set()

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            _, leader = held.setdefault(id(x), (x, name))
            # Two modules share their sums if they have shared every input so far; the first forward decides.
            if leader_of.setdefault(name, leader) == name:
                sums.setdefault(name, _Sums(hessians)).add(x)
            elif leader_of[name] != leader:
                raise PftoolsError(f"{place}.{name} reads other inputs from one forward to the next: report this model.")
            reached.add(name)
            if output is None and len(reached) == len(linears):
                raise _Enough

        return hook

    hooks = [module.register_forward_pre_hook(hook_for(name)) for name, module in linears.items()]
    try:
        for start in range(0, len(hidden), batch_size):
            held.clear()
            reached.clear()
            try:
                result = call(layer, hidden[start : start + batch_size])
                if output is not None:
                    output[start : start + batch_size].copy_(result)
            except _Enough:
                pass
    finally:
        held.clear()
        for hook in hooks:
            hook.remove()
    found = {name: total.finish() for name, total in sums.items()}
    for name, measured in found.items():
        if measured is not None and not torch.isfinite(measured.norms).all():
            raise PftoolsError(
                f"the input of {place}.{name} holds NaN or infinity on the calibration blocks: use dtype float32 or "
                "bfloat16 (float16 overflows above 65,504), or check the model."
            )
    return {name: found[leader] for name, leader in leader_of.items() if found[leader] is not None}


def run_layer(layer: nn.Module, call: LayerCall, hidden: torch.Tensor, batch_size: int) -> None:
    """Replace all hidden states by the layer's outputs, in place."""
    for start in range(0, len(hidden), batch_size):
        batch = hidden[start : start + batch_size]
        batch.copy_(call(layer, batch))

"""What decoder layers are called with, and how large the inputs of their linear weights are.

Layers of different families take different arguments (masks, position embeddings, cache positions), and layers of one model may
take different ones (Gemma alternates sliding and full attention). So nothing is assumed: one block goes through the real model
once, and every layer's own arguments are kept and replayed. In the same pass we learn which linear modules share an
input (q, k and v; gate and up), so that each input is measured once, and which module is called last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from pftools.errors import PftoolsError
from pftools.models import decoder_layers

# Activations that one forward may hold at a time, in numbers; batches are chosen to stay below it.
_BATCH_BUDGET = 4_000_000


class _Enough(Exception):
    """Ends a forward whose rest is not needed. Never leaves this package."""


@dataclass
class LayerCall:
    """How one decoder layer is called, and which of its linear modules share an input.

    args, kwargs: everything but the hidden states. groups: names of linear modules (within the layer) that read the same
    tensor, in the order in which they are called.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    groups: list[list[str]]

    def __call__(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        output = layer(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output


def batch_size_for(model: nn.Module, block_length: int, n_blocks: int) -> int:
    """Blocks a forward: as many as keep the widest activation of a layer within a fixed budget, at least 1."""
    widest = max(module.out_features for module in decoder_layers(model)[1][0].modules() if isinstance(module, nn.Linear))
    return max(1, min(n_blocks, _BATCH_BUDGET // (block_length * widest)))


def linears_of(layer: nn.Module) -> dict[str, nn.Linear]:
    """The linear modules of a layer by their name within it."""
    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
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


def record_calls(model: nn.Module, block: torch.Tensor) -> list[LayerCall]:
    """One block through the real model: how every layer was called.

    Args:
        block: LongTensor (1, block_length).
    """
    layers = decoder_layers(model)[1]
    calls: list[LayerCall] = []
    seen: list[tuple[str, torch.Tensor]] = []
    hooks = []

    def enter(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.clear()
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        calls.append(LayerCall(args[1:], rest, []))

    def leave(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        by_input: dict[int, list[str]] = {}
        for name, tensor in seen:  # the tensors are held in `seen`, so their ids are their own
            by_input.setdefault(id(tensor), []).append(name)
        calls[-1].groups = list(by_input.values())
        seen.clear()

    def note(name: str) -> Callable[..., None]:
        return lambda module, args: seen.append((name, args[0]))

    try:
        for layer in layers:
            hooks.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.append(layer.register_forward_hook(leave))
            hooks += [module.register_forward_pre_hook(note(name)) for name, module in linears_of(layer).items()]
        _body(model)(block)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def first_hidden_states(model: nn.Module, blocks: torch.Tensor, batch_size: int) -> torch.Tensor:
    """What the first decoder layer is given: (n_blocks, block_length, width), in the model's dtype.

    The forward ends there: embeddings, and whatever a family does to them, are computed, and nothing else.
    """
    layer = decoder_layers(model)[1][0]
    device = next(layer.parameters()).device
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


def _body(model: nn.Module) -> nn.Module:
    """The model without its head: the head's product over the whole vocabulary is never needed here."""
    return getattr(model, getattr(model, "base_model_prefix", ""), model)


def squared_column_sums(x: torch.Tensor) -> torch.Tensor:
    """Sum of squares of every column over all leading dimensions, accumulated in float32: (..., columns) -> (columns,)."""
    return x.reshape(-1, x.shape[-1]).float().square().sum(dim=0)


def measure_layer(
    layer: nn.Module, call: LayerCall, hidden: torch.Tensor, batch_size: int, *, replace: bool, place: str
) -> dict[str, torch.Tensor]:
    """Run all hidden states through a layer and measure the inputs of its linear modules.

    Args:
        hidden: (n_blocks, block_length, width); with ``replace`` it is overwritten by the layer's outputs.
        replace: False: the forward stops before the product of the module called last, whose output nobody needs.
        place: the layer's name, for messages.

    Returns:
        {linear module name: column norms (columns,), float32}; modules that share an input share the tensor.

    Raises:
        PftoolsError: an input holds NaN or infinity.
    """
    linears = linears_of(layer)
    sums: dict[str, torch.Tensor] = {}
    hooks = []

    def measure(name: str, stop: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            sums[name] = sums.get(name, 0) + squared_column_sums(args[0])
            if stop:
                raise _Enough

        return hook

    try:
        for group in call.groups:
            last = group is call.groups[-1] and not replace
            hooks.append(linears[group[0]].register_forward_pre_hook(measure(group[0], last)))
        for start in range(0, len(hidden), batch_size):
            batch = hidden[start : start + batch_size]
            try:
                output = call(layer, batch)
                if replace:
                    batch.copy_(output)
            except _Enough:
                pass
    finally:
        for hook in hooks:
            hook.remove()
    norms = {name: total.sqrt() for name, total in sums.items()}
    for name, norm in norms.items():
        if not torch.isfinite(norm).all():
            raise PftoolsError(
                f"the input of {place}.{name} holds NaN or infinity on the calibration blocks: use dtype float32 or "
                "bfloat16 (float16 overflows above 65,504), or check the model."
            )
    return {name: norms[group[0]] for group in call.groups for name in group}


@dataclass
class ActivationStatistics:
    """Column norms of every linear input of an unpruned model, over the same calibration tokens.

    norms: {linear module's full name: (columns,), float32 on the CPU}. n_tokens: how many tokens they were taken over.
    """

    norms: dict[str, torch.Tensor]
    n_tokens: int

    def save(self, path: str | Path) -> None:
        """Write as safetensors; a few MB even for large models."""
        from safetensors.torch import save_file

        save_file({name: norm.clone() for name, norm in self.norms.items()}, path, metadata={"n_tokens": str(self.n_tokens)})

    @classmethod
    def load(cls, path: str | Path) -> ActivationStatistics:
        """Read what `save` wrote."""
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            return cls({name: file.get_tensor(name) for name in file.keys()}, int(file.metadata()["n_tokens"]))

    def table(self) -> pd.DataFrame:
        """A row a linear module: layer, module, mean_norm and max_norm of its input columns (root mean square a token), and
        outlier_share, the share of columns more than five times the mean."""
        rows = []
        for name, norm in self.norms.items():
            layer = next(int(part) for part in name.split(".") if part.isdigit())
            size = norm / self.n_tokens**0.5
            mean = float(size.mean())
            share = float((size > 5 * mean).float().mean())
            module = name.rpartition(".")[2]
            rows.append({"layer": layer, "module": module, "mean_norm": mean, "max_norm": float(size.max()), "outlier_share": share})
        return pd.DataFrame(rows)


def measure_activations(
    model: nn.Module, blocks: torch.Tensor, *, batch_size: int | None = None, progress: bool = True
) -> ActivationStatistics:
    """One forward of the unpruned model over the calibration blocks: the norms of all linear inputs.

    With these, any sparsity, pattern and per-column criterion is pruned without another forward (`inputs="dense"`).

    Args:
        blocks: LongTensor (n_blocks, block_length).
    """
    prefix, layers = decoder_layers(model)
    batch_size = batch_size or batch_size_for(model, blocks.shape[1], len(blocks))
    norms: dict[str, torch.Tensor] = {}
    with inference(model):
        calls = record_calls(model, blocks[:1].to(model.device))
        hidden = first_hidden_states(model, blocks, batch_size)
        for index, layer in enumerate(tqdm(layers, desc="measuring", unit="layer", disable=not progress)):
            place = f"{prefix}.{index}"
            last = index == len(layers) - 1
            measured = measure_layer(layer, calls[index], hidden, batch_size, replace=not last, place=place)
            norms |= {f"{place}.{name}": norm.cpu() for name, norm in measured.items()}
    return ActivationStatistics(norms, blocks.numel())

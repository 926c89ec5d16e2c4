"""The walk through the decoder layers: measure a layer's inputs, prune it, pass its outputs on.

Each layer is measured behind the already pruned ones, so that it is judged on the inputs that it will see. That takes two
passes of every layer over the calibration tokens, which is where all the time goes; so the first pass stops before the product of the
module called last (down_proj), the last layer is not run a second time, inputs that several modules share are measured once,
and one buffer of hidden states is updated in place.

The walk does not care where layers come from: a `Source` puts one at its disposal, and takes it back when it is done.
`prune_model` walks a model in memory, `checkpoint.prune_checkpoint` one on disk.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Protocol

import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from pftools.errors import PftoolsError
from pftools.layers import decoder_layers
from pftools.prune import allocation, experts
from pftools.prune.inputs import (
    InputMeter,
    LayerCall,
    Measured,
    batch_size_for,
    first_hidden_states,
    inference,
    linears_of,
    record_calls,
    run_layer,
)
from pftools.prune.layer import FEW_TOKENS, PrunedLayer, prune_layer, weights_of
from pftools.prune.memory import naming_the_levers
from pftools.prune.reconstruct import reconstruct
from pftools.prune.request import Request, check_request
from pftools.prune.result import PruneResult
from pftools.prune.statistics import ActivationStatistics


class Source(Protocol):
    """Where a model's weights are while it is walked: `model` is its skeleton, with or without them."""

    model: nn.Module

    def entrance(self) -> AbstractContextManager[None]:
        """All that comes before the layers has its weights within."""

    def layer(self, index: int) -> AbstractContextManager[nn.Module]:
        """The layer has its weights within, on the device that computes it."""


class InMemory:
    """A model in memory; each layer is on ``device`` while it is open, if one is given."""

    def __init__(self, model: nn.Module, device: str | None = None) -> None:
        self.model, self.device = model, device

    def entrance(self) -> AbstractContextManager[None]:
        return nullcontext()

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        layer = decoder_layers(self.model)[1][index]
        before = _device_of(layer)
        if self.device is not None:
            layer.to(self.device)
        try:
            yield layer
        finally:
            layer.to(before)


def prune_model(
    model: nn.Module,
    blocks: torch.Tensor,
    *,
    method: str = "wanda",
    sparsity: float = 0.5,
    pattern: str = "unstructured",
    batch_size: int | None = None,
    inputs: str = "pruned",
    statistics: ActivationStatistics | None = None,
    allocation: str = "uniform",
    owl_lambda: float = 0.08,
    owl_m: float = 5.0,
    reconstruct_steps: int = 0,
    device: str | None = None,
    progress: bool = True,
) -> PruneResult:
    """Set the least important linear weights of the decoder layers to zero, in place.

    Args:
        model: a causal language model; changed in place, in its own dtype.
        blocks: LongTensor (n_blocks, block_length), the calibration tokens.
        method: a name in `METHODS`.
        sparsity: share of zeros in [0, 1); with an N:M pattern it has to be what the pattern fixes.
        pattern: `unstructured` or N:M.
        batch_size: blocks a forward; None: chosen by size.
        inputs: `pruned`: measure each layer behind pruned ones (published); `dense`: measure the unpruned model once.
        statistics: what `measure_activations` found on this model earlier, for `dense` and for OWL; None: measured here.
        allocation: `uniform`, or `owl`: less sparsity where outliers are many. owl_lambda, owl_m: see `allocation.owl`.
        reconstruct_steps: Adam steps a layer that mend the kept weights after pruning; 0: none.
        device: where layers are computed, one at a time; None: where each of them is (one or several devices).

    Raises:
        PftoolsError: a request that cannot be met, found before any weight is changed; NaN in a weight or in the activations;
            or too little memory, with the sizes to lower.
    """
    request = check_request(
        model,
        blocks,
        method=method,
        sparsity=sparsity,
        pattern=pattern,
        inputs=inputs,
        batch_size=batch_size,
        allocation=allocation,
        owl_lambda=owl_lambda,
        owl_m=owl_m,
        reconstruct_steps=reconstruct_steps,
        progress=progress,
    )
    started = time.perf_counter()
    if statistics is not None:
        _check_statistics(model, statistics)
    result = PruneResult({}, pd.DataFrame(), 0.0)
    rows: list[dict[str, Any]] = []
    with inference(model):
        for done in prune_layers(InMemory(model, device), blocks, request, statistics):
            result.masks |= done.masks
            result.weights |= done.weights
            rows += done.rows
    return replace(result, layers=pd.DataFrame(rows), seconds=time.perf_counter() - started)


def measure_activations(
    model: nn.Module,
    blocks: torch.Tensor,
    *,
    batch_size: int | None = None,
    device: str | None = None,
    progress: bool = True,
) -> ActivationStatistics:
    """One forward of the unpruned model over the calibration blocks: the norms of all linear inputs.

    With these, any sparsity, pattern and criterion without weight update is pruned without another forward (`inputs="dense"`).

    Args:
        blocks: LongTensor (n_blocks, block_length).
    """
    batch_size = batch_size or batch_size_for(model, blocks.shape[1], len(blocks))
    with inference(model):
        return measure_layers(InMemory(model, device), blocks, batch_size, progress=progress)


def _check_statistics(model: nn.Module, statistics: ActivationStatistics) -> None:
    prefix, layers = decoder_layers(model)
    for index, layer in enumerate(layers):
        with experts.split(layer):
            for name, module in linears_of(layer).items():
                norms = statistics.norms.get(f"{prefix}.{index}.{name}")
                if norms is None or len(norms) != module.in_features:
                    raise PftoolsError(
                        f"the activation statistics do not fit the model at {prefix}.{index}.{name}: measure them on this model."
                    )


# ---------------------------------------------------------------------------------------------------------------------
# The walk


def _enter(source: Source, blocks: torch.Tensor, batch_size: int) -> tuple[list[LayerCall], torch.Tensor]:
    """How every layer is called, and what the first is given."""
    with source.entrance():
        device = source.model.get_input_embeddings().weight.device
        return record_calls(source.model, blocks[:1].to(device)), first_hidden_states(
            source.model, blocks, batch_size
        )


def measure_layers(
    source: Source, blocks: torch.Tensor, batch_size: int, *, progress: bool
) -> ActivationStatistics:
    """`measure_activations`, wherever the layers come from."""
    prefix, layers = decoder_layers(source.model)
    calls, hidden = _enter(source, blocks, batch_size)
    statistics = ActivationStatistics({}, blocks.numel(), {})
    for index in tqdm(range(len(layers)), desc="measuring", unit="layer", disable=not progress):
        with source.layer(index) as layer, experts.split(layer):
            place, device = f"{prefix}.{index}", _device_of(layer)
            hidden = hidden.to(device)
            meter = InputMeter(linears_of(layer))
            with naming_the_levers(place, layer, hidden, batch_size):
                run_layer(
                    layer,
                    calls[index].to(device),
                    hidden,
                    batch_size,
                    replace=index < len(layers) - 1,
                    meter=meter,
                )
            measured = meter.finish(place)
            for name, module in meter.linears.items():
                norms = measured.norms.get(name)
                statistics.norms[f"{place}.{name}"] = (
                    torch.zeros(module.in_features) if norms is None else norms.cpu()
                )
                if measured.tokens[name] != statistics.n_tokens:
                    statistics.routed[f"{place}.{name}"] = measured.tokens[name]
    return statistics


def prune_layers(
    source: Source, blocks: torch.Tensor, request: Request, statistics: ActivationStatistics | None
) -> Iterator[PrunedLayer]:
    """Prune layer after layer; each is yielded while it is still open."""
    prefix, layers = decoder_layers(source.model)
    if request.allocation == "owl" and statistics is None:
        statistics = measure_layers(source, blocks, request.batch_size, progress=request.progress)
    request = replace(request, sparsities=allocate(source, request, statistics))
    stored = statistics if request.inputs == "dense" and not request.walks else None
    streams = (
        _Streams(source, blocks, request)
        if request.walks or (stored is None and request.method.needs_inputs)
        else None
    )
    for index in tqdm(range(len(layers)), desc="pruning", unit="layer", disable=not request.progress):
        place = f"{prefix}.{index}"
        with source.layer(index) as layer, experts.split(layer):
            if streams is None:
                yield prune_layer(layer, index, place, _known(layer, place, stored), request, blocks.numel())
                continue
            with naming_the_levers(place, layer, streams.hidden, request.batch_size):
                measured = streams.measure(index, layer, place)
                done = prune_layer(layer, index, place, measured, request, blocks.numel())
                streams.recover(index, layer, place, done)
                yield done
                streams.move_on(index, layer)


def allocate(source: Source, request: Request, statistics: ActivationStatistics | None) -> tuple[float, ...]:
    """The sparsity of every layer."""
    prefix, layers = decoder_layers(source.model)
    asked = request.sparsity if request.pattern.sparsity is None else request.pattern.sparsity
    if request.allocation == "uniform":
        return (asked,) * len(layers)
    shares, sizes = [], []
    for index in range(len(layers)):
        with source.layer(index) as layer, experts.split(layer):
            weights = {name: module.weight.detach() for name, module in linears_of(layer).items()}
            norms = {name: statistics.norms[f"{prefix}.{index}.{name}"] for name in weights}
            shares.append(allocation.outlier_share(weights, norms, request.owl_m))
            sizes.append(sum(weight.numel() for weight in weights.values()))
    return tuple(allocation.owl(shares, sizes, asked, request.owl_lambda))


class _Streams:
    """The calibration tokens on their way through the layers: behind pruned layers, behind dense ones, or both."""

    def __init__(self, source: Source, blocks: torch.Tensor, request: Request) -> None:
        self.request, self.n_layers, self.n_tokens = (
            request,
            len(decoder_layers(source.model)[1]),
            blocks.numel(),
        )
        self.calls, first = _enter(source, blocks, request.batch_size)
        behind_dense = request.inputs == "dense" or request.reconstruct_steps > 0
        behind_pruned = request.inputs == "pruned" or request.reconstruct_steps > 0
        self.pruned = first if behind_pruned else None
        self.dense = (first.clone() if behind_pruned else first) if behind_dense else None

    @property
    def hidden(self) -> torch.Tensor:
        return self.dense if self.pruned is None else self.pruned

    def measure(self, index: int, layer: nn.Module, place: str) -> Measured:
        """Pass the dense stream through the layer, and measure the layer's inputs in the stream that is asked for."""
        device = _device_of(layer)
        self.pruned = None if self.pruned is None else self.pruned.to(device)
        self.dense = None if self.dense is None else self.dense.to(device)
        self.call: LayerCall = self.calls[index].to(device)
        meter = InputMeter(linears_of(layer), gram=self.request.method.update, sample_of=self.n_tokens)
        on_dense = self.request.inputs == "dense"
        size = self.request.batch_size
        if self.dense is not None:
            wanted = index < self.n_layers - 1 or self.request.reconstruct_steps > 0
            run_layer(layer, self.call, self.dense, size, replace=wanted, meter=meter if on_dense else None)
        if not self.request.method.needs_inputs:
            return _known(layer, place, None)
        if not on_dense:
            run_layer(layer, self.call, self.pruned, size, replace=False, meter=meter)
        return meter.finish(place)

    def recover(self, index: int, layer: nn.Module, place: str, done: PrunedLayer) -> None:
        """Reconstruct the layer's dense output, if that is asked for; every row of the layer's table says how far it came."""
        if not self.request.reconstruct_steps:
            return
        homes = {name: experts.home(name, module) for name, module in linears_of(layer).items()}
        kept = {name: done.masks[f"{place}.{parameter}"][part] for name, (parameter, part) in homes.items()}
        before, after = reconstruct(
            layer, self.call, self.pruned, self.dense, kept, steps=self.request.reconstruct_steps, place=place
        )
        done.weights = weights_of(layer, place)
        for row in done.rows:
            row |= {"block_error_before": before**0.5, "block_error": after**0.5}

    def move_on(self, index: int, layer: nn.Module) -> None:
        """Pass the pruned stream through the layer that is done; nobody needs the last one's outputs."""
        if self.pruned is not None and index < self.n_layers - 1:
            run_layer(layer, self.call, self.pruned, self.request.batch_size, replace=True)


def _known(layer: nn.Module, place: str, statistics: ActivationStatistics | None) -> Measured:
    """What stored statistics say of a layer; nothing, for a criterion that needs no inputs."""
    device, linears = _device_of(layer), linears_of(layer)
    leader = {name: name for name in linears}
    if statistics is None:
        ones = {name: torch.ones(module.in_features, device=device) for name, module in linears.items()}
        return Measured(ones, {}, leader, dict.fromkeys(linears, FEW_TOKENS))
    norms = {name: statistics.norms[f"{place}.{name}"].to(device) for name in linears}
    tokens = {name: statistics.routed.get(f"{place}.{name}", statistics.n_tokens) for name in linears}
    return Measured(norms, {}, leader, tokens)


def _device_of(layer: nn.Module) -> torch.device:
    return next(layer.parameters()).device

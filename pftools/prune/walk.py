"""The walk through the decoder layers: measure a layer's inputs, prune it, pass its outputs on.

Each layer is measured behind the already pruned ones, so that it is judged on the inputs that it will see.
That takes two passes of every layer over the calibration tokens, which is where all the time goes. So the
first pass stops before the product of the module called last (down_proj), the last layer is not run a second
time, inputs that several modules share are measured once, and one buffer of hidden states is updated in
place.

With `inputs="dense"` a layer is measured while its dense outputs are computed: one pass. Where the norms were
measured earlier, or the criterion needs none, there is no pass at all.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import nn

from pftools.bars import progress_bar
from pftools.errors import PftoolsError
from pftools.layers import decoder_layers, matrices
from pftools.masks import PackedMasks
from pftools.memory import OutOfMemory, smaller
from pftools.pretrained.base_models import check_blocks
from pftools.pretrained.streamed import source_of
from pftools.prune import allocation
from pftools.prune.calls import Batch, copies, inference, record_batches
from pftools.prune.check import check_replay
from pftools.prune.inputs import InputMeter, Measured, batch_size_for, run_layer
from pftools.prune.layer import PrunedLayer, prune_layer, recover_layer
from pftools.prune.levers import naming_the_levers
from pftools.prune.request import Request, check_request
from pftools.prune.result import PruneResult
from pftools.prune.source import InMemory, Source, device_of
from pftools.prune.statistics import ActivationStatistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_READ = "calibration blocks"  # what is read in batches, for the record of a run


def prune_model(
    model: PreTrainedModel,
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
        inputs: `pruned`: measure a layer behind pruned ones (published); `dense`: behind unpruned ones.
        statistics: what `measure_activations` found on this model earlier, for `dense` and for OWL; None:
            measured here.
        allocation: `uniform`, or `owl`: less sparsity where outliers are many.
        owl_lambda: the most that a layer's sparsity may differ from the mean (see `allocation.owl`).
        owl_m: an outlier is this many times the layer's mean score.
        reconstruct_steps: Adam steps a layer that mend the kept weights after pruning; 0: none.
        device: where layers are computed, one at a time; None: where each of them is.
        progress: show a progress bar.

    Raises:
        PftoolsError: a request that cannot be met, found before any weight is changed; NaN in a weight or in
            the activations; or too little memory, with the sizes to lower.
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
    masks, weights, changed = PackedMasks(), dict[str, torch.Tensor](), list[str]()
    rows: list[dict[str, Any]] = []
    with inference(model):
        for done in prune_layers(InMemory(model, device), blocks, request, statistics):
            masks.update(done.masks)
            rows += done.rows
            changed += done.weights
            if source_of(model) is None:
                weights |= done.weights
    if source_of(model) is not None:  # no copies: together they may be more than the memory
        weights = {name: model.get_parameter(name).detach() for name in changed}
    return PruneResult(masks, pd.DataFrame(rows), time.perf_counter() - started, weights)


def measure_activations(
    model: PreTrainedModel,
    blocks: torch.Tensor,
    *,
    batch_size: int | None = None,
    device: str | None = None,
    progress: bool = True,
) -> ActivationStatistics:
    """One forward of the unpruned model over the calibration blocks: the norms of all linear inputs.

    With these, any sparsity, pattern and criterion without weight update is pruned without another forward
    (`inputs="dense"`).

    Args:
        blocks: LongTensor (n_blocks, block_length).
        batch_size: blocks a forward; None: chosen by size.
        device: where layers are computed, one at a time; None: where each of them is.
        progress: show a progress bar.

    Raises:
        PftoolsError: the blocks are longer than the model's context, or hold what is not finite.
    """
    check_blocks(model, blocks)
    batch_size = batch_size or batch_size_for(model, blocks.shape[1], len(blocks))
    with inference(model):
        while True:
            try:
                return measure_layers(InMemory(model, device), blocks, batch_size, progress=progress)
            except OutOfMemory as error:
                batch_size = smaller(error, batch_size, of=_READ)


def _check_statistics(model: nn.Module, statistics: ActivationStatistics) -> None:
    prefix, layers = decoder_layers(model)
    for index, layer in enumerate(layers):
        for name, matrix in matrices(layer).items():
            norms = statistics.norms.get(f"{prefix}.{index}.{name}")
            if norms is None or len(norms) != matrix.weight(layer).shape[1]:
                raise PftoolsError(
                    f"the activation statistics do not fit the model at {prefix}.{index}.{name}: "
                    "measure them on this model."
                )


# ------------------------------------------------------------------------------------------------------------
# The walk


def prune_layers(
    source: Source, blocks: torch.Tensor, request: Request, statistics: ActivationStatistics | None
) -> Iterator[PrunedLayer]:
    """Prune layer after layer; each is yielded while it is still open.

    Where memory runs out before anything was changed, batches are halved.
    """
    while True:
        try:
            yield from _prune_layers(source, blocks, request, statistics)
            return
        except OutOfMemory as error:
            request = replace(request, batch_size=smaller(error, request.batch_size, of=_READ))


def _prune_layers(
    source: Source, blocks: torch.Tensor, request: Request, statistics: ActivationStatistics | None
) -> Iterator[PrunedLayer]:
    if request.allocation == "owl" and statistics is None:
        statistics = measure_layers(source, blocks, request.batch_size, progress=request.progress)
    request = replace(request, sparsities=_allocate(source, request, statistics))
    known = statistics if request.inputs == "dense" else None
    if request.changes_weights or (request.method.needs_inputs and known is None):
        yield from _walk(source, blocks, request)
        return
    for index, place, layer in _open_layers(source, "pruning", request.progress):
        measured = _look_up(layer, place, known) if known else Measured()
        yield prune_layer(layer, index, place, measured, request, blocks.numel())


def measure_layers(
    source: Source, blocks: torch.Tensor, batch_size: int, *, progress: bool
) -> ActivationStatistics:
    """`measure_activations`, wherever the layers come from."""
    batches = _enter(source, blocks, batch_size)
    statistics = ActivationStatistics({}, blocks.numel(), {})
    last = len(decoder_layers(source.model)[1]) - 1
    for index, place, layer in _open_layers(source, "measuring", progress):
        meter = InputMeter(layer)
        with naming_the_levers(place, layer, blocks.shape, batch_size, harmless=True):
            run_layer(layer, index, batches, replace=index < last, meter=meter)
        statistics.add(place, layer, meter.finish(place))
    return statistics


def _walk(source: Source, blocks: torch.Tensor, request: Request) -> Iterator[PrunedLayer]:
    """Prune layers on the inputs that the calibration tokens give them.

    ``batches`` are where they are measured: behind pruned layers, or behind dense ones. Reconstruction needs
    both streams: the inputs in the pruned model, and the outputs of the dense one."""
    batches = _enter(source, blocks, request.batch_size)
    on_dense, mends = request.inputs == "dense", request.reconstruct_steps > 0
    dense = copies(batches) if mends else batches
    n_layers = len(decoder_layers(source.model)[1])
    for index, place, layer in _open_layers(source, "pruning", request.progress):
        last, run = index == n_layers - 1, partial(run_layer, layer, index)
        meter = _meter_for(layer, request, blocks.numel())
        with naming_the_levers(place, layer, blocks.shape, request.batch_size, harmless=index == 0):
            if on_dense or mends:
                run(dense, replace=mends or not last, meter=meter if on_dense else None)
            if meter and not on_dense:
                run(batches, replace=False, meter=meter)
            measured = meter.finish(place) if meter else Measured()
        with naming_the_levers(place, layer, blocks.shape, request.batch_size):
            done = prune_layer(layer, index, place, measured, request, blocks.numel())
            if mends:
                recover_layer(layer, index, place, done, batches, dense, steps=request.reconstruct_steps)
            yield done
            if (mends or not on_dense) and not last:
                run(batches, replace=True)


def _meter_for(layer: nn.Module, request: Request, n_tokens: int) -> InputMeter | None:
    """What measures the layer's inputs as the criterion needs them; None: it needs none."""
    if not request.method.needs_inputs:
        return None
    return InputMeter(layer, gram=request.method.update, sample_of=n_tokens)


def _enter(source: Source, blocks: torch.Tensor, batch_size: int) -> list[Batch]:
    """What the first layer is given and how all are called, after the check that this is what the model
    does."""
    with source.entrance():
        check_replay(source, blocks, batch_size)
        return record_batches(source.model, blocks, batch_size)


def _open_layers(source: Source, verb: str, progress: bool) -> Iterator[tuple[int, str, nn.Module]]:
    """(index, full name, layer), one layer open at a time."""
    prefix, layers = decoder_layers(source.model)
    for index in progress_bar(range(len(layers)), desc=verb, unit="layer", disable=not progress):
        with source.layer(index) as layer:
            yield index, f"{prefix}.{index}", layer


def _allocate(source: Source, request: Request, statistics: ActivationStatistics | None) -> tuple[float, ...]:
    """The sparsity asked of every layer."""
    asked = request.sparsity if request.pattern.sparsity is None else request.pattern.sparsity
    if statistics is None or request.allocation == "uniform":
        return (asked,) * len(decoder_layers(source.model)[1])
    shares, sizes = [], []
    for _, place, layer in _open_layers(source, "allocating", False):
        weights = {name: matrix.weight(layer) for name, matrix in matrices(layer).items()}
        norms = {name: statistics.norms[f"{place}.{name}"] for name in weights}
        shares.append(allocation.outlier_share(weights, norms, request.owl_m))
        sizes.append(sum(weight.numel() for weight in weights.values()))
    return tuple(allocation.owl(shares, sizes, asked, request.owl_lambda))


def _look_up(layer: nn.Module, place: str, statistics: ActivationStatistics) -> Measured:
    """What was measured of a layer earlier."""
    names, device = list(matrices(layer)), device_of(layer)
    norms = {name: statistics.norms[f"{place}.{name}"].to(device) for name in names}
    tokens = {name: statistics.routed.get(f"{place}.{name}", statistics.n_tokens) for name in names}
    return Measured(norms, {}, {name: name for name in names}, tokens)

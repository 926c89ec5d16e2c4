"""The walk through the decoder layers: measure a layer's inputs, prune it, pass its outputs on.

Each layer is measured behind the already pruned ones, so that it is judged on the inputs that it will see. That takes two
passes of every layer over the calibration tokens, which is where all the time goes; so the first pass stops before the product of the
module called last (down_proj), the last layer is not run a second time, inputs that several modules share are measured once,
and one buffer of hidden states is updated in place.
"""

from __future__ import annotations

import time
from typing import Any

import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from pftools.errors import PftoolsError, nearest
from pftools.models import decoder_layers, linear_modules
from pftools.prune import inputs as layer_inputs
from pftools.prune.criteria import Method, find_method
from pftools.prune.inputs import ActivationStatistics
from pftools.prune.patterns import Pattern, check_width, parse_pattern
from pftools.prune.result import PruneResult, choose, table_row


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
        statistics: for `dense`, what `measure_activations` found earlier; None: measured here.

    Raises:
        PftoolsError: a request that cannot be met, found before any weight is changed; or NaN in the activations.
    """
    rule, shape = find_method(method), parse_pattern(pattern)
    _check(model, blocks, sparsity, shape, inputs)
    asked = sparsity if shape.sparsity is None else shape.sparsity
    started = time.perf_counter()
    batch_size = batch_size or layer_inputs.batch_size_for(model, blocks.shape[1], len(blocks))
    walk = _prune_dense if inputs == "dense" or not rule.needs_inputs else _prune_walking
    if walk is _prune_dense and statistics is None and rule.needs_inputs:
        statistics = layer_inputs.measure_activations(model, blocks, batch_size=batch_size, progress=progress)
    if statistics is not None:
        _check_statistics(model, statistics)
    masks, rows = walk(model, blocks, rule, asked, shape, batch_size, statistics, progress)
    return PruneResult(masks, pd.DataFrame(rows), time.perf_counter() - started)


def _check(model: nn.Module, blocks: torch.Tensor, sparsity: float, pattern: Pattern, inputs: str) -> None:
    if not 0 <= sparsity < 1:
        raise PftoolsError(f"sparsity is {sparsity}: it should be a share of zeros from 0 up to (not including) 1.")
    if pattern.sparsity is not None and abs(sparsity - pattern.sparsity) > 1e-6:
        raise PftoolsError(f"sparsity is {sparsity} and the pattern {pattern} fixes it at {pattern.sparsity:g}: ask for that.")
    if inputs not in ("pruned", "dense"):
        raise PftoolsError(f"unknown inputs {inputs!r}: {nearest(inputs, ['pruned', 'dense'])}.")
    if blocks.dim() != 2 or not blocks.numel():
        raise PftoolsError(f"the calibration blocks have shape {tuple(blocks.shape)}: (n_blocks, block_length) is needed, with tokens.")
    dtypes = {module.weight.dtype for module in linear_modules(model).values()}
    if len(dtypes) > 1 or not next(iter(dtypes)).is_floating_point:
        found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise PftoolsError(f"the linear weights are of dtype {found}: load the model in one float dtype before pruning.")
    for name, module in linear_modules(model).items():
        check_width(name, module.in_features, pattern)


def _check_statistics(model: nn.Module, statistics: ActivationStatistics) -> None:
    for name, module in linear_modules(model).items():
        norms = statistics.norms.get(name)
        if norms is None or len(norms) != module.in_features:
            raise PftoolsError(f"the activation statistics do not fit the model at {name}: measure them on this model.")


def _prune_walking(
    model: nn.Module, blocks: torch.Tensor, rule: Method, asked: float, pattern: Pattern, batch_size: int,
    statistics: ActivationStatistics | None, progress: bool,
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:  # fmt: skip
    prefix, layers = decoder_layers(model)
    masks: dict[str, torch.Tensor] = {}
    rows: list[dict[str, Any]] = []
    with layer_inputs.inference(model):
        calls = layer_inputs.record_calls(model, blocks[:1].to(model.device))
        hidden = layer_inputs.first_hidden_states(model, blocks, batch_size)
        for index, layer in enumerate(tqdm(layers, desc="pruning", unit="layer", disable=not progress)):
            place = f"{prefix}.{index}"
            norms = layer_inputs.measure_layer(layer, calls[index], hidden, batch_size, replace=False, place=place)
            for name, module in layer_inputs.linears_of(layer).items():
                _prune_module(module, place, name, norms.get(name), rule, asked, pattern, masks, rows)
            if index < len(layers) - 1:
                for start in range(0, len(hidden), batch_size):
                    batch = hidden[start : start + batch_size]
                    batch.copy_(calls[index](layer, batch))
    return masks, rows


def _prune_dense(
    model: nn.Module, blocks: torch.Tensor, rule: Method, asked: float, pattern: Pattern, batch_size: int,
    statistics: ActivationStatistics | None, progress: bool,
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:  # fmt: skip
    masks: dict[str, torch.Tensor] = {}
    rows: list[dict[str, Any]] = []
    modules = linear_modules(model)
    for full_name, module in tqdm(modules.items(), desc="pruning", unit="weight", disable=not progress):
        norms = statistics.norms[full_name] if statistics else torch.ones(module.in_features)
        place, name = _split(full_name)
        _prune_module(module, place, name, norms.to(module.weight.device), rule, asked, pattern, masks, rows)
    return masks, rows


def _split(full_name: str) -> tuple[str, str]:
    """model.layers.3.mlp.up_proj -> (model.layers.3, mlp.up_proj)"""
    parts = full_name.split(".")
    last_number = next(index for index, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: last_number + 1]), ".".join(parts[last_number + 1 :])


def _prune_module(
    module: nn.Linear, place: str, name: str, norms: torch.Tensor | None, rule: Method, asked: float, pattern: Pattern,
    masks: dict[str, torch.Tensor], rows: list[dict[str, Any]],
) -> None:  # fmt: skip
    started, note = time.perf_counter(), ""
    weight = module.weight.detach().float()
    if norms is None or not norms.any():
        note = "saw no calibration tokens: pruned by magnitude"
        norms = torch.ones(module.in_features, device=weight.device)
    scores = rule.score(weight, norms)
    pruned = choose(scores, asked, pattern, per_matrix=rule.per_matrix)
    already = float((weight == 0).float().mean())
    if already > asked + 0.005:
        note = f"was {already:.1%} sparse before, more than asked"
    row = table_row(place, name, pruned, weight, scores, norms, asked, note)
    with torch.no_grad():
        module.weight.masked_fill_(pruned, 0)
    masks[f"{place}.{name}.weight"] = ~pruned.cpu()
    rows.append({**row, "seconds": time.perf_counter() - started})

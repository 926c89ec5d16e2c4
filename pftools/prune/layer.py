"""One decoder layer whose inputs are known: choose what goes, set it to zero and, for methods that do, mend the rest."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pftools.errors import PftoolsError
from pftools.prune import experts, sparsegpt
from pftools.prune.criteria import magnitude
from pftools.prune.inputs import Measured, linears_of
from pftools.prune.patterns import choose
from pftools.prune.request import Request
from pftools.prune.result import output_error_on, table_row, zeros

# An expert that saw fewer tokens is pruned by magnitude: norms over so few say more about chance than about the expert.
FEW_TOKENS = 32


@dataclass
class PrunedLayer:
    """A layer that is done. masks: {full parameter name: bool, True = kept}, on the CPU; weights: the same for changed weights."""

    index: int
    masks: dict[str, torch.Tensor]
    rows: list[dict[str, Any]]
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


def prune_layer(
    layer: nn.Module, index: int, place: str, measured: Measured, request: Request, n_tokens: int
) -> PrunedLayer:
    """Choose, set to zero and, for methods that do, mend: all linear weights of a layer whose inputs were measured."""
    linears, asked = linears_of(layer), request.sparsities[index]
    homes = {name: experts.home(name, module) for name, module in linears.items()}
    shapes = {parameter: layer.get_parameter(parameter).shape for parameter, _ in homes.values()}
    done = PrunedLayer(
        index,
        {f"{place}.{parameter}": torch.ones(shape, dtype=torch.bool) for parameter, shape in shapes.items()},
        [],
    )
    by_input: dict[str, list[str]] = {}
    for name in linears:
        by_input.setdefault(measured.leader.get(name, name), []).append(name)
    rows: dict[str, dict[str, Any]] = {}
    for leader, names in by_input.items():
        started = time.perf_counter()
        why = _unmeasured(measured, leader, n_tokens)
        weights = {name: linears[name].weight.detach().float() for name in names}
        for name, weight in weights.items():
            if not math.isfinite(weight.sum()):
                raise PftoolsError(
                    f"the weight {place}.{name}.weight holds NaN or infinity: check the model before pruning it."
                )
        if request.method.update and not why:
            solved = sparsegpt.solve(
                list(weights.values()), measured.grams.pop(leader), request.method, asked, request.pattern
            )
        else:
            solved = [_chosen(weight, measured, leader, request, asked, why) for weight in weights.values()]
        for (name, weight), one in zip(weights.items(), solved):
            norms = measured.norms.get(leader, torch.ones(weight.shape[1], device=weight.device))
            rows[name] = table_row(
                place,
                name,
                one.pruned,
                weight,
                one.scores,
                norms,
                asked,
                one.note,
                one.output_error,
                one.error_is,
            )
            _write(linears[name], one)
            parameter, part = homes[name]
            done.masks[f"{place}.{parameter}"][part] = ~one.pruned.cpu()
            rows[name]["measured"] = zeros(linears[name].weight)
        for name in names:
            rows[name]["seconds"] = (time.perf_counter() - started) / len(names)
    done.rows = [rows[name] for name in linears]
    if request.method.update:
        done.weights = weights_of(layer, place)
    return done


def _unmeasured(measured: Measured, leader: str, n_tokens: int) -> str:
    """Why a module's inputs cannot be judged by, if so."""
    seen = measured.tokens[leader]
    if seen == 0 or not measured.norms[leader].any():
        return (
            "saw no calibration tokens: pruned by magnitude"
            if seen == 0
            else "its inputs are all zero: pruned by magnitude"
        )
    return f"saw {seen} calibration tokens: pruned by magnitude" if seen < min(FEW_TOKENS, n_tokens) else ""


@dataclass
class _Chosen:
    pruned: torch.Tensor
    scores: torch.Tensor
    note: str
    output_error: float | None
    weight: torch.Tensor | None = None
    error_is: str = "sampled"


def _chosen(
    weight: torch.Tensor, measured: Measured, leader: str, request: Request, asked: float, why: str
) -> _Chosen:
    """The choice of a method that mends nothing; by magnitude within each row where the inputs are not known."""
    if why:
        scores, compare = magnitude(weight, weight), "row"
    else:
        scores, compare = request.method.score(weight, measured.norms[leader]), request.method.compare
    pruned = choose(scores, asked, request.pattern, compare=compare)
    sample = measured.samples.get(leader)
    enough = sample is not None and len(sample) >= FEW_TOKENS
    return _Chosen(pruned, scores, why, output_error_on(sample, weight, pruned) if enough else None)


def _write(module: nn.Linear, one: _Chosen | sparsegpt.Solved) -> None:
    if one.weight is None:
        # As integers, times 0 or 1: exact zeros, and ten times faster on a CPU than to fill by mask.
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[module.weight.element_size()]
        module.weight.data.view(bits).mul_(~one.pruned)
    else:
        module.weight.data.copy_(one.weight)


def weights_of(layer: nn.Module, place: str) -> dict[str, torch.Tensor]:
    """Copies of a layer's linear weights on the CPU, by full parameter name."""
    names = {experts.home(name, module)[0] for name, module in linears_of(layer).items()}
    return {
        f"{place}.{name}": weight.detach().to("cpu", copy=True)
        for name, weight in layer.named_parameters()
        if name in names
    }

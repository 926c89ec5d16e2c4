"""One decoder layer whose inputs are known: choose what goes, set it to zero, and mend the rest if asked."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pftools.criteria import magnitude
from pftools.errors import PftoolsError
from pftools.layers import Matrix, matrices
from pftools.prune import sparsegpt
from pftools.prune.calls import Batch
from pftools.prune.inputs import Measured
from pftools.prune.patterns import choose
from pftools.prune.reconstruct import reconstruct
from pftools.prune.request import Request
from pftools.prune.result import Choice, judge, output_error_on, zeros

# An expert that saw fewer tokens is pruned by magnitude: norms over so few say more about chance than about
# it.
FEW_TOKENS = 32


@dataclass
class PrunedLayer:
    """A layer that is done.

    Attributes:
        index: the layer's number.
        masks: {full parameter name: bool, True = kept}, on the CPU.
        rows: the layer's rows of the table, in the order of its modules.
        weights: {full parameter name: whole weight}, on the CPU, where kept weights have changed.
    """

    index: int
    masks: dict[str, torch.Tensor]
    rows: list[dict[str, Any]]
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


def prune_layer(
    layer: nn.Module, index: int, place: str, measured: Measured, request: Request, n_tokens: int
) -> PrunedLayer:
    """Choose, set to zero and, for methods that do, mend: all linear weights of a layer whose inputs were
    measured.

    Args:
        place: the layer's full name.
        n_tokens: how many calibration tokens there are; an expert may have seen fewer.

    Raises:
        PftoolsError: a weight holds NaN or infinity.
    """
    found, asked = matrices(layer), request.sparsities[index]
    masks = _all_kept(layer, place)
    rows: dict[str, dict[str, Any]] = {}
    for leader, names in _by_input(found, measured).items():
        started = time.perf_counter()
        weights = {name: _finite(found[name].weight(layer), f"{place}.{name}") for name in names}
        choices = _choices(list(weights.values()), leader, measured, request, asked, n_tokens)
        for (name, weight), choice in zip(weights.items(), choices):
            norms = measured.norms.get(leader, torch.ones(weight.shape[1], device=weight.device))
            facts = judge(choice, weight, norms, asked)
            written = found[name].weight(layer)
            _write(written, choice)
            found[name].of(masks[f"{place}.{found[name].parameter}"]).copy_(~choice.pruned)
            rows[name] = _named(place, name, asked, zeros(written)) | facts
        for name in names:
            rows[name]["seconds"] = (time.perf_counter() - started) / len(names)
    done = PrunedLayer(index, masks, [rows[name] for name in found])
    if request.method.update:
        done.weights = _weights_of(layer, place)
    return done


def recover_layer(
    layer: nn.Module,
    index: int,
    place: str,
    done: PrunedLayer,
    inputs: list[Batch],
    targets: list[Batch],
    *,
    steps: int,
) -> None:
    """Reconstruct a pruned layer's dense output, and note in every row of its table how far it came.

    Args:
        inputs: the batches as the layer is given them in the pruned model.
        targets: the same batches as the layer of the dense model gives them.
        steps: Adam steps.
    """
    kept = {}
    for name, mask in done.masks.items():
        inner = name.removeprefix(f"{place}.")
        # Zeros that the mask keeps, because the pattern asks for no more, stay zero as well.
        kept[inner] = mask & (layer.get_parameter(inner) != 0).cpu()
    before, after = reconstruct(layer, index, inputs, targets, kept, steps=steps, place=place)
    done.weights = _weights_of(layer, place)
    for row in done.rows:
        row |= {"block_error_before": before**0.5, "block_error": after**0.5}


def _parameters(layer: nn.Module) -> list[str]:
    """The parameters of a layer that count, by their name within it."""
    return list(dict.fromkeys(matrix.parameter for matrix in matrices(layer).values()))


def _all_kept(layer: nn.Module, place: str) -> dict[str, torch.Tensor]:
    shapes = {name: layer.get_parameter(name).shape for name in _parameters(layer)}
    return {f"{place}.{name}": torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()}


def _by_input(found: dict[str, Matrix], measured: Measured) -> dict[str, list[str]]:
    """{first matrix: all matrices that are given the same input}"""
    groups: dict[str, list[str]] = {}
    for name in found:
        groups.setdefault(measured.leader.get(name, name), []).append(name)
    return groups


def _finite(weight: torch.Tensor, name: str) -> torch.Tensor:
    weight = weight.float()
    # The sum is quick, and overflows where weights are huge.
    if not math.isfinite(weight.sum()) and not torch.isfinite(weight).all():
        raise PftoolsError(
            f"the weight {name}.weight holds NaN or infinity: check the model before pruning it."
        )
    return weight


def _choices(
    weights: list[torch.Tensor],
    leader: str,
    measured: Measured,
    request: Request,
    asked: float,
    n_tokens: int,
) -> list[Choice]:
    """What goes of each of the weights that are given one input."""
    method = request.method
    why = _unmeasured(measured, leader, n_tokens) if method.needs_inputs else ""
    if why:
        by_size = [magnitude(weight, weight) for weight in weights]
        return [Choice(choose(scores, asked, request.pattern), scores, note=why) for scores in by_size]
    if method.update:
        return sparsegpt.solve(weights, measured.grams.pop(leader), method, asked, request.pattern)
    choices = []
    for weight in weights:
        scores = method.score(weight, measured.norms.get(leader, weight))
        choice = Choice(choose(scores, asked, request.pattern, compare=method.compare), scores)
        sample = measured.samples.get(leader)
        if sample is not None and len(sample) >= FEW_TOKENS:
            choice.output_error = output_error_on(sample, weight, choice.pruned)
        choices.append(choice)
    return choices


def _unmeasured(measured: Measured, leader: str, n_tokens: int) -> str:
    """Why a module cannot be judged by its inputs; empty: it can."""
    seen = measured.tokens[leader]
    if seen == 0:
        return "saw no calibration tokens: pruned by magnitude"
    if not measured.norms[leader].any():
        return "its inputs are all zero: pruned by magnitude"
    return f"saw {seen} calibration tokens: pruned by magnitude" if seen < min(FEW_TOKENS, n_tokens) else ""


def _write(weight: torch.Tensor, choice: Choice) -> None:
    """Write into a matrix, a view of its parameter."""
    if choice.weight is None:
        # As integers, times 0 or 1: exact zeros, and ten times faster on a CPU than to fill by mask.
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
        weight.view(bits).mul_(~choice.pruned)
    else:
        weight.copy_(choice.weight)


def _named(place: str, name: str, asked: float, measured: float) -> dict[str, Any]:
    return {
        "layer": next((int(part) for part in place.split(".") if part.isdigit()), -1),
        "module": name.rpartition(".")[2],
        "weight": f"{place}.{name}.weight",
        "asked": asked,
        "measured": measured,
    }


def _weights_of(layer: nn.Module, place: str) -> dict[str, torch.Tensor]:
    """Copies of the parameters that count on the CPU, by full name."""
    copies = {name: layer.get_parameter(name).detach().to("cpu", copy=True) for name in _parameters(layer)}
    return {f"{place}.{name}": weight for name, weight in copies.items()}

"""Naive Wanda on a model whose anatomy is not known: the real model runs, and every product with a parameter
is watched.

Nothing is replayed and no layout is assumed. Torch's own functions are watched while the whole model reads
the calibration tokens: a product whose operand lies in the memory of a decoder layer's parameter shows which
part of the parameter it is, which way round (inputs first or outputs first), and the inputs that it is
multiplied with. So the experts of a mixture are found one by one, on the tokens that they are given, whatever
way a family stores them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pftools.prune.layer import FEW_TOKENS

# {function: (place of the inputs, place of the weight, whether the weight is (outputs, inputs))}
_PRODUCTS = {
    F.linear: (0, 1, True),
    torch.matmul: (0, 1, False),
    torch.Tensor.matmul: (0, 1, False),
    torch.Tensor.__matmul__: (0, 1, False),
    torch.mm: (0, 1, False),
    torch.Tensor.mm: (0, 1, False),
    torch.bmm: (0, 1, False),
    torch.Tensor.bmm: (0, 1, False),
    torch.addmm: (1, 2, False),
    torch.baddbmm: (1, 2, False),
}


@dataclass
class Piece:
    """A matrix that inputs were multiplied with: (outputs, inputs), a view of the parameter ``name``; and
    what these were."""

    name: str
    shape: tuple[int, int]
    strides: tuple[int, int]
    offset: int
    squares: torch.Tensor
    tokens: int = 0

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This part of a tensor of the parameter's shape, as (outputs, inputs)."""
        return tensor.as_strided(self.shape, self.strides, self.offset)


class _Watch(TorchFunctionMode):
    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.homes = {parameter.untyped_storage().data_ptr(): name for name, parameter in parameters.items()}
        self.pieces: dict[tuple[str, tuple[int, int], tuple[int, int], int], Piece] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            inputs, weight, outputs_first = _PRODUCTS[func]
            if len(args) > weight and isinstance(args[weight], torch.Tensor):
                self._note(args[inputs], args[weight], outputs_first)
                if not outputs_first:  # W x instead of x W^T
                    self._note(args[weight].transpose(-1, -2), args[inputs], True)
        return func(*args, **kwargs)

    def _note(self, inputs: torch.Tensor, weight: torch.Tensor, outputs_first: bool) -> None:
        name = self.homes.get(weight.untyped_storage().data_ptr())
        if name is None or weight.dim() < 2:
            return
        if weight.dim() == 3:  # one matrix for each first index
            for index in range(len(weight)):
                self._note(inputs[index], weight[index], outputs_first)
            return
        view = weight if outputs_first else weight.t()
        key = (name, tuple(view.shape), view.stride(), view.storage_offset())
        piece = self.pieces.setdefault(key, Piece(*key, torch.zeros(view.shape[1], dtype=torch.float64)))
        rows = inputs.detach().reshape(-1, view.shape[1]).double()
        piece.squares += rows.square().sum(dim=0)
        # Where every expert is given every token, those that are not its own are multiplied by zero.
        piece.tokens += int(rows.any(dim=1).sum())


def watched(model: nn.Module, parameters: dict[str, nn.Parameter], batches: Any) -> list[Piece]:
    """All matrices among the parameters that the model multiplies with, reading the batches with its own
    forward."""
    watch = _Watch(parameters)
    with torch.no_grad():
        for batch in batches:
            with watch:
                model(input_ids=batch, use_cache=False)
    return list(watch.pieces.values())


@dataclass
class Naive:
    """masks: {parameter: bool, True = kept}. unsure: {parameter: bool}, where a score is so near its row's
    threshold that rounding decides, or nothing was multiplied with. left: matrices that were multiplied with
    and left as they were."""

    masks: dict[str, torch.Tensor]
    unsure: dict[str, torch.Tensor]
    left: set[str]


def wanda(
    model: nn.Module, prefix: str, blocks: torch.Tensor, batch_size: int, counted: Mapping[str, torch.Tensor]
) -> Naive:
    """Wanda at 50% by the formula, layer after layer, each behind pruned ones; a copy is pruned.

    Args:
        prefix: the name of the list of decoder layers.
        counted: the masks of the parameters that are to be pruned. Only those of experts that no token
            reaches are looked at.
    """
    model = copy.deepcopy(model)
    naive = Naive({}, {}, set())
    for layer in range(len(model.get_submodule(prefix))):
        parameters = {
            name: weight for name, weight in model.named_parameters() if name.startswith(f"{prefix}.{layer}.")
        }
        reached: dict[str, torch.Tensor] = {}
        for piece in watched(model, parameters, blocks.split(batch_size)):
            if piece.name not in counted:
                if sum(size > 1 for size in parameters[piece.name].shape) > 1:  # a vector is no matrix
                    naive.left.add(piece.name)
                continue
            weight = parameters[piece.name].data
            mask = naive.masks.setdefault(piece.name, torch.ones(weight.shape, dtype=torch.bool))
            unsure = naive.unsure.setdefault(piece.name, torch.ones(weight.shape, dtype=torch.bool))
            norms = piece.squares.sqrt()
            if piece.tokens < min(FEW_TOKENS, blocks.numel()) or not norms.any():
                norms = torch.ones_like(norms)
            scores = piece.of(weight).double().abs() * norms
            count = scores.shape[1] // 2
            ordered = scores.sort(dim=1, stable=True)
            kept = torch.ones(scores.shape, dtype=torch.bool).scatter(1, ordered.indices[:, :count], False)
            edge = ordered.values[:, count - 1 : count + 1].mean(dim=1, keepdim=True)
            piece.of(mask).copy_(kept)
            piece.of(unsure).copy_((scores - edge).abs() <= 1e-4 * edge + 1e-12)
            piece.of(weight).mul_(kept)
            piece.of(reached.setdefault(piece.name, torch.zeros(weight.shape, dtype=torch.bool))).fill_(True)
        # Once a layer is pruned, tokens may go to experts that none had reached. How these are laid out is
        # not known here: their masks are taken over, so that later layers are given the same inputs.
        for name, seen in reached.items():
            parameters[name].data.mul_(seen | counted[name])
    return naive

"""What is asked of a pruning, and all that can be refused before a weight is changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pftools.causal import check_bare
from pftools.criteria import Method, find_method
from pftools.errors import PftoolsError, nearest
from pftools.layers import decoder_layers, linear_weights, matrices
from pftools.pretrained.base_models import check_blocks
from pftools.prune.inputs import batch_size_for
from pftools.prune.patterns import Pattern, check_width, parse_pattern
from pftools.prune.reconstruct import TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pftools.settings import Prune


@dataclass(frozen=True)
class Request:
    """What is asked of a pruning, checked. sparsities: one a layer, filled in by `allocate`."""

    method: Method
    sparsity: float
    pattern: Pattern
    inputs: str = "pruned"
    allocation: str = "uniform"
    owl_lambda: float = 0.08
    owl_m: float = 5.0
    reconstruct_steps: int = 0
    batch_size: int = 1
    progress: bool = True
    sparsities: tuple[float, ...] = ()

    @property
    def changes_weights(self) -> bool:
        """Whether kept weights differ afterwards, so that masks alone do not say what was done."""
        return self.method.update or self.reconstruct_steps > 0


def check_request(
    model: PreTrainedModel,
    blocks: torch.Tensor,
    *,
    method: str,
    sparsity: float,
    pattern: str,
    inputs: str,
    batch_size: int | None,
    **options: Any,
) -> Request:
    """The request, after everything that can be refused was looked at."""
    rule, shape = find_method(method), parse_pattern(pattern)
    if not 0 <= sparsity < 1:
        raise PftoolsError(
            f"sparsity is {sparsity}: it should be a share of zeros from 0 up to (not including) 1."
        )
    if shape.sparsity is not None and abs(sparsity - shape.sparsity) > 1e-6:
        raise PftoolsError(
            f"sparsity is {sparsity} and the pattern {shape} fixes it at {shape.sparsity:g}: ask for that."
        )
    for name, value, valid in (
        ("inputs", inputs, ("pruned", "dense")),
        ("allocation", options["allocation"], ("uniform", "owl")),
    ):
        if value not in valid:
            raise PftoolsError(f"unknown {name} {value!r}: {nearest(value, valid)}.")
    if options["allocation"] == "owl" and shape.group:
        raise PftoolsError(
            f"OWL gives every layer a sparsity of its own, and the pattern {shape} fixes it: use "
            "one of the two."
        )
    if blocks.dim() != 2 or not blocks.numel():
        raise PftoolsError(
            f"the calibration blocks have shape {tuple(blocks.shape)}: (n_blocks, block_length) "
            "is needed, with tokens."
        )
    check_bare(model)
    check_blocks(model, blocks)
    weights = linear_weights(model)
    dtypes = {weight.dtype for weight in weights.values()}
    if len(dtypes) > 1 or not next(iter(dtypes)).is_floating_point:
        found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise PftoolsError(
            f"the linear weights are of dtype {found}: load the model in one float dtype before pruning."
        )
    check_matrices(model, shape)
    size = batch_size or batch_size_for(model, blocks.shape[1], len(blocks))
    if options["reconstruct_steps"]:
        size = min(size, max(1, TOKENS // blocks.shape[1]))
    return Request(method=rule, sparsity=sparsity, pattern=shape, inputs=inputs, batch_size=size, **options)


def check_matrices(model: nn.Module, shape: Pattern) -> None:
    """Every matrix is as wide as the pattern needs, and belongs to one layer only."""
    prefix, layers = decoder_layers(model)
    seen: dict[int, int] = {}
    for index, layer in enumerate(layers):
        for name, matrix in matrices(layer).items():
            owner = seen.setdefault(id(layer.get_parameter(matrix.parameter)), index)
            if owner != index:
                raise PftoolsError(
                    f"layers {owner} and {index} of {type(model).__name__} share {name}: what is pruned for "
                    "the one is gone for the other, so this model cannot be pruned layer by layer."
                )
            check_width(f"{prefix}.{index}.{name}", matrix.weight(layer).shape[1], shape)


_KEYWORDS = (
    "method",
    "sparsity",
    "pattern",
    "allocation",
    "owl_lambda",
    "owl_m",
    "reconstruct_steps",
    "batch_size",
)


def request_of(parameters: Prune) -> dict[str, Any]:
    """The keywords of `prune_model` that a step's parameters decide, but for `inputs`, which a notebook
    varies."""
    return {name: getattr(parameters, name) for name in _KEYWORDS}

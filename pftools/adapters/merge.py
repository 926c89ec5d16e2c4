"""The merge of an adapter into plain weights: the product is formed in float32, added, and cast once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import nn

from pftools.adapters.folder import Adapter, digest_of, load_adapter
from pftools.dithering import dithered
from pftools.errors import PftoolsError, nearest
from pftools.layers import measured_sparsity, rows_of
from pftools.mapped import in_turn, release
from pftools.masks import apply_masks

# A model counts as pruned from here on; below, its zeros are accidents of its number format.
_PRUNED_FROM = 0.01

Kind = Literal["masked", "hira", "dense"]
Model = TypeVar("Model", bound=nn.Module)


def resolve_merge(merge: str, model: nn.Module) -> Literal["masked", "dense"]:
    """`auto` is masked where the model is pruned, else dense.

    Raises:
        PftoolsError: another word than auto, masked and dense.
    """
    if merge == "auto":
        return "masked" if measured_sparsity(model) >= _PRUNED_FROM else "dense"
    if merge == "masked":
        return "masked"
    if merge == "dense":
        return "dense"
    raise PftoolsError(f"unknown merge {merge!r}: {nearest(merge, ('auto', 'masked', 'dense'))}.")


def merge_adapter(model: Model, adapter: Adapter | str | Path, *, merge: str = "auto") -> Model:
    """Add an adapter to the weights of a plain model, in place, and return it.

    A dense model is pruned first by the masks of an exported adapter, so that the base model will do.

    Args:
        adapter: what `finetune_model` gave, or an adapter folder.
        merge: `masked` (zeros stay zeros), `dense` (the published behaviour: they are filled), or `auto`:
            masked where the adapter was trained masked or the model is pruned. HiRA multiplies the weight,
            and keeps zeros with either.

    Raises:
        PftoolsError: the adapter does not fit the model, or was trained on other zeros.
    """
    if not isinstance(adapter, Adapter):
        adapter = load_adapter(adapter)
    merge = "masked" if merge == "auto" and adapter.masked else resolve_merge(merge, model)
    modules = dict(model.named_modules())
    for name, (a, b) in adapter.factors.items():
        if name not in modules or rows_of(modules[name]).shape != (b.shape[0], a.shape[1]):
            raise PftoolsError(
                f"the adapter does not fit the model at {name}: it was trained on another model."
            )
    if adapter.masked and merge == "masked" and adapter.mask != mask_digest(model, adapter.factors):
        _prune_as_trained(model, adapter)
    kind = "hira" if adapter.kind == "hira" else merge
    with torch.no_grad():
        for name, (a, b) in adapter.factors.items():
            weight = rows_of(modules[name])
            weight.copy_(
                updated_weight(weight, a.to(weight.device), b.to(weight.device), adapter.scaling, kind=kind)
            )
            release(weight)
    return model


def _prune_as_trained(model: nn.Module, adapter: Adapter) -> None:
    """Make the model that the adapter was trained on out of its dense base, in place.

    Raises:
        PftoolsError: the model is pruned already, or the masks are not of this model, or there are none.
    """
    weights = dict(model.named_parameters())
    fit = all(
        name in weights and weights[name].shape == kept.shape and bool(weights[name].cpu()[kept].all())
        for name, kept in adapter.kept.items()
    )
    if not adapter.kept or not fit or measured_sparsity(model) >= _PRUNED_FROM:
        raise PftoolsError(
            "the adapter was trained on other zeros than this model has: merge it into the model that it was "
            "trained on, in the same dtype."
        )
    apply_masks(model, adapter.kept)


def mask_digest(model: nn.Module, names: Iterable[str]) -> str:
    """sha256 over where the weights of the named modules are zero."""
    weights = ((name, model.get_parameter(f"{name}.weight")) for name in sorted(names))
    return digest_of(weight != 0 for _, weight in in_turn(weights))


def updated_weight(
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float = 1.0,
    *,
    kind: Kind = "masked",
    kept: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    alone: bool = False,
) -> torch.Tensor:
    """W + s K * (B A), computed in float32 and cast once.

    K is the mask M = (W != 0) for `masked`, W for `hira`, 1 for `dense`, whose merge fills zeros. With the
    first two, a kept weight that would become zero becomes the smallest number of its dtype instead: the
    number of zeros is the same before and after.

    Args:
        weight: W (rows, columns), any float dtype.
        a: (rank, columns), any float dtype.
        b: (rows, rank), any float dtype.
        scaling: s.
        kept: bool (rows, columns), the mask M; None: where the weight is not zero.
        dtype: of the result; None: the weight's.
        alone: s K * (B A) without W.

    Returns:
        (rows, columns) in ``dtype``, rounded as in `dithering`.
    """
    result = torch.empty_like(weight, dtype=dtype or weight.dtype)
    limits = torch.finfo(result.dtype)
    # A subnormal where float16 has one.
    least = max(limits.tiny * limits.eps, torch.finfo(torch.float32).tiny)
    a, b = a.float(), b.float() * scaling
    with torch.autocast(weight.device.type, enabled=False):
        for rows in row_slices(weight):
            part = weight[rows]
            new = b[rows] @ a
            if kind == "hira":
                new.mul_(part)
            if not alone:
                new.add_(part)
            if kind != "dense":
                if not alone:
                    new.add_(new.abs().lt_(least), alpha=2 * least)
                new.mul_(part != 0 if kept is None else kept[rows])
            result[rows] = dithered(new, rows.start, result.dtype)
    return result


def row_slices(weight: torch.Tensor) -> Iterator[slice]:
    """Rows that are worked on together: few enough for a processor's cache; a GPU wants many."""
    numbers = 2**17 if weight.device.type == "cpu" else 2**24
    step = max(1, numbers // weight.shape[1])
    return (slice(start, start + step) for start in range(0, weight.shape[0], step))

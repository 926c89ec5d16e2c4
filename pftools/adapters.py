"""An adapter, and its merge into plain weights: the product is formed in float32, added, and cast once.

An adapter that was trained masked is stored as an ordinary PEFT adapter folder with one difference: its
`peft_type` is a sentence. PEFT without pftools stops there and shows it, where it would otherwise merge
densely and fill the zeros without a word. One that was exported for PEFT has its mask beside it instead.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from pftools.dithering import dithered
from pftools.errors import PftoolsError, nearest
from pftools.files import write_json
from pftools.layers import measured_sparsity, rows_of
from pftools.mapped import in_turn, release
from pftools.masks import MASKS, PackedMasks, apply_masks, pack, read_masks, save_masks

MASKED_TYPE = (
    "MASKED_LORA: load it with pftools.finetune.merge_adapter, a plain LoRA merge would fill the zeros"
)
# A model counts as pruned from here on; below, its zeros are accidents of its number format.
_PRUNED_FROM = 0.01

Kind = Literal["masked", "hira", "dense"]
Model = TypeVar("Model", bound=nn.Module)


@dataclass
class Adapter:
    """A trained adapter.

    Attributes:
        factors: {linear module's full name: (A (rank, inputs), B (outputs, rank))}, float32 on the CPU.
        scaling: what the product is multiplied by: alpha / rank for LoRA, 1 for HiRA.
        kind: `lora` or `hira`.
        masked: whether it was trained masked.
        mask: digest of the zeros that it was trained on; empty where it was not masked.
        kept: {weight name: bool, True = kept}, the masks that make the model that it was trained on out of
            the dense base; empty where that takes more than masks, or they are not beside it.
    """

    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    scaling: float
    kind: Literal["lora", "hira"] = "lora"
    masked: bool = False
    mask: str = ""
    kept: Mapping[str, torch.Tensor] = field(default_factory=dict)


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
    return _digest(weight != 0 for _, weight in in_turn(weights))


def _digest(kept: Iterable[torch.Tensor]) -> str:
    """sha256 over masks, bool, True = kept, in the order of their modules' names."""
    digest = hashlib.sha256()
    for mask in kept:
        digest.update(pack(mask).tobytes())
    return digest.hexdigest()


def load_adapter(folder: str | Path) -> Adapter:
    """Read a PEFT adapter folder (LoRA, masked LoRA or HiRA).

    Raises:
        PftoolsError: no adapter there, or one of another kind, or masks that it was not trained on.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
    except FileNotFoundError as error:
        raise PftoolsError(
            f"{folder} is no adapter folder: {Path(error.filename).name} is missing."
        ) from None
    kind: Literal["lora", "hira"] = "hira" if config["peft_type"] == "HIRA" else "lora"
    if kind == "lora" and config["peft_type"] not in ("LORA", MASKED_TYPE):
        raise PftoolsError(
            f"the adapter in {folder} is of type {config['peft_type']}: only LoRA and HiRA can be merged "
            "here."
        )
    if config.get("use_dora") or config.get("use_rslora"):
        raise PftoolsError(f"the adapter in {folder} uses DoRA or rsLoRA: merge it with PEFT.")
    _refuse_foreign_parts(folder, config, tensors, kind)
    factors = factors_of(tensors, kind)
    scaling = 1.0 if kind == "hira" else config["lora_alpha"] / config["r"]
    digest = config.get("pftools_mask", "")
    kept = _masks_beside(folder, factors, digest) if digest and config.get("pftools_from_base") else {}
    return Adapter(factors, scaling, kind, bool(digest), digest, kept)


def _masks_beside(folder: Path, modules: Iterable[str], digest: str) -> Mapping[str, torch.Tensor]:
    """The masks of an exported adapter's folder, {weight name: bool, True = kept}.

    Raises:
        PftoolsError: they are missing, damaged, or not those that the adapter was trained on.
    """
    try:
        kept = PackedMasks()
        kept.update(read_masks(folder / MASKS))
        found = _digest(kept[f"{name}.weight"] for name in sorted(modules))
    except Exception as error:  # safetensors has errors of its own
        raise PftoolsError(
            f"{folder / MASKS} cannot be read ({error or type(error).__name__}): export the adapter again."
        ) from error
    if found != digest:
        raise PftoolsError(
            f"{folder / MASKS} holds other masks than the adapter was trained on: export the adapter again."
        )
    return kept


def _refuse_foreign_parts(
    folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], kind: str
) -> None:
    """Refuse an adapter that does more than its factors say: the rest would be left out of the merge.

    PEFT can train whole modules and biases too, give modules a rank or an alpha of their own, and adapt
    stacked parameters.
    """
    parts = (f".{kind}_A", f".{kind}_B")
    if foreign := [name for name in tensors if not any(part in name for part in parts)]:
        name = foreign[0].removeprefix("base_model.model.")
        raise PftoolsError(
            f"the adapter in {folder} holds more than low-rank factors ({name}; {len(foreign)} such in all): "
            "merge it with PEFT, and give the merged model."
        )
    own = [name for name in ("rank_pattern", "alpha_pattern", "target_parameters") if config.get(name)]
    if own:
        raise PftoolsError(
            f"the adapter in {folder} has {', '.join(own)}: merge it with PEFT, and give the merged model."
        )


def factors_of(tensors: dict[str, torch.Tensor], kind: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{module name: (A, B)}, float32 on the CPU, from PEFT's names.

    Args:
        tensors: {base_model.model.<module>.lora_A[.default][.weight]: tensor}.
        kind: `lora` or `hira`.
    """
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        module, found, rest = name.removeprefix("base_model.model.").partition(f".{kind}_")
        if found:
            factors.setdefault(module, {})[rest[0]] = tensor.detach().float().cpu()
    return {module: (pair["A"], pair["B"]) for module, pair in factors.items()}


def mark_masked(folder: Path, digest: str) -> None:
    """Turn a saved LoRA folder into one that only pftools merges."""
    path = folder / "adapter_config.json"
    write_json(path, json.loads(path.read_text()) | {"peft_type": MASKED_TYPE, "pftools_mask": digest})


def set_base(folder: Path, base: str | None) -> None:
    """Name the model that PEFT adds an adapter's folder to; None: it has no name that others know."""
    path = folder / "adapter_config.json"
    write_json(path, json.loads(path.read_text()) | {"base_model_name_or_path": base})


def add_masks(folder: Path, masks: Mapping[str, torch.Tensor], *, from_base: bool) -> None:
    """Turn a masked adapter's folder into a LoRA that PEFT reads, with its masks beside it.

    Args:
        masks: {weight name: bool, True = kept} of the model that it was trained on.
        from_base: whether that model is the dense base with these masks, and nothing else.

    Raises:
        PftoolsError: the adapter was trained on other masks.
    """
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | {"peft_type": "LORA", "pftools_from_base": from_base}
    write_json(path, config)
    save_masks(folder / MASKS, masks)
    _masks_beside(folder, load_adapter(folder).factors, config["pftools_mask"])


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

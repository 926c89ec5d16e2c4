"""An adapter, and the PEFT folder that it is kept in.

An adapter that was trained masked is stored as an ordinary PEFT adapter folder with one difference: its
`peft_type` is a sentence. PEFT without pftools stops there and shows it, where it would otherwise merge
densely and fill the zeros without a word. One that was exported for PEFT has its mask beside it instead.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from pftools.errors import PftoolsError
from pftools.files import write_json
from pftools.masks import MASKS, PackedMasks, pack, read_masks, save_masks

MASKED_TYPE = (
    "MASKED_LORA: load it with pftools.finetune.merge_adapter, a plain LoRA merge would fill the zeros"
)


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


def digest_of(kept: Iterable[torch.Tensor]) -> str:
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
        found = digest_of(kept[f"{name}.weight"] for name in sorted(modules))
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

"""A model out of its base and what the steps changed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from pftools import run_folder
from pftools.adapters import merge_adapter
from pftools.checkpoints.deltas import MANIFEST, lineage
from pftools.checkpoints.reload_check import ADAPTER, WEIGHTS
from pftools.errors import PftoolsError
from pftools.mapped import release
from pftools.masks import MASKS, apply_masks, fitting, read_masks, read_tensors
from pftools.pretrained.loading import load_pretrained

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load(
    folder: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    placement: str = "one",
    resident: int = 0,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a finished prune or finetune run, and its tokenizer: the base with all deltas replayed.

    Args:
        dtype: `auto` is the one that the run was made in: its merge was rounded to that.

    Raises:
        PftoolsError: a run of the chain is missing, unfinished or damaged, or does not fit the base.
    """
    base, chain = lineage(folder)
    if dtype == "auto":
        dtype = run_folder.read_record(folder)["results"].get("dtype", dtype)
    model, tokenizer = load_pretrained(
        base,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        placement=placement,
        resident=resident,
    )
    _refuse_offloaded(model)
    for delta in chain:
        model = _replay(model, delta)
    return model, tokenizer


def _refuse_offloaded(model: PreTrainedModel) -> None:
    """Refuse a model of which accelerate keeps a part elsewhere: nothing could be changed in it."""
    elsewhere = {"cpu", "disk"} & {str(device) for device in getattr(model, "hf_device_map", {}).values()}
    if any(weight.is_meta for weight in model.parameters()):
        raise PftoolsError(
            f"the devices of this machine together are too small for the model, so that a part of it went to "
            f"{' and '.join(sorted(elsewhere))}: use placement='stream'."
        )


def _replay(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    manifest = json.loads((folder / MANIFEST).read_text())
    outputs = run_folder.read_record(folder)["outputs"]  # and nothing else that may lie there
    if manifest["kind"] == "adapter":
        return merge_adapter(model, folder / ADAPTER, merge=manifest["merge"])
    if WEIGHTS in outputs:
        _overwrite(model, read_tensors(folder / WEIGHTS), folder)
    apply_masks(model, read_masks(folder / MASKS), place=str(folder))
    return model


def _overwrite(model: PreTrainedModel, weights: Iterable[tuple[str, torch.Tensor]], folder: Path) -> None:
    import torch

    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights:
            written = fitting(parameters, name, weight.shape, str(folder))
            written.copy_(weight)
            release(written)

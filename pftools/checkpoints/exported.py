"""A run's model as a plain Hugging Face folder that is checked, or its adapter as one that PEFT reads."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pftools import hub, needs, run_folder, settings
from pftools.adapters import add_masks, load_adapter, set_base
from pftools.checkpoints.card import adapter_card, model_card
from pftools.checkpoints.deltas import lineage, parent_of, read_manifest
from pftools.checkpoints.reload_check import ADAPTER, WEIGHTS
from pftools.checkpoints.replay import load
from pftools.errors import PftoolsError
from pftools.files import refuse_full, replacing, write_json, write_text
from pftools.layers import linear_weights, measured_sparsity
from pftools.mapped import in_turn, release
from pftools.masks import PackedMasks
from pftools.pretrained import base_models
from pftools.pretrained.loading import load_pretrained
from pftools.pretrained.streamed import source_of
from pftools.settings import Placement, PlacementName

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def export_adapter(
    run: str | Path,
    folder: str | Path,
    *,
    trust_remote_code: bool = False,
    placement: PlacementName = "auto",
) -> Path:
    """Write the adapter of a finetune run as a folder that PEFT reads, with how it is to be merged.

    A masked one comes with its masks, one bit a weight, and a README.

    Raises:
        PftoolsError: no finetune run, or the target is not empty.
    """
    folder, manifest = Path(folder), read_manifest(run)
    if manifest["kind"] != "adapter":
        raise PftoolsError(f"{run} has no adapter: give the folder of a finetune run.")
    refuse_full(folder)
    base, (*before, _) = lineage(run)
    named = not before and not Path(base).expanduser().is_dir()  # and no path of this machine
    with replacing(folder) as partial:
        shutil.copytree(Path(run) / ADAPTER, partial)
        set_base(partial, base if named else None)
        if load_adapter(partial).masked:
            from_base = not any(_more_than_masks(one) for one in before)
            masks = _masks_of_parent(run, trust_remote_code=trust_remote_code, placement=placement)
            add_masks(partial, masks, from_base=from_base)
            write_text(partial / "README.md", adapter_card(base, Path(run), before if not from_base else []))
    return folder


def _more_than_masks(run: Path) -> bool:
    return read_manifest(run)["kind"] != "masks" or WEIGHTS in run_folder.read_record(run)["outputs"]


def _masks_of_parent(run: str | Path, **options: Any) -> Mapping[str, torch.Tensor]:
    """{weight name: bool, True = kept} of the model that a run was made from, in the run's dtype."""
    options["placement"] = _placement(run, options["placement"], "cpu", ".")
    options |= {"dtype": run_folder.read_record(run)["results"].get("dtype", "auto"), "device": "cpu"}
    parent = parent_of(run)
    load_parent = load if run_folder.is_finished(parent) else load_pretrained
    model, _ = load_parent(parent, **options)
    masks = PackedMasks()
    for name, weight in in_turn(linear_weights(model).items()):
        masks[name] = weight != 0
    return masks


def export(
    run: str | Path,
    folder: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    placement: PlacementName = "auto",
) -> Path:
    """Write the model of a run as a plain Hugging Face folder with a model card, and check it.

    The written folder is loaded again with plain transformers and must give the same logits on a short text.

    Raises:
        PftoolsError: the target is not empty, or the check fails (nothing is left then).
    """
    import torch

    folder = Path(folder)
    refuse_full(folder)
    placement = _placement(run, placement, device, folder.parent)
    model, tokenizer = load(
        run, dtype=dtype, device=device, trust_remote_code=trust_remote_code, placement=placement
    )
    with replacing(folder) as partial:
        _write_model(model, partial)
        tokenizer.save_pretrained(partial)
        sparsity = measured_sparsity(model)
        facts = {"exported_from": Path(run).name, "sparsity": sparsity}
        write_json(partial / "pftools.json", facts)
        write_text(partial / "README.md", model_card(*lineage(run), sparsity))
        again, _ = load_pretrained(
            str(partial),
            dtype=model.dtype,
            device=str(model.device),
            trust_remote_code=trust_remote_code,
            placement=placement,
        )
        tokens = torch.arange(64, device=model.device)[None] % (base_models.known_tokens(model) or 64)
        with torch.no_grad():
            if not torch.equal(model(tokens).logits, again(tokens).logits):
                raise PftoolsError(f"the export of {run} failed its check: its logits differ from the run's.")
    return folder


def _placement(run: str | Path, asked: PlacementName, device: str, room: str | Path) -> Placement:
    """Where a run's model is while it is written; what `auto` comes to is decided as for an analysis."""
    given = {"model": str(run), "placement": asked, "device": device, "runs": str(room)}
    placement, _ = needs.resolve(settings.check(settings.Analyse, given))
    return placement


def _write_model(model: PreTrainedModel, folder: Path) -> None:
    """Write a model's files; those of a streamed one a layer at a time."""
    source = source_of(model)
    if source is None:
        model.save_pretrained(folder)
        return
    folder.mkdir()
    for index, layer in enumerate(source.layers):
        source.write_layer(folder, index)
        for weight in layer.parameters():
            release(weight)
    source.write_rest(folder)


def push(folder: str | Path, repository: str) -> str:
    """Push an exported folder to a repository of the hub, made private if it is new; returns its address.

    Weights that are there from an earlier push are removed: a model of several files beside one of a single
    file would be read in its place. Other files of the repository stay.

    Raises:
        PftoolsError: not logged in, no network, or the hub refuses.
    """
    from huggingface_hub import HfApi

    try:
        address = HfApi().create_repo(repository, private=True, exist_ok=True)
        HfApi().upload_folder(
            repo_id=repository,
            folder_path=folder,
            delete_patterns=["*.safetensors", "*.safetensors.index.json"],
        )
    except Exception as error:  # the hub refuses, or is not to be reached, in many ways
        raise PftoolsError(
            f"{folder} could not be pushed to {repository!r} ({hub.cause_of(error)}): log in with `hf "
            "auth login` as somebody who may write there, where there is network; the folder stays as it is."
        ) from error
    return str(address)

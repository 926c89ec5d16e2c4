"""Checkpoints: a model is its base plus what the steps changed.

A prune step leaves packed masks (one bit a weight), a finetune step leaves its adapter, and only a method
that changes the kept weights (SparseGPT, reconstruction) leaves full weights. `load` replays these deltas on
the base, oldest first. Files are safetensors and JSON, never pickles; every file is checked against the
sha256 in its run's record.

    runs/prune-4f.../checkpoint.json      {"parent": "smollm2-135m", "kind": "masks"}
                     masks.safetensors    uint8, eight weights a byte, shapes in the header
    runs/finetune-a1.../checkpoint.json   {"parent": "../prune-4f...", "kind": "adapter", "merge": "masked"}
                        adapter/          a PEFT adapter folder

Where the parent is a folder that is no run, `checkpoint.json` also has "contents", its digest, and "near",
its path from the run.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pftools import contents, hub, needs, reload_check, run_folder, settings
from pftools.adapters import Adapter, add_masks, load_adapter, merge_adapter, set_base
from pftools.errors import PftoolsError
from pftools.files import refuse_full, replacing, write_json, write_text
from pftools.layers import linear_weights, measured_sparsity
from pftools.mapped import in_turn, release
from pftools.masks import (
    MASKS,
    PackedMasks,
    apply_masks,
    fitting,
    load_masks,
    read_masks,
    read_tensors,
    save_masks,
    save_tensors,
)
from pftools.model_card import adapter_card, model_card
from pftools.pretrained import base_models
from pftools.pretrained.loading import load_pretrained
from pftools.pretrained.streamed import source_of
from pftools.reload_check import ADAPTER, WEIGHTS
from pftools.settings import Placement, PlacementName

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["apply_masks", "export", "export_adapter", "lineage", "load", "load_masks", "parent_of", "push"]
__all__ += ["read_manifest", "save_finetune", "save_prune"]

MANIFEST = "checkpoint.json"


def save_prune(
    run: run_folder.Run,
    masks: Mapping[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor] | None = None,
    *,
    model: PreTrainedModel | None = None,
) -> list[str]:
    """Write the delta of a prune step; returns the names of the outputs to seal.

    Args:
        run: of the step.
        masks: {weight name: bool tensor, True = kept}.
        weights: {weight name: tensor} where the method changed kept weights; they are stored whole.
        model: what was measured; what was written is read again and compared with it.

    Raises:
        PftoolsError: what was written would not give ``model``.
    """
    save_masks(run.path(MASKS), masks)
    outputs = [MASKS, MANIFEST]
    if weights:
        save_tensors(run.path(WEIGHTS), weights)
        outputs.append(WEIGHTS)
    if model is not None:
        reload_check.check_prune(run, model)
    _write_manifest(run, {"kind": "masks"})
    return outputs


def save_finetune(
    run: run_folder.Run,
    merge: Literal["masked", "dense"],
    *,
    adapter: Adapter | None = None,
    model: PreTrainedModel | None = None,
) -> list[str]:
    """Write the delta of a finetune step; returns the names of the outputs to seal.

    Args:
        run: its adapter lies in `run.path("adapter")` already.
        merge: how the adapter was merged.
        adapter: what was merged; the one that was written is read again and compared with it.
        model: what was measured; its zeros are compared with those that the adapter was trained on.

    Raises:
        PftoolsError: what was written would not give ``model``.
    """
    if adapter is not None and model is not None:
        reload_check.check_finetune(run, merge, adapter, model)
    _write_manifest(run, {"kind": "adapter", "merge": merge})
    return [ADAPTER, MANIFEST]


def _write_manifest(run: run_folder.Run, delta: dict[str, str]) -> None:
    parent, held = run.parameters.model, {}
    if run_folder.is_finished(parent):
        # Relative, so that a folder of runs can be moved or copied whole.
        beside = _same_folder(run.folder.parent, Path(parent).parent)
        parent = f"../{Path(parent).name}" if beside else str(Path(parent).resolve())
    elif Path(parent).expanduser().is_dir():
        # A base model's folder, wherever the run is loaded from.
        parent = str(Path(parent).expanduser().resolve())
        near = os.path.relpath(parent, run.folder.resolve())  # where a project was moved whole
        held = {"contents": contents.digest(parent), "near": near}
    write_json(run.path(MANIFEST), {"parent": parent, **held, **delta})


def _same_folder(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def read_manifest(folder: str | Path) -> dict[str, str]:
    """`checkpoint.json` of a finished run, after all its files were checked.

    Raises:
        PftoolsError: not finished, damaged, or a run that makes no model.
    """
    record = run_folder.verify(folder)
    if MANIFEST not in record["outputs"]:
        raise PftoolsError(
            f"{folder} is a {record['step']} run and holds no model: give a prune or finetune run."
        )
    return json.loads((Path(folder) / MANIFEST).read_text())


def parent_of(model: str | Path) -> str:
    """The model that a run was made from, as `models.load_model` takes it; empty: ``model`` is no run."""
    if not run_folder.is_finished(model):
        return ""
    parent = read_manifest(model)["parent"]
    return str(Path(model).parent / Path(parent).name) if parent.startswith("../") else parent


def lineage(folder: str | Path) -> tuple[str, list[Path]]:
    """The base model's name and the run folders to replay on it, oldest first.

    Raises:
        PftoolsError: a run of the chain is missing, unfinished or damaged, or what one was made from has
            other contents by now.
    """
    chain: list[Path] = []
    manifest, parent, here = {}, str(folder), Path()
    while (here / parent / "run.json").exists():
        here = here / parent
        if chain:
            _check_parent(chain[0], run_folder.outputs_digest(here), str(here))
        chain.insert(0, here)
        manifest = read_manifest(here)
        parent = manifest["parent"]
        if not parent.startswith(".."):
            here = Path()
    if parent.startswith("../"):
        raise PftoolsError(
            f"{chain[0]} starts from the run {here / parent}, which is not there: run its step again."
        )
    if "contents" in manifest:
        return _base_folder(chain[0], parent, manifest), chain
    if chain:
        _check_parent(chain[0], contents.hub_revision("models", parent), parent)
    return parent, chain


def _base_folder(run: Path, parent: str, manifest: dict[str, str]) -> str:
    """The folder of the base model that a run was made from, where it was or where it is by now."""
    for folder in (parent, os.path.normpath(run.resolve() / manifest["near"])):
        if contents.digest(folder) == manifest["contents"]:
            return folder
    raise PftoolsError(
        f"{run} was made from the model in {parent}, which is gone or was changed since: "
        "put it back, or run the step again."
    )


def _check_parent(run: Path, digest: str | None, parent: str) -> None:
    recorded = run_folder.read_record(run)["inputs"].get("model")
    if recorded and digest and recorded != digest:
        raise PftoolsError(
            f"{run} was made from other contents of {parent} than are there now: run its step again."
        )


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

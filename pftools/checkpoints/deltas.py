"""What a prune or finetune step leaves, and the chain of steps behind a model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pftools import contents, run_folder
from pftools.adapters import Adapter
from pftools.checkpoints import reload_check
from pftools.checkpoints.reload_check import ADAPTER, WEIGHTS
from pftools.errors import PftoolsError
from pftools.files import write_json
from pftools.masks import MASKS, save_masks, save_tensors

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

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

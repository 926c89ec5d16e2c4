"""Finished runs: their names and their records.

The key in a run's name is a hash of what decides the result: the step, its parameters, the keys of the runs
it starts from, and the recipe version of pftools. Two studies that share a step so share its run.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pftools import RECIPE_VERSION, contents
from pftools.errors import PftoolsError
from pftools.files import sha256, write_json
from pftools.settings import EMBEDDED_MODEL, Step

KEY_LENGTH = 12
RECORD = "run.json"
_REMEDY = "its step has to run again, which `pftools run` sees to; by hand, remove the run's folder first"


def run_key(parameters: Step) -> str:
    """The hash that names a run.

    Parents count by their keys, so the place of the runs folder does not matter. The folder of a model and a
    corpus of files count by their contents as well, so that a run on old contents is never taken for one on
    new contents.
    """
    decisive = {name: getattr(parameters, name) for name in parameters.key_fields()}
    for name in parameters.parents:
        decisive[name] = key_of_reference(decisive[name])
    held = _held_by_inputs(parameters)
    text = json.dumps([parameters.step, decisive, RECIPE_VERSION, *([held] if held else [])], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


def _held_by_inputs(parameters: Step) -> dict[str, str]:
    """{parameter: digest} of the model's folder and the corpus, where they are paths."""
    model, corpus = parameters.model, getattr(parameters, "corpus", "")
    found = {"corpus": contents.digest(corpus) if contents.is_path(corpus) else None}
    if model != EMBEDDED_MODEL and key_of_reference(model) == model:
        found["model"] = contents.digest(model)
    return {name: digest for name, digest in found.items() if digest}


def key_of_reference(reference: str) -> str:
    """`runs/prune-0123456789ab` counts as its last part; a model's name as itself."""
    last = Path(reference).name
    step, _, key = last.rpartition("-")
    is_run = bool(step) and len(key) == KEY_LENGTH and set(key) <= set("0123456789abcdef")
    return last if is_run else reference


def folder_of(parameters: Step) -> Path:
    """Where the run of a step with these parameters is, or will be."""
    return Path(parameters.runs).expanduser() / f"{parameters.step}-{run_key(parameters)}"


def is_finished(folder: str | Path) -> bool:
    """Whether the run is sealed. Its files are checked when they are read (`verify`)."""
    return (Path(folder) / RECORD).exists()


def read_record(folder: str | Path) -> dict[str, Any]:
    """The contents of `run.json`.

    Raises:
        PftoolsError: the run is not finished, or its record is damaged.
    """
    path = Path(folder) / RECORD
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        whole = record.pop("seal") == _seal_of(record)
    except FileNotFoundError:
        raise PftoolsError(
            f"the run {folder} is not finished: it has no run.json; run its step first."
        ) from None
    except (ValueError, KeyError, AttributeError, TypeError):
        whole = False
    if not whole:
        raise PftoolsError(f"{path} is damaged: {_REMEDY}.")
    return record


def verify(folder: str | Path) -> dict[str, Any]:
    """`read_record`, after every output was found to have the sha256 that the record states."""
    record = read_record(folder)
    for name, expected in record["outputs"].items():
        path = Path(folder) / name
        if not path.exists() or sha256(path) != expected:
            found = "is missing" if not path.exists() else "differs from what was sealed"
            raise PftoolsError(f"{path} {found}: {_REMEDY}.")
    return record


def damage(folder: str | Path) -> str | None:
    """Why a finished run cannot be used, as a sentence; None when all its files are as they were sealed."""
    try:
        verify(folder)
    except PftoolsError as error:
        return str(error)
    return None


def is_whole(folder: str | Path) -> bool:
    """Whether the run is finished and undamaged."""
    return is_finished(folder) and damage(folder) is None


def write_record(folder: Path, record: dict[str, Any]) -> None:
    write_json(folder / RECORD, {**record, "seal": _seal_of(record)})


def _seal_of(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()

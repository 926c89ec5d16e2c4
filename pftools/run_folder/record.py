"""Finished runs: their names and their records.

The key in a run's name is a hash of what decides the result: the step, its parameters, the keys of the runs
it starts from, the code of its notebook, and the recipe version of pftools. Two studies that share a step so
share its run.

What a step reads and is not in the key, such as a data set by its name, is in the record: {input: digest}.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from pftools import RECIPE_VERSION, cells, contents, shipped
from pftools.errors import PftoolsError
from pftools.files import sha256, write_json
from pftools.settings import EMBEDDED_MODEL, STEPS, Step

KEY_LENGTH = 12
RECORD, NOTEBOOK = "run.json", "notebook.ipynb"
_CRITERIA = Path(__file__).parents[1] / "criteria.py"
_REMEDY = "its step has to run again, which `pftools run` sees to; by hand, remove the run's folder first"


def run_key(parameters: Step, *, own_cells: str = "") -> str:
    """The hash that names a run.

    Parents count by their keys, so the place of the runs folder does not matter. The folder of a model and a
    corpus of files count by their contents alone, wherever they are, so that a run on old contents is never
    taken for one on new contents. The code of the step's notebook counts, its parameters cell and its text do
    not; so does the file of pruning criteria.

    Args:
        parameters: of the step.
        own_cells: the digest of the code that was executed, where it is not the notebook's.
    """
    decisive = {name: getattr(parameters, name) for name in parameters.key_fields()}
    for name in parameters.parents:
        decisive[name] = _by_contents(decisive[name])
    if contents.is_path(corpus := decisive.get("corpus", "")):
        place, column = contents.place_and_column(corpus)
        decisive["corpus"] = f"{_held(place)}:{column}" if column else _held(place)
    if include := decisive.get("include"):  # task files, of which any may be part of another
        decisive["include"] = contents.digest_of_tree(include) or include
    code = own_cells or cells.digest(cells.of_notebook(notebook_of(parameters)))
    if parameters.step == "prune":  # the file that people write criteria of their own into
        code += contents.digest(str(_CRITERIA)) or ""
    text = json.dumps([parameters.step, decisive, RECIPE_VERSION, code], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


def notebook_of(parameters: Step) -> Path:
    """The notebook of a step, as it is on this machine."""
    return shipped.NOTEBOOKS / shipped.NOTEBOOK_OF[parameters.step]


def _by_contents(model: str) -> str:
    """What stands for a model in a key: the key of a run, the digest of a folder, else its name."""
    if model in ("", EMBEDDED_MODEL) or is_reference(model):
        return key_of_reference(model)
    return _held(model)


def _held(path: str) -> str:
    digest = contents.digest(path)
    return f"contents {digest}" if digest else path


def is_reference(model: str) -> bool:
    """Whether a model is named by the folder of a run, such as `runs/prune-0123456789ab`."""
    step, _, key = Path(model).name.rpartition("-")
    return step in STEPS and len(key) == KEY_LENGTH and set(key) <= set("0123456789abcdef")


def key_of_reference(reference: str) -> str:
    """`runs/prune-0123456789ab` counts as its last part; a model's name as itself."""
    return Path(reference).name if is_reference(reference) else reference


def folder_of(parameters: Step, *, own_cells: str = "") -> Path:
    """Where the run of a step with these parameters is, or will be."""
    return (
        Path(parameters.runs).expanduser() / f"{parameters.step}-{run_key(parameters, own_cells=own_cells)}"
    )


# ------------------------------------------------------------------------------------------------------------
# Inputs


def outputs_digest(folder: str | Path) -> str | None:
    """A digest of what later steps read of a run; None where it is not finished, or its record is damaged.

    Its notebook and its tables are for people, and do not count.
    """
    return _told(folder)[1] or None


def changed_input(folder: str | Path, visible: Mapping[str, str]) -> str | None:
    """Why a finished run cannot stand for the step any more, as a sentence; None where it can.

    Args:
        folder: of the run.
        visible: {input: digest} of what the step would read now. What is not there, on this machine, is taken
            to be as it was.
    """
    recorded, _ = _told(folder)
    for name, digest in recorded.items():
        if visible.get(name, digest) != digest:
            return (
                f"{folder} was made from other contents of {name} than are there now: it is made again by "
                "`pftools run`, unless they are put back."
            )
    return None


def _told(folder: str | Path) -> tuple[dict[str, str], str]:
    """{input: digest} as recorded, and `outputs_digest`; both empty for a run that cannot be read."""
    path = Path(folder) / RECORD
    try:
        now = path.stat()
        return _read_told(path, now.st_ino, now.st_size, now.st_mtime_ns)
    except (OSError, PftoolsError):
        return {}, ""


@lru_cache(maxsize=100_000)
def _read_told(path: Path, inode: int, size: int, modified: int) -> tuple[dict[str, str], str]:
    record = read_record(path.parent)
    kept = {
        name: digest
        for name, digest in record["outputs"].items()
        if name != NOTEBOOK and not name.endswith(".parquet")
    }
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    return dict(record.get("inputs", {})), digest


class Misnamed(PftoolsError):
    """A run in a folder that has the name of another run."""


def is_finished(folder: str | Path) -> bool:
    """Whether the run is sealed. Its files are checked when they are read (`verify`)."""
    return (Path(folder) / RECORD).exists()


def read_record(folder: str | Path) -> dict[str, Any]:
    """The contents of `run.json`.

    Raises:
        PftoolsError: the run is not finished, its record is damaged, or its folder has another run's name.
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
    if is_reference(str(folder)) and Path(folder).name != (own := f"{record['step']}-{record['key']}"):
        raise Misnamed(
            f"{folder} has the name of another run: by its record it is {own}; give it that name, or "
            "remove it."
        )
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

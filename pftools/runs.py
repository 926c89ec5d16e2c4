"""Run folders: where a step's results live, how they get a name, and when they count as finished.

A run is `runs/<step>-<key>/`. The key is a hash of what decides the result: the step, its parameters, the keys of the
runs it starts from, and the recipe version of pftools. Two studies that share a step so share its run.

While a step works, everything it writes is in `work/`. Sealing moves the outputs up and writes `run.json` last, in one
atomic rename: a folder without `run.json` is not finished, whatever else it holds.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from pftools import RECIPE_VERSION
from pftools.errors import PftoolsError
from pftools.settings import Step

KEY_LENGTH = 12
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "lm_eval", "accelerate", "pftools")


def run_key(parameters: Step) -> str:
    """The hash that names a run. Parents count by their keys, so the place of the runs folder does not matter."""
    decisive = {name: getattr(parameters, name) for name in parameters.key_fields()}
    for name in parameters.parents:
        decisive[name] = _key_of_reference(decisive[name])
    text = json.dumps([parameters.step, decisive, RECIPE_VERSION], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


def _key_of_reference(reference: str) -> str:
    """`runs/prune-0123456789ab` counts as its last part; a model's name as itself."""
    last = Path(reference).name
    step, _, key = last.rpartition("-")
    is_run = bool(step) and len(key) == KEY_LENGTH and set(key) <= set("0123456789abcdef")
    return last if is_run else reference


def run_folder(parameters: Step) -> Path:
    """Where the run of a step with these parameters is, or will be."""
    return Path(parameters.runs) / f"{parameters.step}-{run_key(parameters)}"


def is_finished(folder: str | Path) -> bool:
    """Whether the run is sealed. Its files are checked when they are read (`verify`)."""
    return (Path(folder) / "run.json").exists()


def read_record(folder: str | Path) -> dict[str, Any]:
    """The contents of `run.json`.

    Raises:
        PftoolsError: the run is not finished, or its record is damaged.
    """
    path = Path(folder) / "run.json"
    try:
        record = json.loads(path.read_text())
        whole = record.pop("seal") == _seal_of(record)
    except FileNotFoundError:
        raise PftoolsError(f"the run {folder} is not finished: it has no run.json; run its step first.") from None
    except (ValueError, KeyError, AttributeError):
        whole = False
    if not whole:
        raise PftoolsError(f"{path} is damaged: remove the folder {folder}, and its step is run again.")
    return record


def verify(folder: str | Path) -> dict[str, Any]:
    """`read_record`, after every output was found to have the sha256 that the record states."""
    record = read_record(folder)
    for name, expected in record["outputs"].items():
        path = Path(folder) / name
        if not path.exists() or _sha256(path) != expected:
            found = "is missing" if not path.exists() else "differs from what was sealed"
            raise PftoolsError(f"{path} {found}: remove the folder {folder}, and its step is run again.")
    return record


@dataclass
class Run:
    """A run under way. Write outputs to `path(name)`, then `seal` it."""

    parameters: Step
    folder: Path
    already_finished: bool
    lock: BaseFileLock
    started: float = field(default_factory=time.time)

    @property
    def key(self) -> str:
        return self.folder.name.rpartition("-")[2]

    def path(self, name: str) -> Path:
        """Where to write the output ``name`` (a file or a folder) until the run is sealed."""
        path = self.folder / "work" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def seal(self, outputs: list[str], **results: Any) -> Path:
        """Finish the run: move ``outputs`` out of `work/`, and write `run.json` last.

        Args:
            outputs: names given to `path` that are to be kept; everything else in `work/` is removed.
            results: what the step found, as JSON values (perplexity, measured sparsity, ...).

        A run that had been finished before is left as it was.
        """
        work = self.folder / "work"
        if not self.already_finished:
            for name in outputs:
                _replace(work / name, self.folder / name)
            record = {
                "step": self.parameters.step,
                "key": self.key,
                "parameters": self.parameters.model_dump(mode="json"),
                "results": results,
                "outputs": {name: _sha256(self.folder / name) for name in _files(self.folder, outputs)},
                "seconds": round(time.time() - self.started, 2),
                **_circumstances(),
            }
            _write_record(self.folder, record)
        shutil.rmtree(work, ignore_errors=True)
        self.lock.release()
        return self.folder

    def __str__(self) -> str:
        state = "finished before; its sealed results are kept" if self.already_finished else "under way"
        return f"{self.folder} ({state})"


def start(parameters: Step) -> Run:
    """Open the run of a step: makes its folder, after checking that the runs it starts from are finished."""
    for name in parameters.parents:
        reference = getattr(parameters, name)
        if _key_of_reference(reference) != reference and not is_finished(reference):
            raise PftoolsError(f"{name} is {reference!r}, and that run is not finished: run its step first.")
    folder = run_folder(parameters)
    writer = _lock(folder, "writer")
    try:
        writer.acquire(timeout=0)
    except Timeout:
        print(f"waiting: {owner(folder)} is working on {folder}")
        writer.acquire()
    (folder / "work").mkdir(parents=True, exist_ok=True)
    return Run(parameters, folder, is_finished(folder), writer)


def add_output(folder: Path, name: str) -> None:
    """Add a file to the record of a finished run: its executed notebook, which is complete only after the seal."""
    record = read_record(folder)
    record["outputs"][name] = _sha256(folder / name)
    _write_record(folder, record)


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    write_json(folder / "run.json", {**record, "seal": _seal_of(record)})


def _seal_of(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Locks. Two for a run: the process that drives the step holds one, so that no step is computed twice; the kernel that
# writes holds the other, so that a new attempt waits for an orphaned kernel of a killed driver. The system lets go of
# both when their owner dies, however it dies: there are no stale locks.


@contextmanager
def driving(folder: Path) -> Iterator[None]:
    """Hold a run while its step is executed; waits until nobody else drives it and no kernel writes to it."""
    with _lock(folder, "driver"):
        note = _lock_path(folder, "driver").with_suffix(".json")
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        write_json(note, {"host": socket.gethostname(), "process": os.getpid(), "since": since})
        with _lock(folder, "writer"):
            pass
        yield
        note.unlink(missing_ok=True)


def is_locked(folder: Path) -> bool:
    """Whether a living process works on the run."""
    for role in ("driver", "writer"):
        if _lock_path(folder, role).exists():
            lock = _lock(folder, role)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                return True
            lock.release()
    return False


def owner(folder: Path) -> str:
    """Who works on the run, and since when, in words."""
    try:
        note = json.loads(_lock_path(folder, "driver").with_suffix(".json").read_text())
        return f"process {note['process']} on {note['host']} (since {note['since']})"
    except (OSError, ValueError, KeyError):
        return "another process"


def _lock_path(folder: Path, role: str) -> Path:
    return folder.parent / ".locks" / f"{folder.name}.{role}"


def _lock(folder: Path, role: str) -> BaseFileLock:
    path = _lock_path(folder, role)
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file in one atomic step: readers see the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)


def _replace(source: Path, target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    os.replace(source, target)


def _files(folder: Path, names: list[str]) -> list[str]:
    found: list[str] = []
    for name in names:
        path = folder / name
        inside = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        found += [str(file.relative_to(folder)) for file in inside]
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _circumstances() -> dict[str, Any]:
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes, Linux in KiB
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "machine": _machine(),
        "versions": versions,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _machine() -> dict[str, Any]:
    torch = sys.modules.get("torch")  # a step that needs no torch does not load it for this
    gpu = torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None
    return {"platform": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count(), "gpu": gpu}


# ---------------------------------------------------------------------------------------------------------------------
# Room


def unneeded(root: str | Path, kept: set[str]) -> list[Path]:
    """Run folders under ``root`` that are neither in ``kept`` nor under way."""
    folders = [folder for folder in sorted(Path(root).glob("*-*")) if _key_of_reference(str(folder)) != str(folder)]
    return [folder for folder in folders if folder.name not in kept and not is_locked(folder)]


def size_of(folder: Path) -> int:
    """Bytes of all files of a run."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def remove(folder: Path) -> None:
    """Remove a run; its record goes first, so that a removal cut short leaves an unfinished run, not a damaged one."""
    (folder / "run.json").unlink(missing_ok=True)
    shutil.rmtree(folder)

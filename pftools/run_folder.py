"""Run folders: where a step's results live, how they get a name, and when they count as finished.

A run is `runs/<step>-<key>/`. The key is a hash of what decides the result: the step, its parameters, the keys of the
runs it starts from, and the recipe version of pftools. Two studies that share a step so share its run.

While a step works, everything it writes is in `work/`. Sealing moves the outputs up and writes `run.json` last, in one
atomic rename: a folder without `run.json` is not finished, whatever else it holds. Nothing here relies on the clock:
dates are written for people to read.

    runs/<step>-<key>/     run.json, outputs, notebook.ipynb; failure.json where the step failed; work/ while it works
    runs/.locks/           who works on what (see "Locks" below)
    runs/.drafts/          notebooks that are being executed
    runs/.logs/            what the processes of steps printed
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import secrets
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

from pftools import RECIPE_VERSION, contents
from pftools.errors import PftoolsError
from pftools.files import partial_path, sealed_sha256, sha256, write_json
from pftools.settings import EMBEDDED_MODEL, Step

KEY_LENGTH = 12
_REMEDY = "its step has to run again, which `pftools run` sees to; by hand, remove the run's folder first"
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "lm_eval", "accelerate", "pftools")


def run_key(parameters: Step) -> str:
    """The hash that names a run. Parents count by their keys, so the place of the runs folder does not matter; a model's folder and a
    corpus of files count by what they hold, too, so that a run of what was there before is never taken for one of what is there now."""
    decisive = {name: getattr(parameters, name) for name in parameters.key_fields()}
    for name in parameters.parents:
        decisive[name] = _key_of_reference(decisive[name])
    held = _held_by_inputs(parameters)
    text = json.dumps([parameters.step, decisive, RECIPE_VERSION, *([held] if held else [])], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


def _held_by_inputs(parameters: Step) -> dict[str, str]:
    """{parameter: digest} of the model's folder and the corpus, where they are paths."""
    model, corpus = parameters.model, getattr(parameters, "corpus", "")
    found = {"corpus": contents.digest(corpus) if contents.is_path(corpus) else None}
    if model != EMBEDDED_MODEL and _key_of_reference(model) == model:
        found["model"] = contents.digest(model)
    return {name: digest for name, digest in found.items() if digest}


def _key_of_reference(reference: str) -> str:
    """`runs/prune-0123456789ab` counts as its last part; a model's name as itself."""
    last = Path(reference).name
    step, _, key = last.rpartition("-")
    is_run = bool(step) and len(key) == KEY_LENGTH and set(key) <= set("0123456789abcdef")
    return last if is_run else reference


def folder_of(parameters: Step) -> Path:
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


def reopen(folder: Path) -> None:
    """Take the seal off a damaged run, so that its step counts as not finished. For who drives the run (`driving`)."""
    (folder / "run.json").unlink(missing_ok=True)


@dataclass
class Run:
    """A run under way. Write outputs to `path(name)`, then `seal` it."""

    parameters: Step
    folder: Path
    already_finished: bool
    lock: BaseFileLock
    started: float = field(default_factory=time.monotonic)

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
            _refuse_orphans(self.folder)
            for name in outputs:
                _replace(work / name, self.folder / name)
            record = {
                "step": self.parameters.step,
                "key": self.key,
                "parameters": self.parameters.model_dump(mode="json"),
                "results": results,
                "outputs": {name: sealed_sha256(self.folder / name) for name in _files(self.folder, outputs)},
                "seconds": round(time.monotonic() - self.started, 2),
                **_circumstances(),
            }
            _write_record(self.folder, record)
        shutil.rmtree(work, ignore_errors=True)
        self.lock.release(force=True)
        return self.folder

    def __str__(self) -> str:
        state = "finished before; its sealed results are kept" if self.already_finished else "under way"
        return f"{self.folder} ({state})"


def start(parameters: Step) -> Run:
    """Open the run of a step: makes its folder, after every file of the runs it starts from was checked.

    Raises:
        PftoolsError: a run that it starts from is not finished or is damaged; or this run is finished and damaged; or
            another attempt has taken it over from this kernel.
    """
    for name in parameters.parents:
        reference = getattr(parameters, name)
        if _key_of_reference(reference) != reference:
            if not is_finished(reference):
                raise PftoolsError(
                    f"{name} is {reference!r}, and that run is not finished: run its step first."
                )
            verify(reference)
    folder = folder_of(parameters)
    # One lock object a process: a cell that is executed again by hand must not wait for itself.
    writer = _lock(folder, "writer", is_singleton=True)
    _acquire(writer, folder)
    try:
        _refuse_orphans(folder)
        finished = is_finished(folder)
        if finished:
            verify(folder)
        else:
            clear(folder, keep_work=parameters.resumes)
        (folder / "work").mkdir(parents=True, exist_ok=True)
    except BaseException:
        writer.release(force=True)
        raise
    return Run(parameters, folder, finished, writer)


def clear(folder: Path, *, keep_work: bool, keep: tuple[str, ...] = ()) -> None:
    """Remove what an attempt that did not finish left: nothing of it may pass for an output of the next. For who holds the run.

    Args:
        keep_work: leave `work/`, for a step that goes on from there.
        keep: other names to leave.
    """
    kept = {*keep, "work"} if keep_work else set(keep)
    for path in folder.iterdir() if folder.exists() else ():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def add_output(folder: Path, name: str) -> None:
    """Add a file to the record of a finished run: its executed notebook, which is complete only after the seal."""
    record = read_record(folder)
    record["outputs"][name] = sealed_sha256(folder / name)
    _write_record(folder, record)


def draft_path(folder: Path) -> Path:
    """Where the notebook of a run is while it is executed."""
    path = folder.parent / ".drafts" / f"{folder.name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def log_path(folder: Path) -> Path:
    """Where the process of a step prints to."""
    path = folder.parent / ".logs" / f"{folder.name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def tidy(folder: Path) -> None:
    """Remove what processes that were killed left beside a finished run. For who drives the run (`driving`)."""
    if is_finished(folder):
        shutil.rmtree(folder / "work", ignore_errors=True)
        (folder / "failure.json").unlink(missing_ok=True)
    for path in (folder / "run.json", folder / "failure.json", _note_path(folder)):
        partial_path(path).unlink(missing_ok=True)


def needs_tidying(folder: Path) -> bool:
    """Whether a finished run has leftovers, and nobody works on it."""
    note = _note_path(folder)
    traces = (
        folder / "work",
        folder / "failure.json",
        partial_path(folder / "run.json"),
        draft_path(folder),
        note,
        partial_path(note),
    )
    return any(path.exists() for path in traces) and not is_locked(folder)


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    write_json(folder / "run.json", {**record, "seal": _seal_of(record)})


def _seal_of(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Locks. Two for a run: the process that drives the step holds one, so that no step is computed twice; the kernel that
# writes holds the other, so that a new attempt waits for the orphaned kernel of a killed driver. They are locks of the
# operating system (flock; over NFS and Lustre where they are mounted with locks), which lets go when the owner dies,
# however it dies, so there is no stale lock to break; the note beside it only says who holds it, or held it last.
#
# A lock file can be removed by hand, and a kernel can begin to write after its driver was killed and another has taken
# over. So every attempt has a token, in the note and in the kernel's environment, and a kernel whose token is no longer
# that of the note neither starts nor seals.

_ATTEMPT = "PFTOOLS_ATTEMPT"


@contextmanager
def driving(folder: Path) -> Iterator[None]:
    """Hold a run while its step is executed; waits until nobody else drives it and no kernel writes to it."""
    lock, note = _lock(folder, "driver"), _note_path(folder)
    _acquire(lock, folder)
    before = os.environ.get(_ATTEMPT)
    try:
        attempt = f"{folder.name}:{secrets.token_hex(8)}"
        write_json(
            note,
            {"host": socket.gethostname(), "process": os.getpid(), "since": time.time(), "attempt": attempt},
        )
        _acquire(
            writer := _lock(folder, "writer"), folder
        )  # only after the note: now every older kernel is refused
        writer.release()
        os.environ[_ATTEMPT] = attempt
        yield
    finally:
        os.environ.pop(_ATTEMPT, None) if before is None else os.environ.update({_ATTEMPT: before})
        note.unlink(missing_ok=True)
        lock.release()


def _refuse_orphans(folder: Path) -> None:
    """Raise if this kernel was started by a driver that no longer has the run."""
    attempt = os.environ.get(_ATTEMPT)
    if attempt is None:
        return  # stepping through a notebook by hand
    name = attempt.partition(":")[0]
    if name != folder.name:
        raise PftoolsError(
            f"this notebook was started for the run {name}, and its parameters make {folder.name}: was a file that it reads changed, or is the "
            "plan of an older pftools?"
        )
    if _note(folder).get("attempt") != attempt:
        raise PftoolsError(
            f"another attempt at {folder} has taken over from this one, which stops and seals nothing."
        )


def is_locked(folder: Path) -> bool:
    """Whether a living process works on the run."""
    return any(_is_held(_lock_path(folder, role)) for role in ("driver", "writer"))


def _is_held(path: Path) -> bool:
    """Asks with a shared lock, so that any number of processes can ask at once."""
    import fcntl

    try:
        file = path.open("rb+")
    except FileNotFoundError:
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def owner(folder: Path) -> str:
    """Who works on the run, or did last, and for how long, in words."""
    note = _note(folder)
    try:
        age = max(0.0, time.time() - note["since"])  # a clock that was set back makes it 0, and nothing else
        return f"process {note['process']} on {note['host']}, begun {_in_words(age)} ago"
    except (KeyError, TypeError):
        return "a notebook that is open by hand"


def was_interrupted(folder: Path) -> bool:
    """Whether an attempt was cut short: its note or its work is there, and no process is."""
    left = _note_path(folder).exists() or (folder / "work").exists()
    return left and not is_finished(folder) and not is_locked(folder)


def _in_words(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def _note(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(_note_path(folder).read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _note_path(folder: Path) -> Path:
    return folder.parent / ".locks" / f"{folder.name}.json"


def _lock_path(folder: Path, role: str) -> Path:
    return folder.parent / ".locks" / f"{folder.name}.{role}"


def _lock(folder: Path, role: str, **options: Any) -> BaseFileLock:
    path = _lock_path(folder, role)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without flock, a file that stays when its owner dies would be the lock: better to refuse such a place.
    return FileLock(path, thread_local=False, fallback_to_soft=False, **options)


def _acquire(lock: BaseFileLock, folder: Path) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting: {owner(folder)}, works on {folder}", flush=True)
        lock.acquire()
    except OSError as error:
        raise PftoolsError(
            f"{lock.lock_file} cannot be locked ({error.strerror}): mount that file system with locks, or give a --runs folder elsewhere."
        ) from None


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
    return {
        "platform": f"{platform.system()} {platform.release()}",
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "gpu": gpu,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Room


def unneeded(root: str | Path, kept: set[str]) -> list[Path]:
    """Run folders under ``root`` that are neither in ``kept`` nor under way."""
    folders = [
        folder for folder in sorted(Path(root).glob("*-*")) if _key_of_reference(str(folder)) != str(folder)
    ]
    return [folder for folder in folders if folder.name not in kept and not is_locked(folder)]


def remove(folder: Path) -> None:
    """Remove a run; its record goes first, so that a removal cut short leaves an unfinished run, not a damaged one."""
    (folder / "run.json").unlink(missing_ok=True)
    shutil.rmtree(folder)
    log_path(folder).unlink(missing_ok=True)
    draft_path(folder).unlink(missing_ok=True)

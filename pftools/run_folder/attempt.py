"""Attempts: executions of a step, each in a folder of its own that becomes the run by one rename.

One lock a run: who holds it makes the run. It is a lock of the operating system (flock; over NFS and Lustre
where they are mounted with locks), which lets go when its owner dies, however it dies. Where a lock file was
removed by hand, the later attempt removes the folder of the earlier one, which then stops. A mounted drive
that takes no locks, as on Colab, has them on the machine's own disk: then only its own processes see each
other, and that is said.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from pftools.errors import PftoolsError
from pftools.files import sealed_sha256, write_json
from pftools.redaction import redact
from pftools.run_folder.record import (
    NOTEBOOK,
    RECORD,
    Misnamed,
    damage,
    is_finished,
    is_whole,
    read_record,
    write_record,
)

FAILURE, OWNER = "failure.json", "owner.json"


@contextmanager
def attempting(
    folder: Path, *, resumes: bool = False, outdated: Callable[[], str | None] = lambda: None
) -> Iterator[Path | None]:
    """Hold a run while its step is executed; waits until nobody else does.

    Yields:
        The folder of a new attempt; None where the run is finished. A finished run that is damaged is removed
        first, and one that is outdated is set aside.

    Args:
        folder: of the run.
        resumes: go on from what a failed or interrupted attempt left.
        outdated: why a finished run is not to be used any more, as a sentence; None: it is.
    """
    lock = lock_of(folder)
    acquire(lock, folder)
    try:
        recover(folder)
        if is_finished(folder) and (why := damage(folder)) is not None:
            print(f"Again: {why}", flush=True)
            (set_aside if _is_anothers(folder) else _remove_folder)(folder)
        if is_finished(folder) and (why := outdated()) is not None:
            print(f"Again: {why}", flush=True)
            set_aside(folder)
        yield None if is_finished(folder) else begin(folder, resumes)
    finally:
        lock.release()


def _is_anothers(folder: Path) -> bool:
    try:
        read_record(folder)
    except PftoolsError as error:
        return isinstance(error, Misnamed)
    return False


def publish(attempt: Path, folder: Path) -> None:
    """Make a sealed attempt the run, by one rename; discard it where another attempt was first."""
    record = read_record(attempt)
    notebook = attempt / NOTEBOOK
    if _is_json(notebook):
        _redact_file(notebook)
        record["outputs"][NOTEBOOK] = sealed_sha256(notebook)
        write_record(attempt, record)
    else:  # cut short while it was written
        notebook.unlink(missing_ok=True)
    (attempt / OWNER).unlink(missing_ok=True)
    if folder.exists() and not is_finished(folder):
        shutil.rmtree(folder)
    try:
        attempt.rename(folder)
    except OSError:
        if not is_finished(folder):
            raise
        shutil.rmtree(attempt)


def give_up(attempt: Path, failure: dict[str, Any], *, resumes: bool) -> None:
    """Record why an attempt failed, and keep its notebook.

    Args:
        resumes: also keep what it wrote, for the next attempt to go on from.
    """
    if not resumes:
        clear(attempt, keep=(NOTEBOOK, OWNER))  # first: it may be what fills the disk
    write_json(attempt / FAILURE, failure)
    _redact_file(attempt / NOTEBOOK)


def attempts(folder: Path) -> list[Path]:
    """The folders of all attempts at a run: the one under way, or what earlier ones left."""
    return sorted((folder.parent / ".work").glob(f"{folder.name}.*"))


def failure_of(folder: Path) -> dict[str, Any] | None:
    """What the last attempt at an unfinished run failed of; None where it did not, or could not say so."""
    for attempt in attempts(folder):
        if _is_json(attempt / FAILURE):
            return dict(json.loads((attempt / FAILURE).read_text()))
    return None


def was_interrupted(folder: Path) -> bool:
    """Whether an attempt was cut short: its folder is there without a failure, and no process works on it."""
    unfinished = not is_finished(folder) and bool(attempts(folder))
    return unfinished and failure_of(folder) is None and not is_locked(folder)


def is_locked(folder: Path) -> bool:
    """Whether a living process makes the run. Asks with a shared lock, so that any number can ask at once."""
    import fcntl

    try:
        file = _lock_path(folder).open("rb")
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
    for attempt in attempts(folder):
        if _is_json(attempt / OWNER):
            note = json.loads((attempt / OWNER).read_text())
            age = max(0.0, time.time() - note["since"])  # a clock that was set back makes it 0, nothing else
            return f"process {note['process']} on {note['host']}, begun {_in_words(age)} ago"
    return "another process"


def begin(folder: Path, resumes: bool) -> Path:
    """The folder of a new attempt, for the holder of the lock: whoever made the earlier ones is dead or given
    up.

    A step that resumes adopts the folder of an earlier attempt under a new name, so that an orphan does not
    find it.
    """
    attempt = _beside(folder, ".work") / f"{folder.name}.{secrets.token_hex(4)}"
    earlier = attempts(folder)
    if resumes and earlier:
        earlier.pop().rename(attempt)
        for name in (RECORD, NOTEBOOK, FAILURE):
            (attempt / name).unlink(missing_ok=True)
    else:
        attempt.mkdir()
    for other in earlier:
        shutil.rmtree(other, ignore_errors=True)
    write_json(attempt / OWNER, {"host": socket.gethostname(), "process": os.getpid(), "since": time.time()})
    return attempt


def recover(folder: Path) -> None:
    """Publish what was sealed by an attempt whose process was killed before the rename."""
    for attempt in attempts(folder):
        if is_whole(attempt):
            publish(attempt, folder)


def _lock_path(folder: Path) -> Path:
    inside = folder.parent / ".locks"
    return (_lock_folder(inside.resolve()) if inside.is_dir() else inside) / folder.name


@lru_cache(maxsize=16)
def _lock_folder(inside: Path) -> Path:
    """Where the locks of a folder of runs are: in it, or on the machine's own disk where it takes none.

    In a job of a cluster there is no such way out, as other machines work on the same folder.
    """
    why = without_locks(inside)
    if not why or "SLURM_JOB_ID" in os.environ:
        return inside
    print(
        f"{inside.parent} takes no file locks ({why}): the processes of this machine see each other, but "
        "start no second machine on this folder.",
        file=sys.stderr,
        flush=True,
    )
    mark = hashlib.sha256(str(inside).encode()).hexdigest()[:12]
    outside = Path(tempfile.gettempdir()) / "pftools-locks" / mark
    outside.mkdir(parents=True, exist_ok=True)
    return outside


def without_locks(folder: Path) -> str:
    """Why files in a folder cannot be locked, in the system's words; empty: they can."""
    probe = folder / f".probe-{secrets.token_hex(4)}"
    try:
        with FileLock(probe, fallback_to_soft=False):
            return ""
    except OSError as error:
        return error.strerror or "no locks"
    finally:
        probe.unlink(missing_ok=True)


def lock_of(folder: Path, **options: Any) -> BaseFileLock:
    _beside(folder, ".locks")
    # Without flock, a file that stays when its owner dies would be the lock: better to refuse such a place.
    return FileLock(_lock_path(folder), mode=0o666, thread_local=False, fallback_to_soft=False, **options)


def acquire(lock: BaseFileLock, folder: Path) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting: {owner(folder)}, works on {folder}", flush=True)
        lock.acquire()
    except OSError as error:
        raise PftoolsError(
            f"{lock.lock_file} cannot be locked ({error.strerror}): mount that file system with locks, "
            "or give a --runs folder elsewhere."
        ) from None


def log_path(folder: Path) -> Path:
    """Where the process of a step prints to."""
    return _beside(folder, ".logs") / f"{folder.name}.log"


def _beside(folder: Path, name: str) -> Path:
    path = folder.parent / name
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PftoolsError(
            f"{folder.parent} cannot hold runs ({error.strerror}): give a folder that can be written to, "
            "with --runs, or as the parameter `runs`."
        ) from None
    return path


def unneeded(root: str | Path, kept: set[str]) -> list[Path]:
    """Finished runs and abandoned attempts under ``root`` that belong to none of ``kept`` and are not under
    way, and runs that were set aside.

    Other folders are never listed, whatever their names.
    """
    root = Path(root).expanduser()
    runs = [folder for folder in sorted(root.glob("*-*")) if _is_run(folder)]
    left = [path for path in sorted((root / ".work").glob("*-*.*")) if path.is_dir()]
    owners = {path: root / path.name.rpartition(".")[0] for path in left} | {run: run for run in runs}
    replaced = [path for path in sorted((root / ".replaced").glob("*-*.*")) if _is_run(path)]
    return [
        *(path for path, run in owners.items() if run.name not in kept and not is_locked(run)),
        *replaced,
    ]


def _is_run(folder: Path) -> bool:
    try:
        record = read_record(folder)
        return f"{record['step']}-{record['key']}" == folder.name.partition(".")[0]
    except (PftoolsError, KeyError, OSError):
        return False


def set_aside(folder: Path) -> None:
    """Keep a run whose inputs were changed out of the way, until `pftools clean` or somebody removes it."""
    folder.rename(_beside(folder, ".replaced") / f"{folder.name}.{secrets.token_hex(4)}")


def remove(folder: Path) -> None:
    """Remove a run or an abandoned attempt, and a run's log."""
    _remove_folder(folder)
    (folder.parent / ".logs" / f"{folder.name}.log").unlink(missing_ok=True)


def _remove_folder(folder: Path) -> None:
    """The record goes first: a removal cut short leaves an unfinished run, not a damaged one."""
    (folder / RECORD).unlink(missing_ok=True)
    shutil.rmtree(folder)


def sweep(folder: Path) -> None:
    """Remove what attempts left at a run that is finished, unless one is under way."""
    if is_finished(folder) and attempts(folder):
        lock = lock_of(folder)
        try:
            with lock.acquire(timeout=0):
                for attempt in attempts(folder):
                    shutil.rmtree(attempt, ignore_errors=True)
        except Timeout:
            pass  # by hand, somebody goes through the notebook of a finished run


def clear(attempt: Path, *, keep: tuple[str, ...]) -> None:
    for path in attempt.iterdir():
        if path.name not in keep:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _redact_file(path: Path) -> None:
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    if (clean := redact(text)) != text:
        path.write_text(clean, encoding="utf-8")


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _in_words(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"

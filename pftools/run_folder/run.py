"""A run under way, as its notebook sees it: started, written to, sealed once."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import BaseFileLock

from pftools import memory
from pftools.errors import PftoolsError
from pftools.files import sealed_sha256, share
from pftools.run_folder import attempt as attempts
from pftools.run_folder.machine import circumstances
from pftools.run_folder.record import (
    changed_input,
    folder_of,
    is_finished,
    is_reference,
    notebook_of,
    verify,
    write_record,
)
from pftools.settings import Step

ATTEMPT = "PFTOOLS_ATTEMPT"  # the environment variable that gives a notebook in batch its attempt's folder
Inputs = Callable[[Step], dict[str, str]]


@dataclass
class Run:
    """A run under way. Write outputs to `path(name)`, then `seal` it.

    Attributes:
        parameters: of the step.
        folder: where the finished run will be.
        attempt: where it is made.
        already_finished: whether it was finished before.
        lock: None where the process that executes the notebook holds it, and makes the sealed attempt the
            run.
        inputs: {input: digest} of what a step reads, as it is now.
        own_cells: the digest of the code that was executed, where it is not the notebook's; empty: it is.
    """

    parameters: Step
    folder: Path
    attempt: Path
    already_finished: bool = False
    lock: BaseFileLock | None = None
    sealed: bool = False
    inputs: Inputs = lambda parameters: {}
    own_cells: Callable[[], str] = str
    started: float = field(default_factory=time.monotonic)
    read: dict[str, str] = field(init=False)
    made_by: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self.read = self.inputs(self.parameters)

    @property
    def key(self) -> str:
        return self.folder.name.rpartition("-")[2]

    def path(self, name: str) -> Path:
        """Where to write the output ``name`` (a file or a folder) until the run is sealed.

        Raises:
            PftoolsError: this run is sealed, or another attempt has taken over.
        """
        self._refuse_if_over()
        path = self.attempt / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def seal(self, outputs: list[str], **results: Any) -> Path:
        """Finish the run: write `run.json` last, and make the attempt the run in one rename.

        Args:
            outputs: names given to `path` that are to be kept; everything else in the attempt is removed.
            results: what the step found, as JSON values (perplexity, measured sparsity, ...).

        A run that had been finished before is left as it was. A run made by hand with code that is not the
        notebook's gets a name of its own.

        Raises:
            PftoolsError: this run is sealed, another attempt has taken over, or an input was changed.
        """
        self._refuse_if_over()
        self._refuse_if_changed()
        if self.lock and (digest := self.own_cells()):
            self._rename(digest)
        if self.already_finished:
            shutil.rmtree(self.attempt)
        else:
            attempts.clear(
                self.attempt,
                keep=(*(Path(name).parts[0] for name in outputs), attempts.NOTEBOOK, attempts.OWNER),
            )
            write_record(self.attempt, self._record(outputs, results))
            if self.lock:
                attempts.publish(self.attempt, self.folder)
        self.sealed = True
        if self.lock:
            self.lock.release(force=True)
        return self.folder

    def _refuse_if_over(self) -> None:
        if self.sealed:
            raise PftoolsError(
                f"the run {self.folder} is sealed and stays as it is: to make another, begin again at "
                "the cell that starts the run, and load the model anew."
            )
        if not self.attempt.exists():
            raise PftoolsError(
                f"another attempt at {self.folder} has taken over from this one, "
                "which stops and seals nothing."
            )

    def _refuse_if_changed(self) -> None:
        now = self.inputs(self.parameters)
        changed = [name for name, digest in self.read.items() if now.get(name, digest) != digest]
        if changed:
            raise PftoolsError(
                f"{', '.join(changed)} was changed while {self.folder} was made, so nothing is sealed: "
                "execute the notebook again from the cell that starts the run."
            )
        self.read = {**self.read, **now}

    def _rename(self, digest: str) -> None:
        """Make it the run of other cells, under the lock of that."""
        folder = folder_of(self.parameters, own_cells=digest)
        print(
            f"Cells were executed that are not those of {notebook_of(self.parameters)}, so this is a run of "
            f"its own: {folder}"
        )
        if self.lock:
            self.lock.release(force=True)
        self.made_by = digest
        self.lock, self.already_finished = _hold(folder, self.inputs(self.parameters))
        attempt = self.attempt.with_name(f"{folder.name}.{secrets.token_hex(4)}")
        self.attempt.rename(attempt)
        self.folder, self.attempt = folder, attempt

    def _record(self, outputs: list[str], results: dict[str, Any]) -> dict[str, Any]:
        files = _files(self.attempt, outputs)
        share(self.attempt)
        return {
            "step": self.parameters.step,
            "key": self.key,
            "parameters": self.parameters.model_dump(mode="json"),
            "inputs": self.read,
            **({"own_cells": self.made_by} if self.made_by else {}),
            "results": results,
            **({"relieved": smaller} if (smaller := memory.relieved()) else {}),
            "outputs": {name: sealed_sha256(self.attempt / name) for name in files},
            "seconds": round(time.monotonic() - self.started, 2),
            **circumstances(),
        }

    def __str__(self) -> str:
        state = "finished before; its sealed results are kept" if self.already_finished else "under way"
        return f"{self.folder} ({state})"


def start(parameters: Step, *, inputs: Inputs = lambda parameters: {}) -> Run:
    """Open the run of a step: begins an attempt, after every file of the runs it starts from was checked.

    In batch the attempt is given by the process that executes the notebook. A finished run whose inputs were
    changed is set aside.

    Args:
        parameters: of the step.
        inputs: tells {input: digest} of what a step reads, as it is now.

    Raises:
        PftoolsError: a run that it starts from is not finished or is damaged; this run is finished and
            damaged; or the attempt given is for another run, is sealed, or was taken over.
    """
    memory.relieved()  # what an earlier run of this process made smaller is not this one's
    for name in parameters.parents:
        reference = getattr(parameters, name)
        if is_reference(reference):
            if not is_finished(reference):
                raise PftoolsError(
                    f"{name} is {reference!r}, and that run is not finished: run its step first."
                )
            verify(reference)
    folder = folder_of(parameters)
    if given := os.environ.get(ATTEMPT):
        return _in_batch(parameters, folder, Path(given), inputs)
    lock, finished = _hold(folder, inputs(parameters))
    try:
        attempt = attempts.begin(folder, parameters.resumes)
        return Run(parameters, folder, attempt, finished, lock, inputs=inputs)
    except BaseException:
        lock.release(force=True)
        raise


def _hold(folder: Path, visible: dict[str, str]) -> tuple[BaseFileLock, bool]:
    """The lock of a run by hand, and whether the run is finished and to be kept."""
    # One lock object a process: a cell that is executed again by hand must not wait for itself.
    lock = attempts.lock_of(folder, is_singleton=True)
    attempts.acquire(lock, folder)
    try:
        attempts.recover(folder)
        if is_finished(folder):
            verify(folder)
            if (why := changed_input(folder, visible)) is not None:
                print(f"Again: {why}")
                attempts.set_aside(folder)
        return lock, is_finished(folder)
    except BaseException:
        lock.release(force=True)
        raise


def _in_batch(parameters: Step, folder: Path, attempt: Path, inputs: Inputs) -> Run:
    planned = attempt.name.rpartition(".")[0]
    if planned != folder.name:
        raise PftoolsError(
            f"this notebook was started for the run {planned}, and its parameters make {folder.name}: was "
            "its notebook or a file that it reads changed, or is the plan of an older pftools? Then call "
            "`pftools run` again."
        )
    run = Run(parameters, folder, attempt, sealed=is_finished(attempt), inputs=inputs)
    run._refuse_if_over()
    return run


def _files(folder: Path, names: list[str]) -> list[str]:
    found: list[str] = []
    for name in names:
        path = folder / name
        inside = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        found += [str(file.relative_to(folder)) for file in inside]
    return found

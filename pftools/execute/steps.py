"""Execute one step: its notebook, through papermill, in one process with one kernel, here or on a cluster.

A step is finished when its run is sealed, and only then. papermill marks all cells of a killed kernel as
completed and takes `sys.exit(0)` for success, so the executed notebook is a record to read, never a verdict.
A step that did not finish leaves its attempt with the notebook and `failure.json`, which has the cause in one
sentence.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pftools import bars, inputs, run_folder, settings
from pftools.errors import PftoolsError
from pftools.redaction import redact
from pftools.shipped import NOTEBOOK_OF, NOTEBOOKS

if TYPE_CHECKING:
    from pftools.study import Plan, PlannedStep


@dataclass(frozen=True)
class Failure:
    """Why a step did not finish.

    run: the run's name. cell: counted from 1; None outside a cell. cause: a sentence.
    """

    run: str
    cell: int | None
    cause: str

    def __str__(self) -> str:
        return f"{self.run} failed{f' in cell {self.cell}' if self.cell else ''}: {self.cause}"


class StepFailed(PftoolsError):
    """A step that did not finish, with its `Failure`."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(str(failure))
        self.failure = failure


def request(step: PlannedStep, notebooks: str | Path | None = None) -> dict[str, Any]:
    """Everything that another process needs to execute a step, as JSON.

    Args:
        notebooks: the folder of step notebooks; None: those of pftools.
    """
    return {
        "notebook": str(Path(notebooks or NOTEBOOKS) / NOTEBOOK_OF[step.parameters.step]),
        "folder": str(step.folder),
        "parameters": step.parameters.model_dump(mode="json"),
        "resumes": step.parameters.resumes,
        "parents": [str(step.folder.parent / name) for name in step.parents],
    }


def execute_step(step: dict[str, Any]) -> None:
    """Execute one step in this process, unless its run is finished.

    A damaged run, and one whose inputs were changed, is made again.

    Args:
        step: what `request` made.

    Raises:
        StepFailed: the step did not finish; `failure.json` in its attempt says why.
    """
    folder, resumes = Path(step["folder"]), step.get("resumes", False)
    parameters = settings.STEPS[folder.name.partition("-")[0]](**step["parameters"])

    def outdated() -> str | None:
        return run_folder.changed_input(folder, inputs.visible(parameters))

    with run_folder.attempting(folder, resumes=resumes, outdated=outdated) as attempt:
        if attempt is None:
            return
        failure = _execute_notebook(step, attempt)
        if run_folder.is_finished(attempt):
            run_folder.publish(attempt, folder)
            return
        failure = failure or Failure(
            folder.name, None, "the notebook ended without sealing its run: does it call run.seal?"
        )
        with suppress(OSError):  # the disk may be full
            run_folder.give_up(attempt, asdict(failure), resumes=resumes)
        raise StepFailed(failure)


def _execute_notebook(step: dict[str, Any], attempt: Path) -> Failure | None:
    """Execute the notebook into its attempt; why that ended early, or None."""
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    run, notebook = Path(step["folder"]).name, attempt / run_folder.NOTEBOOK
    try:
        with (
            kernel_options() as options,
            _environment(run_folder.ATTEMPT, str(attempt.resolve())),
            _telling(attempt),
        ):
            papermill.execute_notebook(step["notebook"], str(notebook), step["parameters"], **options)
    except PapermillExecutionError as error:
        cause = error.evalue if error.ename == "PftoolsError" else f"{error.ename}: {error.evalue}"
        return Failure(run, error.cell_index + 1, redact(cause.strip() or error.ename))
    except (
        Exception
    ) as error:  # a damaged notebook, a full disk: whatever it is, the step has a cause on record
        if type(error).__name__ == "UncompletedJobError":  # from submitit, in a job that is not queued again
            cause = "the time limit of its job was reached: give it more with --slurm time=MINUTES."
            return Failure(run, _cell_at_work(notebook), cause)
        if isinstance(error, DeadKernelError) or "Kernel died" in str(error):
            cause = (
                "the kernel died; most often the system ended it for lack of memory "
                "(try a smaller batch_size), or it was cancelled."
            )
            return Failure(run, _cell_at_work(notebook), cause)
        return Failure(run, None, redact(f"{type(error).__name__}: {error}"))
    return None


@contextmanager
def kernel_options() -> Iterator[dict[str, Any]]:
    """How papermill starts a kernel: in this working directory, and over sockets in a folder of this process.

    A TCP port is chosen before the kernel takes it, and of hundreds of kernels one would find its port taken.
    """
    from traitlets.config import Config

    sweep_sockets()
    folder = _socket_folder(os.getpid())
    folder.mkdir(exist_ok=True)
    kernel = {
        "transport": "ipc",
        "ip": str(folder / "kernel"),
        "connection_file": str(folder / "kernel.json"),
    }
    try:
        yield {
            "kernel_name": "python3",
            "progress_bar": False,
            "cwd": os.getcwd(),
            "start_timeout": 300,
            "config": Config({"KernelManager": kernel}),
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _socket_folder(process: int) -> Path:
    return Path(tempfile.gettempdir()) / f"pftools-{process}"


def sweep_sockets() -> None:
    """Remove the sockets of processes that were killed, and could not do it themselves."""
    import psutil

    for folder in _socket_folder(0).parent.glob("pftools-*"):
        process = folder.name.partition("-")[2]
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


_TELL_SECONDS = 8


@contextmanager
def _telling(attempt: Path) -> Iterator[None]:
    """Write into the step's log every few seconds how far it is: its cell, and the progress bar of that."""
    ended = threading.Event()
    began = time.monotonic()

    def tell() -> None:
        while not ended.wait(_TELL_SECONDS):
            cell = _cell_at_work(attempt / run_folder.NOTEBOOK)
            words = [f"{time.monotonic() - began:.0f} s", f"cell {cell or 1}", bars.latest(attempt)]
            print("  ".join(filter(None, words)), flush=True)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()


def how_far(folder: Path) -> str:
    """What the log of a step said last of how far it is, as `40 s, cell 9, pruning 50%`; empty: nothing."""
    try:
        with run_folder.log_path(folder).open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 500))
            lines = log.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    told = [found for line in lines if (found := _TOLD.fullmatch(line))]
    return ", ".join(filter(None, [told[-1][1], told[-1][2], _bar(told[-1][3])])) if told else ""


_TOLD = re.compile(r"(\d+ s)  (cell \d+)(?:  (.*))?")  # a line of `_telling`


def _bar(drawn: str | None) -> str:
    """A bar in words: what is done, and how much of it."""
    found = re.match(r"([^:|]+): *(\d+%|\d+)", drawn or "")
    return f"{found[1]} {found[2]}" if found else ""


def _cell_at_work(notebook: Path) -> int | None:
    """The last cell that has begun: where a killed kernel was, whatever papermill wrote about later cells."""
    try:
        cells = json.loads(notebook.read_text())["cells"]
    except (OSError, ValueError, KeyError):
        return None
    begun = [
        number for number, cell in enumerate(cells, 1) if cell.get("execution_count") or cell.get("outputs")
    ]
    return begun[-1] if begun else None


def read_failure(folder: Path, otherwise: str = "its process ended before it could say why") -> Failure:
    """What `failure.json` says, or what can be said of a step that was killed before it could write one."""
    with suppress(TypeError):
        if (failure := run_folder.failure_of(folder)) is not None:
            return Failure(**failure)
    return Failure(folder.name, None, f"{otherwise}{_last_words(folder)}.")


def _last_words(folder: Path) -> str:
    log = run_folder.log_path(folder)
    with suppress(OSError):
        lines = log.read_text(errors="replace").strip().splitlines()
        if lines:
            return f"; its last words, in {log}: {redact(lines[-1])[:300]!r}"
    return ""


def unusable(plan: Plan) -> dict[str, str]:
    """Finished runs that this plan is about to use, and that are damaged: {run: why, in a sentence}.

    Used are evaluations and analyses, which the results are read from, and every run that a step still to do
    starts from, directly or through others.
    """
    found: dict[str, str] = {}
    used: set[str] = set()
    to_do = {step.name for step in plan.missing()}
    # Children first: a damaged run needs its own parents again.
    for name, step in reversed(plan.steps.items()):
        if name not in to_do and (step.parameters.step in ("evaluate", "analyse") or name in used):
            damage = run_folder.damage(step.folder)
            if damage is not None and not run_folder.is_locked(step.folder):
                found[name] = damage
        if name in to_do or name in found or name in used:
            used.update(step.parents)
    return found


def _main() -> int:
    """A step's process: executes the request given as JSON, and ends when its standard input does."""
    threading.Thread(target=_end_with_driver, daemon=True).start()
    # jsonschema checks IRIs with a grammar that takes two seconds to build, at import; it does without where
    # the package is not there, and no notebook holds an IRI.
    sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]
    try:
        execute_step(json.loads(sys.argv[1]))
    except StepFailed as failed:
        print(failed, flush=True)
        return 1
    return 0


def _end_with_driver() -> None:
    """Wait until the driver is gone, which closes standard input; then end the kernel and this process."""
    import psutil

    os.read(0, 1)
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    shutil.rmtree(_socket_folder(os.getpid()), ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(_main())

"""Execute the steps of a plan: one process a step, through papermill, here or on a SLURM cluster.

The same `execute_step` runs everywhere. A step is finished when its run is sealed, and only then: papermill marks all cells of a
killed kernel as completed and takes `sys.exit(0)` for success, so its notebook is a record to read, never a verdict. A step that
did not finish leaves its notebook with the error and `failure.json` with the cause in one sentence.

Here, the driver (`pftools run`) keeps one worker for every step at a time: a process that has loaded papermill once and forks
itself for each step. Whatever ends the driver closes the pipe to its workers, and with it everything that it started.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import select
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pftools import run_folder
from pftools.errors import PftoolsError, nearest
from pftools.files import write_json
from pftools.settings import HUB_TOKEN
from pftools.shipped import NOTEBOOKS

if TYPE_CHECKING:
    from pftools.study import Plan, PlannedStep

NOTEBOOK_OF = {
    "calibrate": "01_calibrate.ipynb",
    "prune": "02_prune.ipynb",
    "finetune": "03_finetune.ipynb",
    "evaluate": "04_evaluate.ipynb",
    "analyse": "05_analyse_weights.ipynb",
}
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|API_?KEY|CREDENTIAL", re.IGNORECASE)


@dataclass(frozen=True)
class Failure:
    """Why a step did not finish: its run, the cell (counted from 1; None outside a cell) and the cause in a sentence."""

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


# ---------------------------------------------------------------------------------------------------------------------
# One step


def request(step: PlannedStep, notebooks: str | Path | None = None) -> dict[str, Any]:
    """Everything that another process needs to execute a step, as JSON."""
    notebook = Path(notebooks or NOTEBOOKS) / NOTEBOOK_OF[step.parameters.step]
    return {
        "notebook": str(notebook),
        "folder": str(step.folder),
        "parameters": step.parameters.model_dump(mode="json"),
        "resumes": step.parameters.resumes,
        "parents": [str(step.folder.parent / name) for name in step.parents],
    }


def execute_step(step: dict[str, Any]) -> None:
    """Execute one step in this process, unless it is finished; a finished run that is damaged is made again.

    Args:
        step: what `request` made.

    Raises:
        StepFailed: the step did not finish; `failure.json` in its folder says why.
    """
    folder = Path(step["folder"])
    with run_folder.driving(folder):
        if run_folder.is_finished(folder) and (damage := run_folder.damage(folder)) is not None:
            print(f"Again: {damage}", flush=True)
            run_folder.reopen(folder)
        _keep_notebook(folder)  # of an attempt whose driver was killed after its kernel had sealed
        run_folder.tidy(folder)
        if run_folder.is_finished(folder):
            return
        run_folder.clear(folder, keep_work=step.get("resumes", False))
        folder.mkdir(parents=True, exist_ok=True)
        failure = _execute_notebook(step, folder)
        with suppress(OSError):  # on a full disk the notebook is lost, and the cause is not
            _keep_notebook(folder)
        if run_folder.is_finished(folder):
            return
        run_folder.clear(
            folder, keep_work=step.get("resumes", False), keep=("notebook.ipynb",)
        )  # what it left may be what fills a disk
        failure = failure or Failure(
            folder.name, None, "the notebook ended without sealing its run: does it call run.seal?"
        )
        with suppress(OSError):
            write_json(folder / "failure.json", asdict(failure))
        raise StepFailed(failure)


def tidy_finished(plan: Plan) -> None:
    """Put in order what killed processes left beside finished runs: a notebook, a folder of work, a note."""
    for step in plan.steps.values():
        if run_folder.is_finished(step.folder) and run_folder.needs_tidying(step.folder):
            with run_folder.driving(step.folder):
                if run_folder.is_whole(step.folder):
                    _keep_notebook(step.folder)
                    run_folder.tidy(step.folder)


def kernel_options() -> dict[str, Any]:
    """How papermill starts a kernel here: it talks over sockets in the file system, with names of its own. A TCP port is chosen before the
    kernel takes it, and of hundreds of kernels one would find its port taken."""
    from traitlets.config import Config

    sockets = str(Path(tempfile.gettempdir()) / f"pftools-{secrets.token_hex(8)}")
    return {
        "kernel_name": "python3",
        "progress_bar": False,
        "config": Config({"KernelManager": {"transport": "ipc", "ip": sockets}}),
    }


def _execute_notebook(step: dict[str, Any], folder: Path) -> Failure | None:
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    draft = run_folder.draft_path(folder)
    try:
        papermill.execute_notebook(
            step["notebook"],
            str(draft),
            step["parameters"],
            cwd=os.getcwd(),
            start_timeout=300,
            **kernel_options(),
        )
    except PapermillExecutionError as error:
        cause = error.evalue if error.ename == "PftoolsError" else f"{error.ename}: {error.evalue}"
        return Failure(folder.name, error.cell_index + 1, redact(cause.strip() or error.ename))
    except (
        Exception
    ) as error:  # a damaged notebook, a full disk: whatever it is, the step has a cause on record
        if (
            type(error).__name__ == "UncompletedJobError"
        ):  # what submitit raises in a job that may not be queued again
            cause = "the time limit of its job was reached: give it more with --slurm time=MINUTES."
            return Failure(folder.name, _cell_at_work(draft), cause)
        if isinstance(error, DeadKernelError) or "Kernel died" in str(error):
            cause = "the kernel died; most often the system ended it for lack of memory (try a smaller batch_size), or it was cancelled."
            return Failure(folder.name, _cell_at_work(draft), cause)
        return Failure(folder.name, None, redact(f"{type(error).__name__}: {error}"))
    return None


def _keep_notebook(folder: Path) -> None:
    """Move the executed notebook into its run, without secrets, and into the record of a finished run."""
    draft, notebook = run_folder.draft_path(folder), folder / "notebook.ipynb"
    if not draft.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        text = draft.read_text(encoding="utf-8")
        json.loads(text)
    except ValueError:  # cut short while papermill wrote it
        draft.unlink()
        return
    if (clean := redact(text)) != text:
        draft.write_text(clean, encoding="utf-8")
    os.replace(draft, notebook)
    if run_folder.is_finished(folder):
        run_folder.add_output(folder, "notebook.ipynb")


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


def redact(text: str) -> str:
    """The text with the values of secret environment variables, and whatever looks like a token of the hub, blotted out."""
    secrets = [value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= 8]
    for secret in secrets:
        for form in (secret, json.dumps(secret)[1:-1]):
            text = text.replace(form, "[redacted]")
    return HUB_TOKEN.sub("[redacted]", text)


# ---------------------------------------------------------------------------------------------------------------------
# A plan


def run_plan(
    plan: Plan,
    *,
    executor: str = "local",
    jobs: int = 1,
    progress: bool = True,
    notebooks: str | Path | None = None,
    wait: bool = True,
    slurm: dict[str, str] | None = None,
) -> list[Failure]:
    """Execute all missing steps of a plan.

    Args:
        executor: `local` (processes of this machine) or `slurm` (jobs of a cluster).
        jobs: local: how many steps at a time; GPUs are handed out one a step.
        wait: slurm: stay until the last job has ended; otherwise leave after submitting.
        slurm: options of sbatch for every job, such as {"partition": "gpu", "gres": "gpu:1", "time": "120"}.

    Returns:
        The failures; empty when every step is finished. What depends on a failed step is not started.
    """
    if jobs < 1:
        raise PftoolsError(f"jobs is {jobs}: at least 1 step has to run at a time.")
    if executor == "local":
        return _run_local(plan, jobs, progress, notebooks)
    if executor == "slurm":
        from pftools import slurm as cluster

        return cluster.run_plan(plan, progress=progress, notebooks=notebooks, wait=wait, options=slurm or {})
    raise PftoolsError(f"unknown executor {executor!r}: {nearest(executor, ['local', 'slurm'])}.")


def unusable(plan: Plan) -> dict[str, str]:
    """Finished runs that this plan is about to use, and that are damaged: {run: why, in a sentence}.

    Used are evaluations and analyses, which the results are read from, and every run that a step which is still to do goes back to.
    """
    found: dict[str, str] = {}
    used: set[str] = set()
    to_do = {step.name for step in plan.missing()}
    for name, step in reversed(
        plan.steps.items()
    ):  # children first: a damaged run needs its own parents again
        if name not in to_do and (step.parameters.step in ("evaluate", "analyse") or name in used):
            damage = run_folder.damage(step.folder)
            if damage is not None and not run_folder.is_locked(step.folder):
                found[name] = damage
        if name in to_do or name in found or name in used:
            used.update(step.parents)
    return found


def _run_local(plan: Plan, jobs: int, progress: bool, notebooks: str | Path | None) -> list[Failure]:
    tidy_finished(plan)
    damaged = unusable(plan)
    for why in damaged.values():
        print(f"Again: {why}", file=sys.stderr)
    waiting = {
        name: step
        for name, step in plan.steps.items()
        if name in damaged or not run_folder.is_finished(step.folder)
    }
    unfinished = set(waiting)
    failures: list[Failure] = []
    workers: list[_Worker] = []
    told: set[str] = set()
    with progress_bar(len(plan.steps), len(plan.steps) - len(waiting), progress) as show:
        try:
            while waiting or any(worker.step for worker in workers):
                idle = [worker for worker in workers if worker.step is None]
                for step in _ready(waiting, unfinished, limit=jobs - len(workers) + len(idle)):
                    if not idle:
                        workers.append(_Worker(len(workers), jobs))
                        idle = workers[-1:]
                    idle.pop().start(waiting.pop(step.name), notebooks)
                busy = [worker for worker in workers if worker.step]
                show([worker.step.label for worker in busy])
                if not busy:
                    open_steps = [step for step in waiting.values() if not unfinished & set(step.parents)]
                    if not open_steps:
                        break  # what is left depends on a failure
                    _tell_who_works(open_steps, told)
                ended = select.select([worker.answers for worker in busy], [], [], 1.0)[0]
                for worker in [worker for worker in busy if worker.answers in ended]:
                    name, failure = worker.step.name, worker.collect()
                    # A step that was killed right after it had sealed its run is finished.
                    if failure is None or run_folder.is_whole(plan.steps[name].folder):
                        unfinished.discard(name)
                        show([], advance=1)
                    else:
                        failures.append(failure)
        finally:
            for worker in workers:  # Ctrl-C, or an error here: leave no step behind
                worker.end()
    tidy_finished(
        plan
    )  # again: what a driver had left that was killed just before this one began was still locked then
    return failures


def _tell_who_works(steps: list[PlannedStep], told: set[str]) -> None:
    """Nothing can be done here until another driver, or a notebook that is open by hand, is done: say so, once."""
    for step in steps:
        if step.name not in told and run_folder.is_locked(step.folder):
            print(f"Waiting: {run_folder.owner(step.folder)}, works on {step.folder}.", file=sys.stderr)
            told.add(step.name)


def _ready(waiting: dict[str, PlannedStep], unfinished: set[str], limit: int) -> list[PlannedStep]:
    """Steps whose parents are finished and that no other driver works on, in the plan's order."""
    found: list[PlannedStep] = []
    for step in waiting.values():
        if len(found) >= limit:
            break
        if not unfinished & set(step.parents) and not run_folder.is_locked(step.folder):
            found.append(step)
    return found


class _Worker:
    """A process that executes one step after the other, each in a fork of itself.

    step: the step at work; None while it waits for one. answers: becomes readable when the step has ended.
    """

    def __init__(self, number: int, jobs: int) -> None:
        environment = dict(os.environ)
        self._place = (number, jobs)
        gpus = _gpus()
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
        if jobs > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pftools.executors"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
            start_new_session=True,  # Ctrl-C is for the driver, which then ends its workers
        )
        self.answers = self._process.stdout
        self.step: PlannedStep | None = None

    def start(self, step: PlannedStep, notebooks: str | Path | None) -> None:
        self.step = step
        with suppress(BrokenPipeError):  # a worker that was killed is noticed in `collect`
            self._process.stdin.write(
                json.dumps({"step": request(step, notebooks), "log": str(run_folder.log_path(step.folder))})
                + "\n"
            )
            self._process.stdin.flush()

    def collect(self) -> Failure | None:
        """How the step ended: None where it is finished."""
        step, self.step = self.step, None
        line = self.answers.readline()
        if not line:
            self.end()
            self.__init__(*self._place)
            return read_failure(step.folder, "its process was killed")
        answer = json.loads(line)
        if answer["code"] == 0:
            return None
        if answer["failure"]:
            return Failure(**answer["failure"])
        return read_failure(
            step.folder, f"its process ended with exit code {answer['code']} before it could say why"
        )

    def end(self) -> None:
        """End the worker, and the step that it is at, kernel included."""
        with suppress(OSError):
            self._process.stdin.close()
        self._process.wait()
        self.answers.close()


def _work() -> None:
    """What a worker does until its driver closes the pipe: fork, and let the fork execute the step that a line asks for."""
    # jsonschema can check a format of web addresses that nothing here has, with a grammar that takes most of a second to load.
    sys.modules.setdefault("rfc3987_syntax", None)
    sys.modules.setdefault(
        "pyarrow", None
    )  # papermill would load it, to reach a file system of Hadoop; and a small process forks sooner
    _warm_up()

    for line in sys.stdin:
        order = json.loads(line)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            code = _execute_in_fork(order, writing)
            os._exit(code)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            failure = pipe.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        try:
            print(json.dumps({"code": code, "failure": json.loads(failure) if failure else None}), flush=True)
        except BrokenPipeError:  # the driver was killed, and so there is nobody to tell
            os._exit(1)


def _warm_up() -> None:
    """Once, here, what every fork would do anew: load what executes a notebook, compile the schema of notebooks, look up the kernel."""
    import nbformat
    import papermill  # noqa: F401
    import psutil  # noqa: F401
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    nbformat.validate(nbformat.v4.new_notebook())
    with suppress(NoSuchKernel):  # the step says so
        KernelSpecManager().get_kernel_spec("python3")


def _execute_in_fork(order: dict[str, Any], answer: int) -> int:
    threading.Thread(target=_end_with_driver, daemon=True).start()
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        execute_step(order["step"])
    except BaseException as error:
        traceback.print_exc()
        failure = getattr(error, "failure", None) or Failure(
            Path(order["step"]["folder"]).name, None, f"{type(error).__name__}: {error}"
        )
        os.write(
            answer, json.dumps(asdict(failure)).encode()
        )  # also where the disk is too full for failure.json
        return 1
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
    return 0


def _end_with_driver() -> None:
    """Wait until the driver is gone, however it went: then its end of the pipe is closed. End the kernel, then this process."""
    import psutil

    os.read(0, 1)
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    os._exit(1)


def read_failure(folder: Path, otherwise: str = "its process ended before it could say why") -> Failure:
    """What `failure.json` says, or what can be said of a step that was killed before it could write one."""
    try:
        return Failure(**json.loads((folder / "failure.json").read_text()))
    except (OSError, ValueError, TypeError):
        return Failure(folder.name, None, f"{otherwise}{_last_words(folder)}.")


def _last_words(folder: Path) -> str:
    log = run_folder.log_path(folder)
    with suppress(OSError):
        lines = log.read_text(errors="replace").strip().splitlines()
        if lines:
            return f"; its last words, in {log}: {redact(lines[-1])[:300]!r}"
    return ""


def _gpus() -> list[str]:
    """The GPUs to hand out, as CUDA names them; empty on a machine without."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip()]
    return sorted(path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))


@contextmanager
def progress_bar(total: int, done: int, visible: bool) -> Iterator[Callable[..., None]]:
    """A bar of steps; yields `show(labels at work, advance=0)`."""
    if not visible:
        yield lambda labels, advance=0: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("steps"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns) as bars:
        task = bars.add_task("", total=total, completed=done)

        def show(labels: list[str], advance: int = 0) -> None:
            bars.update(task, advance=advance, description=" · ".join(labels))

        yield show


if __name__ == "__main__":
    _work()

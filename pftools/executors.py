"""Execute the steps of a plan: one process a step, through papermill, here or on a SLURM cluster.

The same `execute_step` runs everywhere. A step is finished when its run is sealed, and only then: papermill marks all cells of a
killed kernel as completed and takes `sys.exit(0)` for success, so its notebook is a record to read, never a verdict. A step that
did not finish leaves its notebook with the error and `failure.json` with the cause in one sentence.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pftools import runs
from pftools.errors import PftoolsError, nearest

if TYPE_CHECKING:
    from pftools.study import Plan, PlannedStep

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
_NOTEBOOK_OF = {
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


# ---------------------------------------------------------------------------------------------------------------------
# One step


def request(step: PlannedStep, notebooks: str | Path | None = None) -> dict[str, Any]:
    """Everything that another process needs to execute a step, as JSON."""
    notebook = Path(notebooks or NOTEBOOKS) / _NOTEBOOK_OF[step.parameters.step]
    return {"notebook": str(notebook), "folder": str(step.folder), "parameters": step.parameters.model_dump(mode="json")}


def execute_step(step: dict[str, Any]) -> None:
    """Execute one step in this process, unless it is finished.

    Args:
        step: what `request` made.

    Raises:
        PftoolsError: the step did not finish; `failure.json` in its folder says why.
    """
    folder = Path(step["folder"])
    with runs.driving(folder):
        if runs.is_finished(folder):
            return
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "failure.json").unlink(missing_ok=True)
        failure = _execute_notebook(step, folder)
        _redact(folder / "notebook.ipynb")
        if runs.is_finished(folder):
            runs.add_output(folder, "notebook.ipynb")
            return
        failure = failure or Failure(folder.name, None, "the notebook ended without sealing its run: does it call run.seal?")
        runs.write_json(folder / "failure.json", asdict(failure))
        raise PftoolsError(f"{failure.run} failed: {failure.cause}")


def _execute_notebook(step: dict[str, Any], folder: Path) -> Failure | None:
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    try:
        papermill.execute_notebook(
            step["notebook"], str(folder / "notebook.ipynb"), step["parameters"],
            kernel_name="python3", progress_bar=False, cwd=os.getcwd(),
        )  # fmt: skip
    except PapermillExecutionError as error:
        cause = error.evalue if error.ename == "PftoolsError" else f"{error.ename}: {error.evalue}"
        return Failure(folder.name, error.cell_index + 1, cause.strip() or error.ename)
    except DeadKernelError:
        return Failure(
            folder.name, _cell_at_work(folder / "notebook.ipynb"),
            "the kernel died; most often the system ended it for lack of memory: try a smaller batch_size.",
        )  # fmt: skip
    except Exception as error:  # a damaged notebook, a full disk: whatever it is, the step has a cause on record
        return Failure(folder.name, None, f"{type(error).__name__}: {error}")
    return None


def _cell_at_work(notebook: Path) -> int | None:
    """The last cell that has begun: where a killed kernel was, whatever papermill wrote about later cells."""
    try:
        cells = json.loads(notebook.read_text())["cells"]
    except (OSError, ValueError, KeyError):
        return None
    begun = [number for number, cell in enumerate(cells, 1) if cell.get("execution_count") or cell.get("outputs")]
    return begun[-1] if begun else None


def _redact(notebook: Path) -> None:
    """Blot out the values of secret environment variables, should a cell have printed one."""
    if not notebook.exists():
        return
    secrets = [value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= 8]
    text = notebook.read_text(encoding="utf-8")
    clean = text
    for secret in secrets:
        clean = clean.replace(json.dumps(secret)[1:-1], "[redacted]")
    if clean != text:
        notebook.write_text(clean, encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# A plan


def run_plan(
    plan: Plan, *, executor: str = "local", jobs: int = 1, progress: bool = True, notebooks: str | Path | None = None,
    wait: bool = True, slurm: dict[str, str] | None = None,
) -> list[Failure]:  # fmt: skip
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


def _run_local(plan: Plan, jobs: int, progress: bool, notebooks: str | Path | None) -> list[Failure]:
    waiting = {step.name: step for step in plan.missing()}
    unfinished = set(waiting)
    running: dict[str, tuple[subprocess.Popen[bytes], str | None]] = {}
    gpus = _gpus()
    failures: list[Failure] = []
    with _progress(len(plan.steps), len(plan.steps) - len(waiting), progress) as show:
        try:
            while waiting or running:
                for name in [name for name, step in waiting.items() if not unfinished & set(step.parents)]:
                    if len(running) < jobs:
                        gpu = gpus.pop(0) if gpus else None
                        running[name] = (_spawn(waiting.pop(name), notebooks, jobs, gpu), gpu)
                show([plan.steps[name].label for name in running])
                for name, (process, gpu) in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[name]
                    gpus += [gpu] if gpu is not None else []
                    if runs.is_finished(plan.steps[name].folder):
                        unfinished.discard(name)
                        show([], advance=1)
                    else:
                        failures.append(read_failure(plan.steps[name].folder, process.returncode))
                if not running and all(unfinished & set(step.parents) for step in waiting.values()):
                    break  # what is left depends on a failure
                time.sleep(0.05)
        finally:
            for process, _ in running.values():  # Ctrl-C, or an error here: leave no step behind
                process.terminate()
            for process, _ in running.values():
                process.wait()
    return failures


def _spawn(step: PlannedStep, notebooks: str | Path | None, jobs: int, gpu: str | None) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    log = step.folder.parent / ".logs" / f"{step.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        command = [sys.executable, "-m", "pftools.executors", json.dumps(request(step, notebooks))]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment)


def read_failure(folder: Path, returncode: int | None = None) -> Failure:
    """What `failure.json` says, or what can be said of a step that was killed before it could write one."""
    try:
        return Failure(**json.loads((folder / "failure.json").read_text()))
    except (OSError, ValueError, TypeError):
        log = folder.parent / ".logs" / f"{folder.name}.log"
        code = f" with exit code {returncode}" if returncode is not None else ""
        cause = f"its process ended{code} before it could say why; what it printed is in {log}."
        return Failure(folder.name, None, cause)


def _gpus() -> list[str]:
    """The GPUs to hand out, as CUDA names them; empty on a machine without."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip()]
    return sorted(path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))


@contextmanager
def _progress(total: int, done: int, visible: bool) -> Iterator[Callable[..., None]]:
    if not visible:
        with nullcontext():
            yield lambda labels, advance=0: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("steps"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns) as bars:
        task = bars.add_task("", total=total, completed=done)

        def show(labels: list[str], advance: int = 0) -> None:
            bars.update(task, advance=advance, description=" · ".join(labels))

        yield show


if __name__ == "__main__":
    try:
        execute_step(json.loads(sys.argv[1]))
    except PftoolsError as error:
        sys.exit(str(error))

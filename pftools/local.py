"""Execute the steps of a plan on this machine: a process a step, several at a time.

Whatever ends the driver closes the standard input of the steps' processes, and each ends its kernel and
itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pftools import run_folder
from pftools.errors import PftoolsError
from pftools.progress import progress_of
from pftools.steps import Failure, how_far, read_failure, request, sweep_sockets, unusable

if TYPE_CHECKING:
    from pftools.study import Plan, PlannedStep

_POLL_SECONDS = 0.05


def run_plan(
    plan: Plan, *, jobs: int = 1, progress: bool = True, notebooks: str | Path | None = None
) -> list[Failure]:
    """Execute all missing steps of a plan.

    Args:
        jobs: how many steps at a time; GPUs are handed out one a step.
        notebooks: the folder of step notebooks; None: those of pftools.

    Returns:
        The failures; empty when every step is finished. What depends on a failed step is not started.
    """
    if jobs < 1:
        raise PftoolsError(f"jobs is {jobs}: at least 1 step has to run at a time.")
    again = unusable(plan) | plan.outdated()
    for why in again.values():
        print(f"Again: {why}", file=sys.stderr)
    steps = plan.steps.items()
    waiting = {name: s for name, s in steps if name in again or not run_folder.is_finished(s.folder)}
    unfinished, waited_for = set(waiting), set[str]()
    failures: list[Failure] = []
    processes: list[_StepProcess] = []
    with progress_of(plan, len(waiting), visible=progress, jobs=jobs) as told:
        try:
            while waiting or processes:
                for step in _ready(waiting, unfinished, jobs - len(processes)):
                    processes.append(_begin(waiting.pop(step.name), notebooks, processes, jobs))
                told.at_work([process.words() for process in processes])
                if not processes:
                    open_steps = [step for step in waiting.values() if not unfinished & set(step.parents)]
                    if not open_steps:
                        break  # what is left depends on a failure
                    _tell_who_works(open_steps, waited_for)
                time.sleep(_POLL_SECONDS if processes else 1.0)
                for process in [process for process in processes if process.has_ended()]:
                    processes.remove(process)
                    if (failure := process.failure()) is not None:
                        failures.append(failure)
                        told.failed(str(failure))
                    else:
                        unfinished.discard(process.step.name)
                        told.finished(process.step)
        finally:  # also Ctrl-C, or an error here: leave no step behind
            for process in processes:
                process.end()
    for step in plan.steps.values():
        run_folder.sweep(step.folder)
    sweep_sockets()
    return failures


def _ready(waiting: dict[str, PlannedStep], unfinished: set[str], limit: int) -> list[PlannedStep]:
    """Up to ``limit`` steps, in the plan's order, that can begin: parents finished, and nobody at work."""
    found: list[PlannedStep] = []
    for step in waiting.values():
        if len(found) >= limit:
            break
        if not unfinished & set(step.parents) and not run_folder.is_locked(step.folder):
            found.append(step)
    return found


def _tell_who_works(steps: list[PlannedStep], told: set[str]) -> None:
    """Nothing can be done here until another driver, or a notebook open by hand, is done: say so, once."""
    for step in steps:
        if step.name not in told and run_folder.is_locked(step.folder):
            print(f"Waiting: {run_folder.owner(step.folder)}, works on {step.folder}.", file=sys.stderr)
            told.add(step.name)


@dataclass
class _StepProcess:
    """The process of a step at work. place: which of the steps at a time it is, for its GPU."""

    step: PlannedStep
    place: int
    process: subprocess.Popen[bytes]
    _told: tuple[float, str] = (0.0, "")

    def words(self) -> str:
        """What the step does, and how far it is; looked up once a second."""
        if time.monotonic() - self._told[0] >= 1:
            self._told = (time.monotonic(), how_far(self.step.folder))
        return f"{self.step.label}: {self._told[1]}" if self._told[1] else self.step.label

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def failure(self) -> Failure | None:
        """How the step ended: None where it is finished, also if it was killed right after that."""
        self.end()
        if run_folder.is_whole(self.step.folder) and self.step.outdated() is None:
            return None
        code = self.process.returncode
        how = "was killed" if code < 0 else f"ended with exit code {code} before it could say why"
        return read_failure(self.step.folder, f"its process {how}")

    def end(self) -> None:
        """End the process, kernel included, and wait until it is gone."""
        if self.process.stdin:
            with suppress(OSError):
                self.process.stdin.close()
        self.process.wait()


def _begin(
    step: PlannedStep, notebooks: str | Path | None, others: list[_StepProcess], jobs: int
) -> _StepProcess:
    place = min(set(range(jobs)) - {other.place for other in others})
    environment = dict(os.environ)
    if gpus := _gpus():
        environment["CUDA_VISIBLE_DEVICES"] = gpus[place % len(gpus)]
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    with run_folder.log_path(step.folder).open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "pftools.steps", json.dumps(request(step, notebooks))],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the driver, which then ends its steps
        )
    return _StepProcess(step, place, process)


def _gpus() -> list[str]:
    """The GPUs to hand out, as CUDA names them; empty on a machine without."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip()]
    return sorted(path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))

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
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from pftools import needs, run_folder
from pftools.errors import PftoolsError
from pftools.execute.progress import progress_of
from pftools.execute.steps import Failure, how_far, read_failure, request, sweep_sockets, unusable
from pftools.study import costs

if TYPE_CHECKING:
    from pftools.study import Plan, PlannedStep

_POLL_SECONDS = 0.05
_ENDLESS = 10**15  # bytes


def run_plan(
    plan: Plan, *, jobs: int = 1, progress: bool = True, notebooks: str | Path | None = None
) -> list[Failure]:
    """Execute all missing steps of a plan.

    Args:
        jobs: how many steps at a time, as far as they fit on the GPUs that are here.
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
    gpus = _Gpus.of(plan)
    unfinished, waited_for = set(waiting), set[str]()
    failures: list[Failure] = []
    processes: list[_StepProcess] = []
    with progress_of(plan, len(waiting), visible=progress, jobs=jobs) as told:
        try:
            while waiting or processes:
                for step in _ready(waiting, unfinished, jobs - len(processes)):
                    if (taken := gpus.take(step.name)) is not None:
                        processes.append(_begin(waiting.pop(step.name), notebooks, taken, jobs))
                told.at_work([process.words() for process in processes])
                if not processes:
                    open_steps = [step for step in waiting.values() if not unfinished & set(step.parents)]
                    if not open_steps:
                        break  # what is left depends on a failure
                    _tell_who_works(open_steps, waited_for)
                time.sleep(_POLL_SECONDS if processes else 1.0)
                for process in [process for process in processes if process.has_ended()]:
                    processes.remove(process)
                    gpus.give(process.step.name)
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
    """The process of a step at work."""

    step: PlannedStep
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


def _begin(step: PlannedStep, notebooks: str | Path | None, gpus: tuple[str, ...], jobs: int) -> _StepProcess:
    environment = dict(os.environ)
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    with run_folder.log_path(step.folder).open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "pftools.execute.steps", json.dumps(request(step, notebooks))],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the driver, which then ends its steps
        )
    return _StepProcess(step, process)


@dataclass
class _Gpus:
    """Which step has which GPUs.

    A step that is spread has several to itself; others share one for as long as what they need fits together.

    Attributes:
        room: {GPU, as CUDA names it: bytes that were free at the start}; 0: not known.
        needed: {step: (GPUs, bytes on each)}; 0 bytes: all of it.
    """

    room: dict[str, int]
    needed: dict[str, tuple[int, int]]
    taken: dict[str, dict[str, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: Plan) -> _Gpus:
        if not (names := _gpus()):
            return cls({}, {})
        here = needs.machine(plan.runs)
        if len(here.gpus) == len(names):
            return cls(dict(zip(names, here.gpus)), costs.gpus_of(plan, here))
        unknown = replace(here, gpus=(_ENDLESS,) * len(names))  # no nvidia-smi tells what they have
        needed = {step: (count, 0) for step, (count, _) in costs.gpus_of(plan, unknown).items()}
        return cls(dict.fromkeys(names, 0), needed)

    def take(self, step: str) -> tuple[str, ...] | None:
        """The GPUs of a step that begins, none on a machine without; None: it has to wait for some."""
        count, wanted = self.needed.get(step, (1, 0))
        if not self.room or not count:
            return ()
        alone = count > 1 or not wanted
        fitting = [
            name
            for name, free in self.room.items()
            if not self._others(name) or (not alone and wanted <= needs.ROOM * free - self._others(name))
        ]
        chosen = sorted(fitting, key=self._others)[:count]
        if len(chosen) < min(count, len(self.room)):
            return None
        self.taken[step] = {name: self.room[name] + 1 if alone else wanted for name in chosen}
        return tuple(chosen)

    def give(self, step: str) -> None:
        """What a step had is free again."""
        self.taken.pop(step, None)

    def _others(self, name: str) -> int:
        return sum(taken.get(name, 0) for taken in self.taken.values())


def _gpus() -> list[str]:
    """The GPUs to hand out, as CUDA names them; empty on a machine without."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        # As CUDA reads it: what comes after a number that is none is not there.
        named = takewhile(lambda name: not name.strip().startswith("-"), visible.split(","))
        return [name for name in named if name.strip()]
    return sorted(path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))

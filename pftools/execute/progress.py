"""How far a plan is: a bar in a terminal; elsewhere, such as in a log file, a line for each finished step.

Between these lines others tell what is at work, so that no log is silent for long.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pftools import run_folder
from pftools.study import durations

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

    from pftools.study.plan import Plan, PlannedStep


_QUIET = 10


class Progress:
    """Told what happens to the steps of a plan; this one says nothing."""

    def at_work(self, labels: list[str]) -> None:
        """These steps are under way."""

    def finished(self, step: PlannedStep) -> None:
        """A step has finished."""

    def failed(self, words: str) -> None:
        """A step has failed, in words."""


class _Bar(Progress):
    """A bar of steps, and below it a line for each that is under way."""

    def __init__(self, bars: RichProgress, lines: RichProgress, total: int, done: int) -> None:
        self._bars, self._task = bars, bars.add_task("", total=total, completed=done)
        self._lines = lines

    def at_work(self, labels: list[str]) -> None:
        for _ in range(len(self._lines.tasks), len(labels)):
            self._lines.add_task("")
        for task, label in zip(self._lines.tasks, [*labels, *[""] * len(self._lines.tasks)]):
            self._lines.update(task.id, description=label, visible=bool(label))

    def finished(self, step: PlannedStep) -> None:
        self._bars.update(self._task, advance=1)


class _Lines(Progress):
    """A line for each step that ends: when, what it found, and how many are left for how long."""

    def __init__(self, plan: Plan, jobs: int, quiet: float) -> None:
        self._plan, self._jobs, self._quiet = plan, jobs, quiet
        self._began, self._here = time.monotonic(), 0
        self._printed = self._began

    def at_work(self, labels: list[str]) -> None:
        if labels and time.monotonic() - self._printed >= self._quiet:
            self._print(" · ".join(labels))

    def finished(self, step: PlannedStep) -> None:
        self._here += 1
        record = run_folder.read_record(step.folder)
        left = len(self._plan.missing())
        count = f"[{len(self._plan.steps) - left}/{len(self._plan.steps)}]"
        kind, label = step.parameters.step, step.label
        done = label if label.startswith(kind) else f"{kind} {label}"
        found = ", ".join([f"{record['seconds']:.0f} s", *result_words(record["results"])])
        self._print(f"{count} {done}: {found}; {self._expectation(left)}")

    def failed(self, words: str) -> None:
        self._print(f"failed: {words}")

    def _expectation(self, left: int) -> str:
        if not left:
            return "none left, until the next stage is planned" if self._plan.open else "none left"
        seconds, unknown = durations.estimate_seconds(self._plan)
        if unknown:  # then what this call has done so far tells it
            seconds = (time.monotonic() - self._began) / self._here * left * self._jobs
        seconds /= self._jobs
        end = time.strftime("%a %H:%M", time.localtime(time.time() + seconds))
        return f"{left} left, about {in_minutes(seconds)}, until {end}"

    def _print(self, line: str) -> None:
        self._printed = time.monotonic()
        print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def in_minutes(seconds: float) -> str:
    """A length of time in words of the right size."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def result_words(results: dict[str, Any]) -> list[str]:
    """What a step found, in a few words each: perplexity, sparsity, tasks."""
    words = []
    if results.get("measured") is not None:
        words.append(f"sparsity {results['measured']:.1%}")
    for name, told in (("perplexity", "perplexity"), ("perplexity_after", "held-out perplexity")):
        if results.get(name) is not None:
            words.append(f"{told} {results[name]:.2f}")
    for task, score in (results.get("tasks") or {}).items():
        words.append(
            f"{task} {score['value']:.1%}" if score["value"] <= 1 else f"{task} {score['value']:.2f}"
        )
    return words


@contextmanager
def progress_of(
    plan: Plan, to_do: int, *, visible: bool, jobs: int = 1, quiet: float | None = None
) -> Iterator[Progress]:
    """Shows how far a plan is, for as long as the block lasts.

    Args:
        plan: what is executed.
        to_do: how many of its steps are to be done.
        visible: whether anything is shown.
        jobs: how many steps at a time, for the expected end.
        quiet: seconds after which a line tells what is at work, where there is no terminal; None: ten.
    """
    if not visible:
        yield Progress()
    elif not sys.stdout.isatty():
        yield _Lines(plan, jobs, quiet or _QUIET)
    else:
        from rich.console import Group
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        bars = Bars(TextColumn("steps"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        lines = Bars(TextColumn("  {task.description}", markup=False))
        with Live(Group(bars, lines)):
            yield _Bar(bars, lines, len(plan.steps), len(plan.steps) - to_do)

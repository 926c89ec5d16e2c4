"""What a plan is: every step that a study needs, once, after the steps that it starts from.

A step is known by the key of its run (`run_folder.run_key`), which is made of its parameters and its parents'
keys. So orderings that begin alike share their beginning, within a study and across studies, and a finished
step is never planned again. `stages.plan_study` makes the plan of a study.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pftools import inputs, run_folder, settings
from pftools.orderings import parse_ordering
from pftools.study.words import OrderingEntry, Study

if TYPE_CHECKING:
    import pandas as pd

StepState = Literal["finished", "running", "queued", "failed", "to do"]


@dataclass
class PlannedStep:
    """One step of a plan.

    Attributes:
        parameters: checked; they decide the run's key, and so its folder.
        parents: names of the runs (`step-key`) that it starts from.
        label: what it does, in a few words.
        stage: what it is for, in a study that is planned in stages: "trials", "3 seeds", "5 seeds".
        orderings: names of the orderings that need it.
    """

    parameters: settings.Step
    parents: tuple[str, ...]
    label: str
    stage: str = ""
    orderings: set[str] = field(default_factory=set)

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def folder(self) -> Path:
        return run_folder.folder_of(self.parameters)

    def outdated(self) -> str | None:
        """Why the finished run is not to be used, as a sentence; None: it is, or is not finished."""
        return run_folder.changed_input(self.folder, inputs.visible(self.parameters))

    def is_finished(self) -> bool:
        """Whether the run is finished, from what the step would read now."""
        return run_folder.is_finished(self.folder) and self.outdated() is None


@dataclass(frozen=True)
class Variant:
    """An ordering at one target sparsity, with a pruning method, a pattern and a merge: what has seeds, and a
    learning rate where that is tuned."""

    ordering: str
    asked: float
    method: str
    pattern: str
    merge: str

    def __str__(self) -> str:
        choices = [choice for choice in (self.pattern, self.merge) if choice not in ("unstructured", "auto")]
        told = ", ".join([self.method, *choices])
        return f"{self.ordering} at {self.asked:.0%} ({told})" if self.asked else self.ordering


@dataclass(frozen=True)
class PlannedRow:
    """One line of the result table: an ordering at one sparsity.

    Attributes:
        ordering: its name.
        asked: the target sparsity, from 0 up to 1.
        method: the pruning method.
        pattern: `unstructured` or N:M.
        merge: how adapters are merged.
        seed: the study's seed.
        finetune_tokens: tokens of all F's until here.
        n_finetunes: how many F's until here.
        model: the run folder of the model, or the base model's name.
        evaluation: the run folder of its evaluation.
        learning_rate: of its F's, where that was tuned; else None.
        target: the sparsity that its ordering ends at.
    """

    ordering: str
    asked: float
    method: str
    pattern: str
    merge: str
    seed: int
    finetune_tokens: int
    n_finetunes: int
    model: str
    evaluation: str
    learning_rate: float | None = None
    target: float = 0.0

    @property
    def variant(self) -> Variant:
        return Variant(self.ordering, self.target, self.method, self.pattern, self.merge)


@dataclass(frozen=True)
class PlannedTrial:
    """One training that is there to choose a learning rate by, judged on the validation split.

    seed: of its own. model, evaluation: run folders.
    """

    variant: Variant
    learning_rate: float
    seed: int
    model: str
    evaluation: str


@dataclass
class Plan:
    """The steps of a study by the name of their run, parents first.

    Attributes:
        study: what is planned.
        runs: the folder of run folders.
        steps: {run: step}.
        rows: the results, in the order of the study's file.
        unshared: how many steps there would be if nothing were shared.
        trials: what learning rates are chosen by; empty where they are not tuned.
        rates: {variant: its learning rate}, as far as the trials have told.
        open: what is not planned yet, and when it will be, in sentences. A plan is complete where this is
            empty.
    """

    study: Study
    runs: str
    steps: dict[str, PlannedStep] = field(default_factory=dict)
    rows: list[PlannedRow] = field(default_factory=list)
    unshared: int = 0
    trials: list[PlannedTrial] = field(default_factory=list)
    rates: dict[Variant, float] = field(default_factory=dict)
    open: list[str] = field(default_factory=list)

    def table(self) -> pd.DataFrame:
        """A row a step: stage, step, does, run, starts from, state, and how many orderings share it."""
        import pandas as pd

        outdated = self.outdated()
        return pd.DataFrame(
            {
                "stage": step.stage,
                "step": step.parameters.step,
                "does": step.label,
                "run": name,
                "starts from": ", ".join(step.parents),
                "state": "to do" if name in outdated else run_state(step.folder),
                "shared by": len(step.orderings),
            }
            for name, step in self.steps.items()
        )

    def missing(self) -> list[PlannedStep]:
        """The steps that are not finished, or finished from other inputs than are there now."""
        outdated = self.outdated()
        return [
            step
            for name, step in self.steps.items()
            if name in outdated or not run_folder.is_finished(step.folder)
        ]

    def outdated(self) -> dict[str, str]:
        """Finished runs that are made again: {run: why, as a sentence}.

        Their inputs were changed, or those of a run that they start from.
        """
        found: dict[str, str] = {}
        for name, step in self.steps.items():
            parents = [parent for parent in step.parents if parent in found]
            if not run_folder.is_finished(step.folder):
                continue
            if (why := step.outdated()) is not None:
                found[name] = why
            elif parents:
                found[name] = f"{step.folder} starts from {parents[0]}, which is made again."
        return found


def run_state(folder: Path) -> StepState:
    """The state of the step whose run is in ``folder``."""
    if run_folder.is_finished(folder):
        return "finished"
    if run_folder.is_locked(folder):
        return "running"
    return "to do" if run_folder.failure_of(folder) is None else "failed"


def variants(study: Study) -> list[Variant]:
    """Everything that a study crosses, each once, in the order of its file; seeds aside."""
    found = [
        Variant(parse_ordering(entry.ordering).name, sparsity, method, pattern, merge)
        for method in study.methods
        for pattern in study.patterns
        for merge in study.merges
        for entry in study.orderings
        for sparsity in _targets(study, entry, pattern)
    ]
    return list(dict.fromkeys(found))


def _targets(study: Study, entry: OrderingEntry, pattern: str) -> list[float]:
    if not parse_ordering(entry.ordering).n_prunes:
        return [0.0]
    fixed = settings.pattern_sparsity(pattern)
    return (entry.sparsities or study.sparsities) if fixed is None else [fixed]

"""What a plan is: every step that a study needs, once, after the steps that it starts from.

A step is known by the key of its run (`run_folder.run_key`), which is made of its parameters and its parents'
keys. So orderings that begin alike share their beginning, within a study and across studies, and a finished
step is never planned again. `stages.plan_study` makes the plan of a study.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pftools import inputs, run_folder, settings
from pftools.orderings import MOST_STEPS, OrderingStep, parse_ordering
from pftools.study.file import OrderingEntry, Study

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


def add_training(
    plan: Plan, variant: Variant, seed: int, *, learning_rate: float | None = None, stage: str = ""
) -> None:
    """Add the steps of one training to a plan, with an evaluation wherever its ordering reports."""
    chain = _Chain(plan, variant, seed, learning_rate, stage)
    plan.rows += chain.results()


def add_trial(plan: Plan, variant: Variant, seed: int, learning_rate: float) -> None:
    """Add the steps of a trial to a plan: one training, evaluated on the validation split."""
    chain = _Chain(plan, variant, seed, learning_rate, "trials")
    for _ in chain.reports():
        pass
    assert plan.study.tune is not None
    evaluation = chain.evaluate(split="validation", n_blocks=plan.study.tune.n_blocks, tasks=[])
    plan.trials.append(PlannedTrial(variant, learning_rate, seed, chain.model, evaluation))


class _Chain:
    """Walks one ordering and adds its steps to the plan."""

    def __init__(
        self, plan: Plan, variant: Variant, seed: int, learning_rate: float | None, stage: str
    ) -> None:
        self.plan, self.study, self.variant, self.seed = plan, plan.study, variant, seed
        self.ordering = parse_ordering(variant.ordering)
        self.method, self.pattern, self.merge = variant.method, variant.pattern, variant.merge
        self.learning_rate, self.stage = learning_rate, stage
        self.model, self.tokens, self.finetunes = plan.study.model, 0, 0

    def reports(self) -> Iterator[float]:
        """Add the steps one after the other; stops with the sparsity wherever the ordering reports."""
        if not self.ordering.letters:
            yield 0.0
        for step in self.ordering.steps(self.variant.asked, schedule=self.study.schedule):
            self.prune(step) if step.kind == "P" else self.finetune(step)
            if step.reported:
                yield step.sparsity

    def results(self) -> Iterator[PlannedRow]:
        for sparsity in self.reports():
            evaluation = self.evaluate()
            if self.study.analyse:
                self._add(settings.Analyse, f"analyse {Path(self.model).name}", model=self.model)
            yield PlannedRow(
                ordering=self.ordering.name,
                asked=sparsity,
                method=self.method,
                pattern=self.pattern,
                merge=self.merge,
                seed=self.seed,
                finetune_tokens=self.tokens,
                n_finetunes=self.finetunes,
                model=self.model,
                evaluation=evaluation,
                learning_rate=self.learning_rate,
                target=self.variant.asked,
            )

    def evaluate(self, **planned: Any) -> str:
        """Plan the evaluation of the model as it is now; returns its run folder."""
        label = f"evaluate {Path(self.model).name}"
        return self._add(settings.Evaluate, label, model=self.model, seed=self.seed, **planned)

    def prune(self, step: OrderingStep) -> None:
        # Dense inputs and OWL read statistics that 01 keeps, which have to be of the model that is pruned.
        asked = self.study.prune
        needs_statistics = asked.get("inputs") == "dense" or asked.get("allocation") == "owl"
        calibration = self._add(
            settings.Calibrate,
            "calibration blocks",
            model=self.model if needs_statistics else self.study.model,
            seed=self.seed,
        )
        self.model = self._add(
            settings.Prune,
            f"{self.method} {step.sparsity:.0%}" + (f" {self.pattern}" if ":" in self.pattern else ""),
            model=self.model,
            calibration=calibration,
            method=self.method,
            sparsity=step.sparsity,
            pattern=self.pattern,
            seed=self.seed,
        )

    def finetune(self, step: OrderingStep) -> None:
        share = self.study.tokens
        if self.study.budget == "total":
            share = self.study.shares(self.ordering.n_finetunes)[step.number - 1]
        tuned = {} if self.learning_rate is None else {"learning_rate": self.learning_rate}
        rate = f", rate {self.learning_rate:g}" if tuned else ""
        self.model = self._add(
            settings.Finetune,
            f"F{step.number}, {share:,} tokens{rate}",
            **tuned,
            model=self.model,
            tokens=share,
            merge=self._merge(step),
            # The k-th F of a chain has seed k, and chains of different seeds never meet.
            seed=MOST_STEPS * self.seed + step.number,
        )
        self.tokens += share
        self.finetunes += 1

    def _merge(self, step: OrderingStep) -> str:
        """The merge as the step is told it: ways that give the same model share one run.

        A model without zeros has none to keep, one with zeros keeps them unless the merge is dense, and HiRA
        keeps them whatever the merge is.
        """
        is_hira = self.study.finetune.get("adapter") == "hira"
        # With a preset, auto may stand for another way.
        is_auto = self.merge == "masked" and not self.study.finetune.get("preset")
        return "auto" if step.sparsity == 0 or is_hira or is_auto else self.merge

    def _add(self, kind: type[settings.Step], label: str, **planned: Any) -> str:
        """Add a step, unless the plan has it; returns its run folder."""
        parameters = self.study.parameters(kind, **planned, runs=self.plan.runs)
        references = [Path(getattr(parameters, name)).name for name in parameters.parents]
        parents = tuple(name for name in references if name in self.plan.steps)
        step = PlannedStep(parameters, parents, label, self.stage)
        step = self.plan.steps.setdefault(step.name, step)
        step.orderings.add(self.ordering.name)
        self.plan.unshared += 1
        return str(step.folder)

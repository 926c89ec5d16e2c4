"""The plan of a study: every step that it needs, once, after the steps that it starts from.

A step is known by the key of its run (`run_folder.run_key`), which is made of its parameters and its parents'
keys. So orderings that begin alike share their beginning, within a study and across studies, and a finished
step is never planned again. Planning loads no torch, no model, and asks no network.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pftools import run_folder, settings
from pftools.errors import PftoolsError
from pftools.orderings import MOST_STEPS, Ordering, OrderingStep, parse_ordering
from pftools.study_file import OrderingEntry, Study

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
        orderings: names of the orderings that need it.
    """

    parameters: settings.Step
    parents: tuple[str, ...]
    label: str
    orderings: set[str] = field(default_factory=set)

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def folder(self) -> Path:
        return run_folder.folder_of(self.parameters)


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


@dataclass
class Plan:
    """The steps of a study by the name of their run, parents first.

    Attributes:
        study: what is planned.
        runs: the folder of run folders.
        steps: {run: step}.
        rows: the results, in the order of the study's file.
        unshared: how many steps there would be if nothing were shared.
    """

    study: Study
    runs: str
    steps: dict[str, PlannedStep] = field(default_factory=dict)
    rows: list[PlannedRow] = field(default_factory=list)
    unshared: int = 0

    def table(self) -> pd.DataFrame:
        """A row a step: step, does, run, starts from, state, and how many orderings share it."""
        import pandas as pd

        return pd.DataFrame(
            {
                "step": step.parameters.step,
                "does": step.label,
                "run": name,
                "starts from": ", ".join(step.parents),
                "state": run_state(step.folder),
                "shared by": len(step.orderings),
            }
            for name, step in self.steps.items()
        )

    def missing(self) -> list[PlannedStep]:
        """The steps that are not finished."""
        return [step for step in self.steps.values() if not run_folder.is_finished(step.folder)]


def run_state(folder: Path) -> StepState:
    """The state of the step whose run is in ``folder``."""
    if run_folder.is_finished(folder):
        return "finished"
    if run_folder.is_locked(folder):
        return "running"
    return "to do" if run_folder.failure_of(folder) is None else "failed"


def plan_study(study: Study, *, runs: str | Path = "runs") -> Plan:
    """All steps that a study needs.

    Args:
        study: what `study_file.load_study` read.
        runs: the folder of run folders; it need not be there yet.

    Raises:
        PftoolsError: ``runs`` is a file, or lies in one.
    """
    plan = Plan(study, str(_folder(runs)))
    for seed in study.seeds:
        for method in study.methods:
            for pattern in study.patterns:
                for merge in study.merges:
                    for entry in study.orderings:
                        _plan_ordering(plan, entry, method, pattern, merge, seed)
    plan.rows = list(dict.fromkeys(plan.rows))  # a value that the file repeats is one result
    return plan


def _folder(runs: str | Path) -> Path:
    path = Path(runs).expanduser()
    blocking = next((part for part in (path, *path.parents) if part.exists()), path)
    if blocking.is_file():
        raise PftoolsError(f"--runs is {path}, and {blocking} is a file: give a folder.")
    return path


def _plan_ordering(
    plan: Plan, entry: OrderingEntry, method: str, pattern: str, merge: str, seed: int
) -> None:
    ordering = parse_ordering(entry.ordering)
    for sparsity in _targets(plan.study, entry, ordering, pattern):
        chain = _Chain(plan, ordering, method, pattern, merge, seed)
        if not ordering.letters:
            chain.report(0.0)
        for step in ordering.steps(sparsity, schedule=plan.study.schedule):
            chain.prune(step) if step.kind == "P" else chain.finetune(step)
            if step.reported:
                chain.report(step.sparsity)


def _targets(study: Study, entry: OrderingEntry, ordering: Ordering, pattern: str) -> list[float]:
    if not ordering.n_prunes:
        return [0.0]
    fixed = settings.pattern_sparsity(pattern)
    return (entry.sparsities or study.sparsities) if fixed is None else [fixed]


class _Chain:
    """Walks one ordering and adds its steps to the plan."""

    def __init__(
        self, plan: Plan, ordering: Ordering, method: str, pattern: str, merge: str, seed: int
    ) -> None:
        self.plan, self.study, self.ordering = plan, plan.study, ordering
        self.method, self.pattern, self.merge, self.seed = method, pattern, merge, seed
        self.model, self.tokens, self.finetunes = plan.study.model, 0, 0

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
        self.model = self._add(
            settings.Finetune,
            f"F{step.number}, {share:,} tokens",
            model=self.model,
            tokens=share,
            # A model without zeros has none to keep, so all merges share this step.
            merge="auto" if step.sparsity == 0 else self.merge,
            # The k-th F of a chain has seed k, and chains of different seeds never meet.
            seed=MOST_STEPS * self.seed + step.number,
        )
        self.tokens += share
        self.finetunes += 1

    def report(self, sparsity: float) -> None:
        """Plan the evaluation of the model as it is now, and the row that it fills."""
        name = Path(self.model).name
        evaluation = self._add(settings.Evaluate, f"evaluate {name}", model=self.model, seed=self.seed)
        if self.study.analyse:
            self._add(settings.Analyse, f"analyse {name}", model=self.model)
        self.plan.rows.append(
            PlannedRow(
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
            )
        )

    def _add(self, kind: type[settings.Step], label: str, **planned: Any) -> str:
        """Add a step, unless the plan has it; returns its run folder."""
        parameters = self.study.parameters(kind, **planned, runs=self.plan.runs)
        references = [Path(getattr(parameters, name)).name for name in parameters.parents]
        parents = tuple(name for name in references if name in self.plan.steps)
        step = PlannedStep(parameters, parents, label)
        step = self.plan.steps.setdefault(step.name, step)
        step.orderings.add(self.ordering.name)
        self.plan.unshared += 1
        return str(step.folder)


def plan_layout(plan: Plan) -> pd.DataFrame:
    """Where `figures.plan_chart` draws every model of a plan, as a tree that grows to the right.

    A model is one column to the right of the model it starts from, and on its line or, where another child
    has taken that, on the next free one.

    Returns:
        A row a model: key, parent, depth, lane, kind (base, P or F), label, state, evaluated.
    """
    import pandas as pd

    models = _models(plan)
    evaluated = {Path(row.model).name for row in plan.rows}
    children: dict[str, list[str]] = {}
    for name, model in models.items():
        children.setdefault(model["parent"], []).append(name)
    rows, branches, lane = [], [(_BASE, 0, 0)], 0
    while branches:  # depth first, the first child on its parent's line
        name, depth, level = branches.pop()
        parent = models[name]["parent"]
        if parent and name != children[parent][0]:
            lane = level = lane + 1
        shown = (Path(plan.study.model).name if name == _BASE else name) in evaluated
        rows.append({"key": name, **models[name], "depth": depth, "lane": level, "evaluated": shown})
        branches += [(child, depth + 1, level) for child in reversed(children.get(name, []))]
    return pd.DataFrame(rows)


_BASE = "base"  # the key of the base model in a layout


def _models(plan: Plan) -> dict[str, dict[str, str]]:
    """{key: parent, kind, label and state} of the base model and of every model that the plan makes."""
    models = {_BASE: {"parent": "", "kind": _BASE, "label": _BASE, "state": _base_state(plan)}}
    for name, step in plan.steps.items():
        if step.parameters.step not in ("prune", "finetune"):
            continue
        parent = Path(step.parameters.model).name
        state = run_state(step.folder)
        models[name] = {
            "parent": parent if parent in plan.steps else _BASE,
            "kind": step.parameters.step[0].upper(),
            "label": step.label.partition(",")[0],
            "state": state if state in ("finished", "failed") else "to do",
        }
    return models


def _base_state(plan: Plan) -> StepState:
    """No step makes the base model: it counts as finished once a step that starts from it is."""
    used = [step for step in plan.steps.values() if step.parameters.model == plan.study.model]
    return "finished" if any(run_folder.is_finished(step.folder) for step in used) else "to do"

"""Add the steps of one training to a plan: its ordering, walked letter by letter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pftools import settings
from pftools.orderings import MOST_STEPS, OrderingStep, parse_ordering
from pftools.study.plan import Plan, PlannedRow, PlannedStep, PlannedTrial, Variant


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

"""An engine that trains nobody: it seals the steps of a plan with losses that a function makes up.

Everything around the training is real: plans, run folders, seals, stages.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from pftools import run_folder, study
from pftools.study.plan import Plan, PlannedStep, Variant


@dataclass
class StubEngine:
    """Seals what is missing of a plan.

    Attributes:
        loss: (variant, seed, learning rate or None) -> true mean loss of that training, in nats a token.
        right: the same for the share of questions that its model answers.
        text, noise: standard deviations of a block's loss: of the text, and of block and training.
    """

    loss: Callable[[Variant, int, float | None], float]
    right: Callable[[Variant, int], float] = lambda variant, seed: 0.6
    n_blocks: int = 40
    n_questions: int = 150
    text: float = 0.4
    noise: float = 0.02
    sealed: list[str] = field(default_factory=list)

    def run(self, plan: Plan) -> Plan:
        """All stages of a plan, as `study.run_study` goes through them."""
        self.stage(plan)
        while study.grow(plan):
            self.stage(plan)
        return plan

    def stage(self, plan: Plan) -> None:
        """The missing steps of a plan as it is now."""
        trainings = {row.evaluation: (row.variant, row.seed, row.learning_rate) for row in plan.rows}
        trainings |= {
            trial.evaluation: (trial.variant, trial.seed, trial.learning_rate) for trial in plan.trials
        }
        for step in plan.missing():
            self.sealed.append(step.name)
            run = run_folder.start(step.parameters)
            if step.parameters.step == "evaluate":
                self._evaluate(run, step, *trainings[str(step.folder)])
            else:
                run.seal([], measured=0.5)

    def _evaluate(
        self, run: run_folder.Run, step: PlannedStep, variant: Variant, seed: int, rate: float | None
    ) -> None:
        # Not of the run's key, which is another one as soon as a notebook is.
        generator = np.random.default_rng(zlib.crc32(f"{variant} {seed} {rate}".encode()))
        text = np.random.default_rng(7).normal(0, self.text, self.n_blocks)
        noise = generator.normal(0, self.noise, self.n_blocks)
        losses = self.loss(variant, seed, rate) + text - text.mean() + noise
        pd.DataFrame({"block": range(self.n_blocks), "nll": losses}).to_parquet(run.path("block_nll.parquet"))
        outputs, tasks = ["block_nll.parquet"], {}
        if step.parameters.tasks:
            correct = (generator.random(self.n_questions) < self.right(variant, seed)).astype(float)
            questions = pd.DataFrame({"question": range(self.n_questions), "correct": correct})
            questions.assign(task="facts", subject="facts").to_parquet(run.path("samples.parquet"))
            outputs.append("samples.parquet")
            share = float(correct.mean())
            bounds = {"low": share - 0.08, "high": share + 0.08}
            tasks["facts"] = {
                "metric": "acc",
                "value": share,
                **bounds,
                "n": self.n_questions,
                "chance": 0.25,
            }
        run.seal(
            outputs,
            perplexity=float(np.exp(losses.mean())),
            measured=variant.asked,
            n_blocks=self.n_blocks,
            block_length=512,
            corpus="pydocs",
            split=step.parameters.split,
            vocabulary=49_152,
            tasks=tasks,
            dtype="float32",
        )

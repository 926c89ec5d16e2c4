"""Studies whose runs are made up: planned and sealed as real ones are, but computed by nobody."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file
from scipy import stats

from pftools import run_folder, study
from pftools.study.plan import Plan, PlannedRow

GAIN = {"prune": 0.25, "finetune_prune": 0.12, "prune_finetune": 0.02}
WORDS: dict[str, Any] = {
    "name": "made_up",
    "description": "Does it matter?",
    "evaluate": {"tasks": ["facts", "wikitext2"]},
    "tokens": 1000,
    "finetune": {"block_length": 10},
}
N_BLOCKS, N_QUESTIONS = 30, 120
SHAPES = {"model.layers.0.self_attn.q_proj.weight": (3, 5), "model.layers.1.mlp.up_proj.weight": (4, 7)}


def published_harm(row: PlannedRow) -> float:
    """What a row's model loses, in nats a token: by its ordering, and more with the sparsity."""
    return GAIN.get(row.ordering, 0.0) * row.asked * 2


def seal_study(
    folder: Path,
    *,
    harm: Callable[[PlannedRow], float] = published_harm,
    measured: Callable[[PlannedRow], float] = lambda row: row.asked,
    skip: Callable[[PlannedRow], bool] = lambda row: False,
    **words: Any,
) -> Path:
    """Write a study file and its runs; returns the file. The runs are in `runs` beside it.

    Args:
        harm: what the model of a row loses against the dense one, in nats a token.
        measured: the share of zeros that its evaluation counts.
        skip: rows whose evaluation is left out.
        words: of the study.
    """
    file = folder / "made_up.yaml"
    file.write_text(json.dumps({**WORDS, "orderings": ["base", *GAIN], **words}))
    plan = study.plan_study(study.load_study(file), runs=folder / "runs")
    seal_plan(plan, harm, measured, skip)
    return file


def seal_plan(
    plan: Plan,
    harm: Callable[[PlannedRow], float],
    measured: Callable[[PlannedRow], float],
    skip: Callable[[PlannedRow], bool],
) -> None:
    generator = np.random.default_rng(0)
    text, skill = generator.normal(0, 0.4, N_BLOCKS), generator.beta(2, 2, N_QUESTIONS)
    rows: dict[str, PlannedRow] = {}
    for row in plan.rows:
        rows.setdefault(row.evaluation, row)
    for step in plan.steps.values():
        row = rows.get(str(step.folder))
        if row is not None and skip(row):
            continue
        run = run_folder.start(step.parameters)
        if row is None:
            run.seal([], measured=0.5)
            continue
        losses = np.log(20) + harm(row) + text - text.mean() + generator.normal(0, 0.01, N_BLOCKS)
        right = np.clip(skill - 1.2 * harm(row), 0.1, 1)
        correct = (generator.random(N_QUESTIONS) < right).astype(float)
        _seal_evaluation(run, losses, correct, asked=row.asked, measured=measured(row))


def _seal_evaluation(
    run: Any, losses: np.ndarray, correct: np.ndarray, *, asked: float, measured: float
) -> None:
    pd.DataFrame({"block": range(len(losses)), "nll": losses}).to_parquet(run.path("block_nll.parquet"))
    questions = pd.DataFrame({"question": range(len(correct)), "correct": correct})
    questions.assign(task="facts", subject="facts").to_parquet(run.path("samples.parquet"))
    interval = stats.binomtest(int(correct.sum()), len(correct)).proportion_ci(method="wilson")
    none = {"low": None, "high": None, "chance": None}
    tasks = {
        "facts": {
            "metric": "acc",
            "value": correct.mean(),
            "low": interval.low,
            "high": interval.high,
            "n": len(correct),
            "chance": 0.25,
        },
        "wikitext2": {"metric": "word_perplexity", "value": 61.0 + asked, "n": 62, **none},
    }
    run.seal(
        ["block_nll.parquet", "samples.parquet"],
        perplexity=float(np.exp(min(losses.mean(), 700))),
        measured=measured,
        n_blocks=len(losses),
        block_length=512,
        corpus="pydocs",
        vocabulary=49_152,
        tasks=tasks,
        dtype="float32",
    )


def fill_weights(runs: Path) -> None:
    """What sealed analyses and finetune runs hold: tables of two weights, and adapters of rank 2."""
    for number, run in enumerate(sorted(runs.glob("analyse-*"))):
        place = {"layer": [0, 1], "module": ["q_proj", "up_proj"]}
        pd.DataFrame({**place, "sparsity": 0.5, "std": 0.1 * (number + 1), "kurtosis": 3.0}).to_parquet(
            run / "weights.parquet"
        )
        if number % 2:
            pd.DataFrame({**place, "relative": [0.1, 0.2], "on_zeros": [0.0, 0.4]}).to_parquet(
                run / "differences.parquet"
            )
            pd.DataFrame({**place, "distance": [0.2, 0.4]}).to_parquet(run / "distance.parquet")
    for number, run in enumerate(sorted(runs.glob("finetune-*"))):
        _save_adapter(run / "adapter", torch.Generator().manual_seed(number))


def _save_adapter(folder: Path, generator: torch.Generator) -> None:
    factors = {}
    for name, (rows, columns) in SHAPES.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        factors[f"{module}.lora_A.weight"] = torch.randn(2, columns, generator=generator)
        factors[f"{module}.lora_B.weight"] = torch.randn(rows, 2, generator=generator)
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 4, "r": 2}))

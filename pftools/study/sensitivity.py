"""Which differences a study will be able to see, before a step of it is run.

That depends on how much trainings and text vary. Earlier runs on the same model tell it: those in the folder
of runs, of any study, where orderings were trained with several seeds; otherwise the study `seeds` that comes
with pftools (`data/results/seeds`).
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pftools import run_folder, settings
from pftools.compare.other_losses import holds_losses, read_losses
from pftools.errors import PftoolsError
from pftools.inference.crossed import LEVEL, Estimate, Variances, crossed_mean, crossed_proportion
from pftools.inference.power import visible_difference
from pftools.shipped import DATA
from pftools.study.plan import Plan, variants
from pftools.study.words import TRIAL_SEEDS, Study

SEEDS = (1, 3, 5, 10)
PERPLEXITY = "perplexity"
_SHIPPED = DATA / "results" / "seeds"


@dataclass(frozen=True)
class Sensitivity:
    """What a study will see.

    Attributes:
        table: by number of seeds (the index) and metric, the smallest true difference that four of five such
            studies find: of perplexity as a share (0.03 is 3%), of a task in shares of the questions.
            Infinite for one seed, which says nothing about orderings.
        n: {metric: how many blocks or questions}.
        pairs: for how many pairs of orderings p-values are corrected.
        source: where the variances are from, in words.
    """

    table: pd.DataFrame
    n: dict[str, int]
    pairs: int
    source: str

    def in_words(self) -> pd.DataFrame:
        """The table as it is shown: with units, and for one seed that it is about two models only."""
        return pd.DataFrame(
            {
                f"{metric}, {many:,} {'blocks' if metric == PERPLEXITY else 'questions'}": [
                    _in_words(metric, value) for value in self.table[metric]
                ]
                for metric, many in self.n.items()
            },
            index=self.table.index,
        )


@dataclass
class _Varied:
    """Variances of a metric's paired differences in pairs of orderings, and how many blocks or questions."""

    variances: list[Variances] = field(default_factory=list)
    n: int = 0
    seeds: int = 0

    def add(self, estimate: Estimate) -> None:
        self.variances.append(estimate.variances)
        self.n, self.seeds = estimate.n_blocks, max(self.seeds, estimate.n_seeds)

    def mean(self) -> Variances:
        parts = [
            [float(getattr(one, part)) for one in self.variances] for part in ("seeds", "blocks", "rest")
        ]
        return Variances(*(float(np.mean(part)) for part in parts))


def sensitivity(plan: Plan) -> Sensitivity | None:
    """What a study will see, by numbers of seeds; None where it has no two orderings to compare."""
    pairs = _n_pairs(plan.study)
    if not pairs:
        return None
    varied, source = _earlier(plan), f"as earlier runs in {plan.runs} on this model varied"
    if PERPLEXITY not in varied:
        varied, source = (
            _shipped(),
            "as the study 'seeds' that comes with pftools varied (SmolLM2-135M, pydocs)",
        )
    if not varied:
        return None
    asked = plan.study.parameters(settings.Evaluate)
    n = {metric: (_asked(asked, metric) or one.n) for metric, one in varied.items()}
    rows = sorted(
        {*SEEDS, len(plan.study.seeds), *([plan.study.most_seeds] if plan.study.most_seeds else [])}
    )
    table = pd.DataFrame(
        {
            metric: [_visible(metric, one.mean(), seeds, n[metric], LEVEL / pairs) for seeds in rows]
            for metric, one in varied.items()
        },
        index=pd.Index(rows, name="seeds"),
    )
    of = varied[PERPLEXITY]
    many = f"{len(of.variances)} pairs" if len(of.variances) > 1 else "one pair"
    return Sensitivity(table, n, pairs, f"{source} ({many} of orderings, up to {of.seeds} seeds)")


def _in_words(metric: str, value: float) -> str:
    if math.isinf(value):
        return "two models only"
    return f"{value:.1%}" if metric == PERPLEXITY else f"{100 * value:.1f} points"


def _asked(asked: settings.Evaluate, metric: str) -> int | None:
    return asked.n_blocks if metric == PERPLEXITY else None


def _visible(metric: str, variances: Variances, seeds: int, n: int, level: float) -> float:
    found = visible_difference(variances, seeds, n, level=level)
    return float(np.expm1(found)) if metric == PERPLEXITY else found


def _n_pairs(study: Study) -> int:
    """How many pairs are compared: at each sparsity above 0 (or at 0, if there is no other), every two."""
    by_target: dict[float, int] = {}
    for variant in variants(study):
        by_target[variant.asked] = by_target.get(variant.asked, 0) + 1
    pruned = {asked: many for asked, many in by_target.items() if asked > 0} or by_target
    return sum(math.comb(many, 2) for many in pruned.values())


# ------------------------------------------------------------------------------------------------------------
# Where variances are from


def _shipped() -> dict[str, _Varied]:
    """Of the committed study: a file of block losses an ordering."""
    grids = [read_losses(path) for path in sorted(_SHIPPED.glob("*.csv")) if holds_losses(path)]
    found = _varied(grids, crossed_mean)
    return {PERPLEXITY: found} if found.variances else {}


def _earlier(plan: Plan) -> dict[str, _Varied]:
    """Of runs on the study's model: {metric: what varied}, over all texts that they were evaluated on."""
    found: dict[str, _Varied] = {}
    for evaluations in _comparable(Path(plan.runs), plan.study.model):
        losses = [_grid(runs, "block_nll.parquet", ["block"], "nll") for runs in evaluations]
        _merge(found, PERPLEXITY, _varied(losses, crossed_mean))
        for task in plan.study.parameters(settings.Evaluate).tasks:
            answers = [
                _grid(runs, "samples.parquet", ["subject", "question"], "correct", task)
                for runs in evaluations
            ]
            _merge(found, task, _varied(answers, crossed_proportion))
    return found


def _merge(found: dict[str, _Varied], metric: str, more: _Varied) -> None:
    if more.variances:
        known = found.setdefault(metric, _Varied())
        known.variances += more.variances
        known.n, known.seeds = max(known.n, more.n), max(known.seeds, more.seeds)


def _varied(grids: Iterable[pd.DataFrame | None], estimate: Callable[[Any], Estimate]) -> _Varied:
    """Every two of these (seeds x blocks) tables, compared over what both have."""
    found = _Varied()
    for first, second in itertools.combinations([grid for grid in grids if grid is not None], 2):
        one, other = first.align(second, join="inner")
        kept = one.columns[(one.notna() & other.notna()).all()]
        if len(one) > 1 and len(kept) > 4:
            found.add(estimate((one[kept] - other[kept]).to_numpy()))
    return found


def _grid(
    runs: dict[int, Path], name: str, columns: list[str], value: str, task: str | None = None
) -> pd.DataFrame | None:
    """Seeds x blocks (or questions) of one ordering; None where its runs have kept none."""
    rows = []
    for seed, run in runs.items():
        if (run / name).exists():
            table = pd.read_parquet(run / name)
            rows.append((table if task is None else table[table["task"] == task]).assign(seed=seed))
    kept = pd.concat(rows) if rows else pd.DataFrame()
    return kept.pivot(index="seed", columns=columns, values=value) if len(kept) else None


def _comparable(root: Path, model: str) -> list[list[dict[int, Path]]]:
    """Lists of orderings, each {seed: its evaluation}, that end at one sparsity and have read one text."""
    records = {}
    for path in root.glob("*/run.json"):
        with suppress(PftoolsError):  # a damaged record is named when it is used
            records[path.parent.name] = run_folder.read_record(path.parent)
    found: dict[str, dict[str, dict[int, Path]]] = {}
    for name, record in records.items():
        seed = record["parameters"]["seed"]
        if record["step"] != "evaluate" or seed >= TRIAL_SEEDS:
            continue
        chain, base = _chain(records, record)
        sparsities = [step["sparsity"] for step in chain if "sparsity" in step]
        if base == model and sparsities:
            text = json.dumps([_telling(record), sparsities[0]], sort_keys=True)
            ordering = json.dumps([base, chain], sort_keys=True)
            found.setdefault(text, {}).setdefault(ordering, {})[seed] = root / name
    return [
        [runs for runs in orderings.values() if len(runs) > 1]
        for orderings in found.values()
        if len(orderings) > 1
    ]


def _chain(records: dict[str, dict[str, Any]], record: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """What made the model of an evaluation, the last step first, seeds aside; and the base model."""
    chain, model = [], record["parameters"]["model"]
    while (made := records.get(Path(model).name)) is not None:
        chain.append(_telling(made))
        model = made["parameters"]["model"]
    return chain, model


def _telling(record: dict[str, Any]) -> dict[str, Any]:
    kind = settings.STEPS[record["step"]]
    names = [name for name in kind.key_fields() if name != "seed" and name not in kind.parents]
    return {"step": record["step"], **{name: record["parameters"].get(name) for name in names}}

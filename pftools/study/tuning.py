"""Fair tuning: every ordering tries the same learning rates, and has its own chosen.

A rate that suits one ordering and not the other would be an ordering's defeat by accident. So each ordering
(at each sparsity, with each method, pattern and merge) is trained with every rate of the grid, with seeds
that no result has, and judged on the validation split, which no result is of. The rate with the lowest mean
loss is chosen; the results are fresh trainings with it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from pftools import run_folder
from pftools.study.plan import Plan, PlannedTrial, Variant
from pftools.study.trainings import add_trial
from pftools.study.words import TRIAL_SEEDS, Tune

if TYPE_CHECKING:
    import pandas as pd


def add_trials(plan: Plan, variant: Variant, tune: Tune) -> float | None:
    """Add the trials of an ordering to a plan, and choose its rate if they are finished; else None."""
    before = len(plan.trials)
    for number in range(tune.seeds):
        for rate in tune.learning_rate:
            add_trial(plan, variant, TRIAL_SEEDS + number, rate)
    found = plan.trials[before:]
    losses = mean_losses(found)
    if losses is None or {Path(trial.evaluation).name for trial in found} & set(plan.outdated()):
        return None
    # Of equal losses, also where every training went to infinity, the lower rate.
    return min(losses, key=lambda rate: (losses[rate], rate))


def mean_losses(trials: list[PlannedTrial]) -> dict[float, float] | None:
    """{rate: mean validation loss over its seeds}; None where a trial is not finished, or damaged."""
    found: dict[float, list[float]] = {}
    for trial in trials:
        loss = validation_loss(trial)
        if loss is None:
            return None
        found.setdefault(trial.learning_rate, []).append(loss)
    return {rate: sum(losses) / len(losses) for rate, losses in found.items()}


def validation_loss(trial: PlannedTrial) -> float | None:
    """In nats a token; infinite where it is not a number. None: not finished, or damaged."""
    if not run_folder.is_whole(trial.evaluation):
        return None
    perplexity = float(run_folder.read_record(trial.evaluation)["results"]["perplexity"])
    return math.log(perplexity) if 0 < perplexity < math.inf else math.inf


def trials(plan: Plan) -> pd.DataFrame:
    """The finished trials of a plan, a row an ordering and rate: its curve.

    Columns: ordering, asked, method, pattern, merge, label (all of them in words), learning_rate, loss (mean
    validation loss over the seeds, in nats a token), low and high (the least and the most of one seed),
    seeds, chosen, and edge (whether the chosen rate is the lowest or the highest of the grid: a better one
    may lie outside).
    """
    import pandas as pd

    columns = ["ordering", "asked", "method", "pattern", "merge", "label", "learning_rate"]
    told = ["loss", "low", "high", "seeds", "chosen", "edge"]
    losses: dict[tuple[Variant, float], list[float]] = {}
    for trial in plan.trials:
        if (loss := validation_loss(trial)) is not None:
            losses.setdefault((trial.variant, trial.learning_rate), []).append(loss)
    rows = []
    for (variant, rate), found in losses.items():
        chosen = plan.rates.get(variant) == rate
        assert plan.study.tune is not None
        grid = plan.study.tune.learning_rate
        of = (variant.ordering, variant.asked, variant.method, variant.pattern, variant.merge, str(variant))
        mean = sum(found) / len(found)
        edge = chosen and rate in (min(grid), max(grid))
        rows.append((*of, rate, mean, min(found), max(found), len(found), chosen, edge))
    return pd.DataFrame(rows, columns=[*columns, *told])

"""Which differences between orderings are real: paired statistics on the same blocks and the same questions.

Two orderings are compared only at equal measured sparsity. Perplexities are compared block by block (paired bootstrap of the ratio),
accuracies question by question (exact McNemar test, bootstrap interval of the difference), and p-values are corrected for the
number of comparisons (Holm). What cannot be told apart is called so, with the smallest difference that could have been seen.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats
from statsmodels.stats.multitest import multipletests

from pftools.errors import PftoolsError

SPARSITY_TOLERANCE = 0.005  # half a point: two models further apart are not compared
ALPHA = 0.05
_RESAMPLES = 10_000


@dataclass(frozen=True)
class Comparison:
    """estimate: ratio of perplexities, or difference of accuracies, first against second. low, high: its 95% interval. p: two-sided."""

    estimate: float
    low: float
    high: float
    p: float
    n: int


def compare_perplexity(first: ArrayLike, second: ArrayLike, *, seed: int = 0) -> Comparison:
    """The ratio of two perplexities on the same blocks.

    The blocks' differences in loss d are paired, so their mean is the log of the ratio. Its interval is a bootstrap over blocks
    (percentiles of the studentized mean: blocks are few, and plain percentiles would be too narrow); p is the share of the
    bootstrap distribution, centred on no difference, that is further away.

    Args:
        first, second: mean loss of each block, in nats a token, in the same order.

    Raises:
        PftoolsError: not the same blocks, or fewer than 5.
    """
    a, b = _paired(first, second)
    if len(a) < 5:
        raise PftoolsError(f"{len(a)} blocks are too few to compare two perplexities: evaluate on at least 5.")
    d = a - b
    mean, error = d.mean(), d.std(ddof=1) / math.sqrt(len(d))
    if error == 0:
        ratio = math.exp(mean)
        return Comparison(ratio, ratio, ratio, 1.0 if mean == 0 else 0.0, len(d))
    draws = np.random.default_rng(seed).integers(0, len(d), (_RESAMPLES, len(d)))
    resampled = d[draws]
    spread = np.maximum(resampled.std(axis=1, ddof=1), 1e-12) / math.sqrt(len(d))
    t = (resampled.mean(axis=1) - mean) / spread
    low, high = np.quantile(t, [ALPHA / 2, 1 - ALPHA / 2])
    p = (1 + (np.abs(t) >= abs(mean / error)).sum()) / (_RESAMPLES + 1)
    return Comparison(math.exp(mean), math.exp(mean - high * error), math.exp(mean - low * error), float(p), len(d))


def compare_accuracy(first: ArrayLike, second: ArrayLike, *, seed: int = 0) -> Comparison:
    """The difference of two accuracies on the same questions.

    p is the exact McNemar test: of the questions that exactly one of the two gets right, each should get half (binomial). The
    interval is a paired bootstrap over questions.

    Args:
        first, second: 1 where a question was right, 0 where not, in the same order.
    """
    a, b = _paired(first, second)
    d = a - b
    only_first, only_second = int((d > 0).sum()), int((d < 0).sum())
    p = stats.binomtest(only_first, only_first + only_second).pvalue if only_first + only_second else 1.0
    # Resampling questions is drawing the counts of the three outcomes: the same, and far cheaper.
    shares = np.array([only_first, only_second, len(d) - only_first - only_second]) / len(d)
    counts = np.random.default_rng(seed).multinomial(len(d), shares, _RESAMPLES)
    low, high = np.quantile((counts[:, 0] - counts[:, 1]) / len(d), [ALPHA / 2, 1 - ALPHA / 2])
    return Comparison(float(d.mean()), float(low), float(high), float(p), len(d))


def _paired(first: ArrayLike, second: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise PftoolsError(f"{a.size} and {b.size} results cannot be paired: both orderings must be evaluated on the same blocks and questions.")
    return a, b


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's step-down method."""
    return list(multipletests(p_values, method="holm")[1]) if len(p_values) else []


def chance_interval(chance: float, n: int) -> tuple[float, float]:
    """Where 95% of all guessers land on n questions: an accuracy inside says nothing."""
    low, high = stats.binom.ppf([ALPHA / 2, 1 - ALPHA / 2], n, chance) / n
    return float(low), float(high)


def smallest_visible_difference(n: int, *, disagreement: float = 0.2, power: float = 0.8) -> float:
    """The smallest difference in accuracy that a McNemar test on n questions sees with the given power.

    Args:
        disagreement: share of questions that exactly one of the two models gets right; the more, the harder.

    Source: Connor (1987), Biometrics 43, the sample size of McNemar's test, solved for the difference.
    """
    z_alpha, z_power = stats.norm.ppf(1 - ALPHA / 2), stats.norm.ppf(power)

    def needed(difference: float) -> float:
        spread = math.sqrt(max(disagreement - difference**2, 0))
        return ((z_alpha * math.sqrt(disagreement) + z_power * spread) / difference) ** 2

    low, high = 1e-6, disagreement
    if needed(high) > n:
        return high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if needed(middle) <= n else (middle, high)
    return high


def compare_orderings(results: pd.DataFrame, block_nll: Mapping[str, ArrayLike]) -> pd.DataFrame:
    """Every pair of orderings with the same asked sparsity, compared by perplexity, pooled over seeds.

    Args:
        results: a row a result: ordering, asked, measured, perplexity, finetune_tokens, seed, method, pattern, merge, run.
        block_nll: {run: mean loss of each block}.

    Returns:
        A row a pair: first, second, pair, asked, measured_first, measured_second, ratio, low, high, p, p_holm, verdict_kind
        (`differs`, `cannot be told apart`, `not comparable`) and verdict, a sentence.
    """
    rows = []
    settings = ["method", "pattern", "merge", "asked"]
    for (_, _, _, asked), group in results.groupby(settings, sort=False):
        for first, second in itertools.combinations(dict.fromkeys(group["ordering"]), 2):
            one, other = (_last_of(group, name) for name in (first, second))
            seeds = sorted(set(one.index) & set(other.index))
            if not seeds:
                continue
            rows.append(_pair(first, second, asked, one.loc[seeds], other.loc[seeds], block_nll))
    pairs = pd.DataFrame(rows)
    if not len(pairs):
        return pairs
    tested = pairs["p"].notna()
    pairs.loc[tested, "p_holm"] = holm(pairs.loc[tested, "p"].tolist())
    kinds = [_kind(row) for row in pairs.to_dict("records")]
    verdicts = [_verdict(row, kind) for row, kind in zip(pairs.to_dict("records"), kinds)]
    return pairs.assign(verdict_kind=kinds, verdict=verdicts)


def _last_of(group: pd.DataFrame, ordering: str) -> pd.DataFrame:
    """One row a seed: where an ordering reports several states at one sparsity, the one with the most training."""
    rows = group[group["ordering"] == ordering].sort_values("finetune_tokens")
    return rows.groupby("seed").last()


def _pair(first: str, second: str, asked: float, one: pd.DataFrame, other: pd.DataFrame, block_nll: Mapping[str, ArrayLike]) -> dict:
    measured = one["measured"].mean(), other["measured"].mean()
    row = {
        "first": first, "second": second, "pair": f"{first} / {second}, {asked:.0%}", "asked": asked,
        "measured_first": measured[0], "measured_second": measured[1],
        "perplexity_first": _geometric(one["perplexity"]), "perplexity_second": _geometric(other["perplexity"]),
        "tokens_first": int(one["finetune_tokens"].iloc[0]), "tokens_second": int(other["finetune_tokens"].iloc[0]),
        "seeds": len(one), "ratio": math.nan, "low": math.nan, "high": math.nan, "p": math.nan, "p_holm": math.nan,
    }  # fmt: skip
    if abs(measured[0] - measured[1]) > SPARSITY_TOLERANCE:
        return row
    # Pooled over seeds: a block's loss is averaged over the seeds first, so that seeds do not pose as new text.
    losses = [np.mean([np.asarray(block_nll[run], dtype=np.float64) for run in frame["run"]], axis=0) for frame in (one, other)]
    found = compare_perplexity(*losses)
    return {**row, "ratio": found.estimate, "low": found.low, "high": found.high, "p": found.p}


def _geometric(values: pd.Series) -> float:
    return float(np.exp(np.log(values.astype(float)).mean()))


def _kind(row: dict) -> str:
    if math.isnan(row["p"]):
        return "not comparable"
    return "differs" if row["p_holm"] < ALPHA else "cannot be told apart"


def _verdict(row: dict, kind: str) -> str:
    first, second, at = row["first"], row["second"], f"{row['measured_first']:.0%}"
    if kind == "not comparable":
        return (
            f"{first} and {second} are not comparable: their measured sparsities are {row['measured_first']:.1%} and "
            f"{row['measured_second']:.1%}, and more than half a point apart."
        )
    numbers = f"{row['perplexity_first']:.2f} vs {row['perplexity_second']:.2f}, ratio {row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
    if kind == "differs":
        better, worse = (first, second) if row["ratio"] < 1 else (second, first)
        sentence = f"{better} beats {worse} at {at} ({numbers}, corrected p {_p(row['p_holm'])})"
    else:
        sentence = f"{first} and {second} cannot be told apart at {at} ({numbers}, corrected p {_p(row['p_holm'])})"
    return f"{sentence}; {_budgets(row['tokens_first'], row['tokens_second'])}."


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _budgets(first: int, second: int) -> str:
    if first == second:
        return f"both were fine-tuned on {first:,} tokens" if first else "neither was fine-tuned"
    return f"their training was not equal ({first:,} and {second:,} tokens)"


def compare_tasks(results: pd.DataFrame, samples: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Every comparable pair of orderings, compared by every task: a row a pair and task.

    Args:
        samples: {run: DataFrame(task, question, correct)}.

    Returns:
        Columns pair, task, difference, low, high, p, p_holm, n, visible (the smallest difference that n questions show)
        and verdict.
    """
    rows = []
    for (_, _, _, asked), group in results.groupby(["method", "pattern", "merge", "asked"], sort=False):
        for first, second in itertools.combinations(dict.fromkeys(group["ordering"]), 2):
            one, other = _last_of(group, first), _last_of(group, second)
            if not set(one.index) & set(other.index) or abs(one["measured"].mean() - other["measured"].mean()) > SPARSITY_TOLERANCE:
                continue
            seed = min(set(one.index) & set(other.index))
            both = _join(samples[one.loc[seed, "run"]], samples[other.loc[seed, "run"]])
            for task, answers in both.groupby("task", sort=False):
                found = compare_accuracy(answers["correct"], answers["correct_other"])
                disagreement = float((answers["correct"] != answers["correct_other"]).mean())
                visible = smallest_visible_difference(found.n, disagreement=max(disagreement, 0.05))
                rows.append({"pair": f"{first} / {second}, {asked:.0%}", "task": task, "difference": found.estimate, "low": found.low,
                             "high": found.high, "p": found.p, "n": found.n, "visible": visible})  # fmt: skip
    if not rows:
        return pd.DataFrame(columns=["pair", "task", "difference", "low", "high", "p", "p_holm", "n", "visible", "verdict"])
    table = pd.DataFrame(rows)
    table["p_holm"] = holm(table["p"].tolist())
    table["verdict"] = [_task_verdict(row) for row in table.to_dict("records")]
    return table


def _join(one: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    columns = ["task", "question", "correct"]
    both = one[columns].merge(other[columns], on=["task", "question"], suffixes=("", "_other"))
    return both.dropna(subset=["correct", "correct_other"])


def _task_verdict(row: dict) -> str:
    if row["p_holm"] < ALPHA:
        return f"{'the first' if row['difference'] > 0 else 'the second'} is better by {abs(row['difference']):.1%}"
    return f"cannot be told apart on {row['n']} questions: a difference under {row['visible']:.0%} is not visible"

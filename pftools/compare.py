"""Which differences between orderings are real: paired statistics on the same blocks and the same questions.

Two orderings are compared only at equal measured sparsity. Perplexities are compared block by block (paired bootstrap of the ratio),
accuracies question by question (exact McNemar test, bootstrap interval of the difference), pooled over seeds, and p-values are
corrected for the number of comparisons (Holm). What cannot be told apart is called so, with the smallest difference that could
have been seen. Intervals are over text and questions: another sample of them, the same models.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import signal, stats

from pftools.errors import PftoolsError

SPARSITY_TOLERANCE = 0.005  # half a point: two models further apart are not compared
ALPHA = 0.05
_RESAMPLES = 10_000
_FEWEST_BLOCKS = 5
_EQUAL_BUDGETS = 0.001  # a total that is split over several F's loses a token or two
_CHOICES = ("method", "pattern", "merge")  # what else a study may vary: pairs agree in it


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
    if len(a) < _FEWEST_BLOCKS:
        raise PftoolsError(
            f"{len(a)} blocks are too few to compare two perplexities: evaluate on at least {_FEWEST_BLOCKS}."
        )
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
    return Comparison(
        math.exp(mean), math.exp(mean - high * error), math.exp(mean - low * error), float(p), len(d)
    )


def compare_accuracy(first: ArrayLike, second: ArrayLike, *, seed: int = 0) -> Comparison:
    """The difference of two accuracies on the same questions.

    With one seed, p is the exact McNemar test: of the questions that exactly one of the two gets right, each should get half. With
    several, it is the same test on the questions' sums over the seeds: if there is no difference, each sum is as likely to have
    the other sign (the exact distribution, by convolution). So seeds never pose as new questions.

    The interval is a paired bootstrap over questions. One made-up question for each outcome (one half each way, one for neither) keeps it
    from shrinking to nothing where no question differs (Agresti and Min, 2005).

    Args:
        first, second: 1 where a question was right, 0 where not, in the same order: (n,) or (seeds, n).
    """
    a, b = (np.atleast_2d(np.asarray(values, dtype=np.float64)) for values in (first, second))
    _paired(a.ravel(), b.ravel())
    seeds, n = a.shape
    d = (a - b).sum(axis=0).round().astype(int)
    outcomes = np.arange(-seeds, seeds + 1)
    counts = np.array([(d == outcome).sum() for outcome in outcomes], dtype=float)
    smoothed = counts.copy()
    smoothed[[0, -1]] += 0.5
    smoothed[seeds] += 1
    # Resampling questions is drawing the counts of the outcomes: the same, and far cheaper.
    drawn = np.random.default_rng(seed).multinomial(n, smoothed / smoothed.sum(), _RESAMPLES)
    low, high = np.quantile(drawn @ outcomes / (n * seeds), [ALPHA / 2, 1 - ALPHA / 2])
    return Comparison(float(d.mean() / seeds), float(low), float(high), _sign_flip_p(d), n)


def _sign_flip_p(d: np.ndarray) -> float:
    """P(|sum| as large as found), when every entry of ``d`` (whole numbers) has either sign with probability one half. Exact."""
    distribution, reach = np.ones(1), 0
    for size in np.unique(np.abs(d[d != 0])):
        many = int((np.abs(d) == size).sum())
        own = np.zeros(2 * many * size + 1)
        own[:: 2 * size] = stats.binom.pmf(np.arange(many + 1), many, 0.5)
        distribution = (
            signal.fftconvolve(distribution, own)
            if min(len(distribution), len(own)) > 64
            else np.convolve(distribution, own)
        )
        reach += many * int(size)
    sums = np.abs(np.arange(-reach, reach + 1))
    return float(min(1.0, np.clip(distribution[sums >= abs(d.sum())], 0, None).sum()))


def _paired(first: ArrayLike, second: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise PftoolsError(
            f"{a.size} and {b.size} results cannot be paired: both orderings must be evaluated on the same blocks and questions."
        )
    return a, b


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's step-down method."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return corrected.tolist()


def chance_interval(chance: float, n: int) -> tuple[float, float]:
    """Where 95% of all guessers land on n questions: an accuracy inside says nothing."""
    low, high = stats.binom.ppf([ALPHA / 2, 1 - ALPHA / 2], n, chance) / n
    return float(low), float(high)


def smallest_visible_difference(
    n: int, *, disagreement: float = 0.2, power: float = 0.8, alpha: float = ALPHA
) -> float:
    """The smallest difference in accuracy that a McNemar test on n questions sees with the given power.

    Args:
        disagreement: share of questions that exactly one of the two models gets right; the more, the harder. Pooled over seeds: the mean
            square of the questions' differences.
        alpha: the level of the test; over several pairs, the level of Holm's strictest step, 0.05 / pairs.

    Source: Connor (1987), Biometrics 43, the sample size of McNemar's test, solved for the difference. Never less than the number of
    one-sided questions that an exact test needs to reach ``alpha`` at all.
    """
    z_alpha, z_power = stats.norm.ppf(1 - alpha / 2), stats.norm.ppf(power)
    least = math.ceil(1 + math.log2(1 / alpha)) / n

    def needed(difference: float) -> float:
        spread = math.sqrt(max(disagreement - difference**2, 0))
        return ((z_alpha * math.sqrt(disagreement) + z_power * spread) / difference) ** 2

    low, high = 1e-6, max(disagreement, 1e-6)
    if needed(high) > n:
        return min(1.0, max(high, least))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if needed(middle) <= n else (middle, high)
    return min(1.0, max(high, least))


def smallest_visible_ratio(
    first: ArrayLike, second: ArrayLike, *, power: float = 0.8, alpha: float = ALPHA
) -> float:
    """The smallest ratio of perplexities above 1 that these blocks show with the given power, from the spread of their differences."""
    a, b = _paired(first, second)
    error = (a - b).std(ddof=1) / math.sqrt(len(a))
    return math.exp((stats.t.ppf(1 - alpha / 2, len(a) - 1) + stats.t.ppf(power, len(a) - 1)) * error)


# ---------------------------------------------------------------------------------------------------------------------
# Whole studies


@dataclass(frozen=True)
class _Pair:
    """Two orderings at one asked sparsity: a row of results a seed that both have."""

    first: str
    second: str
    asked: float
    where: str
    one: pd.DataFrame
    other: pd.DataFrame

    @property
    def comparable(self) -> bool:
        return abs(self.one["measured"].mean() - self.other["measured"].mean()) <= SPARSITY_TOLERANCE

    def row(self) -> dict:
        """What every table of pairs begins with."""
        return {
            "first": self.first,
            "second": self.second,
            "pair": f"{self.first} / {self.second}, {self.where}",
            "asked": self.asked,
            "where": self.where,
            "measured_first": self.one["measured"].mean(),
            "measured_second": self.other["measured"].mean(),
            "tokens_first": int(self.one["finetune_tokens"].iloc[0]),
            "tokens_second": int(self.other["finetune_tokens"].iloc[0]),
            "seeds": len(self.one),
            "low": math.nan,
            "high": math.nan,
            "p": math.nan,
            "p_holm": math.nan,
        }


def _pairs(results: pd.DataFrame) -> Iterator[_Pair]:
    """Every two orderings with the same method, pattern, merge and asked sparsity, and at least one seed in common."""
    varied = [name for name in _CHOICES if results[name].nunique() > 1]
    seen = set()  # orderings that do not differ by method or merge are the same runs for all of them: one comparison, not several
    for (*choices, asked), group in results.groupby([*_CHOICES, "asked"], sort=False):
        named = [choice for name, choice in zip(_CHOICES, choices) if name in varied]
        where = " with ".join([f"{asked:.0%}", ", ".join(named)]) if named else f"{asked:.0%}"
        for first, second in itertools.combinations(dict.fromkeys(group["ordering"]), 2):
            one, other = (_last_of(group, name) for name in (first, second))
            seeds = sorted(set(one.index) & set(other.index))
            same = (*one.loc[seeds, "run"], *other.loc[seeds, "run"])
            if seeds and same not in seen:
                seen.add(same)
                yield _Pair(first, second, asked, where, one.loc[seeds], other.loc[seeds])


def _last_of(group: pd.DataFrame, ordering: str) -> pd.DataFrame:
    """One row a seed: where an ordering reports several states at one sparsity, the one with the most training."""
    rows = group[group["ordering"] == ordering].sort_values("finetune_tokens", kind="stable")
    return rows.groupby("seed").last()


def compare_orderings(results: pd.DataFrame, block_nll: Mapping[str, ArrayLike]) -> pd.DataFrame:
    """Every pair of orderings with the same asked sparsity, compared by perplexity, pooled over seeds.

    Args:
        results: a row a result: ordering, asked, measured, perplexity, finetune_tokens, seed, method, pattern, merge, run.
        block_nll: {run: mean loss of each block}.

    Returns:
        A row a pair: first, second, pair, asked, where (the sparsity in words, with what else the study varies), measured_first, measured_second, tokens_first, tokens_second, seeds, agree (seeds with the
        sign of the whole), n (blocks), ratio, low, high, p, p_holm, visible (the smallest ratio that could be seen), verdict_kind
        (`differs`, `cannot be told apart`, `not comparable`) and verdict, a sentence.
    """
    rows = []
    for pair in _pairs(results):
        perplexities = {
            "perplexity_first": _geometric(pair.one["perplexity"]),
            "perplexity_second": _geometric(pair.other["perplexity"]),
        }
        row = {**pair.row(), **perplexities, "ratio": math.nan, "n": 0, "agree": 0}
        losses = [_stacked([block_nll[run] for run in frame["run"]]) for frame in (pair.one, pair.other)]
        row["n"] = losses[0].shape[1]
        if pair.comparable and row["n"] >= _FEWEST_BLOCKS:
            # Pooled over seeds: a block's loss is averaged over the seeds first, so that seeds do not pose as new text.
            found = compare_perplexity(losses[0].mean(axis=0), losses[1].mean(axis=0))
            row |= {"ratio": found.estimate, "low": found.low, "high": found.high, "p": found.p}
            row["agree"] = _agreeing(losses[0].mean(axis=1) - losses[1].mean(axis=1))
            row["_losses"] = losses
        rows.append(row)
    if not rows:
        return pd.DataFrame()
    family = sum(not math.isnan(row["p"]) for row in rows)
    for row in rows:
        losses = row.pop("_losses", None)
        row["visible"] = (
            math.nan
            if losses is None
            else smallest_visible_ratio(*(part.mean(axis=0) for part in losses), alpha=ALPHA / family)
        )
    pairs = _corrected(pd.DataFrame(rows))
    return pairs.assign(verdict=[_perplexity_verdict(row) for row in pairs.to_dict("records")])


def _stacked(losses: list[ArrayLike]) -> np.ndarray:
    """(seeds, n) losses of the same blocks."""
    arrays = [np.asarray(values, dtype=np.float64) for values in losses]
    return np.stack([_paired(array, arrays[0])[0] for array in arrays])


def _agreeing(differences: np.ndarray) -> int:
    """How many seeds have the sign of their mean."""
    return int((np.sign(differences) == np.sign(differences.mean())).sum())


def _geometric(values: pd.Series) -> float:
    return float(np.exp(np.log(values.astype(float)).mean()))


def _corrected(pairs: pd.DataFrame) -> pd.DataFrame:
    """The table with Holm's p-values over its tested pairs, and what they say."""
    tested = pairs["p"].notna()
    pairs.loc[tested, "p_holm"] = holm(pairs.loc[tested, "p"].tolist())
    kinds = [
        "not comparable" if math.isnan(p) else "differs" if p < ALPHA else "cannot be told apart"
        for p in pairs["p_holm"]
    ]
    return pairs.assign(verdict_kind=kinds)


def compare_tasks(results: pd.DataFrame, samples: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Every comparable pair of orderings, compared by every task, pooled over seeds. Holm's correction is over the pairs of a task.

    Args:
        results: as in `compare_orderings`.
        samples: {run: DataFrame(task, subject, question, correct)}; questions whose ``correct`` is missing are left out.

    Returns:
        A row a pair and task: first, second, pair, task, n (questions), seeds, accuracy_first, accuracy_second, difference, low, high, p,
        p_holm, visible (the smallest difference that could be seen), verdict_kind and verdict, a sentence.
    """
    rows = []
    for pair in _pairs(results):
        if not pair.comparable:
            continue
        answers = [
            pd.concat([_answers(samples[run], place) for place, run in enumerate(frame["run"])])
            for frame in (pair.one, pair.other)
        ]
        both = answers[0].join(answers[1], how="inner", lsuffix="_first", rsuffix="_second")
        for task, asked in both.groupby(level="task", sort=False):
            # Questions that every seed has answered, under both orderings: (seeds, n).
            first, second = (
                asked[f"correct_{side}"].unstack("seed").dropna().T for side in ("first", "second")
            )
            found = compare_accuracy(first, second)
            mean_square = float(((first.mean() - second.mean()) ** 2).mean())
            accuracies = {
                "accuracy_first": float(first.to_numpy().mean()),
                "accuracy_second": float(second.to_numpy().mean()),
            }
            agree = _agreeing((first - second).mean(axis=1).to_numpy())
            rows.append(
                {
                    **pair.row(),
                    "task": task,
                    **accuracies,
                    "difference": found.estimate,
                    "low": found.low,
                    "high": found.high,
                    "p": found.p,
                    "n": found.n,
                    "agree": agree,
                    "visible": mean_square,
                }
            )
    if not rows:
        return pd.DataFrame(
            columns=[
                "pair",
                "task",
                "n",
                "difference",
                "low",
                "high",
                "p",
                "p_holm",
                "visible",
                "verdict_kind",
                "verdict",
            ]
        )
    tables = []
    for _, table in pd.DataFrame(rows).groupby("task", sort=False):
        table = _corrected(table.reset_index(drop=True))
        table["visible"] = [
            smallest_visible_difference(n, disagreement=mean_square, alpha=ALPHA / len(table))
            for n, mean_square in zip(table["n"], table["visible"])
        ]
        tables.append(table)
    compared = pd.concat(tables, ignore_index=True)
    return compared.assign(verdict=[_task_verdict(row) for row in compared.to_dict("records")])


def _answers(samples: pd.DataFrame, seed: int) -> pd.DataFrame:
    """The outcomes of one run, by task, subject, question and seed."""
    kept = samples.dropna(subset=["correct"])
    subject = kept["subject"] if "subject" in kept else kept["task"]
    return kept.assign(subject=subject, seed=seed).set_index(["task", "subject", "question", "seed"])[
        ["correct"]
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Sentences


def _perplexity_verdict(row: dict) -> str:
    first, second, at = row["first"], row["second"], row["where"]
    if row["verdict_kind"] == "not comparable":
        if abs(row["measured_first"] - row["measured_second"]) <= SPARSITY_TOLERANCE:
            return f"{first} and {second} are not comparable at {at}: {row['n']} blocks are too few, evaluate on at least {_FEWEST_BLOCKS}."
        return (
            f"{first} and {second} are not comparable: their measured sparsities are {row['measured_first']:.1%} and "
            f"{row['measured_second']:.1%}, more than half a point apart."
        )
    better, worse = (first, second) if row["ratio"] <= 1 else (second, first)
    low, high = (row["low"], row["high"]) if row["ratio"] <= 1 else (1 / row["high"], 1 / row["low"])
    values = sorted((row["perplexity_first"], row["perplexity_second"]))
    numbers = f"{values[0]:.2f} vs {values[1]:.2f}, ratio {min(row['ratio'], 1 / row['ratio']):.3f} [{low:.3f}, {high:.3f}]"
    if row["verdict_kind"] == "differs":
        return (
            f"{better} beats {worse} at {at} ({numbers}, {_p(row['p_holm'])}{_seeds(row)}); {_budgets(row)}."
        )
    return (
        f"{better} and {worse} cannot be told apart at {at} on {row['n']} blocks ({numbers}, {_p(row['p_holm'])}{_seeds(row)}): "
        f"a difference under {row['visible'] - 1:.1%} is not visible; {_budgets(row)}."
    )


def _task_verdict(row: dict) -> str:
    first, second, at = row["first"], row["second"], row["where"]
    if row["verdict_kind"] == "differs":
        ahead = row["difference"] > 0
        better, worse = (first, second) if ahead else (second, first)
        low, high = (row["low"], row["high"]) if ahead else (-row["high"], -row["low"])
        values = sorted((row["accuracy_first"], row["accuracy_second"]), reverse=True)
        numbers = f"{values[0]:.1%} vs {values[1]:.1%}, {abs(row['difference']) * 100:.1f} points [{low * 100:.1f}, {high * 100:.1f}]"
        return f"{row['task']}: {better} beats {worse} at {at} ({numbers}, {_p(row['p_holm'])}{_seeds(row)}); {_budgets(row)}."
    return (
        f"{row['task']}: at {at}, {first} and {second} cannot be told apart on {row['n']:,} questions: "
        f"a difference under {row['visible'] * 100:.0f} points is not visible; {_budgets(row)}."
    )


def p_in_words(p: float) -> str:
    """A p-value as it is written: "0.017", or "< 0.001"."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _p(p: float) -> str:
    return f"corrected p {p_in_words(p)}"


def _seeds(row: dict) -> str:
    return f", the same sign in {row['agree']} of {row['seeds']} seeds" if row["seeds"] > 1 else ""


def _budgets(row: dict) -> str:
    first, second = row["tokens_first"], row["tokens_second"]
    if not first and not second:
        return "neither was fine-tuned"
    if abs(first - second) <= _EQUAL_BUDGETS * max(first, second):
        return (
            f"both were fine-tuned on {first:,} tokens"
            if first == second
            else f"both were fine-tuned on about {max(first, second):,} tokens"
        )
    return f"their training was not equal ({first:,} and {second:,} tokens)"

"""Two results on the same blocks or questions: estimate, interval, p-value, and what such a test can show.

`compare_perplexity` and `compare_accuracy` are the only tests of the kit. What else is said about a study is
built on the `Comparison` that they return.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import signal, stats

from pftools.errors import PftoolsError
from pftools.inference.crossed import crossed_mean

ALPHA = 0.05
FEWEST_BLOCKS = 5
_RESAMPLES = 10_000


@dataclass(frozen=True)
class Comparison:
    """A first result against a second.

    Attributes:
        estimate: the ratio of their perplexities, or the difference of their accuracies.
        low, high: the 95% interval of the estimate.
        p: two-sided p-value of no difference.
        n: how many blocks or questions.
    """

    estimate: float
    low: float
    high: float
    p: float
    n: int


def compare_perplexity(first: ArrayLike, second: ArrayLike) -> Comparison:
    """The ratio of two perplexities on the same blocks.

    The differences in loss are paired by block. Their mean is the logarithm of the ratio, with the interval
    and p-value of Student's paired t-test. So p has no floor, and survives a correction for any number of
    pairs.

    Args:
        first, second: mean loss of each block, in nats a token, in the same order.

    Raises:
        PftoolsError: not the same blocks, fewer than 5, or a loss that is infinite or not a number.
    """
    a, b = paired(first, second)
    if len(a) < FEWEST_BLOCKS:
        raise PftoolsError(
            f"{len(a)} blocks are too few to compare two perplexities: evaluate on at least {FEWEST_BLOCKS}."
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise PftoolsError(
            "a block's loss is infinite or not a number, so there is no ratio of perplexities: look at that "
            "model's evaluation first."
        )
    found = crossed_mean((a - b)[None])
    with np.errstate(over="ignore"):  # a ratio above 1e308 is infinite
        estimate, low, high = np.exp([found.mean, *found.interval()])
    return Comparison(float(estimate), float(low), float(high), float(found.p), len(a))


def compare_accuracy(first: ArrayLike, second: ArrayLike, *, seed: int = 0) -> Comparison:
    """The difference of two accuracies on the same questions.

    With one seed, p is the exact McNemar test: of the questions that exactly one of the two gets right, each
    should get half. With several, it is the same test on the questions' sums over the seeds: without a
    difference, each sum is as likely to have the other sign (the exact distribution, by convolution). So
    seeds never pose as new questions.

    The interval is a paired bootstrap over questions. One made-up question for each outcome (one half each
    way, one for neither) keeps it from shrinking to nothing where no question differs (Agresti and Min
    2005). It holds 0 where the exact test finds no difference, which has more to overcome on few questions.

    Args:
        first, second: 1 where a question was right, 0 where not, in the same order: (n,) or (seeds, n).
        seed: of the bootstrap.
    """
    a, b = (np.atleast_2d(np.asarray(values, dtype=np.float64)) for values in (first, second))
    paired(a.ravel(), b.ravel())
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
    p = _sign_flip_p(d)
    if p >= ALPHA:
        low, high = min(low, 0.0), max(high, 0.0)
    return Comparison(float(d.mean() / seeds), float(low), float(high), p, n)


def _sign_flip_p(d: np.ndarray) -> float:
    """The probability of a sum as far from 0 if every entry of ``d`` (whole numbers) had a random sign."""
    distribution, reach = np.ones(1), 0
    for size in np.unique(np.abs(d[d != 0])):
        many = int((np.abs(d) == size).sum())
        own = np.zeros(2 * many * size + 1)
        own[:: 2 * size] = stats.binom.pmf(np.arange(many + 1), many, 0.5)
        # The Fourier transform is faster for long ones, but its rounding hides probabilities below 1e-16.
        long = min(len(distribution), len(own)) > 512
        distribution = (signal.fftconvolve if long else np.convolve)(distribution, own)
        reach += many * int(size)
    sums = np.abs(np.arange(-reach, reach + 1))
    return float(min(1.0, np.clip(distribution[sums >= abs(d.sum())], 0, None).sum()))


def paired(first: ArrayLike, second: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays of one length.

    Raises:
        PftoolsError: they cannot belong to the same blocks or questions.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise PftoolsError(
            f"{a.size} and {b.size} results cannot be paired: both orderings must be evaluated on the same "
            "blocks and questions."
        )
    return a, b


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's step-down method (Holm 1979)."""
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
    """The difference in accuracy that a McNemar test on n questions sees with the given power.

    Args:
        disagreement: share of questions that exactly one of the two models gets right; the more, the harder.
            Pooled over seeds: the mean square of the questions' differences.
        alpha: the level of the test; over several pairs, the level of Holm's strictest step, 0.05 / pairs.

    Returns:
        The difference; infinite where so few questions show none.

    Source: Connor (1987), Biometrics 43, the sample size of McNemar's test, solved for the difference. Never
    less than the number of one-sided questions that an exact test needs to reach ``alpha`` at all.
    """
    z_alpha, z_power = stats.norm.ppf(1 - alpha / 2), stats.norm.ppf(power)
    least = math.ceil(1 + math.log2(1 / alpha)) / n

    def needed(difference: float) -> float:
        one_sided = max(disagreement, difference)  # no difference is larger than the disagreement
        spread = math.sqrt(one_sided - difference**2)
        return ((z_alpha * math.sqrt(one_sided) + z_power * spread) / difference) ** 2

    low, high = 1e-6, 1.0
    if needed(high) > n or least > 1:
        return math.inf
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if needed(middle) <= n else (middle, high)
    return max(high, least)


def smallest_visible_ratio(
    first: ArrayLike, second: ArrayLike, *, power: float = 0.8, alpha: float = ALPHA
) -> float:
    """The ratio of perplexities above 1 that blocks with such differences show with the given power."""
    a, b = paired(first, second)
    error = (a - b).std(ddof=1) / math.sqrt(len(a))
    quantiles = stats.t.ppf(1 - alpha / 2, len(a) - 1) + stats.t.ppf(power, len(a) - 1)
    with np.errstate(over="ignore"):
        return float(np.exp(quantiles * error))

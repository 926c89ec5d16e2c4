"""One comparison of two ways of training, judged over seeds and text, and what may be said of it.

With one seed each, a test on the same text compares two *models*. Whether another training would come
out the same way nobody can know then, so nothing is said about the ways of training. With several
seeds, seeds and text are both drawn, and the verdict is about them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from pftools.errors import PftoolsError
from pftools.inference.crossed import LEVEL, Estimate, crossed_mean, crossed_proportion
from pftools.inference.equivalence import equivalence_p
from pftools.inference.power import Needed, needed_for, visible_difference

DIFFERS, ALIKE, EQUIVALENT = "differs", "cannot be told apart", "equivalent"


@dataclass(frozen=True)
class Judged:
    """Two ways of training, compared on the same text.

    Attributes:
        estimate: of the mean difference, first less second: losses in nats, or shares of questions.
        p: two-sided. agree: in how many seeds the difference has the sign of the whole.
        unit: what was drawn beside seeds: "blocks" or "questions".
    """

    estimate: Estimate
    p: float
    agree: int
    unit: str

    @property
    def n_seeds(self) -> int:
        return self.estimate.n_seeds

    @property
    def mean(self) -> float:
        return float(self.estimate.mean)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the mean difference."""
        return self.interval_at(LEVEL)

    def interval_at(self, level: float) -> tuple[float, float]:
        """The interval that misses the mean difference with probability ``level``.

        Of shares of questions it ends at -1 and 1, as one question alone says no more.
        """
        low, high = (float(end) for end in self.estimate.interval(level))
        if self.unit == "questions":
            low, high = (-1.0, 1.0) if math.isnan(low) else (max(low, -1.0), min(high, 1.0))
        return low, high

    def kind(self, p_corrected: float, margin: float | None = None, *, level: float = LEVEL) -> str:
        """ "differs", "equivalent" (within the margin, over several seeds) or "cannot be told apart".

        Args:
            level: of the test of equivalence. p_corrected is compared with 5% whatever this is.
        """
        if margin is not None and self.n_seeds > 1 and equivalence_p(self.estimate, margin) <= level:
            return EQUIVALENT
        return DIFFERS if p_corrected < LEVEL else ALIKE

    def visible(self, level: float = LEVEL) -> float:
        """The smallest difference that these seeds and this text show in 80% of studies.

        With one seed: what they show about these two models.
        """
        n = self.estimate.n_blocks
        if self.n_seeds > 1:
            return visible_difference(self.estimate.variances, self.n_seeds, n, level=level)
        quantiles = stats.t.isf(level / 2, n - 1) + stats.t.ppf(0.8, n - 1)
        return float(quantiles * self.estimate.error)

    def needed(self, difference: float, level: float = LEVEL) -> Needed:
        """How many seeds, blocks or both would show a difference of this size; several seeds only."""
        e = self.estimate
        return needed_for(difference, e.variances, e.n_seeds, e.n_blocks, level=level)


def judge_losses(first: ArrayLike, second: ArrayLike) -> Judged:
    """Compare mean losses of the same blocks, in nats a token: (seeds, blocks) each, or (blocks,).

    Raises:
        PftoolsError: the shapes differ, or there are fewer than two blocks.
    """
    d = _differences(first, second)
    estimate = crossed_mean(d)
    return Judged(estimate, float(estimate.p), _agreeing(d), "blocks")


def judge_answers(first: ArrayLike, second: ArrayLike) -> Judged:
    """Compare right (1) and wrong (0) answers to the same questions: (seeds, questions) each, or
    (questions,).

    With one seed p is McNemar's exact test: of the questions that one of the two alone gets right,
    each should get half.

    Raises:
        PftoolsError: the shapes differ, or there is no question.
    """
    d = _differences(first, second)
    estimate = crossed_proportion(d)
    if len(d) > 1:
        return Judged(estimate, float(estimate.p), _agreeing(d), "questions")
    ahead, behind = int((d > 0).sum()), int((d < 0).sum())
    p = stats.binomtest(ahead, ahead + behind).pvalue if ahead + behind else 1.0
    return Judged(estimate, float(p), _agreeing(d), "questions")


def _differences(first: ArrayLike, second: ArrayLike) -> np.ndarray:
    a, b = (np.atleast_2d(np.asarray(values, dtype=np.float64)) for values in (first, second))
    if a.shape != b.shape or not a.size:
        raise PftoolsError(
            f"results of shapes {a.shape} and {b.shape} (seeds, blocks) cannot be paired: evaluate both "
            "with the same seeds, on the same blocks or questions."
        )
    return a - b


def _agreeing(d: np.ndarray) -> int:
    by_seed = d.mean(axis=1)
    return int((np.sign(by_seed) == np.sign(by_seed.mean())).sum())


# ------------------------------------------------------------------------------------------------------------
# In words


def about_the_difference(judged: Judged, things: str = "orderings") -> str:
    """What a found difference means: of one training each, or over seeds with the shares of variance."""
    if judged.n_seeds == 1:
        where = "on this text" if judged.unit == "blocks" else "on these questions"
        return f"these two models differ {where}; whether the {things} do, one training each cannot say"
    return (
        f"the same sign in {judged.agree} of {judged.n_seeds} seeds; of the variance of the mean, "
        f"{variance_in_words(judged)}"
    )


def variance_in_words(judged: Judged) -> str:
    """The shares of seeds, of blocks or questions, and of the rest, such as "60% is seeds, ..."."""
    e = judged.estimate
    of_seeds, of_text, rest = e.variances.shares(e.n_seeds, e.n_blocks)
    return f"{of_seeds:.0%} is seeds, {of_text:.0%} {judged.unit}, {rest:.0%} the rest"


def about_the_doubt(
    judged: Judged, size: float, said: str, *, level: float = LEVEL, things: str = "orderings"
) -> str:
    """What would show a difference of this size, where none was found.

    Args:
        size: in the units of the estimate. said: the same in words, such as "1%" or "2 points".
        level: of the test: over several pairs, the strictest of Holm's steps.
    """
    if judged.n_seeds == 1:
        return f"about the {things}, one training each says nothing: train at least 3 seeds"
    needed = judged.needed(size, level)
    seeds, n = judged.n_seeds, judged.estimate.n_blocks
    ways = []
    if needed.seeds == seeds and needed.blocks == n:
        return f"{said} would have been seen in four of five such studies"
    if needed.seeds:
        ways.append(f"{needed.seeds} seeds")
    if needed.blocks:
        ways.append(f"{needed.blocks:,} {judged.unit}")
    if needed.both and _fewer(needed.both[0], needed.seeds) and _fewer(needed.both[1], needed.blocks):
        ways.append(f"{needed.both[0]} seeds on {needed.both[1]:,} {judged.unit}")
    if not ways:
        return f"no number of seeds or {judged.unit} that can be had would show {said}"
    lacking = "" if needed.seeds and needed.blocks else _never(needed, judged.unit)
    return f"to see {said} takes {', or '.join(ways)}{lacking} (now {seeds} seeds, {n:,} {judged.unit})"


def _fewer(together: int, alone: int | None) -> bool:
    return alone is None or together < alone


def _never(needed: Needed, unit: str) -> str:
    alone = "seeds" if needed.seeds is None else unit
    return f"; more {alone} alone never would"


def points(share: float) -> str:
    """A share as percentage points, such as "2 points" or "1.5 points"."""
    value = round(100 * share, 1)
    return f"{value:g} point{'' if math.isclose(abs(value), 1) else 's'}"

"""The set of orderings that holds the best one with a stated confidence.

The lowest number is not the answer: with ten orderings, some are too close to call. An ordering
leaves the set only where another is better beyond doubt (Hsu 1981, "Simultaneous confidence
intervals for all distances from the best", Annals of Statistics 9). The truly best ordering is
compared with ``k - 1`` others and is never worse than any, so one-sided tests at ``level / (k -
1)`` lose it with probability ``level`` at most (Bonferroni). Nothing is assumed about how the
orderings' seeds and texts hang together.

The model confidence set of Hansen, Lunde and Nason (2011) answers the same question with a
bootstrap, which three seeds are too few for: `benchmarks/verdicts.py` shows both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pftools.inference.crossed import LEVEL, Estimate, crossed_mean


@dataclass(frozen=True)
class ConfidenceSet:
    """Who may be the best of k.

    Attributes:
        members: (..., k) True where an ordering may be the best. Never empty.
        estimates: of all paired differences: first axis the ordering, second the one it is compared with.
        rivals: over how many comparisons the level is shared.
    """

    members: np.ndarray
    estimates: Estimate
    rivals: int

    @cached_property
    def p(self) -> np.ndarray:
        """(..., k) the smallest level at which an ordering would leave the set."""
        behind: Any = self.estimates.p_above
        return np.minimum(1.0, self.rivals * behind.min(axis=-1))


def best_set(
    losses: ArrayLike,
    *,
    level: float = LEVEL,
    estimate: Callable[[ArrayLike], Estimate] = crossed_mean,
    rivals: int | None = None,
) -> ConfidenceSet:
    """Which of k orderings may have the lowest true mean loss.

    Args:
        losses: (k, seeds, blocks), of the same seeds and blocks; leading axes for many studies at
            once. For accuracies: 1 - correct, with ``crossed_proportion``.
        level: the probability that the best is left out, at most.
        estimate: how a matrix of paired differences is analysed.
        rivals: over how many comparisons the level is shared; default k - 1. More where orderings
            were ruled out before.
    """
    values = np.asarray(losses, dtype=np.float64)
    estimates = estimate(values[..., :, None, :, :] - values[..., None, :, :, :])
    shared = rivals or max(1, values.shape[-3] - 1)
    behind = estimates.mean > estimates.half_width(2 * level / shared)
    return ConfidenceSet(~behind.any(axis=-1), estimates, shared)

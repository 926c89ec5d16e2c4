"""Whether two orderings are the same for a reader's purpose: two one-sided tests within a margin
that the reader sets.

"Cannot be told apart" may only mean that the data are few. "Equivalent" means that the difference
is shown to be small (Schuirmann 1987, Journal of Pharmacokinetics and Biopharmaceutics 15): both
"it is at least the margin" and "it is at most minus the margin" are rejected, which is when the
interval of coverage ``1 - 2 level`` lies within the margin.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from pftools.inference.crossed import LEVEL, Estimate, crossed_mean


def equivalence_p(estimate: Estimate, margin: float) -> float:
    """The larger of the two one-sided p-values. Small: the true mean lies between ``-margin`` and ``margin``.

    Args:
        margin: in the units of the estimate, above 0: for perplexities the log of the largest ratio
            that does not matter.
    """
    above = float(estimate.shifted(margin).p_above)  # rejects "mean <= -margin"
    mirrored = estimate.shifted(-2 * estimate.mean)
    below = float(mirrored.shifted(margin).p_above)  # rejects "mean >= margin"
    return max(above, below)


def all_equivalent(
    losses: ArrayLike,
    margin: float,
    *,
    level: float = LEVEL,
    estimate: Callable[[ArrayLike], Estimate] = crossed_mean,
) -> bool:
    """Whether every two of these orderings are equivalent.

    All of them have to be shown, so that no correction for their number is due (Berger 1982,
    Technometrics 24).

    Args:
        losses: (k, seeds, blocks).
        margin: as in `equivalence_p`.
    """
    values = np.asarray(losses, dtype=np.float64)
    first, second = np.triu_indices(len(values), 1)
    pairs = estimate(values[first] - values[second])
    return bool(np.all(np.abs(pairs.mean) + pairs.half_width(2 * level) <= margin))

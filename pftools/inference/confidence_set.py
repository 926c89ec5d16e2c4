"""The set of orderings that holds the best one with a stated confidence.

The lowest number is not the answer: with ten orderings, some are too close to call. As in the model
confidence set (Hansen, Lunde and Nason 2011, Econometrica 79), the worst ordering is compared with
the mean of the others and leaves if it is worse beyond doubt; then the worst of the rest, until
nobody leaves. Two things differ. The test is `crossed.crossed_mean`, because a bootstrap of three
seeds is too narrow. And each step is at three quarters of the level, without a correction for the
number of orderings: only the loss of the *best* counts as an error, and it is seldom the one that
looks worst. `benchmarks/verdicts.py` shows how often the best is held, and the size of the set,
beside the original and beside comparisons with every single rival (Hsu 1981).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from pftools.inference.crossed import LEVEL, Estimate, crossed_mean

_SHARE = 0.75  # of the level: what later steps may add to the error of the first


def best_set(
    losses: ArrayLike,
    *,
    level: float = LEVEL,
    estimate: Callable[[ArrayLike], Estimate] = crossed_mean,
) -> np.ndarray:
    """Which of k orderings may have the lowest true mean loss: (..., k), True for at least one.

    Args:
        losses: (k, seeds, blocks), of the same seeds and blocks; leading axes for many studies at
            once. For accuracies: 1 - correct, with ``crossed_proportion``.
        level: the probability that the best is left out.
        estimate: how a matrix of paired differences is analysed.
    """
    values = np.asarray(losses, dtype=np.float64)
    studies = values.reshape(-1, *values.shape[-3:])
    inside = np.ones(studies.shape[:2], dtype=bool)
    going = np.flatnonzero(inside.sum(axis=1) > 1)
    while len(going):
        worst, behind = _worst(studies[going], inside[going], estimate)
        leaves = behind.mean > behind.half_width(2 * _SHARE * level)
        going = going[leaves]
        inside[going, worst[leaves]] = False
        going = going[inside[going].sum(axis=1) > 1]
    return inside.reshape(values.shape[:-2])


def leaving_levels(
    losses: ArrayLike, *, estimate: Callable[[ArrayLike], Estimate] = crossed_mean
) -> np.ndarray:
    """The smallest level at which each of k orderings leaves the set: (k,). 1 for the one that stays."""
    values = np.asarray(losses, dtype=np.float64)[None]
    inside = np.ones((1, values.shape[1]), dtype=bool)
    levels, so_far = np.ones(values.shape[1]), 0.0
    while inside.sum() > 1:
        worst, behind = _worst(values, inside, estimate)
        so_far = max(so_far, min(1.0, float(behind.p_above[0]) / _SHARE))
        levels[worst[0]] = so_far
        inside[0, worst[0]] = False
    return levels


def _worst(
    studies: np.ndarray, inside: np.ndarray, estimate: Callable[[ArrayLike], Estimate]
) -> tuple[np.ndarray, Estimate]:
    """Of each study, who of those inside is most clearly behind the mean of the others; and by how much."""
    left = inside.sum(axis=1)[:, None, None]
    whole = np.einsum("nk,nksb->nsb", inside, studies)
    found = [
        estimate(studies[:, one] - (whole - studies[:, one]) / (left - 1)) for one in range(inside.shape[1])
    ]
    with np.errstate(invalid="ignore", divide="ignore"):
        clearly = np.stack([one.mean / one.half_width(2 * _SHARE * LEVEL) for one in found], axis=1)
    clearly = np.where(inside, np.nan_to_num(clearly, nan=0.0), -np.inf)
    worst = clearly.argmax(axis=1)

    def chosen(name: str) -> np.ndarray:
        return np.stack([getattr(one, name) for one in found], axis=1)[np.arange(len(worst)), worst]

    squares = chosen("by_seed"), chosen("by_block"), chosen("by_both")
    return worst, Estimate(chosen("mean"), *squares, found[0].n_seeds, found[0].n_blocks)

"""Which difference a number of seeds and blocks can show, and how many more of each a given difference needs.

All from the variances of a paired difference between seeds, between blocks and of the rest, as an
earlier study has them (`crossed.Estimate.variances`). More seeds do not make up for few blocks, nor
the other way round: each has a floor of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import optimize, special

from pftools.inference.crossed import LEVEL, Estimate, Variances

_MOST_SEEDS = 1_000
_MOST_BLOCKS = 10_000_000


def visible_difference(
    variances: Variances, n_seeds: int, n_blocks: int, *, level: float = LEVEL, power: float = 0.8
) -> float:
    """The smallest true mean difference that the crossed test finds with the given power.

    Mean squares are random too, most of all that of few seeds: the power is averaged over their
        quantiles. NaN where the seeds' variance is unknown;
    infinite for one seed, which says nothing about other trainings, and for one block.
    """
    if n_seeds < 2 or n_blocks < 2:
        return math.inf
    error, widths = _errors(variances, n_seeds, n_blocks, level)
    if math.isnan(error) or error == 0:
        return error

    def missing(difference: float) -> float:
        return _share_seen(difference, error, widths) - power

    most = float(widths.max()) + 5 * error
    return float(optimize.brentq(missing, -5 * error, most, xtol=1e-6 * error))


def _errors(variances: Variances, n_seeds: int, n_blocks: int, level: float) -> tuple[float, np.ndarray]:
    """The standard error of a mean, and half widths of its interval, equally likely ones."""
    of_seeds, of_blocks, rest = variances.of_mean(n_seeds, n_blocks)
    by_seed = (of_seeds + rest) * _quantiles(n_seeds - 1, 40)[:, None]
    by_block = (of_blocks + rest) * _quantiles(n_blocks - 1, 4)[None, :]
    widths = Estimate(0.0, by_seed, by_block, rest, n_seeds, n_blocks).half_width(level)
    return math.sqrt(of_seeds + of_blocks + rest), np.asarray(widths)


def _share_seen(difference: float, error: float, widths: np.ndarray) -> float:
    """In which share of studies a true difference is found."""
    return float(special.ndtr((difference - widths) / error).mean())


@lru_cache(maxsize=1024)
def _quantiles(freedom: int, many: int) -> np.ndarray:
    """Where a mean square lies, as multiples of its expectation: so many equally likely places."""
    return np.asarray(2 * special.gammaincinv(freedom / 2, (np.arange(many) + 0.5) / many) / freedom)


@dataclass(frozen=True)
class Needed:
    """What would show a difference, each on its own and in proportion together. None: more of that alone
    never would."""

    seeds: int | None
    blocks: int | None
    both: tuple[int, int] | None


def needed_for(
    difference: float,
    variances: Variances,
    n_seeds: int,
    n_blocks: int,
    *,
    level: float = LEVEL,
    power: float = 0.8,
) -> Needed:
    """How many seeds at these blocks, how many blocks at these seeds, or how many of both in this
    proportion show a difference.

    Args:
        difference: the true mean difference, above 0.
        n_seeds, n_blocks: what there is now; the answers are totals, never less than that.
    """

    def seen(seeds: int, blocks: int) -> bool:
        if blocks < 2:
            return False
        error, widths = _errors(variances, seeds, blocks, level)
        return error == 0 or _share_seen(difference, error, widths) >= power

    seeds = max(n_seeds, 2)
    more = _smallest(lambda many: seen(many, math.ceil(n_blocks * many / seeds)), seeds, _MOST_SEEDS)
    return Needed(
        _smallest(lambda many: seen(many, n_blocks), seeds, _MOST_SEEDS),
        _smallest(lambda many: seen(seeds, many), n_blocks, _MOST_BLOCKS),
        (more, math.ceil(n_blocks * more / seeds)) if more else None,
    )


def _smallest(holds: Callable[[int], bool], start: int, most: int) -> int | None:
    """The first whole number from ``start`` for which ``holds``, which stays true once it is; None
    beyond ``most``."""
    low, high = start, start
    while not holds(high):
        if high >= most:
            return None
        low, high = high + 1, min(2 * high, most)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low

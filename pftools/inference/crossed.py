"""The mean of paired differences that vary by seed, by block and by both: its interval, its p-value
and where it varies.

``d[s, b]`` is the difference between two orderings trained with seed ``s``, on block (or question)
``b``. It is modelled as

    d[s, b] = mean + a[s] + c[b] + e[s, b]

with random ``a``, ``c`` and ``e``: another sample of trainings *and* another sample of text. The
analysis of variance of this crossed layout gives three mean squares. The variance of the mean is
``(seeds + blocks - rest) / n`` (quasi-F; Clark 1973, "The language-as-fixed-effect fallacy",
Journal of Verbal Learning and Verbal Behavior 12).

With three seeds, Satterthwaite's approximation for that sum is liberal where seeds vary a lot and
has little power where they do not. So the interval gives each part its own quantile of Student's t,
and adds them in squares (Banerjee 1960, Sankhya 22): for independent parts that has at least the
stated coverage, whatever the true variances are. (The rest is subtracted, so here it holds nearly.)
It is never narrower than the interval from blocks alone, nor, where seeds vary most, than the
interval from seeds alone. `benchmarks/verdicts.py` shows its level and its power beside
Satterthwaite's and the bootstrap's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from pftools.errors import PftoolsError
from pftools.inference.looks import LEVEL

_SMALLEST_P = 1e-300


@dataclass(frozen=True)
class Estimate:
    """A mean of paired differences, or an array of such means.

    Attributes:
        mean: the mean over seeds and blocks.
        by_seed, by_block, by_both: mean squares of the analysis of variance, each divided by seeds
            x blocks. With one seed there is only ``by_block``, and the others are 0.
        n_seeds, n_blocks: how many of each were seen.
    """

    mean: Any
    by_seed: Any
    by_block: Any
    by_both: Any
    n_seeds: int
    n_blocks: int

    @property
    def error(self) -> Any:
        """The standard error of the mean: never less than from seeds alone or from blocks alone."""
        both = self.by_seed + self.by_block - self.by_both
        return np.sqrt(np.maximum(both, np.maximum(self.by_seed, self.by_block)))

    def half_width(self, level: float | np.ndarray = LEVEL) -> Any:
        """Half of the interval that misses the mean with probability ``level`` at most."""
        blocks = _t_quantile(level, self.n_blocks - 1) ** 2 * self.by_block
        if self.n_seeds == 1:
            return np.sqrt(blocks)
        quantile = _t_quantile(level, self.n_seeds - 1) ** 2
        added = quantile * np.maximum(self.by_seed - self.by_both, 0) + blocks
        # Where seeds have the largest mean square, they alone are a valid and then the wider interval.
        alone = np.where(self.by_seed >= self.by_block, quantile * self.by_seed, 0.0)
        return np.sqrt(np.maximum(added, alone))

    def interval(self, level: float = LEVEL) -> tuple[Any, Any]:
        """The interval of the mean with coverage ``1 - level``."""
        half = self.half_width(level)
        return self.mean - half, self.mean + half

    @property
    def p(self) -> Any:
        """Two-sided p-value of no difference: the smallest level whose interval leaves 0 out. No
        floor above 1e-300."""
        size = np.abs(np.asarray(self.mean, dtype=np.float64))
        low, high = np.full(size.shape, np.log(_SMALLEST_P)), np.zeros(size.shape)
        with np.errstate(over="ignore", invalid="ignore"):
            for _ in range(
                60
            ):  # the half width falls as the level rises, so halving finds where it meets the mean
                middle = (low + high) / 2
                excluded = size > self.half_width(np.exp(middle))
                low, high = np.where(excluded, low, middle), np.where(excluded, middle, high)
        p = np.where(size > 0, np.exp(high), 1.0)
        return p if p.shape else float(p)

    @property
    def p_above(self) -> Any:
        """One-sided p-value of "the true mean is at most 0": small where the mean is clearly above."""
        return np.where(np.asarray(self.mean) > 0, np.asarray(self.p) / 2, 1 - np.asarray(self.p) / 2)

    def shifted(self, by: float) -> Estimate:
        """The same estimate of ``mean + by``."""
        return replace(self, mean=self.mean + by)

    @property
    def variances(self) -> Variances:
        """The variance components, estimated from the mean squares; what comes out negative is 0."""
        n = self.n_seeds * self.n_blocks
        if self.n_seeds == 1:
            return Variances(np.nan, self.by_block * n, 0.0)
        return Variances(
            np.maximum(self.by_seed - self.by_both, 0) * self.n_seeds,
            np.maximum(self.by_block - self.by_both, 0) * self.n_blocks,
            self.by_both * n,
        )


@dataclass(frozen=True)
class Variances:
    """Variances of a paired difference between seeds, between blocks, and of the rest. With one
    seed, ``seeds`` is unknown (NaN)."""

    seeds: Any
    blocks: Any
    rest: Any

    def of_mean(self, n_seeds: int, n_blocks: int) -> tuple[Any, Any, Any]:
        """What seeds, blocks and the rest each add to the variance of a mean over so many of them."""
        return self.seeds / n_seeds, self.blocks / n_blocks, self.rest / (n_seeds * n_blocks)

    def shares(self, n_seeds: int, n_blocks: int) -> tuple[float, float, float]:
        """The same as shares of their sum; all 0 where nothing varies."""
        parts = self.of_mean(n_seeds, n_blocks)
        whole = sum(parts)
        return tuple(float(part / whole) if whole > 0 else 0.0 for part in parts)  # type: ignore[return-value]


def crossed_mean(differences: ArrayLike) -> Estimate:
    """The mean of paired differences, with seeds and blocks both taken as samples.

    Args:
        differences: (seeds, blocks), or with leading axes (..., seeds, blocks) for many at once.

    Raises:
        PftoolsError: fewer than two blocks.
    """
    d = np.asarray(differences, dtype=np.float64)
    n_seeds, n_blocks = d.shape[-2:]
    if n_blocks < 2:
        raise PftoolsError("a difference on one block has no interval: evaluate on at least 5 blocks.")
    n = n_seeds * n_blocks
    mean, of_seeds, of_blocks = d.mean((-2, -1)), d.mean(-1), d.mean(-2)
    by_block = _sum_of_squares(of_blocks - mean[..., None]) * n_seeds / (n_blocks - 1)
    if n_seeds == 1:
        zero = np.zeros_like(by_block)
        return Estimate(mean, zero, by_block / n, zero, n_seeds, n_blocks)
    by_seed = _sum_of_squares(of_seeds - mean[..., None]) * n_blocks / (n_seeds - 1)
    rest = d - of_seeds[..., None] - of_blocks[..., None, :] + mean[..., None, None]
    by_both = np.einsum("...sb,...sb->...", rest, rest) / ((n_seeds - 1) * (n_blocks - 1))
    return Estimate(mean, by_seed / n, by_block / n, by_both / n, n_seeds, n_blocks)


def crossed_proportion(differences: ArrayLike) -> Estimate:
    """`crossed_mean` for differences of right (1) and wrong (0) answers: (..., seeds, questions),
    each -1, 0 or 1.

    Where few questions differ, their variance is estimated too small. Two made-up questions, one
    right only for the first ordering and one only for the second, mend that (Bonett and Price 2012,
    Journal of Educational and Behavioral Statistics 37). They count in the variances, not in the
    mean.
    """
    d = np.asarray(differences, dtype=np.float64)
    n_blocks = d.shape[-1]
    made_up = np.broadcast_to(np.array([1.0, -1.0]), (*d.shape[:-1], 2))
    found = crossed_mean(np.concatenate([d, made_up], axis=-1))
    more = (n_blocks + 2) / n_blocks  # the mean is over the real questions only
    squares = found.by_seed * more, found.by_block * more, found.by_both * more
    return Estimate(d.mean((-2, -1)), *squares, found.n_seeds, n_blocks)


def _t_quantile(level: float | np.ndarray, freedom: int) -> Any:
    """What Student's t exceeds, in either direction, with probability ``level``."""
    return -special.stdtrit(freedom, np.asarray(level) / 2)


def _sum_of_squares(values: np.ndarray) -> np.ndarray:
    return np.einsum("...i,...i->...", values, values)

"""Seeds where doubt remains: looks at growing numbers of seeds, which share one level between them.

Who tests after every seed and stops at the first "differs" is wrong far more often than 5%. Here
the looks are fixed beforehand and the level is spent over them in proportion to the seeds seen (the
linear spending function of Lan and DeMets 1983, Biometrika 70). A look uses its own share only
(Bonferroni), so the whole procedure errs with probability ``level`` at most, whatever the looks
have in common. Orderings that a look has ruled out get no more seeds and stay out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from pftools.inference.confidence_set import best_set
from pftools.inference.crossed import LEVEL, Estimate, crossed_mean
from pftools.inference.equivalence import all_equivalent
from pftools.inference.looks import level_of_looks, look_schedule


@dataclass(frozen=True)
class Look:
    """One look: at how many seeds, at which level, and which orderings may still be best after it."""

    n_seeds: int
    level: float
    members: tuple[str, ...]


@dataclass(frozen=True)
class Decision:
    """What the looks so far say.

    Attributes:
        looks: the looks taken.
        members: the orderings that may be best.
        next_seeds: to how many seeds each of the members has to be trained next; None where the
            procedure has ended.
        reason: why it has ended: "one is left", "equivalent" or "no more seeds"; empty where it goes on.
    """

    looks: tuple[Look, ...]
    members: tuple[str, ...]
    next_seeds: int | None
    reason: str


def decide(
    losses: Mapping[str, ArrayLike],
    *,
    start: int,
    most: int,
    margin: float | None = None,
    level: float = LEVEL,
    estimate: Callable[[ArrayLike], Estimate] = crossed_mean,
) -> Decision:
    """Take every look that the data allow, in order, and say who needs more seeds.

    It is computed anew from all losses at each call and remembers nothing, so that whoever calls
    it, and however often, the answer is the same.

    Args:
        losses: {ordering: (its seeds, blocks)}; seeds in the same order for all. Orderings that are
            out may have fewer.
        start, most: seeds at the first and at the last look.
        margin: orderings whose difference is shown to be smaller than this are equivalent, and the
            procedure ends.
    """
    values = {name: np.asarray(array, dtype=np.float64) for name, array in losses.items()}
    schedule = look_schedule(start, most)
    looks: list[Look] = []
    alive = tuple(values)
    for n_seeds, share in zip(schedule, level_of_looks(schedule, level)):
        if any(len(values[name]) < n_seeds for name in alive):
            return Decision(tuple(looks), alive, n_seeds, "")
        stacked = np.stack([values[name][:n_seeds] for name in alive])
        members = best_set(stacked, level=share, estimate=estimate)
        alive = tuple(name for name, stays in zip(alive, members) if stays)
        looks.append(Look(n_seeds, share, alive))
        if len(alive) == 1:
            return Decision(tuple(looks), alive, None, "one is left")
        if margin is not None and all_equivalent(stacked[members], margin, level=share, estimate=estimate):
            return Decision(tuple(looks), alive, None, "equivalent")
    return Decision(tuple(looks), alive, None, "no more seeds")

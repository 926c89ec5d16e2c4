"""When results are looked at while seeds are spent, and which share of the level each look uses.

Numbers only, and no numpy, so that a plan can be made without it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

LEVEL = 0.05  # the probability of an error, over all looks


def look_schedule(start: int, most: int) -> tuple[int, ...]:
    """The numbers of seeds at which the data are looked at: each half as many again as the one
    before. (3, 10) -> 3, 5, 8, 10."""
    looks = [start]
    while looks[-1] < most:
        looks.append(min(most, math.ceil(1.5 * looks[-1])))
    return tuple(looks)


def level_of_looks(looks: tuple[int, ...], level: float = LEVEL) -> tuple[float, ...]:
    """Each look's share of the level, which together are the whole."""
    before = (0, *looks[:-1])
    return tuple(level * (now - then) / looks[-1] for now, then in zip(looks, before))


@dataclass(frozen=True)
class Looks:
    """Looks from ``start`` to ``most`` seeds.

    >>> Looks(3, 10).schedule
    (3, 5, 8, 10)
    """

    start: int
    most: int

    @property
    def schedule(self) -> tuple[int, ...]:
        return look_schedule(self.start, self.most)

    def last(self, n_seeds: int) -> int:
        """The seeds of the last look that ``n_seeds`` trainings allow; before the first one, all of them."""
        return max((seeds for seeds in self.schedule if seeds <= n_seeds), default=n_seeds)

    def share(self, n_seeds: int) -> float:
        """The level of the last look that ``n_seeds`` allow; before the first one, that of the first."""
        shares = dict(zip(self.schedule, level_of_looks(self.schedule)))
        return shares[max(self.last(n_seeds), self.start)]

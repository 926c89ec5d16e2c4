"""What pooling the variance of seeds over orderings would gain, and what it would cost: a road not taken.

    python benchmarks/pooled_seeds.py --store

With three seeds, the variance between seeds has two degrees of freedom, and intervals are wide. Eight
orderings could lend each other theirs: empirical Bayes shrinks each variance to what they have in common and
adds its degrees of freedom (Smyth 2004, Statistical Applications in Genetics and Molecular Biology 3). The
cells compare each ordering with the mean of the others, as `best_set` does. Orderings vary alike, or the
first one's seeds vary 2.4 times as much. Of SmolLM2's two orderings, three seeds each had the factor 2.4 in
one study (8,192 tokens: 0.008 and 0.019 nats) and 1.1 in another (`data/results/seeds`: 0.026 and 0.023).
"""

from __future__ import annotations

import math
import zlib
from itertools import product
from typing import Any

import _harness
import numpy as np
from scipy import special, stats

from pftools.inference.crossed import LEVEL, Estimate, crossed_mean

ORDERINGS, SEEDS, BLOCKS, SHARED = 8, 3, 43, 0.5
DEVIATIONS = (0.0, 1.0, 2.0)  # of the seeds, in block errors of the mean
FACTORS = (1.0, 2.4)  # of the first ordering's deviation


def against_the_others(
    generator: np.random.Generator, studies: int, deviation: float, factor: float
) -> Estimate:
    """Equal orderings, each less the mean of the others: estimates of (studies, orderings)."""
    shape = (studies, ORDERINGS)
    by_ordering = np.array([factor] + [1.0] * (ORDERINGS - 1))[:, None, None] * deviation / math.sqrt(BLOCKS)
    losses = generator.normal(size=(*shape, SEEDS, 1)) * by_ordering
    losses = losses + generator.normal(size=(*shape, 1, BLOCKS)) * math.sqrt(SHARED)
    losses = losses + generator.normal(size=(*shape, SEEDS, BLOCKS)) * math.sqrt(1 - SHARED)
    others = (losses.sum(axis=1, keepdims=True) - losses) / (ORDERINGS - 1)
    return crossed_mean(losses - others)


def shrunk(by_seed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean squares of seeds, each moved to what the orderings of its study share, and their freedom."""
    freedom = SEEDS - 1
    logs = np.log(by_seed) - special.digamma(freedom / 2) + math.log(freedom / 2)
    spread = logs.var(axis=1, ddof=1) - special.polygamma(1, freedom / 2)
    most = ORDERINGS * freedom
    known = np.exp(np.linspace(math.log(0.2), math.log(most), 400))
    # The prior's freedom is where its own trigamma explains the spread; where nothing is left of it, all.
    prior = np.where(spread > 0, np.interp(-spread, -special.polygamma(1, known / 2), known), most)[:, None]
    centre = np.exp(logs.mean(axis=1, keepdims=True) + special.digamma(prior / 2) - np.log(prior / 2))
    return (prior * centre + freedom * by_seed) / (prior + freedom), freedom + prior


def half_width(found: Estimate, by_seed: np.ndarray, freedom: np.ndarray) -> np.ndarray:
    """`Estimate.half_width`, with other mean squares of seeds and their degrees of freedom."""
    of_seeds = stats.t.isf(LEVEL / 2, freedom) ** 2
    of_blocks = stats.t.isf(LEVEL / 2, BLOCKS - 1) ** 2 * found.by_block
    added = of_seeds * np.maximum(by_seed - found.by_both, 0) + of_blocks
    alone = np.where(by_seed >= found.by_block, of_seeds * by_seed, 0.0)
    return np.sqrt(np.maximum(added, alone))


def pooled_seeds(studies: int) -> dict[str, Any]:
    """Intervals that miss the truth, of the first ordering and of the others, and their median width."""
    cells = {}
    for deviation, factor in product(DEVIATIONS, FACTORS):
        name = f"seed deviation {deviation}, of the first {factor} times that"
        generator = np.random.default_rng(zlib.crc32(name.encode()))
        found = against_the_others(generator, studies, deviation, factor)
        halves = {
            "own": found.half_width(LEVEL),
            "pooled": half_width(found, *shrunk(found.by_seed)),
        }
        cells[name] = {
            who: {
                "first is missed": float((np.abs(found.mean) > half)[:, 0].mean()),
                "others are missed": float((np.abs(found.mean) > half)[:, 1:].mean()),
                "median half width": float(np.median(half)),
            }
            for who, half in halves.items()
        }
    return {"cells": cells}


def main() -> None:
    parser = _harness.arguments(__doc__)
    parser.add_argument("--studies", type=int, default=1000, help="simulated studies a cell")
    given = parser.parse_args()
    settings = {
        "studies": given.studies,
        "orderings": ORDERINGS,
        "seeds": SEEDS,
        "blocks": BLOCKS,
        "shared": SHARED,
    }
    _harness.report(
        "pooled seeds",
        pooled_seeds(given.studies),
        script=__file__,
        device="cpu",
        store=given.store,
        settings=settings,
    )


if __name__ == "__main__":
    main()

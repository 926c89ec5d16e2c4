"""How often a verdict is wrong, and what it can see: simulated studies in which the truth is known.

    python benchmarks/verdicts.py --store

Every cell is 1,000 studies. A paired difference d[s, b] varies by seed, by block and by both;
``seed deviation`` is given in block errors of the mean (the error that blocks alone leave at one
seed), ``shared`` is the share of the block variance that all seeds have in common. Contenders for a
pair: blocks alone (the earlier test: seeds are averaged, blocks are drawn), Satterthwaite's
quasi-F, the pigeonhole bootstrap (Owen 2007, Annals of Applied Statistics 1), and the kit's
`crossed`. For the set: the kit's `best_set`, comparisons with every single rival, and the
model confidence set (Hansen, Lunde and Nason 2011, T_max) with blocks drawn, and with seeds and blocks drawn.

Of so many cells some miss what they hold by chance: those in which the kit covers less than 94%, or holds
the best in less than 95%, are simulated once more, with ten times the studies and other random numbers.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import _harness
import numpy as np
from scipy import stats

from pftools.inference.confidence_set import best_set
from pftools.inference.crossed import crossed_mean, crossed_proportion
from pftools.inference.sequential import decide, look_schedule

LEVEL = 0.05
SEEDS = (3, 5, 10)
DEVIATIONS = (0.0, 0.5, 1.0, 2.0)
BLOCKS = (43, 256)
QUESTIONS = (200, 1000)
SHARED = (0.0, 0.5, 1.0)
DRAWS = 400
EFFECT = 2.8  # errors of the mean: what blocks alone find in 80% where seeds do not vary
_OWN, _NOISE = 0.3, 0.3  # of answers: how much an ordering leans by question, and a training
_SLOPE = 0.367  # what a unit of skill adds to an accuracy

Draw = Callable[[np.random.Generator, int], np.ndarray]

# ------------------------------------------------------------------------------------------------------------
# Simulated results: (studies, orderings, seeds, blocks)


def losses(
    generator: np.random.Generator,
    studies: int,
    *,
    orderings: int = 2,
    seeds: int,
    blocks: int,
    deviation: float,
    shared: float,
    means: np.ndarray | float = 0.0,
) -> np.ndarray:
    """Losses of every ordering, in units in which a paired difference on one block has variance 1
    at one seed."""
    shape, half = (studies, orderings), math.sqrt(0.5)  # two orderings make up a difference
    found = generator.normal(size=(*shape, seeds, 1)) * deviation / math.sqrt(blocks)
    found = found + generator.normal(size=(*shape, 1, blocks)) * math.sqrt(shared)
    found = found + generator.normal(size=(*shape, seeds, blocks)) * math.sqrt(1 - shared)
    return half * found + np.reshape(np.broadcast_to(means, orderings), (orderings, 1, 1))


def error_of_mean(*, seeds: int, blocks: int, shared: float) -> float:
    """The error of a mean paired difference where seeds do not vary."""
    return math.sqrt(shared / blocks + (1 - shared) / (seeds * blocks))


def answers(
    generator: np.random.Generator,
    studies: int,
    *,
    orderings: int = 2,
    seeds: int,
    questions: int,
    deviation: float,
    ahead: float = 0.0,
) -> np.ndarray:
    """Right (1) and wrong (0) answers: a question is answered where its ease, the ordering's own
    leaning and noise exceed 0.

    ahead: by how much the first ordering's skill is shifted.
    """
    shape = (studies, orderings)
    apart = 0.17  # the share of questions that exactly one of two trainings gets right, at these deviations
    of_seed = deviation * math.sqrt(apart / questions / 2) / _SLOPE
    skill = generator.normal(size=(studies, 1, 1, questions)) + _OWN * generator.normal(
        size=(*shape, 1, questions)
    )
    skill = skill + of_seed * generator.normal(size=(*shape, seeds, 1))
    skill = skill + _NOISE * generator.normal(size=(*shape, seeds, questions))
    skill[:, 0] += ahead
    return (skill > 0).astype(np.float64)


# ------------------------------------------------------------------------------------------------------------
# Contenders: each gives (mean, half of its 95% interval) of paired differences (studies, seeds,
# blocks)


def blocks_alone(d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The earlier test: seeds are averaged first, and only blocks are drawn. (Its bootstrap of the
    studentized mean is Student's t.)"""
    one = crossed_mean(d.mean(axis=1, keepdims=True))
    return one.mean, one.half_width(LEVEL)


def satterthwaite(d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quasi-F: the sum of mean squares with Satterthwaite's degrees of freedom, never less than the
    larger one-way variance."""
    found = crossed_mean(d)
    parts = found.by_seed**2 / (found.n_seeds - 1) + found.by_block**2 / (found.n_blocks - 1)
    parts = parts + found.by_both**2 / ((found.n_seeds - 1) * (found.n_blocks - 1))
    return found.mean, found.error * stats.t.isf(LEVEL / 2, found.error**4 / parts)


def pigeonhole(d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Seeds and blocks are drawn with replacement, each on its own; twice the deviation of the
    means so drawn."""
    return d.mean((1, 2)), stats.norm.isf(LEVEL / 2) * _drawn_means(d).std(axis=-1)


def crossed(d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The kit's."""
    found = crossed_mean(d)
    return found.mean, found.half_width(LEVEL)


def crossed_answers(d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The kit's, for answers."""
    found = crossed_proportion(d)
    return found.mean, found.half_width(LEVEL)


def _drawn_means(values: np.ndarray, *, draw_seeds: bool = True) -> np.ndarray:
    """(..., draws) means of resampled seeds and blocks of (..., seeds, blocks); the same draws for all."""
    generator = np.random.default_rng(0)
    seeds, blocks = values.shape[-2:]
    by_block = generator.multinomial(blocks, np.full(blocks, 1 / blocks), DRAWS) / blocks
    by_seed = np.full((DRAWS, seeds), 1 / seeds)
    if draw_seeds:
        by_seed = generator.multinomial(seeds, np.full(seeds, 1 / seeds), DRAWS) / seeds
    return np.einsum("...sr,rs->...r", values @ by_block.T, by_seed)


def every_rival(values: np.ndarray) -> np.ndarray:
    """(studies, k) whom no single rival beats at level / (k - 1), one-sided, with the kit's `crossed` (Hsu
    1981)."""
    d = values[:, :, None] - values[:, None]
    found = crossed_mean(d)
    return ~(found.mean > found.half_width(2 * LEVEL / (values.shape[1] - 1))).any(axis=-1)


def model_confidence_set(values: np.ndarray, *, draw_seeds: bool) -> np.ndarray:
    """(studies, k) members of Hansen, Lunde and Nason's set with T_max, of losses (studies, k,
    seeds, blocks)."""
    means, drawn = values.mean((2, 3)), _drawn_means(values, draw_seeds=draw_seeds)
    inside = np.ones(means.shape, dtype=bool)
    going = np.ones(len(means), dtype=bool)
    for _ in range(means.shape[1] - 1):
        weight = inside / inside.sum(axis=1, keepdims=True)
        apart = means - (means * weight).sum(axis=1, keepdims=True)
        noise = drawn - means[..., None]
        noise = noise - (noise * weight[..., None]).sum(axis=1, keepdims=True)
        error = np.maximum(noise.std(axis=-1), 1e-12)
        statistic = np.where(inside, apart / error, -np.inf)
        under_equality = np.where(inside[..., None], noise / error[..., None], -np.inf).max(axis=1)
        p = (under_equality >= statistic.max(axis=1)[:, None]).mean(axis=1)
        going &= (p < LEVEL) & (inside.sum(axis=1) > 1)
        inside[np.flatnonzero(going), statistic.argmax(axis=1)[going]] = False
    return inside


# ------------------------------------------------------------------------------------------------------------
# The claims


def pairs_of_losses(studies: int) -> dict[str, Any]:
    """False verdicts, coverage and power of every contender, over seeds x blocks x deviation x shared."""
    contenders = {
        "blocks alone": blocks_alone,
        "satterthwaite": satterthwaite,
        "pigeonhole": pigeonhole,
        "crossed": crossed,
    }
    cells = {}
    for name, deviation, setting in _pair_cells():
        ahead = EFFECT * error_of_mean(**setting)
        values = losses(_generator(name), studies, deviation=deviation, **setting)
        d = values[:, 0] - values[:, 1]
        cells[name] = {who: _rates(test, d, d + ahead, ahead) for who, test in contenders.items()}
    return {"worst": _worst(cells), "cells": cells}


def _pair_cells() -> Iterator[tuple[str, float, dict[str, Any]]]:
    """(name, seed deviation, setting) of every cell of `pairs_of_losses`."""
    for seeds, blocks, deviation, shared in product(SEEDS, BLOCKS, DEVIATIONS, SHARED):
        name = f"{seeds} seeds, {blocks} blocks, seed deviation {deviation}, shared {shared}"
        yield name, deviation, {"seeds": seeds, "blocks": blocks, "shared": shared}


def pairs_of_answers(studies: int) -> dict[str, Any]:
    """The same for right and wrong answers."""
    contenders = {"questions alone": blocks_alone, "satterthwaite": satterthwaite, "crossed": crossed_answers}
    cells = {}
    for seeds, questions, deviation in product(SEEDS, QUESTIONS, DEVIATIONS):
        name = f"{seeds} seeds, {questions} questions, seed deviation {deviation}"
        setting = {"seeds": seeds, "questions": questions, "deviation": deviation}
        ahead = 2.8 * math.sqrt((0.05 + 0.12 / seeds) / questions) / _SLOPE
        generator = _generator(name)
        null = answers(generator, studies, **setting)
        real = answers(generator, studies, ahead=ahead, **setting)
        truth = _true_difference(ahead, deviation, questions)
        differences = null[:, 0] - null[:, 1], real[:, 0] - real[:, 1]
        cells[name] = {who: _rates(test, *differences, truth) for who, test in contenders.items()}
    return {"worst": _worst(cells), "cells": cells}


def _true_difference(ahead: float, deviation: float, questions: int) -> float:
    """The difference of two accuracies over all seeds and questions: the skill is normal, so that
    it is exact."""
    of_seed = deviation * math.sqrt(0.17 / questions / 2) / _SLOPE
    spread = math.sqrt(1 + _OWN**2 + _NOISE**2 + of_seed**2)
    return float(stats.norm.cdf(ahead / spread) - 0.5)


def sets(studies: int) -> dict[str, Any]:
    """How often the set holds the best, and its size, with 2 and 8 orderings: all equal, and a
    ladder of ten per cent steps."""
    contenders: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "kit": best_set,
        "every rival": every_rival,
        "bootstrap of blocks": lambda values: model_confidence_set(values, draw_seeds=False),
        "bootstrap of seeds and blocks": lambda values: model_confidence_set(values, draw_seeds=True),
    }
    cells = {}
    for name, setting in _set_cells():
        found: dict[str, list[np.ndarray]] = {who: [] for who in contenders}
        for size in _portions(studies, 50):
            values = losses(_generator(f"{name} {size}"), len(size), **setting)
            for who, choose in contenders.items():
                found[who].append(choose(values))
        cells[name] = {who: _set_rates(np.concatenate(parts)) for who, parts in found.items()}
    worst = {who: min(cell[who]["holds the best"] for cell in cells.values()) for who in contenders}
    return {"least often held": worst, "cells": cells}


def _set_cells() -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, the arguments of `losses`) of every cell of `sets`."""
    for orderings, seeds, blocks, deviation, ladder in product((2, 8), SEEDS, BLOCKS, DEVIATIONS, (0.0, 2.0)):
        name = (
            f"{orderings} orderings {ladder} apart, {seeds} seeds, {blocks} blocks, "
            f"seed deviation {deviation}"
        )
        setting = {"seeds": seeds, "blocks": blocks, "shared": 0.5}
        means = np.arange(orderings) * ladder * error_of_mean(**setting)
        yield name, {"orderings": orderings, "deviation": deviation, "means": means, **setting}


def again(studies: int) -> dict[str, Any]:
    """The cells of the stored results in which the kit misses, anew with ten times the studies."""
    pairs, best = _stored("pairs of losses", studies), _stored("sets", studies)
    covers = {}
    for name, deviation, setting in _pair_cells():
        if pairs[name]["crossed"]["coverage"] < 0.94:
            values = losses(_generator(f"again {name}"), 10 * studies, deviation=deviation, **setting)
            mean, half = crossed(values[:, 0] - values[:, 1])
            covers[name] = float(np.mean(np.abs(mean) <= half))
    holds = {}
    for name, setting in _set_cells():
        if best[name]["kit"]["holds the best"] < 1 - LEVEL:
            parts = [
                best_set(losses(_generator(f"again {name} {size}"), len(size), **setting))
                for size in _portions(10 * studies, 50)
            ]
            holds[name] = _set_rates(np.concatenate(parts))["holds the best"]
    return {"coverage of pairs": covers, "sets hold the best": holds}


def _stored(claim: str, studies: int) -> dict[str, Any]:
    """The cells of an earlier claim."""
    found = _harness.stored(f"verdicts: {claim}", script=__file__, device="cpu", settings=_settings(studies))
    if not found:
        raise SystemExit(f"there are no stored results of {claim!r} yet: run it with --store first.")
    cells: dict[str, Any] = found["cells"]
    return cells


def looks(studies: int) -> dict[str, Any]:
    """The procedure that adds seeds where doubt remains, beside ten seeds for all, and beside
    looking each time at the whole level."""
    cells, start, most = {}, 3, 10
    schedule = look_schedule(start, most)
    for orderings, blocks, deviation, ladder in product((2, 8), BLOCKS, DEVIATIONS, (0.0, 2.0)):
        name = f"{orderings} orderings {ladder} apart, {blocks} blocks, seed deviation {deviation}"
        setting = {"seeds": most, "blocks": blocks, "shared": 0.5}
        means = np.arange(orderings) * ladder * error_of_mean(**setting)
        held = trained = ended = careless = 0
        sizes, fixed = [], []
        for part in _portions(studies, 50):
            values = losses(
                _generator(f"{name} {part}"),
                len(part),
                orderings=orderings,
                deviation=deviation,
                means=means,
                **setting,
            )
            fixed.append(best_set(values, level=LEVEL))
            each = [best_set(values[:, :, :seeds], level=LEVEL)[:, 0] for seeds in schedule]
            careless += int(np.sum(~np.all(each, axis=0)))
            for one in values:
                decision = decide(dict(zip(map(str, range(orderings)), one)), start=start, most=most)
                held += "0" in decision.members
                ended += len(decision.members) == 1
                sizes.append(len(decision.members))
                trained += sum(_trainings(decision.looks, orderings))
        cells[name] = {
            "holds the best": held / studies,
            "ends with one": ended / studies,
            "size": float(np.mean(sizes)),
            "seeds saved": 1 - trained / (studies * orderings * most),
            "ten seeds for all": _set_rates(np.concatenate(fixed)),
            "whole level at each look: loses the best": careless / studies,
        }
    return {
        "least often held": min(cell["holds the best"] for cell in cells.values()),
        "cells": cells,
    }


def _trainings(taken: tuple[Any, ...], orderings: int) -> Iterator[int]:
    """How many trainings each look added."""
    alive, before = orderings, 0
    for look in taken:
        yield alive * (look.n_seeds - before)
        alive, before = len(look.members), look.n_seeds


def _rates(
    test: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    null: np.ndarray,
    real: np.ndarray,
    truth: float,
) -> dict[str, float]:
    mean, half = test(null)
    found, width = test(real)
    return {
        "false": float(np.mean(np.abs(mean) > half)),
        "coverage": float(np.mean(np.abs(found - truth) <= width)),
        "power": float(np.mean(found > width)),
    }


def _set_rates(members: np.ndarray) -> dict[str, float]:
    return {"holds the best": float(members[:, 0].mean()), "size": float(members.sum(axis=1).mean())}


def _worst(cells: dict[str, Any]) -> dict[str, Any]:
    """Of each contender, the highest false rate and the lowest coverage, at three seeds and at more."""
    worst: dict[str, Any] = {}
    for label, chosen in (("3 seeds", True), ("more seeds", False)):
        part = [cell for name, cell in cells.items() if name.startswith("3 seeds") == chosen]
        worst[label] = {
            who: {
                "false": max(cell[who]["false"] for cell in part),
                "coverage": min(cell[who]["coverage"] for cell in part),
            }
            for who in part[0]
        }
    return worst


def _generator(name: str) -> np.random.Generator:
    """A cell's own random numbers, the same whichever cells run."""
    return np.random.default_rng(zlib.crc32(name.encode()))


def _portions(studies: int, size: int) -> list[range]:
    return [range(start, min(start + size, studies)) for start in range(0, studies, size)]


CLAIMS = {
    "pairs of losses": pairs_of_losses,
    "pairs of answers": pairs_of_answers,
    "sets": sets,
    "looks": looks,
    "again": again,
}


def _settings(studies: int) -> dict[str, Any]:
    return {"studies": studies, "level": LEVEL, "draws": DRAWS}


def main() -> None:
    parser = _harness.arguments(__doc__)
    parser.add_argument("--studies", type=int, default=1000, help="simulated studies a cell")
    parser.add_argument("--only", choices=CLAIMS, help="one claim; default: all")
    given = parser.parse_args()
    for name, claim in CLAIMS.items():
        if given.only in (None, name):
            _harness.report(
                f"verdicts: {name}",
                claim(given.studies),
                script=__file__,
                device="cpu",
                store=given.store,
                settings=_settings(given.studies),
            )


if __name__ == "__main__":
    main()

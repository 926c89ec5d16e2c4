"""Block losses as tables: those of other programs, and those that come with pftools (`data/results`).

A CSV has the columns ``block`` and ``nll`` (mean loss of a block, in nats a token) and, where there are
several trainings, ``seed``. Both sides have to be of the same blocks; they are paired by seed and block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from pftools.compare import other_results
from pftools.compare.verdicts import p_in_words, perplexity_in_words, ratio_in_words
from pftools.errors import PftoolsError
from pftools.inference.verdict import (
    DIFFERS,
    EQUIVALENT,
    Judged,
    about_the_difference,
    about_the_doubt,
    judge_losses,
)

_COLUMNS = {"block", "nll"}
_FEWEST = 5
_SIZE = 0.01  # the difference whose cost is told where none was found: 1%


@dataclass(frozen=True)
class LossComparison:
    """Two sets of block losses.

    Attributes:
        names: of the two sides. perplexities: theirs, over all seeds and blocks.
        margin: a ratio less 1 within which a difference does not matter: 0.01 is 1%.
    """

    names: tuple[str, str]
    perplexities: tuple[float, float]
    judged: Judged
    margin: float | None = None

    @property
    def kind(self) -> str:
        """ "differs", "equivalent" or "cannot be told apart"."""
        limit = None if self.margin is None else math.log1p(self.margin)
        return self.judged.kind(self.judged.p, limit)

    @property
    def sentence(self) -> str:
        """The verdict in words, with its numbers."""
        one, other = self.names
        if self.kind == DIFFERS:
            meaning = about_the_difference(self.judged, "ways of training")
            return f"{one} and {other} differ in perplexity ({self._numbers()}): {meaning}."
        if self.kind == EQUIVALENT:
            return (
                f"{one} and {other} are equivalent within {100 * (self.margin or 0):g}% ({self._numbers()})."
            )
        size = math.log1p(_SIZE)
        doubt = about_the_doubt(self.judged, size, f"{_SIZE:.0%}", things="ways of training")
        return f"{one} and {other} cannot be told apart ({self._numbers()}): {doubt}."

    def _numbers(self) -> str:
        ratio, low, high = (
            ratio_in_words(_exp(value)) for value in (self.judged.mean, *self.judged.interval)
        )
        first, second = (perplexity_in_words(value) for value in self.perplexities)
        seeds = f", {self.judged.n_seeds} seeds" if self.judged.n_seeds > 1 else ""
        return (
            f"{first} and {second}, ratio {ratio} [{low}, {high}], "
            f"{self.judged.estimate.n_blocks:,} blocks{seeds}, p {p_in_words(self.judged.p)}"
        )


def holds_losses(path: str | Path) -> bool:
    """Whether a file is a CSV whose first line names block and nll."""
    path = Path(path)
    if path.suffix != ".csv" or not path.is_file():
        return False
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return {name.strip() for name in file.readline().split(",")} >= _COLUMNS


def sentences(
    first: str | Path, second: str | Path, *, metric: str | None = None, margin: float | None = None
) -> list[str]:
    """What `pftools compare` says: of two tables of block losses, or of answers, a sentence a task.

    The arguments are those of `other_results.compare_results`.
    """
    if holds_losses(first) and holds_losses(second):
        return [compare_losses(first, second, margin=margin).sentence]
    found = other_results.compare_results(first, second, metric=metric, margin=margin)
    return [comparison.sentence for comparison in found]


def compare_losses(first: str | Path, second: str | Path, *, margin: float | None = None) -> LossComparison:
    """Compare two tables of block losses.

    With one training a side it is the paired t-test over blocks, and the verdict is about two models; with
    several, seeds and blocks are both taken as samples.

    Raises:
        PftoolsError: a table that cannot be read, or trainings or blocks that are not those of the other.
    """
    paths = Path(first), Path(second)
    one, other = (read_losses(path) for path in paths)
    if not (one.index.equals(other.index) and one.columns.equals(other.columns)):
        raise PftoolsError(
            f"{first} has {_of(one)}, and {second} has {_of(other)}: give the same seeds and blocks on both "
            "sides."
        )
    judged = judge_losses(one, other)
    names = (paths[0].name, paths[1].name) if paths[0].name != paths[1].name else (str(first), str(second))
    perplexities = (_exp(one.to_numpy().mean()), _exp(other.to_numpy().mean()))
    return LossComparison(names, perplexities, judged, margin)


def _exp(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(value))


def _of(table: pd.DataFrame) -> str:
    seeds = ", ".join(map(str, table.index))
    return f"{table.shape[1]} blocks of the seeds {seeds}"


def read_losses(path: Path) -> pd.DataFrame:
    """Losses in nats a token: a row a seed, a column a block.

    Raises:
        PftoolsError: no CSV; a loss that is missing, infinite, no number or there twice; or fewer than five
            blocks.
    """
    table = other_results.read_csv(path)
    table["seed"] = table["seed"] if "seed" in table else 0
    repeated = table.duplicated(["seed", "block"])
    if repeated.any():
        seed, block = (table.loc[repeated, name].iloc[0] for name in ("seed", "block"))
        raise PftoolsError(
            f"{path} has block {block} of the seed {seed} twice: a file holds the losses "
            "of one way of training, with a column seed where there are several."
        )
    table["nll"] = pd.to_numeric(table["nll"], errors="coerce")
    grid = table.pivot(index="seed", columns="block", values="nll")
    missing = ~grid.apply(np.isfinite)
    if missing.any(axis=None):
        place, column = divmod(int(missing.to_numpy().argmax()), missing.shape[1])
        seed, block = grid.index[place], grid.columns[column]
        raise PftoolsError(f"{path} has no loss for block {block} of the seed {seed}: each needs a number.")
    if grid.shape[1] < _FEWEST:
        raise PftoolsError(f"{path} has {grid.shape[1]} blocks: at least {_FEWEST} are needed to compare.")
    return grid

"""The answer of a study: by sparsity and metric, the set of entries that holds the best one.

Everything that can be compared with the best entry takes part (`entries`): the same asked and the same
measured sparsity, and not collapsed. With several seeds, seeds and text are drawn, and the set is about
the orderings. With one seed it is about the models that were trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from pftools.compare.entries import best_entry, entries, rows_by_entry, sparsity_words
from pftools.compare.paired import ALPHA, FEWEST_BLOCKS
from pftools.inference.confidence_set import leaving_levels
from pftools.inference.crossed import Estimate, crossed_mean, crossed_proportion
from pftools.inference.equivalence import all_equivalent

PERPLEXITY = "perplexity"


@dataclass(frozen=True)
class BestSet:
    """Which entries may be the best of one sparsity by one metric.

    Attributes:
        metric: "perplexity" or a task. asked: the sparsity. where: the same in words.
        labels: of the entries that took part, the best found first. leaves: the level at which each
            leaves the set, 1 for those that never do.
        n_seeds, n: how many seeds, and blocks or questions, all of them have.
        equivalent: whether those in the set are shown to be alike within the margin.
        margin: of the reader; None where none was set.
    """

    metric: str
    asked: float
    where: str
    labels: tuple[str, ...]
    leaves: tuple[float, ...]
    n_seeds: int
    n: int
    equivalent: bool = False
    margin: float | None = None

    @property
    def members(self) -> tuple[str, ...]:
        """The entries that may be the best, with 95% confidence."""
        return tuple(label for label, level in zip(self.labels, self.leaves) if level > ALPHA)


def best_sets(
    results: pd.DataFrame,
    block_nll: Mapping[str, ArrayLike],
    samples: Mapping[str, pd.DataFrame] | None = None,
    *,
    margin: float | None = None,
) -> list[BestSet]:
    """The set of every sparsity, by perplexity and then by each task; the highest sparsity first.

    Args:
        results: as for `entries`.
        block_nll: {run: mean loss of each block, in nats a token}.
        samples: {run: DataFrame(task, subject, question, correct)}.
        margin: perplexities within this ratio less 1, and accuracies within this share of questions, are
            the same for the reader: 0.01 is 1%, or one point.
    """
    found = []
    for asked, where, frames in _compared(results):
        losses = {label: [block_nll[run] for run in frame["run"]] for label, frame in frames.items()}
        lengths = {len(np.asarray(values)) for rows in losses.values() for values in rows}
        if len(lengths) == 1 and lengths.pop() >= FEWEST_BLOCKS:
            arrays = {label: np.asarray(rows, dtype=np.float64) for label, rows in losses.items()}
            limit = None if margin is None else float(np.log1p(margin))
            found.append(_set_of(PERPLEXITY, asked, where, arrays, crossed_mean, limit, margin))
        for task, wrong in _wrong_answers(frames, samples or {}):
            found.append(_set_of(task, asked, where, wrong, crossed_proportion, margin, margin))
    return found


def _compared(results: pd.DataFrame) -> Iterator[tuple[float, str, dict[str, pd.DataFrame]]]:
    """(asked, in words, {label: rows by seed}) of at least two entries that can be compared."""
    table = entries(results)
    if not len(table):
        return
    frames = [rows.set_index("seed") for _, rows in rows_by_entry(results)]
    words = sparsity_words(table["asked"])
    for asked in sorted(table["asked"].unique().tolist(), reverse=True):
        best = best_entry(table, asked)
        if best is None:
            continue
        alike = table[(table["asked"] == asked) & (table["level"] == best["level"]) & ~table["collapsed"]]
        seeds = set.intersection(*(set(frames[place].index) for place in alike.index))
        if len(alike) > 1 and seeds:
            chosen = sorted(seeds)
            yield (
                asked,
                words[asked],
                {row["label"]: frames[place].loc[chosen] for place, row in alike.iterrows()},
            )


def _wrong_answers(
    frames: dict[str, pd.DataFrame], samples: Mapping[str, pd.DataFrame]
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """By task {label: (seeds, questions) 1 where wrong}, of the questions that all runs have answered."""
    runs = [run for frame in frames.values() for run in frame["run"]]
    if not all(run in samples for run in runs):
        return
    answers = pd.concat(
        [
            _outcomes(samples[run]).assign(entry=label, seed=seed)
            for label, frame in frames.items()
            for seed, run in zip(frame.index, frame["run"])
        ]
    )
    for task, given in answers.groupby("task", sort=False):
        grid = given.pivot(
            index=["subject", "question"], columns=["entry", "seed"], values="correct"
        ).dropna()
        if len(grid):
            yield str(task), {label: 1 - grid[label].to_numpy().T for label in frames}


def _outcomes(samples: pd.DataFrame) -> pd.DataFrame:
    kept = samples.dropna(subset=["correct"])
    subject = kept["subject"] if "subject" in kept else kept["task"]
    return kept.assign(subject=subject)[["task", "subject", "question", "correct"]]


def _set_of(
    metric: str,
    asked: float,
    where: str,
    losses: dict[str, np.ndarray],
    estimate: Callable[[ArrayLike], Estimate],
    limit: float | None,
    margin: float | None,
) -> BestSet:
    labels = sorted(losses, key=lambda label: float(losses[label].mean()))
    stacked = np.stack([losses[label] for label in labels])
    leaves = leaving_levels(stacked, estimate=estimate)
    inside, n_seeds = leaves > ALPHA, stacked.shape[1]
    alike = (
        limit is not None
        and n_seeds > 1
        and inside.sum() > 1
        and all_equivalent(stacked[inside], limit, estimate=estimate)
    )
    return BestSet(
        metric, asked, where, tuple(labels), tuple(leaves.tolist()), n_seeds, stacked.shape[2], alike, margin
    )


# ------------------------------------------------------------------------------------------------------------
# In words


def set_in_words(found: BestSet) -> str:
    """The answer in a sentence or two."""
    members, others = found.members, len(found.labels) - len(found.members)
    by = "lowest perplexity" if found.metric == PERPLEXITY else f"most right answers to {found.metric}"
    unit = "blocks" if found.metric == PERPLEXITY else "questions"
    drawn = f"{found.n_seeds} seeds, " if found.n_seeds > 1 else ""
    basis = f"95% confidence, {drawn}{found.n:,} {unit}"
    if found.n_seeds == 1:
        return (
            f"At {found.where}, of these {len(found.labels)} models the {by} on other text of this kind has "
            f"{_one_of(members)} ({basis}); which ordering is best, one training each cannot say."
        )
    rest = f"; the other {others} are behind" if others > 1 else "; the other is behind" if others else ""
    sentence = f"At {found.where}, the {by} has {_one_of(members)} ({basis}){rest}."
    if found.equivalent and found.margin is not None:
        sentence += f" Those {len(members)} are equivalent within {_margin_in_words(found)}."
    return sentence


def _margin_in_words(found: BestSet) -> str:
    per_cent = f"{100 * (found.margin or 0):g}"
    return f"{per_cent}%" if found.metric == PERPLEXITY else f"{per_cent} points"


def _one_of(labels: tuple[str, ...]) -> str:
    if len(labels) == 1:
        return labels[0]
    named = ", ".join(labels[:-1])
    return f"one of {named} and {labels[-1]}" if len(labels) < 7 else f"one of {len(labels)}"

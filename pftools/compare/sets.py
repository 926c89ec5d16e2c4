"""The answer of a study: by sparsity and metric, the set of entries that holds the best one.

Everything that can be compared with the best entry takes part (`entries`): the same asked and the same
measured sparsity, and not collapsed. With several seeds, seeds and text are drawn, and the set is about
the orderings. With one seed it is about the models that were trained. Where seeds are spent one look after
the other, the set is what the looks have left, at the level that they share (`inference.sequential`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from pftools.compare.entries import best_entry, entries, rows_by_entry, sparsity_words
from pftools.compare.paired import ALPHA, FEWEST_BLOCKS
from pftools.inference.confidence_set import leaving_levels
from pftools.inference.crossed import Estimate, crossed_mean, crossed_proportion
from pftools.inference.equivalence import all_equivalent
from pftools.inference.looks import Looks
from pftools.inference.sequential import Decision, Look, decide

PERPLEXITY = "perplexity"


@dataclass(frozen=True)
class BestSet:
    """Which entries may be the best of one sparsity by one metric.

    Attributes:
        metric: "perplexity" or a task. asked: the sparsity. where: the same in words.
        labels: of the entries that took part, the best found first. leaves: the level at which each
            leaves the set, 1 for those that never do.
        n_seeds, n: how many seeds, and blocks or questions, all of them have.
        unequal: whether some have more seeds, which are left out.
        equivalent: whether those in the set are shown to be alike within the margin.
        margin: of the reader; None where none was set.
        looks: those that were taken, where seeds are spent one look after the other; then ``leaves`` is
            empty.
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
    looks: tuple[Look, ...] = ()
    unequal: bool = False

    @property
    def members(self) -> tuple[str, ...]:
        """The entries that may be the best, with 95% confidence."""
        if self.looks:
            return tuple(label for label in self.labels if label in self.looks[-1].members)
        return tuple(label for label, level in zip(self.labels, self.leaves) if level > ALPHA)


@dataclass(frozen=True)
class Spent:
    """What the looks say at one sparsity, by perplexity, and the evaluations of each entry by its label."""

    decision: Decision
    runs: dict[str, tuple[str, ...]]


def decisions(
    results: pd.DataFrame, block_nll: Mapping[str, ArrayLike], *, looks: Looks, margin: float | None = None
) -> dict[float, Spent]:
    """{asked sparsity: which entries need more seeds}; the arguments are those of `best_sets`."""
    found = {}
    for asked, _, frames, _ in _compared(results, looks):
        losses = _losses(frames, block_nll)
        if losses is not None:
            decision = decide(
                losses,
                start=looks.start,
                most=looks.most,
                margin=None if margin is None else np.log1p(margin),
            )
            found[asked] = Spent(decision, {label: tuple(frame["run"]) for label, frame in frames.items()})
    return found


def best_sets(
    results: pd.DataFrame,
    block_nll: Mapping[str, ArrayLike],
    samples: Mapping[str, pd.DataFrame] | None = None,
    *,
    margin: float | None = None,
    looks: Looks | None = None,
) -> list[BestSet]:
    """The set of every sparsity, by perplexity and then by each task; the highest sparsity first.

    Args:
        results: as for `entries`.
        block_nll: {run: mean loss of each block, in nats a token}.
        samples: {run: DataFrame(task, subject, question, correct)}.
        margin: perplexities within this ratio less 1, and accuracies within this share of questions, are
            the same for the reader: 0.01 is 1%, or one point.
        looks: where seeds were spent one look after the other. Perplexity decided who got more; every metric
            is looked at with as many seeds, each at its own 5%.
    """
    found = []
    for asked, where, frames, unequal in _compared(results, looks):
        sets = []
        losses = _losses(frames, block_nll)
        if losses is not None:
            limit = None if margin is None else float(np.log1p(margin))
            sets.append(_set_of(PERPLEXITY, asked, where, losses, crossed_mean, limit, margin, looks))
        for task, wrong in _wrong_answers(frames, samples or {}):
            sets.append(_set_of(task, asked, where, wrong, crossed_proportion, margin, margin, looks))
        found += [replace(one, unequal=unequal) for one in sets]
    return found


def _losses(
    frames: dict[str, pd.DataFrame], block_nll: Mapping[str, ArrayLike]
) -> dict[str, np.ndarray] | None:
    """{label: (seeds, blocks)}; None where they are not of the same blocks, or too few."""
    losses = {label: [block_nll[run] for run in frame["run"]] for label, frame in frames.items()}
    lengths = {len(np.asarray(values)) for rows in losses.values() for values in rows}
    if len(lengths) != 1 or lengths.pop() < FEWEST_BLOCKS:
        return None
    return {label: np.asarray(rows, dtype=np.float64) for label, rows in losses.items()}


def _compared(
    results: pd.DataFrame, looks: Looks | None = None
) -> Iterator[tuple[float, str, dict[str, pd.DataFrame], bool]]:
    """(asked, in words, {label: rows by seed}, whether seeds were left out) of at least two entries that can
    be compared.

    All have the same seeds; with looks, each as many of the first ones as it has.
    """
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
        own = {row["label"]: frames[place] for place, row in alike.iterrows()}
        shared = _first_seeds(own) if looks else _common_seeds(own)
        if len(own) > 1 and all(shared.values()):
            kept = {label: own[label].loc[seeds] for label, seeds in shared.items()}
            yield asked, words[asked], kept, any(len(own[label]) > len(kept[label]) for label in kept)


def _common_seeds(frames: dict[str, pd.DataFrame]) -> dict[str, list[int]]:
    common = sorted(set.intersection(*(set(frame.index) for frame in frames.values())))
    return dict.fromkeys(frames, common)


def _first_seeds(frames: dict[str, pd.DataFrame]) -> dict[str, list[int]]:
    """The seeds of each, up to the first that it lacks of those that any has."""
    every = sorted(set.union(*(set(frame.index) for frame in frames.values())))
    found: dict[str, list[int]] = {}
    for label, frame in frames.items():
        own = set(frame.index)
        found[label] = list(itertools.takewhile(own.__contains__, every))
    return found


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
    looks: Looks | None,
) -> BestSet:
    labels = tuple(sorted(losses, key=lambda label: float(losses[label].mean())))
    if looks is not None and all(len(rows) >= looks.start for rows in losses.values()):
        taken = decide(losses, start=looks.start, most=looks.most, margin=limit, estimate=estimate)
        n_seeds, n = taken.looks[-1].n_seeds, losses[labels[0]].shape[1]
        alike = taken.reason == "equivalent"
        return BestSet(metric, asked, where, labels, (), n_seeds, n, alike, margin, taken.looks)
    fewest = min(len(rows) for rows in losses.values())
    losses = {label: rows[:fewest] for label, rows in losses.items()}
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
        metric, asked, where, labels, tuple(leaves.tolist()), n_seeds, stacked.shape[2], alike, margin
    )


# ------------------------------------------------------------------------------------------------------------
# In words


def set_in_words(found: BestSet, *, value: str = "") -> str:
    """The answer in a sentence or two.

    Args:
        found: what `best_sets` finds.
        value: what the best one reached, told where the set holds it alone.
    """
    members, others = found.members, len(found.labels) - len(found.members)
    best = "the lowest perplexity" if found.metric == PERPLEXITY else f"most right answers to {found.metric}"
    reached = f", {value}" if value and len(members) == 1 else ""
    unit = "blocks" if found.metric == PERPLEXITY else "questions"
    drawn = f"{found.n_seeds} seeds, " if found.n_seeds > 1 else ""
    if found.unequal:
        drawn = (
            f"the {found.n_seeds} seeds that all have, "
            if found.n_seeds > 1
            else "the one seed that all have, "
        )
    if found.looks:
        seeds = [str(look.n_seeds) for look in found.looks]
        drawn = f"at the first look, {seeds[0]} seeds, "
        if len(seeds) > 1:
            drawn = f"over looks at {', '.join(seeds[:-1])} and {seeds[-1]} seeds, "
    basis = f"95% confidence, {drawn}{found.n:,} {unit}"
    if found.n_seeds == 1:
        return (
            f"At {found.where}, of these {len(found.labels)} models, {_one_of(members)} has {best} on other "
            f"{'text' if found.metric == PERPLEXITY else 'questions'} of this kind{reached} ({basis}); "
            "which ordering is best, one training each cannot say."
        )
    rest = f"; the other {others} are behind" if others > 1 else "; the other is behind" if others else ""
    if len(found.looks) > 1:
        rest = _left_in_words(found)
    sentence = f"At {found.where}, {_one_of(members)} has {best}{reached} ({basis}){rest}."
    if found.equivalent and found.margin is not None:
        sentence += f" Those {len(members)} are equivalent within {_margin_in_words(found)}."
    return sentence


def _left_in_words(found: BestSet) -> str:
    """Who was out after which look, as far as anyone was."""
    left, inside = [], set(found.labels)
    for look in found.looks:
        out = [label for label in found.labels if label in inside - set(look.members)]
        inside &= set(look.members)
        if out:
            left.append(f"{' and '.join(out)} after {look.n_seeds} seeds")
    return f"; out: {', '.join(left)}" if left else ""


def _margin_in_words(found: BestSet) -> str:
    per_cent = f"{100 * (found.margin or 0):g}"
    return f"{per_cent}%" if found.metric == PERPLEXITY else f"{per_cent} points"


def _one_of(labels: tuple[str, ...]) -> str:
    if len(labels) == 1:
        return labels[0]
    named = ", ".join(labels[:-1])
    return f"one of {named} and {labels[-1]}" if len(labels) < 7 else f"one of {len(labels)}"

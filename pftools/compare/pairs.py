"""Every pair of entries at equal sparsity, compared by perplexity and by task.

A pair is two distinct entries of the same asked sparsity, over the seeds that both have. It is tested where
their measured sparsities are alike too. p-values are corrected over all tested pairs (Holm).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from pftools.compare.entries import best_entry, entries, geometric_mean, rows_by_entry, sparsity_words
from pftools.compare.paired import (
    ALPHA,
    FEWEST_BLOCKS,
    Comparison,
    compare_accuracy,
    compare_perplexity,
    holm,
    paired,
    smallest_visible_difference,
    smallest_visible_ratio,
)
from pftools.compare.verdicts import perplexity_verdict, task_verdict
from pftools.inference.looks import Looks
from pftools.inference.verdict import (
    DIFFERS,
    EQUIVALENT,
    Judged,
    about_the_difference,
    about_the_doubt,
    judge_answers,
    judge_losses,
    points,
)

_PERPLEXITY_SIZE = 0.01  # the difference whose price is told where none was found: 1%,
_ACCURACY_SIZE = 0.02  # or two points

COLUMNS = [
    "first",
    "second",
    "pair",
    "asked",
    "where",
    "best",
    "measured_first",
    "measured_second",
    "tokens_first",
    "tokens_second",
    "seeds",
    "alone",
    "low",
    "high",
    "p",
    "p_holm",
    "n",
    "agree",
    "visible",
    "meaning",
    "verdict_kind",
    "verdict",
]


@dataclass(frozen=True)
class _Pair:
    """Two entries of one asked sparsity: a row of results for each seed that both have."""

    first: pd.Series
    second: pd.Series
    where: str
    best: str
    one: pd.DataFrame
    other: pd.DataFrame
    alone: int  # trainings of one of them with a seed that the other lacks, which are left out
    level: float = ALPHA  # of this look, where seeds are spent one look after the other

    @property
    def comparable(self) -> bool:
        return bool(self.first["level"] == self.second["level"])

    @property
    def collapsed(self) -> bool:
        return bool(self.first["collapsed"] or self.second["collapsed"])

    def row(self) -> dict[str, Any]:
        """What every table of pairs begins with."""
        return {
            "first": self.first["label"],
            "second": self.second["label"],
            "pair": f"{self.first['label']} / {self.second['label']}, {self.where}",
            "asked": self.first["asked"],
            "where": self.where,
            "best": self.best,
            "measured_first": self.one["measured"].mean(),
            "measured_second": self.other["measured"].mean(),
            "tokens_first": int(self.one["finetune_tokens"].iloc[0]),
            "tokens_second": int(self.other["finetune_tokens"].iloc[0]),
            "seeds": len(self.one),
            "alone": self.alone,
            "low": math.nan,
            "high": math.nan,
            "p": math.nan,
            "p_holm": math.nan,
            "n": 0,
            "agree": 0,
            "visible": math.nan,
            "meaning": "",
        }


@dataclass(frozen=True)
class _Row:
    """A pair's row and its test; and how the difference that the test would have seen is found, given a
    level."""

    values: dict[str, Any]
    judged: Judged | None = None
    visible: Callable[[float], float] | None = None
    level: float = ALPHA


@dataclass(frozen=True)
class _Size:
    """A difference worth asking about, in the units of the test and in words. margin: set by the reader."""

    value: float
    words: str
    margin: float | None


def _pairs(results: pd.DataFrame, looks: Looks | None) -> Iterator[_Pair]:
    """Every two entries with the same asked sparsity and at least one seed in common, each pair once.

    With looks, a pair is compared as at the last look that both have reached, at that look's share of the
    level: over all looks it is found different by chance in 5% at most.
    """
    table = entries(results)
    frames = [rows.set_index("seed") for _, rows in rows_by_entry(results)]
    words = sparsity_words(table["asked"])
    for asked in table["asked"].unique().tolist():
        group = table[table["asked"] == asked]
        best = best_entry(table, asked)
        for first, second in itertools.combinations(group.index, 2):
            one, other = frames[first], frames[second]
            seeds = [seed for seed in one.index if seed in other.index]
            alone = len(one) + len(other) - 2 * len(seeds)
            seeds = sorted(seeds)[: looks.last(len(seeds))] if looks else seeds
            if seeds:
                yield _Pair(
                    table.loc[first],
                    table.loc[second],
                    words[asked],
                    "" if best is None else str(best["label"]),
                    one.loc[seeds],
                    other.loc[seeds],
                    alone,
                    looks.share(len(seeds)) if looks else ALPHA,
                )


def compare_orderings(
    results: pd.DataFrame,
    block_nll: Mapping[str, ArrayLike],
    *,
    margin: float | None = None,
    looks: Looks | None = None,
) -> pd.DataFrame:
    """Every pair of distinct results with the same asked sparsity, compared by perplexity.

    With several seeds, seeds and blocks are both taken as samples (`inference.crossed`), and the verdict is
    about the orderings. With one, blocks are, and the verdict is about two models.

    Args:
        results: as for `entries`.
        block_nll: {run: mean loss of each block, in nats a token}.
        margin: perplexities within this share of each other are equivalent to the reader: 0.01 is 1%.
        looks: where seeds were spent one look after the other; p and intervals then count all looks.

    Returns:
        A row a pair. first, second (labels of the entries), pair (both, and where), asked, where (the
        sparsity in words), best (the label of the best entry there, empty where all collapsed), measured,
        tokens and perplexity of both (_first, _second) over the seeds that both have, seeds (how many those
        are), alone (how many trainings have no partner), n (blocks), agree (seeds with the sign of the
        whole), ratio, low, high, p, p_holm, visible (the ratio that would be seen four times in five),
        verdict_kind (`differs`, `cannot be told apart`, `equivalent`, `not comparable` or `collapsed`),
        meaning (what follows from that about orderings, or what would show more) and verdict, a sentence.
    """
    rows = [_perplexity_row(pair, block_nll) for pair in _pairs(results, looks)]
    share = margin or _PERPLEXITY_SIZE
    size = _Size(math.log1p(share), f"{100 * share:g}%", None if margin is None else math.log1p(margin))
    table = _corrected(rows, ["perplexity_first", "perplexity_second", "ratio"], size)
    return table.assign(verdict=[perplexity_verdict(dict(row)) for _, row in table.iterrows()])


def _perplexity_row(pair: _Pair, block_nll: Mapping[str, ArrayLike]) -> _Row:
    row = {
        **pair.row(),
        "perplexity_first": geometric_mean(pair.one["perplexity"]),
        "perplexity_second": geometric_mean(pair.other["perplexity"]),
        "collapsed_first": bool(pair.first["collapsed"]),
        "collapsed_second": bool(pair.second["collapsed"]),
        "ratio": math.nan,
    }
    if pair.collapsed or not pair.comparable:
        return _Row({**row, "verdict_kind": "collapsed" if pair.collapsed else "not comparable"})
    first, second = (_stacked([block_nll[run] for run in frame["run"]]) for frame in (pair.one, pair.other))
    row["n"] = first.shape[1]
    if row["n"] < FEWEST_BLOCKS:
        return _Row({**row, "verdict_kind": "not comparable"})
    judged = judge_losses(first, second)
    row["agree"] = judged.agree
    if len(first) == 1:
        found = compare_perplexity(first[0], second[0])
        row |= {"ratio": found.estimate, **_numbers(found)}
        return _Row(row, judged, lambda level: smallest_visible_ratio(first[0], second[0], alpha=level))
    low, high = judged.interval_at(pair.level)
    p = _over_looks(judged.p, pair.level)
    row |= {"ratio": _ratio(judged.mean), "low": _ratio(low), "high": _ratio(high), "p": p}
    return _Row(row, judged, lambda level: _ratio(judged.visible(level)), pair.level)


def _over_looks(p: float, level: float) -> float:
    """p of one look, as p of all looks: it is below 5% where the look's own is below its share."""
    return min(1.0, p * ALPHA / level)


def _ratio(difference: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(difference))


def compare_tasks(
    results: pd.DataFrame,
    samples: Mapping[str, pd.DataFrame],
    *,
    margin: float | None = None,
    looks: Looks | None = None,
) -> pd.DataFrame:
    """Every comparable pair, compared by every task. Holm's correction is by task.

    Seeds and questions are taken as samples, as seeds and blocks in `compare_orderings`; with one seed the
    test is McNemar's exact one.

    Args:
        results: as for `entries`.
        samples: {run: DataFrame(task, subject, question, correct)}; questions whose ``correct`` is missing
            are left out, as are results whose run is not there.
        margin: accuracies within this share of the questions are equivalent: 0.01 is one point.
        looks: as for `compare_orderings`.

    Returns:
        A row a pair and task, with the columns of `compare_orderings`, but task, accuracy_first,
        accuracy_second and difference for perplexities and ratio. n counts questions; visible is a
        difference.
    """
    answered = results[results["run"].isin(list(samples))]
    by_task: dict[str, list[_Row]] = {}
    known: dict[tuple[str, ...], pd.DataFrame] = {}  # an entry is in many pairs

    def of(frame: pd.DataFrame) -> pd.DataFrame:
        runs = tuple(frame["run"])
        if runs not in known:
            known[runs] = pd.concat([_answers(samples[run]) for run in runs], axis=1, keys=range(len(runs)))
        return known[runs]

    for pair in _pairs(answered, looks) if len(answered) else ():
        for task, row in _task_rows(pair, of(pair.one), of(pair.other)) if pair.comparable else ():
            by_task.setdefault(task, []).append(row)
    numbers = ["task", "accuracy_first", "accuracy_second", "difference"]
    share = margin or _ACCURACY_SIZE
    tables = [_corrected(rows, numbers, _Size(share, points(share), margin)) for rows in by_task.values()]
    table = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=[*COLUMNS, *numbers])
    return table.assign(verdict=[task_verdict(dict(row)) for _, row in table.iterrows()])


def _task_rows(pair: _Pair, one: pd.DataFrame, other: pd.DataFrame) -> Iterator[tuple[str, _Row]]:
    """A row a task. ``one`` and ``other`` are outcomes by question and seed."""
    # Questions that every seed has answered, under both orderings.
    both = pd.concat({"first": one, "second": other}, axis=1, join="inner").dropna()
    for task, asked in both.groupby(level="task", sort=False):
        # (seeds, n)
        first: np.ndarray = asked["first"].to_numpy().T
        second: np.ndarray = asked["second"].to_numpy().T
        judged = judge_answers(first, second)
        row = {
            **pair.row(),
            "task": task,
            "accuracy_first": float(first.mean()),
            "accuracy_second": float(second.mean()),
            "difference": judged.mean,
            "agree": judged.agree,
        }
        if len(first) == 1:
            found = compare_accuracy(first[0], second[0])
            disagreement = float(((first - second) ** 2).mean())
            visible = partial(_visible_share, found.n, disagreement)
            yield str(task), _Row({**row, **_numbers(found)}, judged, visible)
        else:
            low, high = judged.interval_at(pair.level)
            p = _over_looks(judged.p, pair.level)
            row |= {"low": low, "high": high, "p": p, "n": first.shape[1]}
            yield str(task), _Row(row, judged, judged.visible, pair.level)


def _visible_share(n: int, disagreement: float, level: float) -> float:
    return smallest_visible_difference(n, disagreement=disagreement, alpha=level)


def _answers(samples: pd.DataFrame) -> pd.Series:
    """The outcomes of one run, by task, subject and question."""
    kept = samples.dropna(subset=["correct"])
    subject = kept["subject"] if "subject" in kept else kept["task"]
    return kept.assign(subject=subject).set_index(["task", "subject", "question"])["correct"]


def _numbers(found: Comparison) -> dict[str, Any]:
    return {"low": found.low, "high": found.high, "p": found.p, "n": found.n}


def _stacked(losses: list[ArrayLike]) -> np.ndarray:
    """(seeds, n) losses of the same blocks."""
    arrays = [np.asarray(values, dtype=np.float64) for values in losses]
    return np.stack([paired(array, arrays[0])[0] for array in arrays])


def _corrected(rows: list[_Row], numbers: list[str], size: _Size) -> pd.DataFrame:
    """The rows as a table, with p-values that are corrected, what they say, and what would be seen."""
    if not rows:
        return pd.DataFrame(columns=[*COLUMNS, *numbers])
    tested = [row for row in rows if row.judged is not None]
    for row, p in zip(tested, holm([row.values["p"] for row in tested])):
        assert row.judged is not None and row.visible is not None
        level = row.level / len(tested)
        kind = row.judged.kind(p, size.margin, level=row.level)
        row.values["p_holm"] = p
        row.values["verdict_kind"] = kind
        row.values["visible"] = row.visible(level)
        row.values["meaning"] = _meaning(row.judged, kind, size, level)
    return pd.DataFrame([row.values for row in rows])


def _meaning(judged: Judged, kind: str, size: _Size, level: float) -> str:
    if kind == DIFFERS:
        return about_the_difference(judged)
    if kind == EQUIVALENT:
        return size.words
    return about_the_doubt(judged, size.value, size.words, level=level)

"""The entries of a study: its distinct results, each once, and which of them is best at which sparsity.

An entry is an ordering at one asked sparsity, with its method, pattern and merge, over all its seeds. Results
that share their runs are one entry: a base model does not depend on the pruning method, and
`prune_finetune` and `P F` are the same word.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

SPARSITY_TOLERANCE = 0.005  # half a point: two models further apart are not compared
CHOICES = ("method", "pattern", "merge")  # what a study may vary beside the ordering
_PLACES = 10  # decimals of a sparsity that count: 0.1 + 0.2 is 0.3


def entries(results: pd.DataFrame, **more: Any) -> pd.DataFrame:
    """A row an entry, pooled over its seeds.

    Args:
        results: a row a result: ordering, asked, measured, perplexity, finetune_tokens, seed, method,
            pattern, merge, run. Optional: vocabulary (the size of the model's, to know a collapsed model
            by) and n_finetunes. Where an ordering has several results at one sparsity, the most trained one
            counts.
        more: {column: aggregation} of further columns, as `pandas` understands it.

    Returns:
        ordering, also (other words for the same runs), label (ordering and what else tells it apart), method,
        pattern, merge (empty where all of the study's share the runs), asked, measured (mean), perplexity
        (geometric mean), finetune_tokens, n_finetunes, seeds, collapsed, level (the highest measured sparsity
        of the entries that it can be compared with), behind (how many of those are ahead of it), best
        (whether it is the best of its asked sparsity), gone (how many of its seeds have collapsed), runs (a
        tuple), and the columns of ``more``.
    """
    frames = [group for _, group in rows_by_entry(results)]
    table = pd.DataFrame([_pooled(group, more) for group in frames])
    if not len(table):
        return table
    table["level"] = table.groupby("asked", sort=False)["measured"].transform(_levels)
    table["behind"] = _behind(table, [group.set_index("seed")["perplexity"] for group in frames])
    winners = [best_entry(table, asked) for asked in table["asked"].unique()]
    table["best"] = table.index.isin([winner.name for winner in winners if winner is not None])
    return table


def rows_by_entry(results: pd.DataFrame) -> list[tuple[dict[str, str], pd.DataFrame]]:
    """(what tells it apart, its rows) of every entry, a row a seed; the names are columns, too."""
    results = results.assign(asked=results["asked"].astype(float).round(_PLACES))
    same = ["ordering", "asked", *CHOICES]
    ordered = results.sort_values("finetune_tokens", kind="stable")
    last = ordered.drop_duplicates([*same, "seed"], keep="last").sort_index(kind="stable")
    sharing: dict[frozenset[str], list[pd.DataFrame]] = {}
    for _, group in last.groupby(same, sort=False):
        sharing.setdefault(frozenset(group["run"]), []).append(group)
    return [_named(groups, results) for groups in sharing.values()]


def _named(groups: list[pd.DataFrame], results: pd.DataFrame) -> tuple[dict[str, str], pd.DataFrame]:
    orderings = list(dict.fromkeys(group["ordering"].iloc[0] for group in groups))
    names = {"ordering": orderings[0], "also": ", ".join(orderings[1:])}
    for choice in CHOICES:
        own = list(dict.fromkeys(group[choice].iloc[0] for group in groups))
        shared = len(own) == results[choice].nunique() > 1
        names[choice] = "" if shared else "/".join(own)
    telling = [names[choice] for choice in CHOICES if names[choice] and results[choice].nunique() > 1]
    names["label"] = f"{orderings[0]} ({', '.join(telling)})" if telling else orderings[0]
    return names, groups[0].assign(**names)


def _pooled(rows: pd.DataFrame, more: dict[str, Any]) -> dict[str, Any]:
    first = rows.iloc[0]
    same = ("ordering", "also", "label", *CHOICES, "asked", "finetune_tokens", "n_finetunes")
    return {
        **{name: first[name] for name in same if name in rows},
        "measured": float(rows["measured"].mean()),
        "perplexity": geometric_mean(rows["perplexity"]),
        "collapsed": bool(is_collapsed(rows).any()),
        "gone": int(is_collapsed(rows).sum()),
        "seeds": int(rows["run"].nunique()),
        "runs": tuple(dict.fromkeys(rows["run"])),
        **{name: rows[name].agg(how) for name, how in more.items()},
    }


def is_collapsed(results: pd.DataFrame) -> pd.Series:
    """Whether a model is worse than a guess among all tokens of its vocabulary, or infinite."""
    perplexity = results["perplexity"].astype(float)
    limit = results["vocabulary"].astype(float) if "vocabulary" in results else np.inf
    return pd.Series(~np.isfinite(perplexity) | (perplexity > limit), index=results.index)


def geometric_mean(values: pd.Series) -> float:
    """The mean of perplexities: that of their logarithms, which are mean losses."""
    with np.errstate(over="ignore"):
        return float(np.exp(np.log(values.astype(float)).mean()))


def _levels(measured: pd.Series) -> pd.Series:
    """The highest sparsity within the tolerance, for each; counted from the highest of all.

    So "can be compared" is the same for a third: of three models, the first two and the last two can only be
    compared if the first and the last can.
    """
    levels: dict[Any, float] = {}
    top = np.inf
    for place, value in measured.sort_values(ascending=False, kind="stable").items():
        if not top - value <= SPARSITY_TOLERANCE:
            top = value
        levels[place] = float(top)
    return pd.Series(levels).reindex(measured.index)


def _behind(table: pd.DataFrame, perplexities: list[pd.Series]) -> pd.Series:
    """How many entries are ahead of each, of those that it can be compared with.

    Two are compared over the seeds that both have: a seed that only one of them has, as where another failed,
    may be an easy one.

    Args:
        table: a row an entry. perplexities: of each, by seed.
    """
    behind = pd.Series(0, index=table.index)
    for _, group in table[~table["collapsed"]].groupby(["asked", "level"], sort=False):
        by_seed = pd.concat([perplexities[place] for place in group.index], axis=1)
        losses = np.log(by_seed.to_numpy(dtype=float)).T  # (entries, seeds)
        apart = losses[:, None] - losses[None]
        shared = np.isfinite(apart).sum(axis=-1)
        alone = np.log(group["perplexity"].to_numpy(dtype=float))
        means = np.nansum(apart, axis=-1) / np.maximum(shared, 1)
        means = np.where(shared > 0, means, alone[:, None] - alone[None])
        behind[group.index] = (means > 0).sum(axis=1)
    return behind


def best_entry(table: pd.DataFrame, asked: float) -> pd.Series | None:
    """The best entry of an asked sparsity; every table, chart and sentence asks here. None: all collapsed.

    It has the lowest perplexity of the entries that have the sparsity that was asked, over the seeds that
    they share. If a merge has lost zeros of all of them, of those that come nearest.

    Args:
        table: what `entries` returns.
    """
    there = table[(table["asked"] == round(float(asked), _PLACES)) & ~table["collapsed"]]
    if not len(there):
        return None
    nearest = there.iloc[int((there["measured"] - there["asked"]).abs().argmin())]
    alike = there[there["level"] == nearest["level"]]
    return alike.sort_values(["behind", "perplexity"], kind="stable").iloc[0]


def sparsity_words(values: Iterable[float]) -> dict[float, str]:
    """Each sparsity in per cent, with as many digits as tell it from the others, and from none and all."""
    distinct = sorted({round(float(value), _PLACES) for value in values})
    for digits in range(1, _PLACES + 1):
        words = {value: f"{value * 100:.{digits}f}".rstrip("0").rstrip(".") + "%" for value in distinct}
        exact = {**words, 0.0: "0%", 1.0: "100%"}
        if len(set(exact.values())) == len(exact):
            break
    return words if distinct else {}

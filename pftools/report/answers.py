"""The headline of a report and its verdicts, in Markdown. What is not ours in it is escaped."""

from __future__ import annotations

from typing import Any

import pandas as pd

from pftools import compare
from pftools.compare import perplexity_in_words, sparsity_words
from pftools.files import as_bytes
from pftools.report.lineage import in_words, study_cost
from pftools.report.markdown import bullets, code, plain
from pftools.report.matrix import NOTHING
from pftools.report.results import best_sets, entry_table, final_states, pair_table

_NO_SEED = "This is not tested: no seed is that of another training, too."
_MOST_BULLETS = 10  # that are read without being asked for


def headline(table: pd.DataFrame) -> str:
    """The first thing to read: the question, and which ordering won at each sparsity."""
    study = table.attrs["study"]
    lines = [f"**{plain(study['description'] or study['name'])}**"]
    if len(table) < table.attrs["planned"]:
        lines.append(
            f"*{len(table)} of {table.attrs['planned']} results are finished; this is what they say.*"
        )
        lines.append(
            "<details><summary>What is missing (pftools status tells the cause of a failure)</summary>\n\n"
            f"{bullets(table.attrs['missing'])}\n\n</details>"
        )
    if table.attrs["outdated"]:
        lines.append("*Some of the runs behind this are from inputs that were changed since:*")
        lines.append(bullets(table.attrs["outdated"]))
    if table.attrs["open"]:
        lines.append(f"*The study goes on: {plain('; '.join(table.attrs['open']))}.*")
    return "\n\n".join([*lines, *_by_sparsity(answers(table)), _cost(table)])


def _by_sparsity(told: list[tuple[str, list[str]]]) -> list[str]:
    """The highest sparsity in full; what tasks say, and lower sparsities beyond the second, are folded."""
    lines, folded = list[str](), list[str]()
    for place, (sentence, tasks) in enumerate(told):
        (lines if place < 2 else folded).append(f"> {sentence}")
        if tasks:
            (lines if place < 2 else folded).append(_folded("By task", tasks))
    if folded:
        lower = f"{len(told) - 2} lower sparsities" if len(told) > 3 else "The lower sparsity"
        lines.append(_folded(lower, folded))
    return lines


def _folded(summary: str, parts: list[str]) -> str:
    return "\n\n".join([f"<details><summary>{summary}</summary>", *parts, "</details>"])


def _cost(table: pd.DataFrame) -> str:
    """What the finished results took, in a line."""
    spent = study_cost(table)
    return (
        f"*{spent['steps']} step{'s' if spent['steps'] > 1 else ''} took {in_words(spent['seconds'])} of "
        f"computing, {as_bytes(spent['memory'])} of memory at most and {as_bytes(spent['disk'])} on disk.*"
    )


def answers(table: pd.DataFrame) -> list[tuple[str, list[str]]]:
    """What can be said of every sparsity that orderings end at, the highest first: (who may be the best by
    perplexity, how far from dense, and the nearest rival; the sets by each task)."""
    ends = entry_table(final_states(table))
    pairs = pair_table(table)
    levels = sorted(ends["asked"].unique(), reverse=True)
    sets: dict[tuple[float, bool], list[compare.BestSet]] = {}
    for found in best_sets(table):
        sets.setdefault((found.asked, found.metric == compare.PERPLEXITY), []).append(found)
    return [
        (
            _answer(ends, pairs, asked, next(iter(sets.get((asked, True), [])), None)),
            [plain(compare.set_in_words(found)) for found in sets.get((asked, False), [])],
        )
        for asked in levels
        if asked > 0 or len(levels) == 1
    ]


def _answer(ends: pd.DataFrame, pairs: pd.DataFrame, asked: float, found: compare.BestSet | None) -> str:
    """Who may be the best at a sparsity, how far from dense, and whether the nearest rival is behind."""
    there = ends[ends["asked"] == asked]
    collapsed = _collapsed(there)
    best = compare.best_entry(ends, asked)
    if best is None:
        return f"At {sparsity_words(ends['asked'])[asked]} every model has collapsed: {collapsed}"
    sentence = plain(_best_in_words(ends, best, found))
    rivals = there[(there["level"] == best["level"]) & ~there["collapsed"]].drop(index=best.name)
    if len(rivals):
        nearest = rivals.loc[rivals["perplexity"].idxmin(), "label"]
        two = [best["label"], nearest]
        ours = (pairs["asked"] == asked) & pairs["first"].isin(two) & pairs["second"].isin(two)
        rows: list[Any] = pairs[ours].to_dict("records")
        verdicts = [compare.perplexity_verdict(row, brief=True) for row in rows]
        sentence += f" The nearest rival: {plain(verdicts[0])}" if verdicts else f" {_NO_SEED}"
    lost = there[(there["level"] != best["level"]) & ~there["collapsed"]]
    if len(lost):
        names = ", ".join(lost["label"])
        sentence += f" Not compared, because their measured sparsity is another: {plain(names)}."
    return f"{sentence} Collapsed: {collapsed}" if collapsed else sentence


def _best_in_words(ends: pd.DataFrame, best: pd.Series, found: compare.BestSet | None) -> str:
    """The best entry of a sparsity, its perplexity beside the dense one's; how sure, where it was tested."""
    asked, words = best["asked"], sparsity_words([*ends["asked"], round(best["measured"], 4)])
    dense = ends.loc[ends["ordering"] == "base", "perplexity"]
    value = perplexity_in_words(best["perplexity"])
    if round(best["measured"] - asked, 4):
        value += f" at a measured {words[round(best['measured'], 4)]}"
    if len(dense) and asked > 0:
        value += f" where the dense model has {perplexity_in_words(dense.iloc[0])}"
    if found is not None and found.members == (best["label"],):
        return compare.set_in_words(found, value=value)
    if found is not None:
        lowest = "The lowest number" + (" over the seeds that they share" if found.unequal else "")
        return f"{compare.set_in_words(found)} {lowest} is that of {best['label']}, {value}."
    where = sparsity_words(ends["asked"])[asked]
    if (ends["asked"] == asked).sum() == 1:
        return f"At {where}, {best['label']} has a perplexity of {value}; there is nothing to compare."
    return f"At {where}, {best['label']} has the lowest perplexity, {value}."


def _collapsed(entries: pd.DataFrame) -> str:
    """Names and perplexities of the models that are worse than guessing; empty: there is none."""
    gone = entries[entries["collapsed"]]
    if not len(gone):
        return ""
    named = [
        f"{code(entry['label'])} (perplexity {plain(perplexity_in_words(entry['perplexity']))}"
        f"{_seeds_of(entry)})"
        for _, entry in gone.iterrows()
    ]
    return f"{', '.join(named)}, worse than guessing among all tokens of the vocabulary."


def _seeds_of(entry: pd.Series) -> str:
    """How many of a collapsed entry's seeds have collapsed, where not all have."""
    return f"; {entry['gone']} of {entry['seeds']} seeds" if entry["gone"] < entry["seeds"] else ""


def verdict_list(pairs: pd.DataFrame) -> str:
    """The verdicts by sparsity, the highest first; pairs without the best are folded away."""
    if not len(pairs):
        return NOTHING
    parts = []
    for asked in sorted(pairs["asked"].unique(), reverse=True):
        group = pairs[pairs["asked"] == asked]
        where = group["where"].iloc[0]
        own = group[(group["first"] == group["best"]) | (group["second"] == group["best"])]
        rest = group.drop(own.index)
        parts.append(f"**At {where}**\n\n" + bullets(own["verdict"].tolist()))
        if len(rest):
            others = f"The other {len(rest)} pairs" if len(rest) > 1 else "The other pair"
            parts.append(
                f"<details><summary>{others} at {where}</summary>\n\n{bullets(rest['verdict'].tolist())}\n\n"
                "</details>"
            )
    return "\n\n".join(parts)


def told_apart(compared: pd.DataFrame) -> str:
    """What the tasks say, in a sentence for each real difference, and a count of the others."""
    if not len(compared):
        return "No two orderings have answered the same questions."
    real = compared[compared["verdict_kind"] == "differs"]
    rest = len(compared) - len(real)
    lines = [bullets(real["verdict"].tolist())] if len(real) else []
    if len(real) > _MOST_BULLETS:
        lines = [_folded(f"The {len(real)} differences that are there", lines)]
    if rest:
        lines.append(
            f"{rest} of {len(compared)} comparisons cannot be told apart: whatever the dots above suggest, "
            "the questions are too few."
        )
    return "\n\n".join(lines)

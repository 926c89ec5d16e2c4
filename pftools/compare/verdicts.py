"""The verdict about a pair, in a sentence of plain text. Names and numbers stand in the same order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pftools.compare.entries import SPARSITY_TOLERANCE, sparsity_words
from pftools.compare.paired import ALPHA, FEWEST_BLOCKS

_EQUAL_BUDGETS = 0.001  # a total that is split over several F's loses a token or two


def perplexity_verdict(row: Mapping[str, Any], *, brief: bool = False) -> str:
    """The sentence about a row of `compare_orderings`.

    Args:
        brief: of a difference that was found, leave out what it means for the orderings.
    """
    first, second, at = row["first"], row["second"], row["where"]
    if row["verdict_kind"] == "collapsed":
        return _collapsed(row)
    if row["verdict_kind"] == "not comparable":
        return _not_comparable(row)
    swapped = row["ratio"] > 1
    better, worse = (second, first) if swapped else (first, second)
    ends = [row["ratio"], row["low"], row["high"]]
    ratio, low, high = [1 / ends[0], 1 / ends[2], 1 / ends[1]] if swapped else ends
    values = [row["perplexity_first"], row["perplexity_second"]][:: -1 if swapped else 1]
    numbers = (
        f"{perplexity_in_words(values[0])} vs {perplexity_in_words(values[1])}, "
        f"ratio {ratio_in_words(ratio)} [{ratio_in_words(low)}, {ratio_in_words(high)}], "
        f"{_p_values(row)}{_seeds(row)}"
    )
    budgets = _budgets(row, swapped=swapped)
    if row["verdict_kind"] == "differs":
        meaning = "" if brief else f": {row['meaning']}"
        return f"{_ahead(row, better, worse)} at {at} ({numbers}){meaning}; {budgets}."
    if row["verdict_kind"] == "equivalent":
        return f"{better} and {worse} are equivalent within {row['meaning']} at {at} ({numbers}); {budgets}."
    return (
        f"{better} and {worse} cannot be told apart at {at} on {row['n']} blocks ({numbers}): "
        f"{_visible_ratio(row['visible'])} would be seen four times in five; {row['meaning']}; {budgets}."
    )


def _ahead(row: Mapping[str, Any], better: str, worse: str) -> str:
    """Orderings are better or worse; of one training each only the two models are ahead or behind."""
    return f"{better} is better than {worse}" if row["seeds"] > 1 else f"{better} came out ahead of {worse}"


def _collapsed(row: Mapping[str, Any]) -> str:
    names = [row[side] for side in ("first", "second") if row[f"collapsed_{side}"]]
    values = [perplexity_in_words(row[f"perplexity_{side}"]) for side in ("first", "second")]
    numbers = f"{values[0]} vs {values[1]}"
    if len(names) == 2:
        return (
            f"{names[0]} and {names[1]} have both collapsed at {row['where']} ({numbers}): neither is better."
        )
    other = row["second"] if row["collapsed_first"] else row["first"]
    return (
        f"{names[0]} has collapsed at {row['where']}, {other} has not ({numbers} for {row['first']} and "
        f"{row['second']}): no ratio of their perplexities means anything."
    )


def _not_comparable(row: Mapping[str, Any]) -> str:
    first, second = row["first"], row["second"]
    if abs(row["measured_first"] - row["measured_second"]) > SPARSITY_TOLERANCE:
        return (
            f"{first} and {second} are not comparable: their measured sparsities are "
            f"{row['measured_first']:.1%} and {row['measured_second']:.1%}, more than half a point apart."
        )
    if row["n"]:
        return (
            f"{first} and {second} are not comparable at {row['where']}: {row['n']} blocks are too few, "
            f"evaluate on at least {FEWEST_BLOCKS}."
        )
    words = sparsity_words([row["measured_first"], row["measured_second"]])
    one, other = (words[round(row[f"measured_{side}"], 10)] for side in ("first", "second"))
    return (
        f"{first} and {second} are not comparable: their measured sparsities, {one} and {other}, are on "
        "either side of a step of half a point."
    )


def task_verdict(row: Mapping[str, Any]) -> str:
    """The sentence about a row of `compare_tasks`."""
    first, second, at = row["first"], row["second"], row["where"]
    if row["verdict_kind"] == "equivalent":
        return (
            f"{row['task']}: at {at}, {first} and {second} are equivalent within {row['meaning']}; "
            f"{_budgets(row)}."
        )
    if row["verdict_kind"] != "differs":
        own = f" ({_uncorrected(row)})" if _uncorrected(row) else ""
        return (
            f"{row['task']}: at {at}, {first} and {second} cannot be told apart on {row['n']:,} questions"
            f"{own}: {_visible_points(row['visible'])}; {row['meaning']}; {_budgets(row)}."
        )
    swapped = row["difference"] < 0
    better, worse = (second, first) if swapped else (first, second)
    low, high = (-row["high"], -row["low"]) if swapped else (row["low"], row["high"])
    values = sorted((row["accuracy_first"], row["accuracy_second"]), reverse=True)
    numbers = (
        f"{values[0]:.1%} vs {values[1]:.1%}, {abs(row['difference']) * 100:.1f} points "
        f"[{low * 100:.1f}, {high * 100:.1f}], {_p_values(row)}{_seeds(row)}"
    )
    budgets = _budgets(row, swapped=swapped)
    return f"{row['task']}: {_ahead(row, better, worse)} at {at} ({numbers}): {row['meaning']}; {budgets}."


def p_in_words(p: float) -> str:
    """A p-value as it is written: "0.017", or "< 0.001"."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def perplexity_in_words(perplexity: float) -> str:
    """A perplexity as it is written: "17.23", "58,012", "1.2e+09" or "infinite"."""
    if not perplexity < 1e300:
        return "infinite"
    if perplexity < 1000:
        return f"{perplexity:.2f}"
    return f"{perplexity:,.0f}" if perplexity < 1e7 else f"{perplexity:.1e}"


def ratio_in_words(ratio: float) -> str:
    """A ratio of perplexities as it is written: "0.832", "1,234", "3.1e+12", "infinite"."""
    if 0.001 <= ratio < 1000:
        return f"{ratio:.3f}"
    return f"{ratio:.1e}" if ratio < 0.001 else perplexity_in_words(ratio)


def _visible_ratio(ratio: float) -> str:
    return f"a difference of {ratio - 1:.1%}" if ratio < 10 else f"only a ratio of {ratio_in_words(ratio)}"


def _visible_points(difference: float) -> str:
    """Whether a difference of accuracies would be seen; one above 1 there is none of."""
    if difference > 1:
        return "no difference would be seen four times in five"
    return f"a difference under {difference * 100:.0f} points would be seen less than four times in five"


def _p_values(row: Mapping[str, Any]) -> str:
    own = _uncorrected(row)
    return f"corrected p {p_in_words(row['p_holm'])}" + (f", {own}" if own else "")


def _uncorrected(row: Mapping[str, Any]) -> str:
    """The pair's own p, where the correction decides: its interval, which is its own, leaves "no difference"
    out."""
    if row["p"] < ALPHA <= row["p_holm"]:
        return f"p {p_in_words(row['p'])} before the correction for all pairs"
    return ""


def _seeds(row: Mapping[str, Any]) -> str:
    seeds = f"{row['seeds']} seed{'s' if row['seeds'] > 1 else ''}"
    if row["alone"]:
        return f", {seeds} that both have"
    return f", {seeds}" if row["seeds"] > 1 else ""


def _budgets(row: Mapping[str, Any], *, swapped: bool = False) -> str:
    """What both were fine-tuned on, in the order in which the sentence names them."""
    first, second = (row["tokens_first"], row["tokens_second"])[:: -1 if swapped else 1]
    if not first and not second:
        return "neither was fine-tuned"
    if abs(first - second) > _EQUAL_BUDGETS * max(first, second):
        return f"their training was not equal ({first:,} and {second:,} tokens)"
    about = "" if first == second else "about "
    return f"both were fine-tuned on {about}{max(first, second):,} tokens"

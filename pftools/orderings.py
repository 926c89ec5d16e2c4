"""Orderings: words over P (prune) and F (fine-tune), and the steps that they stand for.

    P            prune to the target sparsity
    F P          fine-tune, then prune
    P F*5        prune, then fine-tune five times
    (P F)*7      seven rounds of both; the sparsity rises to the target in equal parts

The ten pipelines of the published study are words with a name. Where a word has several P, they share the way
to the target: in equal parts (`linear`), or fast at first and slower towards the end (`cubic`, Zhu & Gupta
2017, arXiv 1710.01878).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from pftools.errors import PftoolsError, nearest

Schedule = Literal["linear", "cubic"]
Reported = Literal["end", "P", "F"]

# name: (word, where a result is reported: at the end, or after every P or every F)
PUBLISHED: dict[str, tuple[str, Reported]] = {
    "base": ("", "end"),
    "finetune": ("F", "end"),
    "finetune_iter": ("F*5", "F"),
    "prune": ("P", "end"),
    "finetune_prune": ("F P", "end"),
    "prune_finetune": ("P F", "end"),
    "finetune_iter_prune": ("F*5 P", "end"),
    "prune_finetune_iter": ("P F*5", "F"),
    "iter_pf": ("(P F)*7", "F"),
    "iter_fp": ("(F P)*7", "P"),
}
MOST_STEPS = 1000  # a slip such as (P F)*10000 is refused, not planned


@dataclass(frozen=True)
class OrderingStep:
    """One letter of an ordering, with what it needs to know.

    Attributes:
        kind: P (prune) or F (fine-tune).
        number: which P, or which F, of the ordering it is, from 1.
        sparsity: for a P the total sparsity after it, from 0 up to 1; for an F the sparsity that it finds.
        reported: whether its model is evaluated.
    """

    kind: Literal["P", "F"]
    number: int
    sparsity: float
    reported: bool


@dataclass(frozen=True)
class Ordering:
    """A word over P and F.

    Attributes:
        name: what people call it: a published name, or the word as it was given.
        letters: the word written out, such as "PFPF".
        report: where its results are: at the end, or after every P or every F.
    """

    name: str
    letters: str
    report: Reported = "end"

    @property
    def n_prunes(self) -> int:
        return self.letters.count("P")

    @property
    def n_finetunes(self) -> int:
        return self.letters.count("F")

    def steps(self, sparsity: float, *, schedule: Schedule = "linear") -> tuple[OrderingStep, ...]:
        """The steps that lead to a total ``sparsity``; none for `base`.

        >>> [(step.kind, step.sparsity) for step in parse_ordering("(P F)*2").steps(0.5)]
        [('P', 0.25), ('F', 0.25), ('P', 0.5), ('F', 0.5)]
        """
        if not 0 <= sparsity < 1:
            raise PftoolsError(
                f"the sparsity of ordering {self.name!r} is {sparsity}: it should be from 0 up to 1."
            )
        targets = sparsity_schedule(sparsity, self.n_prunes, schedule)
        steps: list[OrderingStep] = []
        counts, current = {"P": 0, "F": 0}, 0.0
        for place, letter in enumerate(self.letters, start=1):
            counts[letter] += 1
            if letter == "P":
                current = targets[counts["P"] - 1]
            reported = place == len(self.letters) or letter == self.report
            steps.append(OrderingStep("P" if letter == "P" else "F", counts[letter], current, reported))
        return tuple(steps)


def sparsity_schedule(target: float, rounds: int, schedule: Schedule = "linear") -> tuple[float, ...]:
    """The total sparsity after each of ``rounds`` prunings; the last is exactly ``target``."""
    if schedule not in ("linear", "cubic"):
        raise PftoolsError(f"unknown schedule {schedule!r}: {nearest(schedule, ['linear', 'cubic'])}.")
    parts = [(number + 1) / rounds for number in range(rounds)]
    if schedule == "cubic":
        parts = [1 - (1 - part) ** 3 for part in parts]
    return tuple(target if part == 1 else round(target * part, 6) for part in parts)


def parse_ordering(text: str) -> Ordering:
    """An ordering from a published name or a word.

    Grammar: a word is a row of items. An item is `P`, `F` or a word in brackets, with or without `*` and a
    count.

    Raises:
        PftoolsError: with the place of the mistake, and the nearest published name if it looks like one.
    """
    name = " ".join(text.split())
    if name in PUBLISHED:
        word, report = PUBLISHED[name]
        return Ordering(name, _Parser(word).letters(), report)
    if re.search(r"[a-z_]", name) or not name:
        raise PftoolsError(
            f"unknown ordering {text!r}: {nearest(name, PUBLISHED)}; or a word such as '(P F)*3'."
        )
    return Ordering(name, _Parser(name).letters())


class _Parser:
    """Recursive descent over the grammar of `parse_ordering`."""

    def __init__(self, word: str) -> None:
        self.word = word
        self.tokens = [(found.group(), found.start()) for found in re.finditer(r"\d+|\S", word)]

    def letters(self) -> str:
        letters = self._word()
        if self.tokens:
            self._fail("P, F or ( is expected")
        return letters

    def _word(self) -> str:
        letters = ""
        while self.tokens and self.tokens[0][0] in "PF(":
            letters += self._item()
            if len(letters) > MOST_STEPS:
                raise PftoolsError(f"the ordering {self.word!r} has more than {MOST_STEPS} steps.")
        return letters

    def _item(self) -> str:
        token, _ = self.tokens.pop(0)
        if token == "(":
            token = self._word()
            if not token:
                self._fail("an empty bracket; P or F is expected")
            if not self.tokens or self.tokens.pop(0)[0] != ")":
                self._fail("a closing bracket is missing")
        if self.tokens and self.tokens[0][0] == "*":
            self.tokens.pop(0)
            if not self.tokens or not self.tokens[0][0].isdigit() or int(self.tokens[0][0]) == 0:
                self._fail("a count of at least 1 is expected after *")
            token *= min(int(self.tokens.pop(0)[0]), MOST_STEPS + 1)
        return token

    def _fail(self, what: str) -> None:
        place = self.tokens[0][1] + 1 if self.tokens else len(self.word) + 1
        raise PftoolsError(f"the ordering {self.word!r} cannot be read at character {place}: {what}.")

"""Errors that people read: one sentence with the cause, the place and the remedy."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from yaml import MarkedYAMLError


class PftoolsError(ValueError):
    """A mistake that the person at the keyboard can mend; its message says how.

    In a notebook it is shown as that one sentence, without a traceback through the library.

    Attributes:
        where: the names and indices that lead to its place in a file or in parameters; empty where there is
        none.
    """

    def __init__(self, message: str = "", *, where: tuple[str | int, ...] = ()) -> None:
        super().__init__(message)
        self.where = where

    def _render_traceback_(self) -> list[str]:  # the hook that IPython asks before it prints a traceback
        return [f"{type(self).__name__}: {self}"]


def nearest(word: str, valid: Iterable[str]) -> str:
    """A half-sentence that offers the valid word most like ``word``, and lists all of them.

    >>> nearest("sparsty", ["sparsity", "seed"])
    "did you mean 'sparsity'? (valid: seed, sparsity)"
    """
    valid = sorted(valid)
    close = get_close_matches(word, valid, n=1, cutoff=0.5)
    listed = f"valid: {', '.join(valid)}"
    return f"did you mean {close[0]!r}? ({listed})" if close else listed


def not_yaml(path: Path, error: MarkedYAMLError) -> PftoolsError:
    """What is wrong with a file that PyYAML does not take, and where."""
    mark = error.problem_mark or error.context_mark
    place = f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(path)
    problem = " ".join((error.problem or error.context or "it cannot be read").split())
    return PftoolsError(
        f"{place}: this is not valid YAML ({problem}): look there for a bracket, a quote, a colon or an "
        "indentation that is missing or one too many."
    )

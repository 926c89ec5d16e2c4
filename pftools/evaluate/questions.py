"""The questions of the task files in `data/tasks`, and how free answers are judged.

A task file is an ordinary lm-eval YAML. Its data comes through `splits` (`custom_dataset: !function ...`),
which reads what `metadata.files` names: `package:facts/facts.csv` in this project's `data/` folder, or
`root:mmlu/test` in the data root. So lm-eval's own command line can run the files too: `lm-eval run
--include_path data/tasks --tasks mmlu_published ...`.
"""

from __future__ import annotations

import csv
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from pftools.corpora.data_root import data_root, read_split
from pftools.errors import PftoolsError
from pftools.records import check_columns
from pftools.shipped import DATA

PACKAGE_DATA = DATA


def splits(
    *,
    files: dict[str, str],
    only: dict[str, Any] | None = None,
    examples_from_test: int = 0,
    first: int | None = None,
    pages: bool = False,
    by: str = "",
    data: str | None = None,
    **_: Any,
) -> Any:
    """A task's splits, as lm-eval takes them.

    Args:
        files: {split: place}.
        only: {column: value}, the rows to keep.
        examples_from_test: so many test rows from the start become the split `examples`, and are not asked
            (published protocol).
        first: how many test rows are asked, at most.
        pages: join the lines of WikiText to the pages that they are from, the column `page`.
        by: the column by which the task is cut into one for each value; `tasks.load_tasks` does that.
        data: the data root.

    Raises:
        PftoolsError: the data is not there, or lacks a column.
    """
    import datasets

    if by and not only:
        raise PftoolsError(f"this task is one for each {by}: run it through pftools, or take lm-eval's own.")
    found = {}
    for split, place in files.items():
        rows = read_rows(place, data)
        rows = [row for row in rows if all(row[column] == value for column, value in (only or {}).items())]
        found[split] = wikitext_pages(rows) if pages else rows
    if examples_from_test:
        if len(found["test"]) <= examples_from_test:
            raise PftoolsError(
                f"{files['test']} has {len(found['test'])} rows: {examples_from_test} are examples, "
                "so none is left to ask."
            )
        found["examples"], found["test"] = (
            found["test"][:examples_from_test],
            found["test"][examples_from_test:],
        )
    found["test"] = found["test"][:first]
    return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in found.items()})


def read_rows(place: str, data: str | None = None) -> list[dict[str, Any]]:
    """The rows of `package:FILE` or `root:DATASET/SPLIT`."""
    where, _, name = place.partition(":")
    if where == "package":
        return _read_csv(PACKAGE_DATA / name)
    folder, _, split = name.rpartition("/")
    data = str(data_root(data) or "")
    return _read_root(folder, split, data, _stamp(folder, split, data))


@lru_cache
def _read_csv(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    check_columns(rows, ("stem", "a", "b", "c", "d", "answer"), str(path))
    return rows


def _stamp(name: str, split: str, data: str | None) -> int:
    """When a file of the data root was last written; 0 where it is not there."""
    root = data_root(data)
    path = root / name / f"{split}.jsonl" if root else None
    return path.stat().st_mtime_ns if path and path.exists() else 0


@lru_cache(maxsize=4)  # the 57 tasks of MMLU share two files
def _read_root(name: str, split: str, data: str | None, stamp: int) -> list[dict[str, Any]]:
    return read_split(name, split, data=data)


# ------------------------------------------------------------------------------------------------------------
# FreebaseQA


def published_prompt(row: dict[str, Any]) -> str:
    """What the study asks; its code searches the answer in this text too."""
    return f"Please give answer to this question: {row['question']}\nThe answer is "


def found_anywhere(row: dict[str, Any], replies: list[str]) -> dict[str, float]:
    """The published match: right when an accepted name occurs in the prompt or in the reply. The prompt holds
    the question, so a question that names its answer counts as right whatever the model says."""
    return {"acc": _occurs(row["answers"], published_prompt(row) + replies[0])}


def found_in_reply(row: dict[str, Any], replies: list[str]) -> dict[str, float]:
    """Right when an accepted name occurs in what the model wrote."""
    return {"acc": _occurs(row["answers"], replies[0])}


def _occurs(names: list[str], text: str) -> float:
    """Whether any name occurs in the text, case and spaces ignored."""
    squeezed = _squeeze(text)
    return float(any(_squeeze(name) in squeezed for name in names if _squeeze(name)))


def _squeeze(text: str) -> str:
    return "".join(text.split()).lower()


# ------------------------------------------------------------------------------------------------------------
# What lm-eval has


def bbh_examples() -> list[dict[str, str]]:
    """The three worked examples of lm-eval's own `leaderboard_bbh_logical_deduction_five_objects`."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    folder = Path(lm_eval.__file__).parent / "tasks" / "leaderboard" / "bbh_mc"
    index = TaskManager(include_path=str(folder), include_defaults=False).task_index
    return index["leaderboard_bbh_logical_deduction_five_objects"].cfg["fewshot_config"]["samples"]


_TITLE = re.compile(r" = [^=].* = \n$")


def wikitext_pages(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The lines of WikiText joined to pages;

    a page begins at a title of the first level. An empty line was " \\n" in the archive.
    """
    pages: list[str] = []
    for row in rows:
        line = row["text"] or " \n"
        if _TITLE.match(line) or not pages:
            pages.append("")
        pages[-1] += line
    return [{"page": page} for page in pages if page.strip()]

"""The data root: a folder of data sets as JSON lines, for machines without a hub.

One folder a data set, one file a split, in the column names that the hub's versions have: `mmlu/test.jsonl`.
It is named by the `PFTOOLS_DATA` variable, or by a `data` parameter; `pftools fetch-data` fills it where
there is network. What it does not hold is asked from the hub.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from pftools.errors import PftoolsError, nearest
from pftools.records import check_columns, read_rows

_FREEBASEQA = "https://raw.githubusercontent.com/kelvin-jiang/FreebaseQA/master/FreebaseQA-eval.json"


@dataclass(frozen=True)
class DataSet:
    """Where a data set comes from.

    Attributes:
        columns: what its rows have.
        splits: their names.
        hub: what `datasets.load_dataset` is given.
        most: how many rows of a split are kept; None: all.
        url: a file to fetch, where the hub has no copy.
    """

    columns: tuple[str, ...]
    splits: tuple[str, ...]
    hub: dict[str, Any] = field(default_factory=dict)
    most: int | None = None
    url: str = ""


_BELEBELE = (
    "flores_passage",
    "question",
    "mc_answer1",
    "mc_answer2",
    "mc_answer3",
    "mc_answer4",
    "correct_answer_num",
)
DATA_SETS = {
    "wikitext2": DataSet(
        ("text",),
        ("train", "validation", "test"),
        {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"},
    ),
    # The shard that the pruning papers calibrate on; a part of it is more than enough.
    "c4": DataSet(
        ("text",),
        ("train",),
        {"path": "allenai/c4", "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}},
        most=20_000,
    ),
    "mmlu": DataSet(
        ("question", "subject", "choices", "answer"), ("dev", "test"), {"path": "cais/mmlu", "name": "all"}
    ),
    # The copy that lm-eval reads: the first one on the hub is a script, which `datasets` no longer runs.
    "bbh/logical_deduction_five_objects": DataSet(
        ("input", "target"), ("test",), {"path": "SaylorTwift/bbh", "name": "logical_deduction_five_objects"}
    ),
    "belebele/eng_Latn": DataSet(_BELEBELE, ("test",), {"path": "facebook/belebele", "name": "eng_Latn"}),
    "freebaseqa": DataSet(("question", "answers"), ("eval",), url=_FREEBASEQA),
}


def data_root(data: str | Path | None = None) -> Path | None:
    """The data root: ``data`` where it is given, else `PFTOOLS_DATA`; None where neither is set."""
    root = data or os.environ.get("PFTOOLS_DATA")
    return Path(root).expanduser() if root else None


def read_split(name: str, split: str, *, data: str | Path | None = None) -> list[dict[str, Any]]:
    """The rows of one split, from the data root where it has the file, else from the hub.

    Raises:
        PftoolsError: neither has it, a row lacks a column (named), or the file is empty or no JSON lines.
    """
    root = data_root(data)
    path = root / name / f"{split}.jsonl" if root else None
    if path is not None and path.exists():
        rows, place = read_rows(path), str(path)
    else:
        rows, place = list(_from_origin(name, split, path)), f"the {split} split of {name}"
    check_columns(rows, DATA_SETS[name].columns if name in DATA_SETS else (), place)
    return rows


def _from_origin(name: str, split: str, path: Path | None) -> Iterator[dict[str, Any]]:
    """Rows from the hub, or from the data set's own address."""
    if name not in DATA_SETS:
        raise PftoolsError(
            f"{path or name} is not there, and {name!r} is no data set that pftools can fetch: "
            f"{nearest(name, DATA_SETS)}."
        )
    source = DATA_SETS[name]
    try:
        if source.url:
            yield from islice(_freebaseqa(source.url), source.most)
            return
        import datasets

        table = datasets.load_dataset(**source.hub, split=split, streaming=source.most is not None)
        for row in islice(table, source.most):
            yield {column: row[column] for column in source.columns}
    except Exception as error:  # the hub fails in many ways (offline, gated, gone); all have one remedy
        looked = f" and {path} is not there" if path else ""
        raise PftoolsError(
            f"the {split} split of {name!r} could not be fetched from the hub "
            f"({type(error).__name__}){looked}: set PFTOOLS_DATA to a data root that has it; `pftools "
            "fetch-data` fills one on a machine with network."
        ) from error


def _freebaseqa(url: str) -> Iterator[dict[str, Any]]:
    """Questions with every accepted name of every accepted answer."""
    from urllib.request import urlopen

    with urlopen(url, timeout=60) as answer:  # noqa: S310 - the address is a constant of this module
        content = json.load(answer)
    for question in content["Questions"]:
        names = [
            name for parse in question["Parses"] for item in parse["Answers"] for name in item["AnswersName"]
        ]
        yield {"question": question["RawQuestion"], "answers": list(dict.fromkeys(names))}


def fetch(names: Iterable[str] = (), *, data: str | Path | None = None) -> Iterator[tuple[str, int | None]]:
    """Fill the data root; what is there already stays.

    Args:
        names: data sets; none: all.

    Yields:
        (file, rows written) a split; rows None: the file was there.

    Raises:
        PftoolsError: no data root is named, an unknown data set, or one that cannot be fetched.
    """
    root = data_root(data)
    if root is None:
        raise PftoolsError("no data root is named: give a folder, or set PFTOOLS_DATA to one.")
    names = list(names) or list(DATA_SETS)
    for name in names:
        if name not in DATA_SETS:
            raise PftoolsError(f"unknown data set {name!r}: {nearest(name, DATA_SETS)}.")
    for name in names:
        for split in DATA_SETS[name].splits:
            path = root / name / f"{split}.jsonl"
            yield str(path), None if path.exists() else _write(path, _from_origin(name, split, None))


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows, in one atomic step: a fetch that was cut short leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    count = 0
    with partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    os.replace(partial, path)
    return count

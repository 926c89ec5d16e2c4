"""Results that other programs wrote: right and wrong answers of two models, or of two ways of training.

Read are lm-eval's ``samples_<task>_<time>.jsonl`` (``--log_samples``), and any CSV or JSONL with the
columns ``question``, ``correct`` and, where there are several, ``seed`` and ``task``. The two sides are
paired by seed and question. lm-eval's own comparison takes them for independent samples, which sees
less and misstates the error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from pftools.compare.paired import holm
from pftools.compare.verdicts import p_in_words
from pftools.errors import PftoolsError
from pftools.inference.verdict import (
    DIFFERS,
    EQUIVALENT,
    Judged,
    about_the_difference,
    about_the_doubt,
    judge_answers,
    points,
)

_COLUMNS = ("question", "correct")
_METRICS = ("acc", "exact_match")  # what counts as right, where nothing else is asked for
_SAMPLES = re.compile(r"samples_(?P<task>.+)_\d{4}-\d{2}-\d{2}T[\d.:-]+\.jsonl")
_SIZE = 0.02  # the difference whose cost is told where none was found: two points


@dataclass(frozen=True)
class Comparison:
    """One task of two sets of results.

    Attributes:
        names: of the two sides. accuracies: theirs, over all seeds and questions that both have.
        left_out: how many questions not all have answered.
        p_corrected: over the tasks, by Holm. margin: within which a difference does not matter.
    """

    task: str
    names: tuple[str, str]
    accuracies: tuple[float, float]
    judged: Judged
    left_out: int
    p_corrected: float = 1.0
    margin: float | None = None

    @property
    def kind(self) -> str:
        """ "differs", "equivalent" or "cannot be told apart"."""
        return self.judged.kind(self.p_corrected, self.margin)

    @property
    def sentence(self) -> str:
        """The verdict in words, with its numbers."""
        one, other = self.names
        seeds, numbers = self.judged.n_seeds, self._numbers()
        if self.kind == DIFFERS:
            verb = "differ in accuracy" if seeds > 1 else "are not equally often right"
            meaning = about_the_difference(self.judged, "ways of training")
            says = f"{one} and {other} {verb} ({numbers}): {meaning}."
        elif self.kind == EQUIVALENT:
            says = f"{one} and {other} are equivalent within {points(self.margin or 0)} ({numbers})."
        else:
            doubt = about_the_doubt(self.judged, _SIZE, points(_SIZE), things="ways of training")
            says = f"{one} and {other} cannot be told apart ({numbers}): {doubt}."
        if self.left_out:
            says += f" Left out: {self.left_out:,} questions that not all have answered."
        return f"{self.task}: {says}" if self.task else says

    def _numbers(self) -> str:
        low, high = (f"{100 * end:+.1f}" for end in self.judged.interval)
        seeds = f", {self.judged.n_seeds} seeds" if self.judged.n_seeds > 1 else ""
        return (
            f"{self.accuracies[0]:.1%} and {self.accuracies[1]:.1%}, {100 * self.judged.mean:+.1f} points "
            f"[{low}, {high}], {self.judged.estimate.n_blocks:,} questions{seeds}, "
            f"p {p_in_words(self.p_corrected)}"
        )


def compare_results(
    first: str | Path, second: str | Path, *, metric: str | None = None, margin: float | None = None
) -> list[Comparison]:
    """Compare two sets of results, a `Comparison` a task.

    With one training a side p is McNemar's exact test and the verdict is about two models; with several,
    seeds and questions are both taken as samples. p-values are corrected over the tasks (Holm).

    Args:
        first: a CSV, a JSONL, or a folder of lm-eval's samples; in a folder with several subfolders each of
            them is one training (seed), and both sides call them alike.
        second: another, with the same questions.
        metric: lm-eval's metric that says what is right; default acc, else exact_match.
        margin: differences shown to be within this share of questions are called equivalent.

    Raises:
        PftoolsError: a file that is not there or not of that kind, or nothing that can be paired.
    """
    sides = [read_results(path, metric=metric) for path in (first, second)]
    names = _names(Path(first), Path(second))
    tasks = [task for task in dict.fromkeys(sides[0]["task"]) if task in set(sides[1]["task"])]
    if not tasks:
        known = ["; ".join(dict.fromkeys(side["task"])) for side in sides]
        raise PftoolsError(
            f"{first} and {second} have no task in common ({known[0]} and {known[1]}): "
            "compare results of the same tasks."
        )
    found = [replace(_paired(sides, task, (first, second)), names=names, margin=margin) for task in tasks]
    corrected = holm([comparison.judged.p for comparison in found])
    return [replace(comparison, p_corrected=p) for comparison, p in zip(found, corrected)]


def read_results(path: str | Path, *, metric: str | None = None) -> pd.DataFrame:
    """A row an answer: task, seed, question, correct (1 or 0), hash (of lm-eval's question, else empty).

    Raises:
        PftoolsError: see `compare_results`.
    """
    path = Path(path)
    if path.is_dir():
        table = _read_folder(path, metric)
    elif path.suffix == ".csv":
        table = _checked(read_csv(path, text=("question", "seed", "task")), path)
    elif path.suffix in (".jsonl", ".json"):
        table = _read_jsonl(path, metric)
    else:
        cause = "is not a CSV or JSONL file" if path.exists() else "is not there"
        raise PftoolsError(
            f"{path} {cause}: give a CSV or JSONL with question and correct, or a folder of lm-eval's "
            "samples."
        )
    repeated = table.duplicated(["task", "seed", "question"])
    if repeated.any():
        row = table[repeated].iloc[0]
        raise PftoolsError(
            f"{path} answers question {row['question']!r}{_of(row['task'])} twice for the training "
            f"{row['seed']!r}: keep one answer, or give every training a seed (a column seed, or "
            "a folder each)."
        )
    return table


def read_csv(path: Path, *, text: Sequence[str] = ()) -> pd.DataFrame:
    """A CSV whose first line names its columns; those in ``text`` are no numbers.

    Raises:
        PftoolsError: it is not there, or no CSV.
    """
    try:
        kinds = dict.fromkeys(text, str)
        return pd.read_csv(path, dtype=kinds, encoding="utf-8-sig", skipinitialspace=True)
    except FileNotFoundError:
        raise PftoolsError(f"{path} is not there: give a CSV, a JSONL or a folder of results.") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise PftoolsError(
            f"{path} cannot be read as CSV ({' '.join(str(error).split())}): its first line names the "
            "columns."
        ) from None


def _read_jsonl(path: Path, metric: str | None) -> pd.DataFrame:
    records = []
    try:
        # Not splitlines: JSON may hold other line breaks, such as U+2028, inside of its strings.
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise PftoolsError(f"{path} is not there: give a CSV, a JSONL or a folder of results.") from None
    except UnicodeDecodeError:
        raise PftoolsError(f"{path} is not text in UTF-8: give a file of one JSON record a line.") from None
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line) if line.strip() else {}
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise PftoolsError(f"line {number} of {path} is not a JSON record: each line holds one answer.")
        if record:
            records.append(record)
    if not records:
        raise PftoolsError(f"{path} is empty: it should hold one JSON record an answer.")
    if "doc_id" in records[0]:
        return _lm_eval(records, path, metric)
    return _checked(pd.DataFrame(records), path)


class _NoMetric(PftoolsError):
    """Samples of a task that says of no answer whether it is right, such as a perplexity."""


def _lm_eval(records: list[dict[str, Any]], path: Path, metric: str | None) -> pd.DataFrame:
    """The samples of one task and one training, as lm-eval writes them."""
    named = _SAMPLES.fullmatch(path.name)
    task = named["task"] if named else path.stem
    known = records[0].get("metrics") or [name for name in _METRICS if name in records[0]]
    chosen = metric or next((name for name in _METRICS if name in known), None)
    if chosen is None or chosen not in known:
        wanted = f"no metric {metric!r}" if metric else "neither acc nor exact_match"
        raise _NoMetric(
            f"{path} has {wanted}: name one of its metrics that is 1 for right and 0 for wrong, "
            f"with --metric ({', '.join(known)})."
        )
    filters = {record.get("filter", "none") for record in records}
    table = pd.DataFrame(
        {
            "task": f"{task} ({record.get('filter')})" if len(filters) > 1 else task,
            "seed": "0",
            "question": str(record["doc_id"]) if "doc_id" in record else None,
            "correct": record.get(chosen),
            "hash": record.get("doc_hash", ""),
        }
        for record in records
    )
    return _checked(table, path)


def _read_folder(folder: Path, metric: str | None) -> pd.DataFrame:
    """Every task's samples below a folder; its subfolders that hold some are trainings.

    Tasks whose answers are neither right nor wrong are left out beside others.
    """
    files = sorted(folder.rglob("samples_*.jsonl"))
    if not files:
        raise PftoolsError(
            f"{folder} holds no samples_*.jsonl: run lm-eval with --log_samples --output_path {folder}, or "
            "give what `pftools export` writes of an evaluation."
        )
    first = [file.relative_to(folder).parts[0] if file.parent != folder else "" for file in files]
    several = len(set(first)) > 1
    tables: list[pd.DataFrame] = []
    seen: dict[tuple[str, str], Path] = {}
    unjudged: _NoMetric | None = None
    for file, training in zip(files, first):
        try:
            table = _read_jsonl(file, metric).assign(seed=training if several else "0")
        except _NoMetric as error:
            unjudged = error
            continue
        for task in table["task"].unique():
            other = seen.setdefault((task, training), file)
            if other != file:
                raise PftoolsError(
                    f"{other} and {file} are both of {task} and of one training: remove the older one, "
                    "or give every training a folder of its own."
                )
        tables.append(table)
    if unjudged is not None and not tables:
        raise unjudged
    return pd.concat(tables, ignore_index=True)


def _checked(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The columns of `read_results`, with every answer right or wrong."""
    for name in _COLUMNS:
        if name not in table:
            raise PftoolsError(
                f"{path} has no column {name!r} (it has {', '.join(map(str, table.columns))}): "
                "each row needs question and correct, and may have seed and task."
            )
    words = {"true": 1.0, "false": 0.0}
    correct = pd.to_numeric(
        table["correct"].map(lambda value: words.get(str(value).strip().lower(), value)), errors="coerce"
    )
    wrong = ~correct.isin([0.0, 1.0]) | table["question"].isna()
    if wrong.any():
        row = int(wrong.to_numpy().argmax())
        raise PftoolsError(
            f"answer {row + 1} of {path} has correct = {table['correct'].iloc[row]} for question "
            f"{table['question'].iloc[row]}: each needs a question, and 1 for right or 0 for wrong."
        )
    return pd.DataFrame(
        {
            "task": table["task"].astype(str) if "task" in table else "",
            "seed": table["seed"].astype(str) if "seed" in table else "0",
            "question": table["question"].astype(str),
            "correct": correct.astype(float),
            "hash": table["hash"].astype(str) if "hash" in table else "",
        }
    )


def _paired(sides: list[pd.DataFrame], task: str, paths: tuple[str | Path, str | Path]) -> Comparison:
    """Both sides' answers to the questions that all their trainings have answered, judged."""
    chosen = [side[side["task"] == task] for side in sides]
    grids = [side.pivot(index="seed", columns="question", values="correct") for side in chosen]
    if set(grids[0].index) != set(grids[1].index):
        seeds = [", ".join(grid.index) for grid in grids]
        raise PftoolsError(
            f"the trainings of {paths[0]} ({seeds[0]}) and of {paths[1]} ({seeds[1]}) cannot be paired: "
            "give the same seeds, or folders of the same names, on both sides."
        )
    hashes = [side.drop_duplicates("question").set_index("question")["hash"] for side in chosen]
    common = [name for name in grids[0].columns if name in set(grids[1].columns)]
    changed = [name for name in common if hashes[0][name] != hashes[1][name]]
    if changed and all((side["hash"] != "").all() for side in chosen):
        raise PftoolsError(
            f"question {changed[0]}{_of(task)} is another one in {paths[0]} than in {paths[1]}: "
            "evaluate both on the same version of the task."
        )
    complete = [name for name in common if not any(grid[name].isna().any() for grid in grids)]
    if not complete:
        raise PftoolsError(
            f"{paths[0]} and {paths[1]} have no question{_of(task)} in common that all "
            "their trainings answered: compare answers to the same questions."
        )
    first, second = (grid.loc[grids[0].index, complete].to_numpy() for grid in grids)
    left_out = len(set(grids[0].columns) | set(grids[1].columns)) - len(complete)
    accuracies = float(first.mean()), float(second.mean())
    return Comparison(task, ("", ""), accuracies, judge_answers(first, second), left_out)


def _of(task: str) -> str:
    return f" of {task}" if task else ""


def _names(first: Path, second: Path) -> tuple[str, str]:
    """The shortest ends of two paths that tell them apart."""
    ends = [first.name or str(first), second.name or str(second)]
    return (ends[0], ends[1]) if ends[0] != ends[1] else (str(first), str(second))

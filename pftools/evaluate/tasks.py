"""lm-eval tasks: the embedded and published ones in `data/tasks`, and any other by name.

A task file here is an ordinary lm-eval YAML with one addition: `metadata.files` names its data, either `package:...` (in the
project's `data/` folder) or `root:...` (in the data root, `PFTOOLS_DATA`), so that nothing is fetched and no path is absolute.
"""

from __future__ import annotations

import csv
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from scipy import stats
from torch import nn

from pftools.corpora import data_root
from pftools.errors import PftoolsError, nearest
from pftools.evaluate.prefix_cache import PrefixCachedLM

DATA = Path(__file__).resolve().parents[2] / "data"
TASKS = DATA / "tasks"
# The metric that a task is judged by, where it has several: the first of these that it reports.
_METRICS = ("acc_norm", "acc", "exact_match", "mcc", "f1", "word_perplexity")


@dataclass
class TaskResults:
    """scores: a row a task (task, metric, value, stderr, low, high, n, chance). samples: a row a question (task, question,
    correct, answer, choice_scores). results: lm-eval's own result, JSON-serialisable. truncated: prompts cut to the context."""

    scores: pd.DataFrame
    samples: pd.DataFrame
    results: dict[str, Any]
    truncated: int = 0


def evaluate_tasks(
    model: nn.Module, tokenizer: Any, tasks: Sequence[str], *, limit: int | None = None, seed: int = 0,
    batch_size: int | None = None,
) -> TaskResults:  # fmt: skip
    """Ask a model the questions of lm-eval tasks.

    Args:
        tasks: names; an unknown one is an error that offers the nearest.
        limit: questions a task, the first ones; None: all.
        batch_size: questions a forward; None: chosen by size.

    Raises:
        PftoolsError: unknown task, missing data or columns, or a model that returns NaN.
    """
    import lm_eval

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    loaded = load_tasks(tasks)
    lm = PrefixCachedLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size or 8)
    found = lm_eval.simple_evaluate(
        lm, tasks=list(loaded.values()), limit=limit, bootstrap_iters=0, log_samples=True, random_seed=seed,
        numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
    )  # fmt: skip
    samples = _samples(found["samples"])
    scores = pd.DataFrame([_score(task, found, samples) for task in found["samples"]])
    if lm.truncated:
        logging.getLogger(__name__).warning("%d prompts were longer than the model's context and cut at their beginning", lm.truncated)
    results = {key: found[key] for key in ("results", "n-shot", "versions", "n-samples", "higher_is_better") if key in found}
    return TaskResults(scores, samples, _strict_json({**results, "truncated_prompts": lm.truncated}), lm.truncated)


def scores_as_json(scores: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """{task: {metric, value, low, high, n, chance}} for a run's record."""
    kept = ["metric", "value", "low", "high", "n", "chance"]
    return _strict_json({row["task"]: {name: row[name] for name in kept} for row in scores.to_dict("records")})


# ---------------------------------------------------------------------------------------------------------------------
# Finding tasks


def load_tasks(names: Sequence[str]) -> dict[str, Any]:
    """{name: what `simple_evaluate` takes}: our own tasks as configurations with their data, others by name."""
    own = {path.stem: path for path in TASKS.glob("*.yaml")}
    unknown = [name for name in names if name not in own]
    if unknown:
        from lm_eval.tasks import TaskManager

        known = TaskManager().all_tasks
        for name in unknown:
            if name not in known:
                raise PftoolsError(f"unknown task {name!r}: {_nearest_task(name, [*own, *known])}.")
    return {name: _configuration(own[name]) if name in own else name for name in names}


def _nearest_task(name: str, known: list[str]) -> str:
    """lm-eval has thousands of tasks: offer the nearest, and list only our own."""
    offered = nearest(name, known).partition("(")[0].strip()
    own = ", ".join(sorted(path.stem for path in TASKS.glob("*.yaml")))
    return f"{offered if 'did you mean' in offered else 'no task has a similar name'} (tasks of this kit: {own}; `lm-eval ls tasks` lists the others)"


def _configuration(path: Path) -> dict[str, Any]:
    configuration = yaml.safe_load(path.read_text(encoding="utf-8"))
    metadata = configuration["metadata"]
    configuration["custom_dataset"] = partial(_dataset, configuration["task"], _columns(configuration))
    configuration["metadata"] = metadata
    return configuration


def _columns(configuration: dict[str, Any]) -> list[str]:
    return configuration["metadata"].get("columns", [])


def _dataset(task: str, columns: list[str], *, files: dict[str, str], examples_from_test: int = 0, **_: Any) -> Any:
    """The splits of a task, read from its files.

    Args:
        examples_from_test: the first so many test rows become the split `examples` and are not asked (published protocol).
    """
    import datasets

    splits = {}
    for split, place in files.items():
        rows = _read_rows(task, place)
        missing = [column for column in columns if column not in rows[0]]
        if missing:
            raise PftoolsError(f"the data of task {task!r}, {place}, has no column {', '.join(missing)}: it has {', '.join(rows[0])}.")
        splits[split] = rows
    if examples_from_test:
        splits["examples"], splits["test"] = splits["test"][:examples_from_test], splits["test"][examples_from_test:]
    return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in splits.items()})


def _read_rows(task: str, place: str) -> list[dict[str, Any]]:
    where, _, name = place.partition(":")
    root = DATA if where == "package" else data_root()
    if root is None:
        raise PftoolsError(f"the task {task!r} needs {name} in the data root: set PFTOOLS_DATA to a folder that has it (`pftools fetch-data` fills one).")
    path = root / name
    if not path.exists():
        raise PftoolsError(f"the task {task!r} needs {path}, which is not there: `pftools fetch-data` fills a data root.")
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    else:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    if not rows:
        raise PftoolsError(f"{path}, the data of task {task!r}, is empty.")
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Reading lm-eval's answer


def _samples(by_task: dict[str, list[dict[str, Any]]]) -> pd.DataFrame:
    rows = []
    for task, samples in by_task.items():
        for sample in samples:
            value = next((sample[metric] for metric in _METRICS if metric in sample), math.nan)
            responses = sample.get("filtered_resps", [])
            choices = [float(response[0]) for response in responses if isinstance(response, (tuple, list))]
            rows.append(
                {
                    "task": task, "question": int(sample["doc_id"]), "correct": float(value) if isinstance(value, (int, float, bool)) else math.nan,
                    "target": str(sample.get("target", "")), "answer": "" if choices else str(responses[0] if responses else ""),
                    "choice_scores": choices,
                }
            )  # fmt: skip
    return pd.DataFrame(rows).sort_values(["task", "question"], ignore_index=True)


def _score(task: str, found: dict[str, Any], samples: pd.DataFrame) -> dict[str, Any]:
    reported = {key.partition(",")[0]: value for key, value in found["results"][task].items() if isinstance(value, (int, float))}
    metric = next((metric for metric in _METRICS if metric in reported), None)
    if metric is None:
        raise PftoolsError(f"the task {task!r} reports none of {', '.join(_METRICS)}: pftools does not know how to judge it.")
    own = samples[samples["task"] == task]
    n, value = len(own), float(reported[metric])
    row = {"task": task, "metric": metric, "value": value, "stderr": math.nan, "low": math.nan, "high": math.nan, "n": n, "chance": math.nan}
    if metric in ("acc", "acc_norm", "exact_match"):
        interval = stats.binomtest(round(value * n), n).proportion_ci(method="wilson")
        row |= {"stderr": math.sqrt(value * (1 - value) / n), "low": interval.low, "high": interval.high}
        row["chance"] = _chance(found["configs"][task], own)
    return row


def _chance(configuration: dict[str, Any], samples: pd.DataFrame) -> float:
    """The level of guessing: what the task states, else one over the mean number of choices."""
    stated = (configuration.get("metadata") or {}).get("chance")
    counts = [1 / len(scores) for scores in samples["choice_scores"] if len(scores) > 1]
    if stated is not None:
        return float(stated)
    return sum(counts) / len(counts) if counts else 0.0


def _strict_json(value: Any) -> Any:
    """The value with what JSON cannot say (NaN, infinity, numpy's numbers) as null or as plain numbers."""
    if isinstance(value, dict):
        return {str(key): _strict_json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict_json(inner) for inner in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)

"""lm-eval's answers as two tables: a score with its interval a task, and a row a question."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
from scipy import stats

from pftools.errors import PftoolsError
from pftools.evaluate.task_names import ACCURACIES, METRICS


def leaves_of(loaded: dict[str, list[Any]], results: dict[str, Any]) -> dict[str, list[str]]:
    """{row of the score table: lm-eval's tasks in it}.

    A group is one row where all its tasks count right answers in the same way.
    """
    rows: dict[str, list[str]] = {}
    for name, parts in loaded.items():
        names = [
            task.task_name
            for part in parts
            for task in (part.get_all_tasks() if hasattr(part, "get_all_tasks") else [part])
        ]
        metrics = {metric_of(task, results) for task in names}
        if len(names) == 1 or (len(metrics) == 1 and metrics.pop()[0] in ACCURACIES):
            rows[name] = names
        else:
            rows |= {task: [task] for task in names}
    return rows


def metric_of(task: str, results: dict[str, Any]) -> tuple[str, str]:
    """The metric that a task is judged by, and the filter before it.

    Raises:
        PftoolsError: the task reports none that pftools knows.
    """
    reported = [
        tuple(key.split(",", 1))
        for key, value in results["results"][task].items()
        if "," in key and isinstance(value, (int, float))
    ]
    for wanted in METRICS:
        for metric, chosen in reported:
            if metric == wanted:
                return metric, chosen
    raise PftoolsError(
        f"the task {task!r} reports none of {', '.join(METRICS)}: pftools does not know how to judge it."
    )


def question_rows(task: str, leaves: list[str], results: dict[str, Any]) -> pd.DataFrame:
    """The rows of `TaskResults.samples` for one row of the score table."""
    rows = []
    for leaf in leaves:
        metric, chosen = metric_of(leaf, results)
        for sample in results["samples"][leaf]:
            if sample["filter"] != chosen:
                continue
            responses = sample["filtered_resps"]
            choices = [float(response[0]) for response in responses if isinstance(response, (tuple, list))]
            correct = float(sample[metric]) if isinstance(sample[metric], (int, float, bool)) else math.nan
            rows.append(
                {
                    **question_row(task, leaf, sample["doc_id"], correct, choices),
                    "target": str(sample["target"]),
                    "answer": "" if choices or not isinstance(responses[0], str) else responses[0],
                }
            )
    return pd.DataFrame(rows).sort_values(["subject", "question"], ignore_index=True)


def question_row(
    task: str, subject: str, question: int, correct: float, choice_scores: Sequence[float]
) -> dict[str, Any]:
    """A row of `TaskResults.samples`, without a target and an answer."""
    return {
        "task": task,
        "subject": subject,
        "question": int(question),
        "correct": correct,
        "target": "",
        "answer": "",
        "choice_scores": list(choice_scores),
    }


def score_row(task: str, metric: str, value: float, n: int, **others: float) -> dict[str, Any]:
    """A row of `TaskResults.scores`; stderr, low, high and chance are NaN where they are not given."""
    unknown = {"stderr": math.nan, "low": math.nan, "high": math.nan}
    row = {"task": task, "metric": metric, "value": value, **unknown, "n": n, "chance": math.nan}
    return {**row, **others}


def task_score(
    task: str, leaves: list[str], results: dict[str, Any], answers: pd.DataFrame
) -> dict[str, Any]:
    """The row of `TaskResults.scores` for a task.

    An accuracy has Wilson's 95% interval (Wilson 1927, JASA 22) and the level of guessing.
    """
    metric, chosen = metric_of(leaves[0], results)
    if metric not in ACCURACIES:
        return score_row(task, metric, float(results["results"][task][f"{metric},{chosen}"]), len(answers))
    n, value = len(answers), float(answers["correct"].mean())
    interval = stats.binomtest(round(value * n), n).proportion_ci(method="wilson")
    by_leaf = answers.groupby("subject")
    chance = sum(_chance(results["configs"][leaf], own) * len(own) for leaf, own in by_leaf) / n
    stderr = math.sqrt(value * (1 - value) / n)
    return score_row(
        task, metric, value, n, stderr=stderr, low=interval.low, high=interval.high, chance=chance
    )


def _chance(configuration: dict[str, Any], answers: pd.DataFrame) -> float:
    """The level of guessing: what the task states, else the mean of one over the number of choices.

    Free answers have none to choose from: 0.
    """
    stated = (configuration.get("metadata") or {}).get("chance")
    counts = [1 / len(scores) for scores in answers["choice_scores"] if len(scores) > 1]
    if stated is not None:
        return float(stated)
    return sum(counts) / len(counts) if counts else 0.0


def strict_json(value: Any) -> Any:
    """The value as plain numbers, texts, lists and mappings. JSON has no NaN, which becomes null."""
    if isinstance(value, dict):
        return {str(key): strict_json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict_json(inner) for inner in value]
    if callable(value):
        return getattr(value, "__name__", str(value))
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)

"""lm-eval tasks: the embedded and published ones in `data/tasks`, and any other by name.

Where the questions of our own come from is in `questions`; how they are asked, in `prefix_cache`. Here they are found, asked, and the
answers turned into two tables: a score a task, and a record of every question.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from scipy import stats
from torch import nn

from pftools import corpora
from pftools.errors import PftoolsError, nearest
from pftools.evaluate.perplexity import perplexity
from pftools.evaluate.prefix_cache import PrefixCachedLM
from pftools.evaluate.questions import PACKAGE_DATA, read_rows

TASKS = PACKAGE_DATA / "tasks"
# The metric that a task is judged by, where it has several: the first of these that it reports.
_ACCURACIES = ("acc_norm", "acc", "exact_match")
_METRICS = (*_ACCURACIES, "mcc", "f1", "word_perplexity", "perplexity")


@dataclass
class TaskResults:
    """What a model made of its tasks.

    Attributes:
        scores: a row a task: task, metric, value, stderr, low and high (95% interval of an accuracy, Wilson), n (questions), chance.
        samples: a row a question: task, subject (lm-eval's own task where ``task`` is a group of several, else the same), question (its
            place), correct (1 or 0; NaN where nothing is right or wrong), target, answer (what was written), choice_scores (log-likelihoods).
        results: lm-eval's own result file, JSON-serialisable.
        truncated: how many prompts were longer than the model's context, and cut at their beginning.
    """

    scores: pd.DataFrame
    samples: pd.DataFrame
    results: dict[str, Any]
    truncated: int = 0


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    data: str | Path | None = None,
    progress: bool = True,
) -> TaskResults:
    """Ask a model the questions of lm-eval tasks.

    Args:
        tasks: names; an unknown one is an error that offers the nearest.
        limit: questions a task, the first ones (of a group, for each of its tasks; of a block perplexity, blocks); None: all.
        seed: draws few-shot examples, where a task draws them.
        batch_size: questions a forward; None: chosen by size.
        data: the data root; None: `PFTOOLS_DATA`.

    Raises:
        PftoolsError: unknown task, missing data or columns, or a model that returns NaN.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks = list(dict.fromkeys(tasks))
    blocks = {name: settings for name in tasks if (settings := _block_perplexity(name))}
    loaded = load_tasks([name for name in tasks if name not in blocks], data=data)
    scores, samples, results, truncated = [], [], {}, 0
    if loaded:
        lm = PrefixCachedLM(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size or "auto", progress=progress
        )
        results = _ask(lm, loaded, limit, seed)
        for task, leaves in _leaves(loaded, results).items():
            answers = _samples(task, leaves, results)
            scores.append(_score(task, leaves, results, answers))
            samples.append(answers)
        truncated = lm.truncated
    for name, settings in blocks.items():
        score, losses = _score_blocks(
            model, tokenizer, name, settings, limit=limit, batch_size=batch_size, data=data, progress=progress
        )
        scores.append(score)
        samples.append(losses)
    if truncated:
        logging.getLogger(__name__).warning(
            "%d prompts were longer than the model's context and cut at their beginning", truncated
        )
    results = {name: value for name, value in results.items() if name != "samples"}
    record = _strict_json({**results, "truncated_prompts": truncated})
    return TaskResults(pd.DataFrame(scores), pd.concat(samples, ignore_index=True), record, truncated)


def scores_as_json(scores: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """{task: {metric, value, low, high, n, chance}} for a run's record."""
    kept = ["metric", "value", "low", "high", "n", "chance"]
    return _strict_json(
        {row["task"]: {name: row[name] for name in kept} for row in scores.to_dict("records")}
    )


def _ask(lm: PrefixCachedLM, loaded: dict[str, Any], limit: int | None, seed: int) -> dict[str, Any]:
    """lm-eval's result, with a record of every question under `samples`."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = TaskManager(include_defaults=False).load([part for parts in loaded.values() for part in parts])
    for task in found["tasks"].values():
        task.set_fewshot_seed(seed=seed)
    results = lm_eval.evaluate(lm, found, limit=limit, bootstrap_iters=0, log_samples=True)
    settings = {
        "model": "PrefixCachedLM",
        "limit": limit,
        "fewshot_seed": seed,
        "model_dtype": str(lm.model.dtype),
    }
    return {**results, "config": settings, "lm_eval_version": lm_eval.__version__}


# ---------------------------------------------------------------------------------------------------------------------
# Finding tasks


def own_tasks() -> dict[str, Path]:
    """{name: file} of the tasks in `data/tasks`."""
    return {path.stem: path for path in sorted(TASKS.glob("*.yaml"))}


def load_tasks(names: Sequence[str], *, data: str | Path | None = None) -> dict[str, list[Any]]:
    """{name: its lm-eval Task or Group, or several Tasks where lm-eval's name is a tag}.

    Our own files win over lm-eval's tasks of the same name: the same questions, from the data root.
    """
    from lm_eval.tasks import TaskManager

    own = own_tasks()
    foreign = [name for name in names if name not in own]
    managers = {}
    if len(foreign) < len(names):
        managers[True] = TaskManager(
            include_path=str(TASKS), include_defaults=False, metadata={"data": str(data) if data else None}
        )
    if foreign:  # reading the index of lm-eval's thousands of tasks takes seconds
        managers[False] = TaskManager()
        for name in foreign:
            if name not in managers[False].all_tasks:
                raise PftoolsError(
                    f"unknown task {name!r}: {_nearest_task(name, [*own, *managers[False].all_tasks])}."
                )
    return {name: _load(managers[name in own], name) for name in names}


def _load(manager: Any, name: str) -> list[Any]:
    if name in own_tasks():
        by = (manager.task_index[name].cfg.get("metadata") or {}).get("by")
        return [_load_group(manager, name, by)] if by else list(manager.load(name)["tasks"].values())
    try:
        found = manager.load(name)
    except Exception as error:  # the hub fails in many ways; the remedy is the same
        cause = (str(error).strip().splitlines() or [""])[0]
        raise PftoolsError(
            f"lm-eval's task {name!r} could not be loaded ({type(error).__name__}: {cause}): its data comes from the hub, which needs "
            f"network or the hub's cache; the tasks of this kit read the data root ({', '.join(own_tasks())})."
        ) from error
    group = found["groups"].get(name)
    return [group] if group else list(found["tasks"].values())


def _load_group(manager: Any, name: str, by: str) -> Any:
    """A task for each value of a column, and their mean over all questions."""
    from lm_eval.api.group import Group
    from lm_eval.config.group import AggMetricConfig

    from pftools.evaluate import questions

    cfg = manager.task_index[name].cfg
    metrics = [AggMetricConfig(metric["metric"]) for metric in cfg["metric_list"]]
    group = Group(name, aggregate_metric_list=metrics, metadata={"version": cfg["metadata"]["version"]})
    rows = read_rows(cfg["metadata"]["files"]["test"], (manager.metadata or {}).get("data"))
    for value in dict.fromkeys(row[by] for row in rows):
        own = {**cfg, "task": f"{name}_{value}", "custom_dataset": questions.splits}
        own["metadata"] = {**cfg["metadata"], "only": {by: value}}
        for task in manager.load(own)["tasks"].values():
            group.add(task)
    return group


def _nearest_task(name: str, known: list[str]) -> str:
    """lm-eval has thousands of tasks: offer the nearest, and list only our own."""
    offered = nearest(name, known).partition("(")[0].strip()
    found = offered if "did you mean" in offered else "no task has a similar name"
    return f"{found} (tasks of this kit: {', '.join(own_tasks())}; `lm-eval ls tasks` lists the others)"


# ---------------------------------------------------------------------------------------------------------------------
# The papers' perplexity, as a task


def _block_perplexity(name: str) -> dict[str, Any] | None:
    """The settings of a task that is a perplexity of blocks, which lm-eval does not know; None for any other."""
    path = own_tasks().get(name)
    text = path.read_text(encoding="utf-8") if path else ""
    return yaml.safe_load(text)["metadata"] if "output_type: block_perplexity" in text else None


def _score_blocks(
    model: nn.Module,
    tokenizer: Any,
    name: str,
    settings: dict[str, Any],
    *,
    limit: int | None,
    data: str | Path | None,
    **options: Any,
) -> tuple[dict[str, Any], pd.DataFrame]:
    length = min(
        settings["block_length"], getattr(model.config, "max_position_embeddings", settings["block_length"])
    )
    blocks = corpora.token_blocks(
        tokenizer, settings["corpus"], split=settings["split"], block_length=length, data=data
    )[:limit]
    found = perplexity(model, blocks, **options)
    score = _row(name, "perplexity", found.perplexity, len(blocks))
    rows = [
        _record(name, name, place, math.nan, choice_scores=[float(-loss)])
        for place, loss in enumerate(found.block_nll)
    ]
    return score, pd.DataFrame(rows)


# ---------------------------------------------------------------------------------------------------------------------
# Reading lm-eval's answer


def _leaves(loaded: dict[str, list[Any]], results: dict[str, Any]) -> dict[str, list[str]]:
    """{row of the score table: lm-eval's tasks in it}. A group is one row where all its tasks count right answers in the same way."""
    rows: dict[str, list[str]] = {}
    for name, parts in loaded.items():
        names = [
            task.task_name
            for part in parts
            for task in (part.get_all_tasks() if hasattr(part, "get_all_tasks") else [part])
        ]
        metrics = {_metric(task, results) for task in names}
        if len(names) == 1 or (len(metrics) == 1 and metrics.pop()[0] in _ACCURACIES):
            rows[name] = names
        else:
            rows |= {task: [task] for task in names}
    return rows


def _metric(task: str, results: dict[str, Any]) -> tuple[str, str]:
    """The metric that a task is judged by, and the filter before it.

    Raises:
        PftoolsError: the task reports none that pftools knows.
    """
    reported = [
        tuple(key.split(",", 1))
        for key, value in results["results"][task].items()
        if "," in key and isinstance(value, (int, float))
    ]
    for wanted in _METRICS:
        for metric, chosen in reported:
            if metric == wanted:
                return metric, chosen
    raise PftoolsError(
        f"the task {task!r} reports none of {', '.join(_METRICS)}: pftools does not know how to judge it."
    )


def _samples(task: str, leaves: list[str], results: dict[str, Any]) -> pd.DataFrame:
    rows = []
    for leaf in leaves:
        metric, chosen = _metric(leaf, results)
        for sample in results["samples"][leaf]:
            if sample["filter"] != chosen:
                continue
            responses = sample["filtered_resps"]
            choices = [float(response[0]) for response in responses if isinstance(response, (tuple, list))]
            correct = float(sample[metric]) if isinstance(sample[metric], (int, float, bool)) else math.nan
            answer = "" if choices or not isinstance(responses[0], str) else responses[0]
            rows.append(
                _record(
                    task,
                    leaf,
                    sample["doc_id"],
                    correct,
                    target=sample["target"],
                    answer=answer,
                    choice_scores=choices,
                )
            )
    return pd.DataFrame(rows).sort_values(["subject", "question"], ignore_index=True)


def _record(
    task: str,
    subject: str,
    question: int,
    correct: float,
    *,
    target: Any = "",
    answer: str = "",
    choice_scores: Sequence[float] = (),
) -> dict[str, Any]:
    return {
        "task": task,
        "subject": subject,
        "question": int(question),
        "correct": correct,
        "target": str(target),
        "answer": answer,
        "choice_scores": list(choice_scores),
    }


def _score(task: str, leaves: list[str], results: dict[str, Any], answers: pd.DataFrame) -> dict[str, Any]:
    metric, chosen = _metric(leaves[0], results)
    if metric not in _ACCURACIES:
        return _row(task, metric, float(results["results"][task][f"{metric},{chosen}"]), len(answers))
    n, value = len(answers), float(answers["correct"].mean())
    interval = stats.binomtest(round(value * n), n).proportion_ci(method="wilson")
    chance = (
        sum(_chance(results["configs"][leaf], own) * len(own) for leaf, own in answers.groupby("subject")) / n
    )
    return _row(
        task,
        metric,
        value,
        n,
        stderr=math.sqrt(value * (1 - value) / n),
        low=interval.low,
        high=interval.high,
        chance=chance,
    )


def _row(
    task: str,
    metric: str,
    value: float,
    n: int,
    *,
    stderr: float = math.nan,
    low: float = math.nan,
    high: float = math.nan,
    chance: float = math.nan,
) -> dict[str, Any]:
    return {
        "task": task,
        "metric": metric,
        "value": value,
        "stderr": stderr,
        "low": low,
        "high": high,
        "n": n,
        "chance": chance,
    }


def _chance(configuration: dict[str, Any], answers: pd.DataFrame) -> float:
    """The level of guessing: what the task states, else the mean of one over the number of choices; none for free answers."""
    stated = (configuration.get("metadata") or {}).get("chance")
    counts = [1 / len(scores) for scores in answers["choice_scores"] if len(scores) > 1]
    if stated is not None:
        return float(stated)
    return sum(counts) / len(counts) if counts else 0.0


def _strict_json(value: Any) -> Any:
    """The value with what JSON cannot say (NaN, infinity, numpy's numbers) as null or as plain numbers."""
    if isinstance(value, dict):
        return {str(key): _strict_json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict_json(inner) for inner in value]
    if callable(value):
        return getattr(value, "__name__", str(value))
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)

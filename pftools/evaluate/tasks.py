"""`evaluate_tasks`: lm-eval tasks, the embedded and published ones in `data/tasks` and any other by name.

Tasks are found (`task_names`), loaded here with their data (`questions`), asked (`prefix_cache`), and the
answers turned into two tables (`scores`).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import nn

from pftools import corpora, hub
from pftools.corpora.chat import need_template
from pftools.errors import PftoolsError
from pftools.evaluate import task_names
from pftools.evaluate.block_perplexity import first_token, first_token_in_words, perplexity
from pftools.evaluate.prefix_cache import PrefixCachedLM
from pftools.evaluate.questions import read_rows
from pftools.evaluate.scores import leaves_of, question_row, question_rows, score_row, strict_json, task_score
from pftools.pretrained.base_models import context_length

if TYPE_CHECKING:
    from pftools.settings import Evaluate

# The arguments of `evaluate_tasks` that a step's parameters have, under the same names.
_DECIDED = (
    "tasks",
    "limit",
    "seed",
    "include",
    "num_fewshot",
    "apply_chat_template",
    "system_instruction",
    "batch_size",
    "data",
)


@dataclass
class TaskResults:
    """What a model made of its tasks.

    Attributes:
        scores: a row a task: task, metric, value, stderr, low and high (95% interval of an accuracy, Wilson),
            n (questions), chance (the level of guessing).
        samples: a row a question: task, subject (lm-eval's own task where ``task`` is a group of several,
            else the same), question (its place), correct (1 or 0; NaN where nothing is right or wrong),
            target, answer (what was written), choice_scores (log-likelihoods, in nats).
        results: lm-eval's own result file, JSON-serialisable.
        records: {lm-eval's task: its record of every question}, as lm-eval logs them.
        truncated: how many prompts were longer than the model's context, and cut at their beginning.
        reading: {"shared_beginnings": "shared" or "plain", "reason": why not}; empty where nothing was asked.
    """

    scores: pd.DataFrame
    samples: pd.DataFrame
    results: dict[str, Any]
    records: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    truncated: int = 0
    reading: dict[str, str] = field(default_factory=dict)


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    seed: int = 0,
    include: str | Path = "",
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    system_instruction: str = "",
    batch_size: int | None = None,
    data: str | Path | None = None,
    progress: bool = True,
) -> TaskResults:
    """Ask a model the questions of lm-eval tasks.

    What can be chosen has the names and the meaning that it has in lm-eval.

    Args:
        tasks: names; an unknown one is an error that offers the nearest.
        limit: questions a task, the first ones (of a group, for each of its tasks; of a block perplexity,
            blocks); None: all.
        seed: draws few-shot examples, where a task draws them.
        include: a folder with more task files, as lm-eval's `--include_path`.
        num_fewshot: examples before each question; None: as many as the task says. A task that says 0 keeps
            it.
        apply_chat_template: ask through the model's chat template, examples as earlier turns.
        system_instruction: what stands before each question, or is the chat's system message.
        batch_size: questions a forward; None: chosen by size.
        data: the data root; None: `PFTOOLS_DATA`.

    Raises:
        PftoolsError: unknown task, missing data or columns, or a model that returns NaN.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks = list(dict.fromkeys(tasks))
    blocks = {name: settings for name in tasks if (settings := _block_perplexity(name))}
    loaded = load_tasks([name for name in tasks if name not in blocks], data=data, include=include)
    if apply_chat_template:
        need_template(tokenizer, otherwise="apply_chat_template=False")
    scores: list[dict[str, Any]] = []
    samples: list[pd.DataFrame] = []
    results: dict[str, Any] = {}
    truncated = 0
    reading: dict[str, str] = {}
    if loaded:
        lm = PrefixCachedLM(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size or "auto", progress=progress
        )
        way = _Way(limit, seed, num_fewshot, apply_chat_template, system_instruction)
        results = _ask(lm, loaded, way)
        for task, leaves in leaves_of(loaded, results).items():
            samples.append(question_rows(task, leaves, results))
            scores.append(task_score(task, leaves, results, samples[-1]))
        truncated, reading = lm.truncated, lm.shared_beginnings()
    first = first_token(model, tokenizer) if blocks else None
    begins = {"blocks_begin_with": first_token_in_words(tokenizer, first)} if blocks else {}
    for name, settings in blocks.items():
        text = _task_blocks(model, tokenizer, settings, data)[:limit]
        found = perplexity(model, text, first=first, batch_size=batch_size, progress=progress)
        scores.append(score_row(name, "perplexity", found.perplexity, len(text)))
        losses = enumerate(found.block_nll.tolist())
        samples.append(
            pd.DataFrame([question_row(name, name, place, math.nan, [-loss]) for place, loss in losses])
        )
    if truncated:
        logging.getLogger(__name__).warning(
            "%d prompts were longer than the model's context and cut at their beginning", truncated
        )
    kept = {name: value for name, value in results.items() if name != "samples"}
    record = strict_json({**kept, "truncated_prompts": truncated, **reading, **begins})
    answers = pd.concat(samples, ignore_index=True)
    records = results.get("samples", {})
    return TaskResults(pd.DataFrame(scores), answers, record, records, truncated, reading)


def tasks_of(parameters: Evaluate) -> dict[str, Any]:
    """The arguments of `evaluate_tasks` that a step's parameters decide, by name."""
    return {name: getattr(parameters, name) for name in _DECIDED}


def scores_as_json(scores: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """{task: {metric, value, low, high, n, chance}} for a run's record."""
    kept = ["metric", "value", "low", "high", "n", "chance"]
    rows = scores.to_dict("records")
    return strict_json({row["task"]: {name: row[name] for name in kept} for row in rows})


@dataclass(frozen=True)
class _Way:
    """How tasks are asked; see `evaluate_tasks`."""

    limit: int | None
    fewshot_seed: int
    num_fewshot: int | None
    apply_chat_template: bool
    system_instruction: str


def _ask(lm: PrefixCachedLM, loaded: dict[str, Any], way: _Way) -> dict[str, Any]:
    """lm-eval's result, with a record of every question under `samples`."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = TaskManager(include_defaults=False).load([part for parts in loaded.values() for part in parts])
    for name, task in found["tasks"].items():
        task.set_fewshot_seed(seed=way.fewshot_seed)
        if way.num_fewshot is not None and task.get_config("num_fewshot") == 0:
            logging.getLogger(__name__).warning("%s is asked without examples, as its file says", name)
        elif way.num_fewshot is not None:
            task.set_config(key="num_fewshot", value=way.num_fewshot)
        _check_examples(name, task)
    results = lm_eval.evaluate(
        lm,
        found,
        limit=way.limit,
        bootstrap_iters=0,
        log_samples=True,
        system_instruction=way.system_instruction or None,
        apply_chat_template=way.apply_chat_template,
        fewshot_as_multiturn=way.apply_chat_template,
    )
    settings = {"model": "PrefixCachedLM", **asdict(way), "model_dtype": str(lm.model.dtype)}
    about = {"config": settings, "lm_eval_version": lm_eval.__version__, "date": time.time()}
    if way.apply_chat_template:
        about["chat_template"] = lm.tokenizer.chat_template
    return {**results, **about}


def _check_examples(name: str, task: Any) -> None:
    """Refuse more examples than a task has rows for."""
    wanted = task.get_config("num_fewshot") or 0
    if wanted:
        own = task.fewshot_cfg.split == task.get_config("test_split")  # the question itself is no example
        there = len(list(task.fewshot_docs())) - own
        if wanted > there:
            raise PftoolsError(
                f"the task {name!r} is asked with {wanted} examples, and has {there} to draw them from: give "
                "a num_fewshot of at most that."
            )


# ----------------------------------------------------------------------------------------------------------
# Loading tasks


def load_tasks(
    names: Sequence[str], *, data: str | Path | None = None, include: str | Path = ""
) -> dict[str, list[Any]]:
    """{name: its lm-eval Task or Group, or several Tasks where lm-eval's name is a tag}.

    Our own files win over lm-eval's tasks of the same name: the same questions, from the data root. Files of
    ``include`` win over both.

    Raises:
        PftoolsError: what `check_tasks` refuses, or data that is not there.
    """
    own, included = task_names.own_tasks(), task_names.included_tasks(include)
    task_names.check_found(names, included)
    return {
        name: _load_own(name, data)
        if name in own and name not in included
        else _load_foreign(name, task_names.index_with(name, included))
        for name in names
    }


def _load_own(name: str, data: str | Path | None) -> list[Any]:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(
        include_path=str(task_names.TASKS),
        include_defaults=False,
        metadata={"data": str(data) if data else None},
    )
    by = (manager.task_index[name].cfg.get("metadata") or {}).get("by")
    return [_load_group(manager, name, by)] if by else list(manager.load(name)["tasks"].values())


def _load_foreign(name: str, index: task_names.Index) -> list[Any]:
    """A task, group or tag of lm-eval, or of an included folder.

    Only the folders of its files are indexed; all of them take half a minute.
    """
    from lm_eval.tasks import TaskManager

    folders = task_names.folders_of(name, index)
    try:
        found = TaskManager(include_path=list(folders), include_defaults=False).load(name)
    except Exception as error:  # a mistake in its file, or the hub, which fails in many ways
        remedy = f"mend its file, or what that reads, in {folders[0]}"
        if not task_names.reads_files(name, index):
            ours = ", ".join(task_names.own_tasks())
            remedy = f"{hub.remedy_of(error)}; the tasks of this kit read the data root ({ours})"
        cause = f"{type(error).__name__}: {hub.cause_of(error)}"
        raise PftoolsError(f"the task {name!r} could not be loaded ({cause}): {remedy}.") from error
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


# ----------------------------------------------------------------------------------------------------------
# The papers' perplexity, as a task


def _block_perplexity(name: str) -> dict[str, Any] | None:
    """The settings of a block perplexity, a kind of task that lm-eval does not know; None for any other."""
    path = task_names.own_tasks().get(name)
    settings = task_names.read_task(path) if path else {}
    return settings["metadata"] if settings.get("output_type") == task_names.BLOCK_PERPLEXITY else None


def _task_blocks(
    model: nn.Module, tokenizer: Any, settings: dict[str, Any], data: str | Path | None
) -> torch.Tensor:
    """The blocks of a block perplexity, (n_blocks, block_length): at most as long as the model's context."""
    asked = settings["block_length"]
    length = min(asked, context_length(model) or asked)
    return corpora.token_blocks(
        tokenizer, settings["corpus"], split=settings["split"], block_length=length, data=data
    )

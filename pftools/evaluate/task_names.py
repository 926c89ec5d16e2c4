"""Which tasks there are, and whether pftools can judge them. Nothing here loads torch or a task's data.

`check_tasks` is what a plan calls before the first step. Our own task files are read at once. Reading the
index of lm-eval's thousands of tasks takes half a minute, so it is kept in the user's cache, for each
installed version.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from pftools.errors import PftoolsError, nearest, not_yaml
from pftools.evaluate.questions import PACKAGE_DATA
from pftools.files import write_json
from pftools.pretrained.base_models import cache_folder

TASKS = PACKAGE_DATA / "tasks"
# The metric that a task is judged by, where it has several: the first of these that it reports.
ACCURACIES = ("acc_norm", "acc", "exact_match")
METRICS = (*ACCURACIES, "mcc", "f1", "word_perplexity", "perplexity")
BLOCK_PERPLEXITY = "block_perplexity"  # an output type of ours, which lm-eval does not know
Index = dict[str, dict[str, Any]]
_INDEX_VERSION = 2  # of the cached index; raise it when its contents change


def check_tasks(names: Sequence[str], *, include: str | Path = "") -> None:
    """Check that every task exists and reports a metric that pftools judges by.

    Args:
        include: a folder with more task files; they win over others of the same name.

    Raises:
        PftoolsError: a name that neither ``data/tasks`` nor lm-eval has (the nearest is offered), a metric or
            aggregation that lm-eval does not have, or a task with no metric that pftools knows.
    """
    check_found(names, included_tasks(include))


def check_found(names: Sequence[str], included: Index) -> None:
    """`check_tasks`, where the folder was read already (`included_tasks`)."""
    own = own_tasks()
    for name in names:
        if name in own and name not in included:
            _check_own(name, own[name])
        else:
            _check_judged(name, index_with(name, included))
            _check_data(name, included)


def own_tasks() -> dict[str, Path]:
    """{name: file} of the tasks in ``data/tasks``."""
    return {path.stem: path for path in sorted(TASKS.glob("*.yaml"))}


def read_task(path: Path) -> dict[str, Any]:
    """The settings in a task's YAML file; a ``!function`` is its name, as text.

    Raises:
        PftoolsError: the file is not YAML, or not a mapping.
    """
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.MarkedYAMLError as error:
        raise not_yaml(path, error) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PftoolsError(
            f"the task file {path} is no text ({' '.join(str(error).split())}): save it as UTF-8."
        ) from None
    if not isinstance(settings, dict):
        raise PftoolsError(
            f"the task file {path} holds no settings: it needs lines such as 'task: {path.stem}'."
        )
    return settings


class _Loader(yaml.SafeLoader):
    """A YAML loader that keeps ``!function module.name`` as text."""


_Loader.add_constructor("!function", lambda _, node: str(node.value))


# ------------------------------------------------------------------------------------------------------------
# Metrics


def reported_metrics(settings: dict[str, Any]) -> list[str]:
    """The names of the metrics that a task's settings ask for; without a list, those of its output type."""
    listed = settings.get("metric_list")
    if listed is None:
        from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY

        return list(DEFAULT_METRIC_REGISTRY.get(settings.get("output_type"), ()))
    names = (entry.get("metric") for entry in listed if isinstance(entry, dict))
    return [str(name).rpartition(".")[2] for name in names]  # of a function, its own name


def _check_own(name: str, path: Path) -> None:
    """Check one of our own task files: every metric and aggregation is lm-eval's, and one is known here."""
    settings = read_task(path)
    if settings.get("output_type") == BLOCK_PERPLEXITY:
        return
    import lm_eval.api.metrics  # noqa: F401  fills the registries
    from lm_eval.api.registry import AGGREGATION_REGISTRY, METRIC_REGISTRY

    # Where a task has a function of its own for results, that function decides which metrics there are.
    free = "process_results" in settings
    for entry in settings.get("metric_list") or ():
        if not isinstance(entry, dict) or "metric" not in entry:
            raise PftoolsError(f"{path}: an entry of metric_list has no metric; write '- metric: acc'.")
        metric, aggregation = str(entry["metric"]), str(entry.get("aggregation", "mean"))
        if not free and "." not in metric and not entry.get("hf_evaluate") and metric not in METRIC_REGISTRY:
            raise PftoolsError(
                f"{path}: unknown metric {metric!r}: {nearest(metric, METRIC_REGISTRY.keys())}."
            )
        if "." not in aggregation and aggregation not in AGGREGATION_REGISTRY:
            valid = nearest(aggregation, AGGREGATION_REGISTRY.keys())
            raise PftoolsError(f"{path}: unknown aggregation {aggregation!r} of {metric}: {valid}.")
    if not set(reported_metrics(settings)) & set(METRICS):
        raise _not_judged(name)


def _check_judged(name: str, index: Index) -> None:
    """Check that a task of lm-eval exists, and that each of its parts reports a metric that is known here."""
    if name not in index:
        raise unknown_task(name, index)
    for part in parts_of(name, index):
        metrics = index[part]["metrics"]
        if metrics is not None and not set(metrics) & set(METRICS):
            raise _not_judged(part)


# Kinds of data sets that are files.
_OF_FILES = ("json", "csv", "parquet", "text", "arrow")


def reads_files(name: str, index: Index) -> bool:
    """Whether a task reads files, and nothing of the hub."""
    return all(index[part]["data"] in _OF_FILES for part in parts_of(name, index))


def _check_data(name: str, index: Index) -> None:
    """Check that the files of an included task are there, where it names files of this machine."""
    for part in parts_of(name, index):
        for file in index[part]["files"] if reads_files(part, index) else ():
            if "://" not in file and not glob.glob(str(Path(file).expanduser())):
                raise PftoolsError(
                    f"the task {part!r} reads {file}, and no such file is there: paths count from "
                    f"{Path.cwd()}; mend data_files in {index[part]['path']}."
                )


def _not_judged(name: str) -> PftoolsError:
    return PftoolsError(
        f"the task {name!r} reports none of {', '.join(METRICS)}: pftools does not know how to judge it."
    )


def unknown_task(name: str, index: Index) -> PftoolsError:
    """The error for an unknown name.

    lm-eval has thousands of tasks: it offers the nearest and lists only our own.
    """
    offered = nearest(name, [*own_tasks(), *index]).partition("(")[0].strip()
    found = offered if "did you mean" in offered else "no task has a similar name"
    ours = ", ".join(own_tasks())
    return PftoolsError(
        f"unknown task {name!r}: {found} (tasks of this kit: {ours}; `lm-eval ls tasks` lists the others)."
    )


# ------------------------------------------------------------------------------------------------------------
# The index of lm-eval's tasks


def included_tasks(include: str | Path) -> Index:
    """The tasks, groups and tags of a folder's files, as `lm_eval_index` tells them; empty for no folder.

    Raises:
        PftoolsError: the folder is not there, has no task files, one that cannot be read, or two of one name.
    """
    if not str(include):
        return {}
    folder = Path(include).expanduser()
    if folder.is_dir():
        _check_files(folder)
    found = _read_index(folder) if folder.is_dir() else {}
    if not found:
        raise PftoolsError(
            f"include is {str(include)!r}, and no task files are there: give a folder with task files of "
            "lm-eval's kind (YAML)."
        )
    return found


def _check_files(folder: Path) -> None:
    """Refuse files that lm-eval would pass over without a word."""
    from lm_eval.tasks._index import TaskIndex
    from lm_eval.tasks._yaml_loader import load_yaml

    homes: dict[str, Path] = {}
    for path in TaskIndex._iter_yaml_files(folder):
        read_task(path)
        try:
            settings = load_yaml(path, resolve_func=False)
        except Exception as error:  # a file that it includes is missing, or includes this one
            cause = " ".join(str(error).split()).rstrip(".")
            raise PftoolsError(
                f"the task file {path} cannot be read ({type(error).__name__}: {cause}): mend it, or take it "
                "out of the folder."
            ) from None
        name = settings.get("group") or settings.get("task")
        if isinstance(name, str) and homes.setdefault(name, path) != path:
            raise PftoolsError(
                f"the task {name!r} stands in {homes[name]} and in {path}: give one of them another name."
            )


def index_with(name: str, included: Index) -> Index:
    """Where a task is looked up: the included ones, and lm-eval's where that is needed."""
    return included if name in included else {**lm_eval_index(), **included}


def lm_eval_index() -> Index:
    """Every task, group and tag that lm-eval ships: {name: {"path", "metrics", "parts", "data", "files"}}.

    path: the YAML file; None for a tag. metrics: names; None where only code knows them. parts: the tasks,
    groups and tags that a group or a tag consists of; empty for a task. data: its data set on the hub, or the
    kind of its files. files: paths of its data. Kept in the user's cache by lm-eval's version and folder.
    """
    folder = _lm_eval_folder()
    version = importlib.metadata.version("lm_eval")
    place = hashlib.sha256(str(folder).encode()).hexdigest()[:12]
    path = cache_folder() / "lm_eval" / f"tasks-{version}-{place}-{_INDEX_VERSION}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there yet, or damaged
        pass
    log = logging.getLogger(__name__)
    log.warning("reading the index of lm-eval's tasks: half a minute, once for each version of lm-eval")
    index = _read_index(folder)
    try:
        write_json(path, index)
    except OSError as error:
        log.warning("the index of lm-eval's tasks could not be kept: %s", error)
    return index


def parts_of(name: str, index: Index) -> list[str]:
    """The tasks behind a name: itself, or those of the group or tag, each once."""
    return [found for found in _below(name, index, set()) if not index[found]["parts"]]


def read_from(name: str, index: Index) -> tuple[list[str], list[str]]:
    """What the tasks behind a name read: data sets on the hub, and files."""
    parts = [index[part] for part in parts_of(name, index)]
    sets = {str(part["data"]) for part in parts if part["data"] and not part["files"]}
    return sorted(sets), sorted({file for part in parts for file in part["files"]})


def folders_of(name: str, index: Index) -> list[Path]:
    """The folders of the YAML files that a task, group or tag is made of."""
    paths = (index[found]["path"] for found in _below(name, index, set()))
    return sorted({Path(path).parent for path in paths if path})


def _below(name: str, index: Index, seen: set[str]) -> Iterator[str]:
    """A name, and all names below it, each once."""
    if name in index and name not in seen:
        seen.add(name)
        yield name
        for part in index[name]["parts"]:
            yield from _below(part, index, seen)


def _lm_eval_folder() -> Path:
    found = importlib.util.find_spec("lm_eval")
    if found is None or found.origin is None:
        raise PftoolsError("lm-eval is not installed: install it with `pip install 'lm-eval[hf]'`.")
    return Path(found.origin).parent / "tasks"


def _read_index(folder: Path) -> Index:
    from lm_eval.tasks._index import Kind, TaskIndex

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    index = {}
    for name, entry in TaskIndex.build([folder]).items():
        settings = entry.cfg or {}
        parts: list[str] = []
        if entry.kind is Kind.TAG:
            parts = sorted(entry.tags)
        elif entry.kind is Kind.GROUP:
            parts = list(_part_names(settings.get("task")))
        known = entry.kind is Kind.TASK and isinstance(settings.get("metric_list", []), list)
        index[name] = {
            "path": str(entry.yaml_path) if entry.yaml_path else None,
            "metrics": reported_metrics(settings) if known else None,
            "parts": parts,
            "data": settings.get("dataset_path"),
            "files": list(_texts((settings.get("dataset_kwargs") or {}).get("data_files"))),
        }
    return index


def _texts(value: Any) -> Iterator[str]:
    """All texts in lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _part_names(parts: Any) -> Iterator[str]:
    """The names in a group's list of parts. A part is a name, or settings with a name or a list."""
    if isinstance(parts, str):
        yield parts
    elif isinstance(parts, dict):
        yield from _part_names(parts.get("task"))
    else:
        for part in parts or ():
            yield from _part_names(part)

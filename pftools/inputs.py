"""What a step reads beside its parameters: models, texts and questions, each known by a digest.

A run records what it was made from. When its step is planned again, what is there now is compared: a run that
was made from other contents is not used any more. What is not on this machine is taken to be as it was.

Files count by their contents; what comes from the hub by its revision, a commit hash that the hub's cache
tells once it was loaded.
"""

from __future__ import annotations

from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path

from pftools import contents, corpora, run_folder, settings
from pftools.corpora.data_root import DATA_SETS, data_root
from pftools.errors import PftoolsError
from pftools.evaluate import task_names
from pftools.pretrained.model_files import model_folder
from pftools.shipped import DATA

Inputs = dict[str, str]


def visible(parameters: settings.Step) -> Inputs:
    """{input: digest} of what a step would read now, as far as it is on this machine."""
    found: dict[str, str | None] = {}
    for name in parameters.parents:
        if reference := getattr(parameters, name):
            found[name] = _of_model(reference)
    corpus, data = getattr(parameters, "corpus", ""), getattr(parameters, "data", "")
    for split in _splits(parameters):
        found[f"corpus/{split}"] = _of_corpus(corpus, split, data)
    if isinstance(parameters, settings.Evaluate):
        for task in parameters.tasks:
            found |= _of_task(task, parameters)
    return {name: digest for name, digest in found.items() if digest}


def changed(parameters: settings.Step) -> str | None:
    """Why the finished run of a step is not to be used any more, as a sentence; None where it is."""
    return run_folder.changed_input(run_folder.folder_of(parameters), visible(parameters))


def _splits(parameters: settings.Step) -> list[str]:
    """The splits of its corpus that a step reads."""
    match parameters:
        case settings.Prune(calibration=""):
            return ["calibration", "validation"]
        case settings.Finetune():
            return ["train", "validation"]
        case settings.Calibrate() | settings.Evaluate():
            return [parameters.split]
    return []


def _of_model(model: str) -> str | None:
    if run_folder.is_reference(model):
        return run_folder.outputs_digest(model)
    if model == settings.EMBEDDED_MODEL:
        # Its weights alone, as what stands around them differs with the version of transformers.
        folder = model_folder(model)
        return contents.digest(str(folder / "model.safetensors")) if folder else None
    return contents.digest(model) or contents.hub_revision("models", model)


def _of_corpus(corpus: str, split: str, data: str) -> str | None:
    if corpus == "pydocs":
        return _of_pydocs()
    path = corpora.file_of(corpus, split, data)
    if data_set := contents.data_set_of(corpus):
        return contents.hub_revision("datasets", data_set[0])
    return contents.digest(str(path)) if path else _of_data_set(corpus)


@cache
def _of_pydocs() -> str:
    """Python's own documentation, which differs from one Python to the next."""
    from pftools.corpora import pydocs

    return pydocs.digest()


def _of_data_set(name: str) -> str | None:
    source = DATA_SETS.get(name)
    return contents.hub_revision("datasets", source.hub["path"]) if source and source.hub else None


def _of_task(task: str, parameters: settings.Evaluate) -> dict[str, str | None]:
    """What a task reads: its own file, the files of its questions, or its data on the hub."""
    path = task_names.own_tasks().get(task)
    tree = contents.digest_of_tree(parameters.include) if parameters.include else None
    if path is None or (tree and task in _included(parameters.include, tree)):
        return _of_foreign_task(task, parameters.include, tree)
    digest = contents.digest(str(path))
    corpus, places = _questions_of(path, digest)
    found = {f"data/{place.partition(':')[2]}": _of_questions(place, parameters.data) for place in places}
    if corpus:
        found[f"data/{'/'.join(corpus)}"] = _of_corpus(*corpus, parameters.data)
    return {f"task/{task}": digest, **found}


def _of_foreign_task(task: str, include: str, tree: str | None) -> dict[str, str | None]:
    """Of a task of lm-eval its version, and the data; the files of ``include`` are in the key themselves."""
    included = tree is not None and task in _included(include, tree)
    sets, files = task_names.read_from(task, _index_for(task, include, tree))
    found: dict[str, str | None] = {}
    if not included:
        found[f"task/{task}"] = f"lm_eval {metadata.version('lm_eval')}"
    found |= {
        f"data/{name}": contents.digest(name) or contents.hub_revision("datasets", name) for name in sets
    }
    return found | {f"data/{Path(name).name}": contents.digest(name) for name in files}


@lru_cache(maxsize=8)
def _included(include: str, tree: str) -> task_names.Index:
    """The tasks of a folder, read once for what it holds."""
    try:
        return task_names.included_tasks(include)
    except PftoolsError:  # it is named when the plan is checked
        return {}


@lru_cache
def _index_for(task: str, include: str, tree: str | None) -> task_names.Index:
    return task_names.index_with(task, _included(include, tree) if tree else {})


@lru_cache
def _questions_of(path: Path, digest: str | None) -> tuple[tuple[str, str] | None, list[str]]:
    """The corpus and split that a task's own file names, and the places of its questions.

    Args:
        path: of the task's file.
        digest: of what it holds, so that it is read once.
    """
    try:
        told = task_names.read_task(path).get("metadata")
    except PftoolsError:  # it is named when the plan is checked
        told = None
    told = told if isinstance(told, dict) else {}
    files = told.get("files")
    corpus = (str(told["corpus"]), str(told.get("split", "test"))) if "corpus" in told else None
    return corpus, [str(place) for place in files.values()] if isinstance(files, dict) else []


def _of_questions(place: str, data: str) -> str | None:
    """The digest of `package:FILE` or `root:DATASET/SPLIT`."""
    where, _, name = place.partition(":")
    if where == "package":
        return contents.digest(str(DATA / name))
    root = data_root(data)
    path = root / f"{name}.jsonl" if root else Path()
    return contents.digest(str(path)) if path.is_file() else _of_data_set(name.rpartition("/")[0])

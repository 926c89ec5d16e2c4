"""What can be known of a plan before its first step: a slip costs a sentence, and not a training."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pftools import contents, corpora, run_folder, settings
from pftools.corpora.data_root import data_root
from pftools.errors import PftoolsError
from pftools.evaluate.task_names import check_tasks
from pftools.files import as_bytes
from pftools.pretrained.model_files import (
    adapted_matrices,
    context_length,
    matrices,
    model_folder,
    module_name,
    read_config,
)
from pftools.pretrained.suitable import (
    has_weights,
    unlike_its_files,
    unreadable_tokenizer,
    unsuitable,
    unsuitable_folder,
)
from pftools.study.costs import estimate_disk, shapes_of
from pftools.study.plan import Plan
from pftools.study.words import Study

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HUB_CORPORA = ("wikitext2", "c4")
_MOST_READ = 64 * 2**20  # bytes of a corpus that are read to check it


def check_plan(plan: Plan) -> None:
    """Refuse a plan of which a step would fail.

    Checked are the tasks and their metrics, corpora with their splits, the model's class, the length of
    blocks, the targets of adapters, N:M patterns, and the room on the disk; of a model's files their names,
    headers and tokenizer. What is on the hub only is taken on trust.

    Raises:
        PftoolsError: what is wrong, and in which line of the study.
    """
    study = plan.study
    steps = {step.parameters.step for step in plan.steps.values()}
    _check_tasks(study)
    for section in ("calibrate", "finetune", "evaluate"):
        if section in steps:
            _check_corpus(study, section)
    if study.tune is not None:
        _check_corpus(study, "evaluate", split="validation")
    config, model = read_config(study.model), None
    _check_folder(study, config)
    if config:
        model = _check_class(study, config, prunes="prune" in steps)
        for section in ("calibrate", "finetune", "evaluate"):
            if section in steps:
                _check_block_length(study, section, context_length(config))
    if "finetune" in steps:
        _check_targets(study)
    if "prune" in steps:
        _check_patterns(study, model)
    _check_room(plan)


def _check_tasks(study: Study) -> None:
    try:
        parameters = study.parameters(settings.Evaluate)
        check_tasks(parameters.tasks, include=parameters.include)
    except PftoolsError as error:
        raise PftoolsError(f"{study.place('evaluate', 'tasks')}: {error}") from None


def _check_corpus(study: Study, section: str, *, split: str | None = None) -> None:
    """Read the split that a step will read, where it is on this machine and of moderate size."""
    parameters: Any = study.parameters(settings.STEPS[section])
    corpus, read = parameters.corpus, split or str(getattr(parameters, "split", "train"))
    data = getattr(parameters, "data", "") or None
    root = data_root(data)
    if corpus in _HUB_CORPORA and not (root and (root / corpus).is_dir()):
        return
    if contents.data_set_of(corpus):
        return
    try:
        if _size(Path(contents.place_and_column(corpus)[0])) <= _MOST_READ:
            corpora.documents(corpus, split=read, data=data)
    except PftoolsError as error:
        raise PftoolsError(f"{study.place(section, 'corpus')}: {error}") from None


def _size(path: Path) -> int:
    files = path.iterdir() if path.is_dir() else [path]
    return max((file.stat().st_size for file in files if file.is_file()), default=0)


def _check_folder(study: Study, config: dict[str, Any]) -> None:
    """Refuse a folder that holds no model; a run is one."""
    place = Path(study.model)
    if config or not place.exists() or run_folder.is_finished(place):
        return
    why = "is a file, and a model is a folder"
    if place.is_dir():
        why = "holds no model: it has no config.json"
        if (place / "adapter_config.json").exists():
            why = "is an adapter of PEFT and no whole model: merge it into its base and save that"
        if (place / "config.json").exists():
            why = "has a config.json that is no JSON object"
    raise PftoolsError(f"{study.place('model')}: {study.model!r} {why}.")


def _check_class(study: Study, config: dict[str, Any], *, prunes: bool) -> PreTrainedModel | None:
    """Refuse a model that the steps would refuse, as far as its files tell.

    Returns:
        What is pruned, without its weights; None where its files are not here, or nothing is pruned.
    """
    folder, trusted = model_folder(study.model), study.parameters(settings.Prune).trust_remote_code
    if folder and not Path(study.model).is_dir() and not has_weights(folder):
        folder = None  # the hub's cache: they come when they are needed
    why = unsuitable_folder(folder, config, trusted) if folder else unsuitable(config)
    model = None
    if folder and not why and study.model != settings.EMBEDDED_MODEL:
        if prunes:
            model, why = _without_weights(folder, trusted)
        why = why or unlike_its_files(folder, trusted) or unreadable_tokenizer(folder, trusted)
    if why:
        raise PftoolsError(
            f"{study.place('model')}: {study.model!r} {why}: give a causal language model with "
            f"plain weights, such as {settings.EMBEDDED_MODEL}."
        )
    return model


def _without_weights(folder: Path, trust_remote_code: bool) -> tuple[PreTrainedModel | None, str]:
    """A model without its weights, and why its matrices cannot be pruned, as half a sentence; empty: they
    can."""
    from pftools.pretrained.suitable import skeleton
    from pftools.prune.patterns import parse_pattern
    from pftools.prune.request import check_matrices

    try:
        model = skeleton(folder, trust_remote_code=trust_remote_code)
        model.tie_weights()  # what layers share, they share here too
        check_matrices(model, parse_pattern("unstructured"))
    except PftoolsError as error:
        return None, f"cannot be pruned ({str(error).rstrip('.')})"
    except Exception as error:  # what a model's own code raises
        cause = " ".join(str(error).split())[:150]
        return None, f"cannot be built from its config.json ({type(error).__name__}: {cause})"
    return model, ""


def _check_block_length(study: Study, section: str, context: int | None) -> None:
    parameters: Any = study.parameters(settings.STEPS[section])
    if context and parameters.block_length > context:
        raise PftoolsError(
            f"{study.place(section, 'block_length')}: blocks of {parameters.block_length} tokens are longer "
            f"than the {context} that {study.model!r} reads at once: give a block_length of at most "
            f"{context} under {section}."
        )


def _check_targets(study: Study) -> None:
    shapes = shapes_of(study)
    targets = study.parameters(settings.Finetune).targets
    if not shapes or targets == "all-linear":
        return
    known = sorted({module_name(name) for name, shape in matrices(shapes).items() if len(shape) == 2})
    named = [] if targets in settings.TARGETS else [name.strip() for name in targets.split(",")]
    missing = [name for name in named if name not in known]
    if missing or not adapted_matrices(shapes, targets):
        raise PftoolsError(
            f"{study.place('finetune', 'targets')}: targets {targets!r} match nothing for "
            f"{', '.join(missing) or 'this model'}: the linear modules of {study.model!r} are "
            f"{', '.join(known)}; or give 'all-linear' or 'attention'."
        )


def _check_patterns(study: Study, model: PreTrainedModel | None) -> None:
    """Every pattern fits the matrices: of the model itself, or of Llama's layout where it is not here."""
    for number, pattern in enumerate(study.patterns):
        if model is not None:
            _check_pattern(study, number, model)
            continue
        group = (settings.parse_nm(pattern) or (0, 1))[1]
        for name, shape in matrices(shapes_of(study)).items():
            if shape[-1] % group:
                raise PftoolsError(
                    f"{study.place('patterns', number)}: the pattern {pattern} does not fit {name}: its "
                    f"{shape[-1]} input columns are no multiple of {group}; choose another, or "
                    "'unstructured'."
                )


def _check_pattern(study: Study, number: int, model: PreTrainedModel) -> None:
    from pftools.prune.patterns import parse_pattern
    from pftools.prune.request import check_matrices

    try:
        check_matrices(model, parse_pattern(study.patterns[number]))
    except PftoolsError as error:
        raise PftoolsError(f"{study.place('patterns', number)}: {error}") from None


def _check_room(plan: Plan) -> None:
    """Refuse what will not fit on the disk; what is finished has its room already."""
    missing = Plan(plan.study, plan.runs, steps={step.name: step for step in plan.missing()})
    needed = (estimate_disk(missing) or {}).get("deltas", 0)
    place = Path(plan.runs).absolute()
    free = shutil.disk_usage(next(part for part in (place, *place.parents) if part.exists())).free
    if needed > free:
        raise PftoolsError(
            f"the runs of {plan.study.name!r} need about {as_bytes(needed)}, and {plan.runs} has "
            f"{as_bytes(free)} left: make room, or give --runs a folder on another disk."
        )

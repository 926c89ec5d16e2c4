"""A study file: the orderings to compare, and everything that they have in common."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field, PrivateAttr, field_validator, model_validator

from pftools import contents, settings
from pftools.errors import PftoolsError, nearest
from pftools.orderings import Schedule, parse_ordering
from pftools.shipped import shipped_studies
from pftools.yaml_file import YamlFile, read_yaml

# What the plan sets in each step, and a study's sections therefore cannot.
_PLANNED = {
    "calibrate": {"model", "seed", "runs"},
    "prune": {
        "model",
        "calibration",
        "method",
        "sparsity",
        "pattern",
        "seed",
        "runs",
        "corpus",
        "n_blocks",
        "block_length",
    },
    "finetune": {"model", "seed", "tokens", "steps", "epochs", "merge", "runs"},
    "evaluate": {"model", "seed", "runs"},
}


class OrderingEntry(settings.Parameters):
    """An ordering of a study, with sparsities of its own where the study's do not fit it."""

    ordering: str
    sparsities: list[float] | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_a_word(cls, given: Any) -> Any:
        if isinstance(given, str):
            return {"ordering": given}
        for name in given if isinstance(given, dict) else ():
            if name not in cls.model_fields:
                raise PftoolsError(
                    f"unknown word {name!r} of an ordering: {nearest(str(name), cls.model_fields)}.",
                    where=(name,),
                )
        return given


class Study(settings.Parameters):
    """The contents of a study file. Every list is crossed with every other."""

    step: ClassVar[str] = "study"

    name: str = Field(
        min_length=1, pattern=r"^[A-Za-z0-9_.-]+$", description="names the report and the SLURM jobs"
    )
    description: str = ""
    model: str = Field(settings.Step.model_fields["model"].default, description="as in every step")
    dtype: settings.DtypeName = "auto"
    orderings: list[OrderingEntry] = Field(min_length=1, description="published names or words over P and F")
    sparsities: list[float] = Field([0.5], min_length=1, description="targets; each from 0 up to 1")
    methods: list[str] = Field(["wanda"], min_length=1)
    patterns: list[str] = Field(["unstructured"], min_length=1)
    merges: list[settings.Merge] = Field(["auto"], min_length=1)
    seeds: list[Annotated[int, Field(ge=0, lt=4_000_000)]] = Field([0], min_length=1)
    schedule: Schedule = Field("linear", description="how several P's share the way to the target")
    budget: Literal["total", "per_step"] = Field(
        "total", description="total: the tokens are split over an ordering's F's"
    )
    tokens: int = Field(
        49_152, ge=1, description="fine-tuning tokens of an ordering, or of each F with per_step"
    )
    calibrate: dict[str, Any] = Field({}, description="parameters of 01_calibrate")
    prune: dict[str, Any] = Field({}, description="parameters of 02_prune")
    finetune: dict[str, Any] = Field({}, description="parameters of 03_finetune")
    evaluate: dict[str, Any] = Field({}, description="parameters of 04_evaluate")
    equivalent_within: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="a difference that does not matter: 1% of perplexity, one point of accuracy",
    )
    analyse: bool = Field(False, description="whether 05_analyse_weights is run on every model")
    shape: dict[str, Annotated[int, Field(ge=0, lt=10**9)]] = Field(
        {}, description="the model's config.json numbers, to estimate disk without the model"
    )
    _source: YamlFile | None = PrivateAttr(None)

    @field_validator("calibrate", "prune", "finetune", "evaluate", "shape", mode="before")
    @classmethod
    def _an_empty_section_is_none(cls, given: Any) -> Any:
        return {} if given is None else given

    @field_validator("equivalent_within", mode="before")
    @classmethod
    def _per_cent(cls, given: Any) -> Any:
        """1% and 0.01 are the same."""
        if isinstance(given, str) and given.strip().endswith("%"):
            with suppress(ValueError):
                return float(given.strip().removesuffix("%")) / 100
        return given

    @field_validator("shape")
    @classmethod
    def _the_shape_is_whole(cls, shape: dict[str, int]) -> dict[str, int]:
        lacks = [name for name in settings.SHAPE if not shape.get(name)]
        if shape and lacks:
            raise ValueError(f"{lacks[0]} is missing or 0: copy it from the model's config.json")
        return shape

    @model_validator(mode="after")
    def _words_and_parameters_are_valid(self) -> Study:
        for number, method in enumerate(self.methods):
            if method not in settings.PRUNING_METHODS:
                says = nearest(method, settings.PRUNING_METHODS)
                raise PftoolsError(f"unknown pruning method {method!r}: {says}.", where=("methods", number))
        for number, pattern in enumerate(self.patterns):
            with _at("patterns", number):
                settings.pattern_sparsity(pattern)
        for number, entry in enumerate(self.orderings):
            with _at("orderings", number):
                self._check_ordering(entry)
        for section in _PLANNED:
            with _at(section):
                self.parameters(settings.STEPS[section])
        with _at("finetune"):
            self._check_preset()
        return self

    def _check_ordering(self, entry: OrderingEntry) -> None:
        ordering = parse_ordering(entry.ordering)
        for sparsity in entry.sparsities or self.sparsities:
            ordering.steps(sparsity, schedule=self.schedule)
        structured = [pattern for pattern in self.patterns if settings.pattern_sparsity(pattern) is not None]
        if ordering.n_prunes > 1 and structured:
            raise PftoolsError(
                f"the ordering {ordering.name!r} has several P's, which raise the sparsity step by step, and "
                f"the pattern {structured[0]} fixes it: leave one of them out of the study {self.name!r}."
            )
        if self.budget == "total" and ordering.n_finetunes and 0 in self.shares(ordering.n_finetunes):
            raise PftoolsError(
                f"{self.tokens} fine-tuning tokens cannot be split over the {ordering.n_finetunes} F's of "
                f"{ordering.name!r}, of which each needs at least one block: raise tokens, or lower the "
                "block_length under finetune."
            )

    def _check_preset(self) -> None:
        found = self.parameters(settings.Finetune)
        if found.preset and (found.merge not in self.merges or found.dtype != self.dtype):
            raise PftoolsError(
                f"the preset {found.preset!r} merges {found.merge} and computes in {found.dtype}, and the "
                f"rest of the study does not: add 'merges: [{found.merge}]' and 'dtype: {found.dtype}'."
            )

    def parameters(self, kind: type[_Step], **planned: Any) -> _Step:
        """The checked parameters of a step: the study's section for it, and what the plan sets.

        Args:
            kind: the step's class in `settings`.
            planned: what the plan sets; it wins over the section.

        Raises:
            PftoolsError: the section is invalid, or names what the plan sets.
        """
        # An analysis has no section: `analyse` says whether there are any.
        section: dict[str, Any] = getattr(self, kind.step) if kind.step in _PLANNED else {}
        for name in section:
            if name in _PLANNED.get(kind.step, ()):
                raise PftoolsError(
                    f"{name!r} under {kind.step} is set by the plan: use the study's own words (model, "
                    "sparsities, seeds, ...).",
                    where=(name,),
                )
        given = {"model": self.model, "dtype": self.dtype, **section, **planned}
        return settings.check(kind, given, place=f"{kind.step} in the study {self.name!r}")

    def place(self, *where: str | int) -> str:
        """Where a value stands, such as `quick.yaml, line 7`, for a message."""
        return self._source.place(where) if self._source else f"the study {self.name!r}"

    def shares(self, n_finetunes: int) -> list[int]:
        """The total budget split over F's, in tokens.

        Shares are whole blocks, as even as these allow, so that every ordering is trained on as many tokens.
        """
        parameters = self.parameters(settings.Finetune)
        unit = parameters.block_length if parameters.packing else 1
        whole, rest = divmod(self.tokens // unit, n_finetunes)
        return [unit * (whole + (number < rest)) for number in range(n_finetunes)]


_Step = TypeVar("_Step", bound=settings.Step)


@contextmanager
def _at(*place: str | int) -> Iterator[None]:
    """Mistakes found inside are at this place of the study."""
    try:
        yield
    except PftoolsError as error:
        error.where = (*place, *error.where)
        raise


def load_study(path: str | Path) -> Study:
    """Read and check a study file, or one that comes with pftools: `quick` or `published`.

    Paths in it (a model's folder, a corpus, a data root) count from the file's own folder, wherever pftools
    is called from.

    Raises:
        PftoolsError: no such file, or a mistake in it; the message names the line and what to write instead.
    """
    path = Path(path).expanduser()
    if not path.exists():
        path = shipped_studies().get(str(path), path)
    try:
        source = read_yaml(path)
    except FileNotFoundError:
        known = ", ".join([*map(str, sorted(Path("data/studies").glob("*.yaml")))] or shipped_studies())
        raise PftoolsError(f"there is no study file {path}: give one such as {known}.") from None
    if not isinstance(source.content, dict):
        raise PftoolsError(f"{path}, line 1: this is not a study: write 'name:', 'orderings:' and so on.")
    try:
        given = {"name": re.sub(r"[^A-Za-z0-9_.-]", "-", path.stem), **source.content}
        study = settings.check(Study, _with_paths(given, path.parent))
    except PftoolsError as error:
        raise PftoolsError(f"{source.place(error.where)}: {error}") from None
    study._source = source
    return study


_Located = Literal["model", "corpus", "data root"]
_PATHS: dict[str, _Located] = {"corpus": "corpus", "data": "data root"}  # parameters of a section


def _with_paths(given: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A study's content, in which relative paths have become absolute ones."""
    found = dict(given)
    if isinstance(given.get("model"), str):
        with _at("model"):
            found["model"] = locate(given["model"], folder, "model")
    for section in _PLANNED:
        if not isinstance(given.get(section), dict):
            continue
        found[section] = dict(given[section])
        for name, kind in _PATHS.items():
            if isinstance(value := given[section].get(name), str) and value:
                with _at(section, name):
                    found[section][name] = locate(value, folder, kind)
    return found


def locate(reference: str, folder: Path, kind: _Located) -> str:
    """What a study calls a model, corpus or data root: a name as it is, a path as an absolute one.

    Args:
        reference: a name or a path.
        folder: where relative paths count from.
        kind: what it stands for.

    Raises:
        PftoolsError: it looks like a path, and nothing is there.
    """
    try:
        path = (folder / Path(reference).expanduser()).absolute()
        there = path.exists()
    except (OSError, RuntimeError, ValueError):  # too long, or an unknown user after ~
        path, there = folder / reference, False
    if reference == settings.EMBEDDED_MODEL or (kind == "corpus" and not contents.is_path(reference)):
        return reference
    if there:
        return os.path.normpath(path)
    if kind == "data root" or contents.looks_like_path(reference, folder):
        here = Path(reference).expanduser()
        hint = f" (from here it is {os.path.relpath(here, folder)!r})" if here.exists() else ""
        raise PftoolsError(
            f"there is no {kind} {reference!r}, which is {os.path.normpath(path)}: paths count from the "
            f"folder of the study file; mend the path{hint}."
        )
    return reference

"""The words of a study: the orderings to compare, and everything that they have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field, PrivateAttr, field_validator, model_validator

from pftools import settings
from pftools.criteria import METHODS
from pftools.errors import PftoolsError, nearest
from pftools.inference.looks import Looks
from pftools.orderings import Schedule, parse_ordering
from pftools.study.yaml_file import YamlFile

TRIAL_SEEDS = 3_000_000  # trials have seeds from here on, which no result has

# What the plan sets in each step, and a study's sections therefore cannot.
PLANNED = {
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


class SeedLooks(settings.Parameters):
    """`seeds: {start: 3, most: 10}`: how many trainings at first, and how many at most."""

    step: ClassVar[str] = "seeds"

    start: int = Field(3, ge=2, le=1000, description="trainings of each ordering before the first look")
    most: int = Field(ge=2, le=1000, description="trainings at most, of those that may still be the best")

    @model_validator(mode="after")
    def _most_is_not_less(self) -> SeedLooks:
        if self.most < self.start:
            raise ValueError(f"most is {self.most}, and start is {self.start}: most cannot be less.")
        return self


class Tune(settings.Parameters):
    """`tune: {learning_rate: [...]}`: what is chosen for each ordering, on text that nothing else reads."""

    step: ClassVar[str] = "tune"

    learning_rate: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        min_length=2, max_length=20, description="the rates that each ordering tries"
    )
    seeds: int = Field(1, ge=1, le=100, description="trainings of each rate, with seeds of their own")
    n_blocks: int | None = Field(
        None, ge=1, description="validation blocks that a trial is judged on; None: the whole split"
    )

    @field_validator("learning_rate")
    @classmethod
    def _each_rate_once(cls, rates: list[float]) -> list[float]:
        if len(set(rates)) < len(rates):
            raise ValueError("each rate should be given once")
        return sorted(rates)


class Study(settings.Parameters):
    """The contents of a study file. Every list is crossed with every other."""

    step: ClassVar[str] = "study"

    name: str = Field(
        min_length=1, pattern=r"^[A-Za-z0-9_.-]+$", description="names the report and the SLURM jobs"
    )
    description: str = Field("", description="a line above the report")
    model: str = Field(settings.Step.model_fields["model"].default, description="as in every step")
    dtype: settings.DtypeName = Field("auto", description="number format, in every step")
    placement: settings.PlacementName = Field("auto", description="where weights are, in every step")
    orderings: list[OrderingEntry] = Field(min_length=1, description="published names or words over P and F")
    sparsities: list[float] = Field([0.5], min_length=1, description="targets; each from 0 up to 1")
    methods: list[str] = Field(["wanda"], min_length=1, description=f"pruning criteria: {', '.join(METHODS)}")
    patterns: list[str] = Field(["unstructured"], min_length=1, description="or N:M such as 2:4")
    merges: list[settings.Merge] = Field(
        ["auto"], min_length=1, description="of adapters: auto, masked or dense"
    )
    seeds: list[Annotated[int, Field(ge=0, lt=4_000_000)]] = Field(
        [0], min_length=1, description="a training each; or {start: 3, most: 10}"
    )
    most_seeds: int | None = Field(
        None, ge=2, le=1000, description="as `most` of seeds: {start: ..., most: ...}"
    )
    tune: Tune | None = Field(None, description="{learning_rate: [...]}: chosen for each ordering")
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

    @model_validator(mode="before")
    @classmethod
    def _seeds_from_looks(cls, given: Any) -> Any:
        """{start: 3, most: 10} is seeds 0, 1 and 2, and up to ten."""
        if isinstance(given, dict) and isinstance(given.get("seeds"), dict):
            with at("seeds"):
                looks = settings.check(SeedLooks, given["seeds"])
            return {**given, "seeds": list(range(looks.start)), "most_seeds": looks.most}
        return given

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
            if method not in METHODS:
                says = nearest(method, METHODS)
                raise PftoolsError(f"unknown pruning method {method!r}: {says}.", where=("methods", number))
        for number, pattern in enumerate(self.patterns):
            with at("patterns", number):
                settings.pattern_sparsity(pattern)
        for number, entry in enumerate(self.orderings):
            with at("orderings", number):
                self._check_ordering(entry)
        for section in PLANNED:
            with at(section):
                self.parameters(settings.STEPS[section])
        with at("finetune"):
            self._check_preset()
        self._check_seeds()
        if self.tune is not None:
            with at("tune"):
                self._check_tuning(self.tune)
        return self

    def _check_seeds(self) -> None:
        if self.most_seeds is not None and not 2 <= len(self.seeds) <= self.most_seeds:
            raise PftoolsError(
                f"most_seeds is {self.most_seeds}, and seeds has {len(self.seeds)}: give at least two seeds, "
                "and no more than most_seeds.",
                where=("seeds",),
            )

    def _check_tuning(self, tune: Tune) -> None:
        if not any(parse_ordering(entry.ordering).n_finetunes for entry in self.orderings):
            raise PftoolsError(
                "no ordering of the study has an F, so there is nothing to tune: leave it out."
            )
        if "learning_rate" in self.finetune:
            raise PftoolsError(
                "learning_rate stands under finetune, too: leave it out there, or do not tune it."
            )
        for rate in tune.learning_rate:
            if self.parameters(settings.Finetune, learning_rate=rate).learning_rate != rate:
                raise PftoolsError(
                    f"the preset under finetune has a rate of its own: {rate:g} cannot be tried."
                )
        if self.parameters(settings.Evaluate).split == "validation":
            raise PftoolsError(
                "rates are chosen on the validation split, so results have to be of another: set split to "
                "test under evaluate."
            )
        if max(self.all_seeds()) >= TRIAL_SEEDS:
            raise PftoolsError(f"seeds from {TRIAL_SEEDS:,} are those of the trials: give smaller ones.")

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
        section: dict[str, Any] = getattr(self, kind.step) if kind.step in PLANNED else {}
        for name in section:
            if name in PLANNED.get(kind.step, ()):
                raise PftoolsError(
                    f"{name!r} under {kind.step} is set by the plan: use the study's own words (model, "
                    "sparsities, seeds, ...).",
                    where=(name,),
                )
        given = {"model": self.model, "dtype": self.dtype, "placement": self.placement, **section, **planned}
        return settings.check(kind, given, place=f"{kind.step} in the study {self.name!r}")

    def all_seeds(self) -> list[int]:
        """The seeds of all looks, in the order in which they are spent."""
        more = (self.most_seeds or 0) - len(self.seeds)
        return [*self.seeds, *(max(self.seeds) + 1 + number for number in range(more))]

    @property
    def looks(self) -> Looks | None:
        """When the results are looked at, where seeds are spent one look after the other."""
        return None if self.most_seeds is None else Looks(len(self.seeds), self.most_seeds)

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
def at(*place: str | int) -> Iterator[None]:
    """Mistakes found inside are at this place of the study."""
    try:
        yield
    except PftoolsError as error:
        error.where = (*place, *error.where)
        raise

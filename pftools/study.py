"""Studies: a set of orderings in a YAML file, the plan of steps that they need, and the table of their results.

A plan is a graph of steps. Every step has the key of its run (`run_folder.run_key`), made of its parameters and its parents' keys, so
orderings that begin alike share their beginning without further thought, within a study and across studies, and what is
finished is never planned again. Planning is pure: no torch, no model, no network.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from pftools import run_folder, settings
from pftools.errors import PftoolsError, nearest
from pftools.orderings import MOST_STEPS, Ordering, OrderingStep, parse_ordering

if TYPE_CHECKING:
    import pandas as pd


class _OrderingEntry(BaseModel):
    """An ordering of a study, with sparsities of its own where the study's do not fit it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
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


class Study(BaseModel):
    """A study file. Every list is crossed with every other."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
    step: ClassVar[str] = "study"

    name: str = Field(
        min_length=1, pattern=r"^[A-Za-z0-9_.-]+$", description="names the report and the SLURM jobs"
    )
    description: str = ""
    model: str = Field(settings.Step.model_fields["model"].default, description="as in every step")
    dtype: settings.DtypeName = "auto"
    orderings: list[_OrderingEntry] = Field(min_length=1, description="published names or words over P and F")
    sparsities: list[float] = Field([0.5], min_length=1, description="targets; each from 0 up to 1")
    methods: list[str] = Field(["wanda"], min_length=1)
    patterns: list[str] = Field(["unstructured"], min_length=1)
    merges: list[Literal["auto", "masked", "dense"]] = Field(["auto"], min_length=1)
    seeds: list[Annotated[int, Field(ge=0, lt=4_000_000)]] = Field([0], min_length=1)
    schedule: Literal["linear", "cubic"] = Field(
        "linear", description="how several P's share the way to the target"
    )
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
    analyse: bool = Field(False, description="whether 05_analyse_weights is run on every model")
    shape: dict[str, int] = Field(
        {}, description="the model's config.json numbers, to estimate disk without the model"
    )

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
                checked = _step(section, self, getattr(self, section))
                if (
                    section == "finetune"
                    and checked.preset
                    and (checked.merge not in self.merges or checked.dtype != self.dtype)
                ):
                    raise PftoolsError(
                        f"the preset {checked.preset!r} merges {checked.merge} and computes in {checked.dtype}, which is not what the rest "
                        f"of the study says: add 'merges: [{checked.merge}]' and 'dtype: {checked.dtype}'."
                    )
        return self

    def _check_ordering(self, entry: _OrderingEntry) -> None:
        ordering = parse_ordering(entry.ordering)
        for sparsity in entry.sparsities or self.sparsities:
            ordering.steps(sparsity, schedule=self.schedule)
        structured = [pattern for pattern in self.patterns if settings.pattern_sparsity(pattern) is not None]
        if ordering.n_prunes > 1 and structured:
            raise PftoolsError(
                f"the ordering {ordering.name!r} has several P's, which raise the sparsity step by step, and the pattern "
                f"{structured[0]} fixes it: leave one of them out of the study {self.name!r}."
            )
        if self.budget == "total" and ordering.n_finetunes and 0 in self.shares(ordering.n_finetunes):
            raise PftoolsError(
                f"{self.tokens} fine-tuning tokens cannot be split over the {ordering.n_finetunes} F's of {ordering.name!r}, "
                f"of which each needs at least one block: raise tokens, or lower the block_length under finetune."
            )

    def shares(self, n_finetunes: int) -> list[int]:
        """The total budget split over F's, as even as whole blocks allow, so that every ordering is trained on the same number of tokens."""
        parameters = _step("finetune", self, self.finetune)
        unit = parameters.block_length if parameters.packing else 1
        whole, rest = divmod(self.tokens // unit, n_finetunes)
        return [unit * (whole + (number < rest)) for number in range(n_finetunes)]


@contextmanager
def _at(*place: str | int) -> Iterator[None]:
    """Mistakes found inside are at this place of the study."""
    try:
        yield
    except PftoolsError as error:
        error.where = (*place, *error.where)
        raise


# What a plan sets itself, and a study's sections therefore cannot.
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


def _step(step: str, study: Study, given: dict[str, Any], **planned: Any) -> settings.Step:
    for name in given:
        if name in _PLANNED.get(step, ()):
            says = f"{name!r} under {step} is set by the plan: use the study's own words (model, sparsities, seeds, ...)."
            raise PftoolsError(says, where=(name,))
    given = {"model": study.model, "dtype": study.dtype, **given, **planned}
    return settings.check(settings.STEPS[step], given, place=f"{step} in the study {study.name!r}")


def load_study(path: str | Path) -> Study:
    """Read and check a study file.

    Raises:
        PftoolsError: no such file, or a mistake in it; the message names the line and the nearest valid word.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.compose(text)
        content = yaml.safe_load(text)
    except FileNotFoundError:
        known = ", ".join(str(file) for file in sorted(Path("data/studies").glob("*.yaml")))
        raise PftoolsError(
            f"there is no study file {path}: give one such as {known or 'data/studies/quick.yaml'}."
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1} of {path}" if mark else str(path)
        raise PftoolsError(f"{place} is not valid YAML: {getattr(error, 'problem', error)}.") from None
    if not isinstance(content, dict):
        raise PftoolsError(f"{path} is not a study: it should hold 'name:', 'orderings:' and so on.")
    try:
        return settings.check(Study, {"name": path.stem, **content})
    except PftoolsError as error:
        line = _line_of(tree, error.where)
        raise PftoolsError(f"{path}{f', line {line}' if line else ''}: {error}") from None


def _line_of(tree: yaml.Node, where: tuple[str | int, ...]) -> int | None:
    """The line of the place that these names and indices lead to, as far as the file follows them."""
    node, line = tree, None
    for part in where:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == part]
            if not found:
                break
            key, node = found[0]
            line = key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line


# ---------------------------------------------------------------------------------------------------------------------
# The plan


@dataclass
class PlannedStep:
    """One step of a plan: its parameters, where its run is, and the keys (`step-hash`) of the runs it starts from."""

    parameters: settings.Step
    parents: tuple[str, ...]
    label: str
    orderings: set[str] = field(default_factory=set)

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def folder(self) -> Path:
        return run_folder.folder_of(self.parameters)


@dataclass(frozen=True)
class PlannedRow:
    """One line of the result table: an ordering at one sparsity, and the evaluation that fills it."""

    ordering: str
    asked: float
    method: str
    pattern: str
    merge: str
    seed: int
    finetune_tokens: int
    n_finetunes: int
    model: str
    evaluation: str


@dataclass
class Plan:
    """The steps of a study, each once, every step after the ones it starts from."""

    study: Study
    runs: str
    steps: dict[str, PlannedStep] = field(default_factory=dict)
    rows: list[PlannedRow] = field(default_factory=list)
    unshared: int = 0

    def table(self) -> pd.DataFrame:
        """A row a step: step, what it does, run, parents, state and how many orderings share it."""
        import pandas as pd

        state = {name: run_state(step.folder) for name, step in self.steps.items()}
        return pd.DataFrame(
            {
                "step": step.parameters.step,
                "does": step.label,
                "run": name,
                "starts from": ", ".join(step.parents),
                "state": state[name],
                "shared by": len(step.orderings),
            }
            for name, step in self.steps.items()
        )

    def missing(self) -> list[PlannedStep]:
        """The steps that no earlier run holds."""
        return [step for step in self.steps.values() if not run_folder.is_finished(step.folder)]

    def summary(self) -> list[str]:
        """What the plan costs, in sentences: steps with and without sharing, disk, and time where past runs tell it."""
        finished = len(self.steps) - len(self.missing())
        lines = [
            f"{len(self.rows)} results from {len(self.steps)} steps; a plan without sharing would take {self.unshared}.",
            f"{finished} of the steps are finished, {len(self.steps) - finished} are to do.",
        ]
        disk = estimate_disk(self)
        if disk:
            lines.append(
                f"Disk: about {as_bytes(disk['deltas'])} as deltas; full copies would be {as_bytes(disk['copies'])}."
            )
        seconds, unknown = estimate_seconds(self)
        if seconds:
            untold = f", without {', '.join(sorted(unknown))}, of which there is none yet" if unknown else ""
            lines.append(
                f"Time: about {seconds / 60:.1f} minutes, one step after the other, as past runs took{untold}."
            )
        return lines


def run_state(folder: Path) -> str:
    """finished, failed, running or to do."""
    if run_folder.is_finished(folder):
        return "finished"
    if run_folder.is_locked(folder):
        return "running"
    return "failed" if (folder / "failure.json").exists() else "to do"


def plan_study(study: Study, *, runs: str | Path = "runs") -> Plan:
    """All steps that a study needs, shared by key."""
    plan = Plan(study, str(runs))
    for seed in study.seeds:
        for method in study.methods:
            for pattern in study.patterns:
                for merge in study.merges:
                    for entry in study.orderings:
                        _plan_ordering(plan, entry, method, pattern, merge, seed)
    plan.rows = list(dict.fromkeys(plan.rows))  # a value that the file repeats is one result
    return plan


def _plan_ordering(
    plan: Plan, entry: _OrderingEntry, method: str, pattern: str, merge: str, seed: int
) -> None:
    ordering = parse_ordering(entry.ordering)
    for sparsity in _targets(plan.study, entry, ordering, pattern):
        chain = _Chain(plan, ordering, method, pattern, merge, seed)
        if not ordering.letters:
            chain.report(0.0, merge)
        for step in ordering.steps(sparsity, schedule=plan.study.schedule):
            chain.prune(step) if step.kind == "P" else chain.finetune(step)
            if step.reported:
                chain.report(step.sparsity, merge)


def _targets(study: Study, entry: _OrderingEntry, ordering: Ordering, pattern: str) -> list[float]:
    if not ordering.n_prunes:
        return [0.0]
    fixed = settings.pattern_sparsity(pattern)
    return (entry.sparsities or study.sparsities) if fixed is None else [fixed]


class _Chain:
    """Walks one ordering and adds its steps to the plan."""

    def __init__(
        self, plan: Plan, ordering: Ordering, method: str, pattern: str, merge: str, seed: int
    ) -> None:
        self.plan, self.study, self.ordering = plan, plan.study, ordering
        self.method, self.pattern, self.merge, self.seed = method, pattern, merge, seed
        self.model, self.tokens, self.finetunes = plan.study.model, 0, 0

    def prune(self, step: OrderingStep) -> None:
        # Dense inputs and OWL read the statistics that 01 keeps, which have to be of the model that is pruned.
        needs_statistics = (
            self.study.prune.get("inputs") == "dense" or self.study.prune.get("allocation") == "owl"
        )
        calibration = self._add(
            "calibrate",
            "calibration blocks",
            self.study.calibrate,
            model=self.model if needs_statistics else self.study.model,
            seed=self.seed,
        )
        self.model = self._add(
            "prune",
            f"{self.method} {step.sparsity:.0%}" + (f" {self.pattern}" if ":" in self.pattern else ""),
            self.study.prune,
            model=self.model,
            calibration=calibration,
            method=self.method,
            sparsity=step.sparsity,
            pattern=self.pattern,
            seed=self.seed,
        )

    def finetune(self, step: OrderingStep) -> None:
        share = self.study.tokens
        if self.study.budget == "total":
            share = self.study.shares(self.ordering.n_finetunes)[step.number - 1]
        merge = (
            "auto" if step.sparsity == 0 else self.merge
        )  # no zeros to keep yet, so all merges share this step
        self.model = self._add(
            "finetune",
            f"F{step.number}, {share:,} tokens",
            self.study.finetune,
            # The k-th F of a chain has seed k, and chains of different seeds never meet.
            model=self.model,
            tokens=share,
            merge=merge,
            seed=MOST_STEPS * self.seed + step.number,
        )
        self.tokens += share
        self.finetunes += 1

    def report(self, sparsity: float, merge: str) -> None:
        evaluation = self._add(
            "evaluate",
            f"evaluate {Path(self.model).name}",
            self.study.evaluate,
            model=self.model,
            seed=self.seed,
        )
        if self.study.analyse:
            self._add("analyse", f"analyse {Path(self.model).name}", {}, model=self.model)
        row = PlannedRow(
            self.ordering.name,
            sparsity,
            self.method,
            self.pattern,
            merge,
            self.seed,
            self.tokens,
            self.finetunes,
            self.model,
            evaluation,
        )
        self.plan.rows.append(row)

    def _add(self, step: str, label: str, given: dict[str, Any], **planned: Any) -> str:
        parameters = _step(step, self.study, {}, **{**given, **planned}, runs=self.plan.runs)
        references = [getattr(parameters, name) for name in parameters.parents]
        parents = tuple(
            Path(reference).name for reference in references if Path(reference).name in self.plan.steps
        )
        planned_step = PlannedStep(parameters, parents, label)
        planned_step = self.plan.steps.setdefault(planned_step.name, planned_step)
        planned_step.orderings.add(self.ordering.name)
        self.plan.unshared += 1
        return str(planned_step.folder)


# ---------------------------------------------------------------------------------------------------------------------
# What it will cost


def estimate_disk(plan: Plan) -> dict[str, int] | None:
    """Bytes of all checkpoints as deltas, and as full 16-bit copies; None where the model's shape is not at hand.

    A mask is one bit a weight; an adapter has rank x (inputs + outputs) numbers in fp32 for each weight it adapts.
    """
    shape = plan.study.shape or _local_shape(plan.study.model)
    if not shape:
        return None
    matrices = _linear_shapes(shape)
    linear = shape["num_hidden_layers"] * sum(rows * columns for rows, columns in matrices.values())
    total = linear + shape["vocab_size"] * shape["hidden_size"] * (
        1 if shape.get("tie_word_embeddings") else 2
    )
    deltas = copies = 0
    for step in plan.steps.values():
        parameters = step.parameters
        if isinstance(parameters, settings.Prune):
            changed = parameters.method in settings.UPDATING_METHODS or parameters.reconstruct_steps
            deltas += linear // 8 + (2 * linear if changed else 0)
            copies += 2 * total
        elif isinstance(parameters, settings.Finetune):
            adapted = [matrices[name] for name in _adapted(parameters.targets)]
            deltas += 4 * parameters.rank * shape["num_hidden_layers"] * sum(map(sum, adapted))
            copies += 2 * total
    return {"deltas": deltas, "copies": copies}


def _linear_shapes(shape: dict[str, int]) -> dict[str, tuple[int, int]]:
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    heads = shape["num_attention_heads"]
    head = shape.get("head_dim") or width // heads
    kv = shape.get("num_key_value_heads", heads) * head
    return {
        "q_proj": (heads * head, width),
        "k_proj": (kv, width),
        "v_proj": (kv, width),
        "o_proj": (width, heads * head),
        "gate_proj": (inner, width),
        "up_proj": (inner, width),
        "down_proj": (width, inner),
    }


def _adapted(targets: str) -> list[str]:
    named = {
        "all-linear": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "published": ["q_proj", "v_proj"],
    }
    return named.get(targets, ["q_proj", "v_proj"])


def _local_shape(model: str) -> dict[str, int]:
    from pftools.base_models import cache_folder

    folder = cache_folder() / "models" / model if model == settings.EMBEDDED_MODEL else Path(model)
    path = folder / "config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    return config if all(name in config for name in needed) else {}


def estimate_seconds(plan: Plan) -> tuple[float, set[str]]:
    """Seconds that the missing steps take one after the other, and the kinds of step that no earlier run tells anything of.

    A step is taken to last as long as finished ones of its kind on the same base model did on average: those with the same
    parameters but for what hardly changes its time, where there are such. Fine-tuning is counted by the token.
    """
    past = _past_seconds(Path(plan.runs))
    total, unknown = 0.0, set()
    for step in plan.missing():
        parameters = step.parameters.model_dump(mode="json")
        kind, alike, work = _likeness(step.parameters.step, parameters, plan.study.model)
        seconds = past.get(alike) or past.get(kind)
        if seconds:
            total += work * sum(seconds) / len(seconds)
        else:
            unknown.add(kind[0])
    return total, unknown


def _past_seconds(root: Path) -> dict[tuple[str, ...], list[float]]:
    """Seconds of the finished runs in a folder, by how much they are alike."""
    records = {}
    for path in root.glob("*/run.json"):
        with suppress(PftoolsError):  # a damaged record is named when it is used; an estimate does without it
            records[path.parent.name] = run_folder.read_record(path.parent)
    past: dict[tuple[str, ...], list[float]] = {}
    for record in records.values():
        base = record["parameters"]["model"]
        while (parent := records.get(Path(base).name)) is not None:
            base = parent["parameters"]["model"]
        kind, alike, work = _likeness(record["step"], record["parameters"], base)
        for likeness in (kind, alike):
            past.setdefault(likeness, []).append(record["seconds"] / work)
    return past


def _likeness(
    step: str, parameters: dict[str, Any], base: str
) -> tuple[tuple[str, ...], tuple[str, ...], float]:
    """(kind and base model; that and all parameters that decide how long it takes; how much work it is)."""
    ignored = {*settings.STEPS[step].parents, "seed", "sparsity", "tokens"}
    telling = {
        name: parameters.get(name) for name in settings.STEPS[step].key_fields() if name not in ignored
    }
    kind = (step, base)
    return kind, (*kind, json.dumps(telling, sort_keys=True)), parameters.get("tokens") or 1


def as_bytes(number: float) -> str:
    """A size in words."""
    for unit in ("bytes", "KB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"


# ---------------------------------------------------------------------------------------------------------------------
# The results


def results(plan: Plan) -> pd.DataFrame:
    """A row a finished result, after the files of its evaluation were checked: ordering, asked, measured, perplexity, dense_perplexity, one column a task, training
    tokens, seed, method, pattern, merge, and the run folders of the model and of its evaluation."""
    import pandas as pd

    rows = []
    for row in plan.rows:
        if not run_folder.is_finished(row.evaluation):
            continue
        found = run_folder.verify(row.evaluation)["results"]
        tasks = {task: score["value"] for task, score in found["tasks"].items()}
        rows.append(
            {
                "ordering": row.ordering,
                "asked": row.asked,
                "measured": found["measured"],
                "perplexity": found["perplexity"],
                **tasks,
                "finetune_tokens": row.finetune_tokens,
                "n_finetunes": row.n_finetunes,
                "seed": row.seed,
                "method": row.method,
                "pattern": row.pattern,
                "merge": row.merge,
                "model": row.model,
                "run": row.evaluation,
            }
        )
    return pd.DataFrame(rows)


def run_study(
    plan: Plan,
    *,
    executor: str = "local",
    jobs: int = 1,
    progress: bool = True,
    notebooks: str | Path | None = None,
) -> list[Any]:
    """Execute the missing steps of a plan; see `pftools.executors`, which does it.

    Returns:
        The failures, empty when every step is finished.
    """
    from pftools import executors

    return executors.run_plan(plan, executor=executor, jobs=jobs, progress=progress, notebooks=notebooks)

"""The parameters of each step. Defaults and meanings stand here, and what cannot go together."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from pftools.criteria import METHODS
from pftools.settings.checked import Parameters
from pftools.settings.words import (
    EMBEDDED_MODEL,
    DtypeName,
    FolderPath,
    Merge,
    PlacementName,
    PruningMethod,
    pattern_sparsity,
)


def local(default: Any, description: str, **limits: Any) -> Any:
    """A field that does not change results, and so is left out of a run's key."""
    return Field(default, description=description, json_schema_extra={"in_key": False}, **limits)


class Step(Parameters):
    """What all five steps share."""

    step: ClassVar[str]
    # The parameters that may name the run of an earlier step.
    parents: ClassVar[tuple[str, ...]] = ("model",)
    # Whether an attempt goes on from what a killed one left in `work/`; all others begin with an empty one.
    resumes: ClassVar[bool] = False

    model: str = Field(
        EMBEDDED_MODEL, min_length=1, description="embedded name, hub id, folder, or a run folder"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of every random choice of the step")
    dtype: DtypeName = Field(
        "auto", description="number format; auto: bf16 where the hardware computes in it"
    )
    device: str = local("auto", "auto, cpu, cuda, cuda:1, mps")
    placement: PlacementName = local(
        "auto", "where weights are: one device, spread over several GPUs, streamed from disk; auto: what fits"
    )
    runs: FolderPath = local("runs", "the folder of run folders")
    trust_remote_code: bool = Field(
        False, description="let a hub model run its own code; off unless you read it"
    )

    @classmethod
    def key_fields(cls) -> tuple[str, ...]:
        """The names of the parameters that decide what the step computes."""
        extras = {name: field.json_schema_extra for name, field in cls.model_fields.items()}
        return tuple(
            name for name, extra in extras.items() if not isinstance(extra, dict) or extra.get("in_key", True)
        )


class _Blocks(Step):
    """Steps that read blocks of tokens."""

    corpus: str = Field(
        "pydocs",
        description="pydocs, wikitext2, c4, a data-root folder, a file or folder of text, owner/name:column",
    )
    block_length: int = Field(512, ge=2, description="tokens a block")
    batch_size: int | None = local(None, "blocks a forward; None: chosen by size", ge=1)


class _Changing(_Blocks):
    """Steps that change the model, and look at a held-out text to tell at once what that did."""

    held_out_blocks: int = local(
        8, "blocks of the validation split that tell what the step did; 0: none", ge=0
    )


class Calibrate(_Blocks):
    """01: choose the calibration blocks, and look at the activations they cause."""

    step = "calibrate"
    split: Literal["calibration", "train"] = Field(
        "calibration", description="the split that blocks come from"
    )
    n_blocks: int = Field(64, ge=1, description="how many blocks")


class Prune(_Changing):
    """02: set the least important weights to zero."""

    step = "prune"
    parents = ("model", "calibration")

    calibration: str = Field("", description="a calibrate run whose blocks are used; empty: choose them here")
    n_blocks: int = Field(64, ge=1, description="how many calibration blocks, where calibration is empty")
    method: PruningMethod = Field("wanda", description=f"the pruning criterion: {', '.join(METHODS)}")
    sparsity: float = Field(
        0.5, ge=0, lt=1, allow_inf_nan=False, description="share of zeros over the linear weights"
    )
    pattern: str = Field(
        "unstructured", description="unstructured, or N:M such as 2:4 (of every M, N are kept)"
    )
    inputs: Literal["pruned", "dense"] = Field(
        "pruned", description="measure layers behind pruned or dense ones"
    )
    show_dense_cost: bool = local(
        False, "also prune a copy with the other kind of inputs, and compare perplexities"
    )
    allocation: Literal["uniform", "owl"] = Field(
        "uniform", description="one sparsity for all layers, or OWL"
    )
    owl_lambda: float = Field(0.08, ge=0, lt=1, description="OWL: most that a layer may differ from the mean")
    owl_m: float = Field(5.0, gt=1, description="OWL: an outlier is this many times the layer's mean")
    reconstruct_steps: int = Field(0, ge=0, description="Adam steps of block reconstruction a layer; 0: none")

    @model_validator(mode="after")
    def _pattern_fits(self) -> Prune:
        fixed = pattern_sparsity(self.pattern)
        if fixed is not None and abs(self.sparsity - fixed) > 1e-6:
            raise ValueError(
                f"the pattern {self.pattern} fixes the sparsity at {fixed:g}, and {self.sparsity:g} is "
                "asked: ask for that."
            )
        if fixed is not None and self.allocation == "owl":
            raise ValueError(
                f"the pattern {self.pattern} fixes the sparsity of every layer, so that allocation 'owl' has "
                "no room: use 'uniform'."
            )
        return self


# The published study's settings (Prune-Finetune-LLM): PEFT's LoRA on q and v of an 8-bit fp16 base, padded
# lines, batches of 4, four of them a step, the dense merge; a tenth of an epoch where no budget is given.
_PRESETS: dict[str, dict[str, Any]] = {
    "published": {
        "packing": False,
        "rank": 8,
        "alpha": 16,
        "dropout": 0.05,
        "targets": "published",
        "learning_rate": 2e-4,
        "warmup_steps": 100,
        "blocks_per_step": 16,
        "batch_size": 4,
        "base": "8bit",
        "dtype": "float16",
        "gradient_checkpointing": True,
        "merge": "dense",
    }
}
_PRESET_EPOCHS = {"published": 0.1}
_BUDGETS = ("tokens", "steps", "epochs")


class Finetune(_Changing):
    """03: train a low-rank adapter."""

    step = "finetune"
    resumes = True
    preset: Literal["", "published"] = Field(
        "", description="'published': the study's settings, wherever a parameter has its default"
    )
    tokens: int | None = Field(
        None, ge=1, description="budget in real tokens (give one of tokens, steps, epochs)"
    )
    steps: int | None = Field(None, ge=1, description="budget in optimizer steps")
    epochs: float | None = Field(None, gt=0, description="budget in passes over the train split")
    packing: bool = Field(True, description="full blocks; False: one line a row, padded (published)")
    adapter: Literal["lora", "hira"] = Field(
        "lora", description="LoRA, or HiRA (keeps zeros by construction)"
    )
    merge: Merge = Field("auto", description="auto: masked where the model has zeros")
    rank: int = Field(8, ge=1, description="rank of the adapter")
    alpha: float = Field(16, gt=0, description="scale of the adapter is alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the adapter")
    targets: str = Field(
        "all-linear", description="all-linear, attention, published (q and v), or names with commas"
    )
    learning_rate: float = Field(
        2e-3,
        gt=0,
        allow_inf_nan=False,
        description="peak learning rate; billions of weights want less, HiRA more",
    )
    warmup_steps: int = Field(
        4, ge=0, description="optimizer steps of linear warm-up, capped below half of all"
    )
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="of the learning rate, after warm-up"
    )
    blocks_per_step: int = Field(8, ge=1, description="blocks an optimizer step (batch x accumulation)")
    base: Literal["plain", "8bit", "nf4"] = Field(
        "plain", description="how the frozen base is held while training"
    )
    gradient_checkpointing: bool = local(False, "trade time for memory")
    track: str = local("", "also log the training to: trackio, wandb, tensorboard, ...; empty: nowhere")
    save_every: int = local(50, "optimizer steps between checkpoints that a killed step goes on from", ge=1)

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: dict[str, Any]) -> dict[str, Any]:
        """A preset stands where a parameter has its default; what was changed by hand wins."""
        for name, value in _PRESETS.get(given.get("preset", ""), {}).items():
            if given.get(name, cls.model_fields[name].default) == cls.model_fields[name].default:
                given = {**given, name: value}
        epochs = _PRESET_EPOCHS.get(given.get("preset", ""))
        if epochs and all(given.get(name) is None for name in _BUDGETS):
            given = {**given, "epochs": epochs}
        return given


class Evaluate(_Blocks):
    """04: perplexity with per-block losses, and tasks with per-question records."""

    step = "evaluate"
    split: Literal["validation", "test"] = Field(
        "test", description="the split that perplexity is computed on"
    )
    n_blocks: int | None = Field(None, ge=1, description="how many blocks; None: the whole split")
    tasks: list[str] = Field(
        ["facts", "reading"], description="lm-eval tasks by name, embedded ones included"
    )
    limit: int | None = Field(200, ge=1, description="questions a task; None: all")
    include: FolderPath = Field("", description="a folder with more task files of lm-eval's kind")
    num_fewshot: int | None = Field(None, ge=0, description="examples a question; None: as the task says")
    apply_chat_template: bool = Field(False, description="ask through the model's chat template")
    system_instruction: str = Field("", description="what stands before each question")
    data: FolderPath = local(
        "", "the data root, a folder that `pftools fetch-data` fills; empty: PFTOOLS_DATA"
    )


class Analyse(Step):
    """05: statistics of weights and adapters, layer by layer, and the difference from the parent."""

    step = "analyse"
    parents = ("model", "parent")

    parent: str = Field("", description="what to compare with; empty: the run's own parent, if it has one")
    top_percent: float = Field(
        1.0, gt=0, le=100, description="also average the largest differences, this many percent"
    )


class PlanStudy(Parameters):
    """00: show the plan of a study."""

    step: ClassVar[str] = "plan"

    study: FolderPath = Field("data/studies/quick.yaml", description="the study file")
    runs: FolderPath = Field("runs", description="the folder of run folders")


class Compare(PlanStudy):
    """06: compare the finished orderings of a study."""

    step: ClassVar[str] = "compare"

    save_figures: FolderPath = Field(
        "", description="a folder for the figures as files; empty: they are only shown"
    )
    others: list[str] = Field(
        [], max_length=2, description="two sets of other results to compare, as `pftools compare` takes them"
    )

    @field_validator("others")
    @classmethod
    def _none_or_two(cls, others: list[str]) -> list[str]:
        if len(others) == 1:
            raise ValueError("give two sets of results, or none")
        return others


STEPS: dict[str, type[Step]] = {kind.step: kind for kind in (Calibrate, Prune, Finetune, Evaluate, Analyse)}

"""What a training is told: a recipe, and what it comes to for one model and its rows."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from pftools.adapters import mask_digest, resolve_merge
from pftools.causal import check_bare, check_causal
from pftools.errors import PftoolsError, nearest
from pftools.finetune.quantize import BASES, check_bitsandbytes
from pftools.finetune.reads import read_by_model
from pftools.finetune.rows import Rows
from pftools.layers import linear_modules, linear_weights
from pftools.mapped import is_mapped
from pftools.pretrained.base_models import check_blocks
from pftools.pretrained.streamed import source_of
from pftools.pretrained.suitable import unsuitable
from pftools.settings import TARGETS

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from pftools.settings import Finetune

ADAPTERS = ("lora", "hira")
_DEFAULT_TOKENS = 49_152
# Tokens of a forward, where the batch size is left open.
_TOKENS_A_FORWARD = 4096


@dataclass(frozen=True)
class Recipe:
    """How an adapter is trained: the keyword arguments of `finetune_model`.

    Attributes:
        keep_sparsity: mask the update wherever the weight is zero, if the model is pruned at all.
        rank: of the adapter's factors A (rank, inputs) and B (outputs, rank).
        alpha: the update is scaled by alpha / rank. HiRA has no alpha.
        dropout: probability, on the input of the update.
        targets: which linear modules get an adapter; see `find_targets`.
        learning_rate: peak rate of AdamW.
        warmup_steps: optimizer steps of linear warm-up; see `warmup_of`.
        schedule: of the learning rate after warm-up: `linear`, `cosine` or `constant`.
        blocks_per_step: rows an optimizer step; the last may have fewer.
        micro_batch_size: rows a forward; None: chosen by size.
        tokens, steps, epochs: the budget, in real tokens, optimizer steps or passes over the rows: one of the
            three. None of them: one epoch.
        adapter: `lora` or `hira`.
        base: how the frozen weights are held while training: `plain`, `8bit` or `nf4`. The merge goes into
            the plain weights: then the update is what was trained, and the base is free of rounding again.
        gradient_checkpointing: compute activations twice instead of keeping them.
        seed: of the adapter's start, the order of the rows, and dropout.
    """

    keep_sparsity: bool = True
    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    targets: str = "all-linear"
    learning_rate: float = 2e-3
    warmup_steps: int = 4
    schedule: str = "linear"
    blocks_per_step: int = 8
    micro_batch_size: int | None = None
    tokens: int | None = None
    steps: int | None = None
    epochs: float | None = None
    adapter: str = "lora"
    base: str = "plain"
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, valid in (("adapter", self.adapter, ADAPTERS), ("base", self.base, BASES)):
            if value not in valid:
                raise PftoolsError(f"unknown {name} {value!r}: {nearest(value, valid)}.")
        check_bitsandbytes(self.base)


@dataclass(frozen=True)
class Training:
    """What a recipe comes to for one model and its rows.

    Attributes:
        recipe: what was asked for.
        targets: full names of the linear modules that get an adapter.
        plain: full names of those that are not quantized, since the model reads their weight itself.
        left_out: {linear weight that gets no adapter: its size}.
        masked: whether the update is masked.
        zeros: digest of the mask that it is trained on; empty where it is not masked.
        n_rows: how many rows are trained on, the same row several times included.
        rows_per_step: rows an optimizer step.
        rows_per_forward: a divisor of it.
        steps: optimizer steps; the last takes the rows that are left.
        warmup_steps: optimizer steps of warm-up.
    """

    recipe: Recipe
    targets: tuple[str, ...]
    plain: frozenset[str]
    left_out: dict[str, int]
    masked: bool
    zeros: str
    n_rows: int
    rows_per_step: int
    rows_per_forward: int
    steps: int
    warmup_steps: int

    def identity(self, rows: Rows) -> dict[str, Any]:
        """What has to be the same for a killed training to go on, as JSON; without what only costs memory."""
        free = ("micro_batch_size", "gradient_checkpointing")
        asked = {name: value for name, value in asdict(self.recipe).items() if name not in free}
        digest = hashlib.sha256(rows.input_ids.numpy().tobytes() + rows.labels.numpy().tobytes()).hexdigest()
        return {**asked, "masked": self.masked, "zeros": self.zeros, "n_rows": self.n_rows, "rows": digest}


def prepare(recipe: Recipe, model: PreTrainedModel, rows: Rows) -> Training:
    """What a recipe comes to for ``model`` and ``rows``.

    Raises:
        PftoolsError: targets that the model does not have, several budgets, or rows longer than its context.
    """
    length = rows.input_ids.shape[1]
    check_bare(model)
    check_blocks(model, rows.input_ids)
    if why := unsuitable(model.config.to_dict()):
        raise PftoolsError(f"{type(model).__name__} {why}: give a causal language model with plain weights.")
    check_causal(model, rows.input_ids[0])
    if recipe.base == "plain" and source_of(model) is not None and model.device.type != "cpu":
        raise PftoolsError(
            "a streamed model is trained on a quantized base, since a GPU would have to read the plain one "
            "again for every gradient: use base='nf4' or '8bit'."
        )
    if recipe.gradient_checkpointing and not getattr(model, "supports_gradient_checkpointing", False):
        raise PftoolsError(
            f"{type(model).__name__} has no gradient checkpointing: train with gradient_checkpointing=False "
            "and a smaller micro_batch_size or block_length."
        )
    plain = frozenset(read_by_model(model, rows.input_ids))
    _refuse_streamed_rest(model, plain)
    targets = find_targets(model, recipe.targets, leave=plain)
    n_rows = rows_of_budget(
        len(rows),
        rows.real_tokens / len(rows),
        recipe.blocks_per_step,
        tokens=recipe.tokens,
        steps=recipe.steps,
        epochs=recipe.epochs,
    )
    masked = recipe.keep_sparsity and recipe.adapter == "lora" and resolve_merge("auto", model) == "masked"
    rows_per_step = min(recipe.blocks_per_step, n_rows)
    steps = math.ceil(n_rows / rows_per_step)
    return Training(
        recipe=recipe,
        targets=tuple(targets),
        plain=plain,
        left_out=_left_out(model, targets),
        masked=masked,
        zeros=mask_digest(model, targets) if masked else "",
        n_rows=n_rows,
        rows_per_step=rows_per_step,
        rows_per_forward=_rows_per_forward(rows_per_step, recipe.micro_batch_size, length),
        steps=steps,
        warmup_steps=warmup_of(recipe.warmup_steps, steps),
    )


def _refuse_streamed_rest(model: PreTrainedModel, plain: Collection[str]) -> None:
    """Refuse to train where a GPU would have to hold matrices of a streamed model that cannot be quantized.

    Raises:
        PftoolsError: there are some: stacked experts, or weights that the model reads itself.
    """
    if source_of(model) is None or model.device.type == "cpu":
        return
    quantized = {f"{name}.weight" for name in linear_modules(model) if name not in plain}
    rest = [
        name for name, weight in linear_weights(model).items() if name not in quantized and is_mapped(weight)
    ]
    if rest:
        raise PftoolsError(
            f"{rest[0]} and {len(rest) - 1} others cannot be quantized, and the GPU is too small for them: "
            "train where the model fits (placement 'one' or 'spread')."
        )


def find_targets(model: nn.Module, targets: str, *, leave: Collection[str] = ()) -> list[str]:
    """Full names of the linear modules that get an adapter.

    Args:
        targets: `all-linear` (every linear module of the decoder layers; stacked experts are none),
            `attention`, `published` (q and v), or module names with commas between.
        leave: full names of modules that can have none (see `reads`).

    Raises:
        PftoolsError: nothing matches; the names that exist are listed.
    """
    modules = [name for name in linear_modules(model) if name not in leave]
    if targets == "all-linear" and modules:
        return modules
    wanted = TARGETS.get(targets) or tuple(name.strip() for name in targets.split(",") if name.strip())
    short = sorted({name.rpartition(".")[2] for name in modules})
    missing = [] if targets in TARGETS else [name for name in wanted if name not in short]
    found = [name for name in modules if name.rpartition(".")[2] in wanted]
    if missing or not found:
        refused = sorted({name.rpartition(".")[2] for name in leave} - set(short))
        why = (
            f" ({', '.join(refused)} can have no adapter: the model reads the weight itself)"
            if refused
            else ""
        )
        raise PftoolsError(
            f"targets {targets!r} match nothing for {', '.join(missing or wanted)}: the linear modules of "
            f"this model are {', '.join(short)}; or give 'all-linear' or 'attention'{why}."
        )
    return found


def _left_out(model: nn.Module, targets: Collection[str]) -> dict[str, int]:
    """{linear weight that gets no adapter: its size}: stacked experts, and what a model reads itself."""
    adapted = {f"{name}.weight" for name in targets}
    return {name: weight.numel() for name, weight in linear_weights(model).items() if name not in adapted}


def says_left_out(left: dict[str, int], model: nn.Module) -> str:
    """A sentence about the weights that get no adapter: which, and how much of the model they are."""
    kinds = dict.fromkeys(re.sub(r".*?\.\d+\.", "", name, count=1) for name in left)
    names = ", ".join(list(kinds)[:4]) + (" and others" if len(kinds) > 4 else "")
    linear = sum(weight.numel() for weight in linear_weights(model).values())
    total = sum(weight.numel() for weight in model.parameters())
    size = sum(left.values())
    return (
        f"{size / linear:.1%} of the linear weights, and {size / total:.1%} of the whole model, get no "
        f"adapter and stay as they are: {names} (stacked experts, or weights that the model reads itself)."
    )


def rows_of_budget(
    rows: int,
    tokens_per_row: float,
    rows_per_step: int,
    *,
    tokens: int | None,
    steps: int | None,
    epochs: float | None,
) -> int:
    """How many rows are trained on, for a budget in real tokens, in steps, or in passes over the rows.

    Raises:
        PftoolsError: several budgets are given.
    """
    budget = {"tokens": tokens, "steps": steps, "epochs": epochs}
    given = {name: value for name, value in budget.items() if value is not None}
    if len(given) > 1:
        raise PftoolsError(f"the training budget is {given}: give exactly one of tokens, steps and epochs.")
    if tokens is not None:
        return max(1, round(tokens / tokens_per_row))
    if steps is not None:
        return steps * rows_per_step
    return max(1, math.ceil((1.0 if epochs is None else epochs) * rows))


def warmup_of(warmup_steps: int, max_steps: int) -> int:
    """Steps of warm-up: capped below half of all, so that a short training also reaches its peak rate."""
    return min(warmup_steps, (max_steps - 1) // 2)


def _rows_per_forward(rows_per_step: int, wanted: int | None, length: int) -> int:
    """The largest divisor of a step that is not above what is wanted, or above about 4,096 tokens."""
    limit = wanted or max(1, _TOKENS_A_FORWARD // length)
    sizes = range(min(limit, rows_per_step), 0, -1)
    return next(size for size in sizes if rows_per_step % size == 0)


def recipe_of(parameters: Finetune) -> dict[str, Any]:
    """The settings of `Recipe` that a step's parameters decide, by name; without a budget, 49,152 tokens."""
    names = [field.name for field in fields(Recipe) if field.name in type(parameters).model_fields]
    recipe = {name: getattr(parameters, name) for name in names}
    if parameters.tokens is None and parameters.steps is None and parameters.epochs is None:
        recipe["tokens"] = _DEFAULT_TOKENS
    return {**recipe, "micro_batch_size": parameters.batch_size}

"""What a training is told: which weights get an adapter, and how long it lasts."""

from __future__ import annotations

import math

from torch import nn

from pftools.errors import PftoolsError
from pftools.layers import linear_modules

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "query_key_value", "dense")
_PUBLISHED = ("q_proj", "v_proj")


def find_targets(model: nn.Module, targets: str) -> list[str]:
    """Full names of the linear modules that get an adapter.

    Args:
        targets: `all-linear` (every `nn.Linear` of the decoder layers; fused experts are none), `attention`, `published` (q and v), or
            module names with commas between.

    Raises:
        PftoolsError: nothing matches; the names that exist are listed.
    """
    modules = list(linear_modules(model))
    if targets == "all-linear":
        return modules
    named = {"attention": _ATTENTION, "published": _PUBLISHED}
    wanted = named.get(targets) or tuple(name.strip() for name in targets.split(",") if name.strip())
    short = sorted({name.rpartition(".")[2] for name in modules})
    missing = [] if targets in named else [name for name in wanted if name not in short]
    found = [name for name in modules if name.rpartition(".")[2] in wanted]
    if missing or not found:
        raise PftoolsError(
            f"targets {targets!r} match nothing for {', '.join(missing or wanted)}: the linear modules of this model are "
            f"{', '.join(short)}; or give 'all-linear' or 'attention'."
        )
    return found


def rows_of_budget(
    rows: int,
    tokens_per_row: float,
    rows_per_step: int,
    *,
    tokens: int | None,
    steps: int | None,
    epochs: float | None,
) -> int:
    """How many rows are trained on, for a budget in real tokens, in steps, or in passes over the rows; one of the three.

    Raises:
        PftoolsError: none or several are given.
    """
    given = {
        name: value
        for name, value in {"tokens": tokens, "steps": steps, "epochs": epochs}.items()
        if value is not None
    }
    if len(given) != 1:
        raise PftoolsError(
            f"the training budget is {given or 'not given'}: give exactly one of tokens, steps and epochs."
        )
    if tokens is not None:
        return max(1, round(tokens / tokens_per_row))
    return max(1, math.ceil(epochs * rows)) if epochs is not None else steps * rows_per_step


def warmup_of(warmup_steps: int, max_steps: int) -> int:
    """The steps of warm-up: less than half of all, so that a short training, as one of an ordering's many, has learning rates at all."""
    return min(warmup_steps, (max_steps - 1) // 2)

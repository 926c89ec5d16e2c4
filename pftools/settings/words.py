"""The words that parameters are written in: names of formats, placements, merges, methods, patterns."""

from __future__ import annotations

import re
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator

from pftools.criteria import METHODS
from pftools.errors import PftoolsError, nearest

# What this name stands for is made by `base_models`; a folder of the same name is not it.
EMBEDDED_MODEL = "smollm2-135m"
A_PATH = "a path"  # marks parameters that are always paths; others, such as a model, may be one
FolderPath = Annotated[str, A_PATH]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
Placement = Literal["one", "spread", "stream"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
PlacementName = Literal["auto", Placement]
Merge = Literal["auto", "masked", "dense"]


def _known_method(name: str) -> str:
    if name not in METHODS:
        raise ValueError(nearest(name, METHODS))
    return name


PruningMethod = Annotated[str, AfterValidator(_known_method)]
# Those that also change the weights they keep, which then have to be stored whole.
UPDATING_METHODS = tuple(name for name, method in METHODS.items() if method.update)


# What `targets` of a fine-tuning may be called, and the modules that it then means.
TARGETS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "query_key_value", "dense"),
    "published": ("q_proj", "v_proj"),
}
# The numbers of a config.json that the sizes of a Llama-like model follow from.
SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def parse_nm(pattern: str) -> tuple[int, int] | None:
    """(N, M) of an N:M pattern: of every M neighbours in a row, N are kept. None for `unstructured`.

    Source: Mishra et al. 2021, arXiv 2104.08378.

    Raises:
        PftoolsError: neither of the two.
    """
    if pattern == "unstructured":
        return None
    found = re.fullmatch(r"([1-9]\d*):(\d+)", pattern)
    if not found or int(found[1]) >= int(found[2]):
        raise PftoolsError(
            f"the pattern {pattern!r} is unknown: give 'unstructured', or N:M with N < M such as '2:4'."
        )
    return int(found[1]), int(found[2])


def pattern_sparsity(pattern: str) -> float | None:
    """The sparsity that an N:M pattern fixes; None for `unstructured`, which leaves it open."""
    numbers = parse_nm(pattern)
    return 1 - numbers[0] / numbers[1] if numbers else None

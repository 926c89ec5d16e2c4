"""Forwards of a model over token rows, with a beginning that is read once, and how far two readings are
apart.

The cache is the model's own: the one that its forward returns, copied and repeated by its own operations. So
a window slides, a state recurs and a position counts as the model's author meant it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, PretrainedConfig, PreTrainedModel

# How models call the cache that they take and return: transformers has renamed it within version 5.
_CACHE_NAMES = ("cache", "past_key_values", "cache_params")
# Rotary embeddings whose frequencies depend on how long the whole sequence is.
_LENGTH_DEPENDENT = ("longrope", "dynamic")
# Most that two readings of one row may differ, as a share of the spread of the log-probabilities: rounding in
# another order gives a tenth of it, a wrong position or a forgotten beginning many times more.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.float16: 0.03, torch.bfloat16: 0.15}


@dataclass(frozen=True)
class Beginning:
    """Tokens that several rows begin with, read into the model's own cache.

    Attributes:
        length: how many tokens.
        cache: the cache, of one row; None where nothing is shared.
        pads: whether rows after it may be padded to one length.
        caches: whether replies may be written with a cache.
    """

    length: int = 0
    cache: Cache | None = None
    pads: bool = True
    caches: bool = True

    def cache_for(self, rows: int) -> Cache | None:
        """A copy of the cache for so many rows; the model may change it."""
        if self.cache is None:
            return None
        repeated = copy.deepcopy(self.cache)
        if rows > 1:
            repeated.reorder_cache(torch.LongTensor([0] * rows))
        return repeated


class Forwards:
    """What a model's forward takes and returns, found once.

    Attributes:
        cache_name: the argument for the cache; None where the model takes none.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        names = inspect.signature(inspect.unwrap(type(model).forward)).parameters
        self.cache_name = next((name for name in _CACHE_NAMES if name in names), None)
        self._keeps_some_logits = "logits_to_keep" in names

    def read(self, tokens: Sequence[int], device: torch.device) -> Beginning:
        """Read a beginning. Its ``cache`` is None where the model returns none."""
        outputs = self._outputs(torch.tensor([list(tokens)], device=device), keep=1, use_cache=True)
        cache = next((outputs[name] for name in _CACHE_NAMES if outputs.get(name) is not None), None)
        return Beginning(len(tokens), cache if isinstance(cache, Cache) else None)

    def logits(
        self, inputs: torch.Tensor, cache: Cache | None = None, *, keep: int | torch.Tensor
    ) -> torch.Tensor:
        """Logits at the last ``keep`` positions, or at those that it lists: (rows, positions, vocabulary)."""
        options = {self.cache_name: cache} if cache is not None and self.cache_name else {}
        logits = self._outputs(inputs, keep=keep, use_cache=cache is not None, **options).logits
        if self._keeps_some_logits:
            return logits
        return logits[:, -keep:] if isinstance(keep, int) else logits[:, keep]

    def _outputs(
        self, inputs: torch.Tensor, *, keep: int | torch.Tensor, use_cache: bool, **options: Any
    ) -> Any:
        if self._keeps_some_logits:
            options["logits_to_keep"] = keep
        if self.cache_name:
            options["use_cache"] = use_cache
        return self.model(input_ids=inputs, **options)


def alike_up_to(config: PretrainedConfig) -> int | None:
    """The number of tokens up to which a sequence's length does not change how its positions are encoded.

    None: it never does.
    LongRoPE (arXiv 2402.13753) and dynamic NTK scaling change every position's encoding once a sequence is
    longer than the original context. A beginning that was read before that is then no longer the beginning of
    the whole.
    """
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    for own in [parameters, *(inner for inner in parameters.values() if isinstance(inner, dict))]:
        if own.get("rope_type", own.get("type")) in _LENGTH_DEPENDENT:
            original = own.get("original_max_position_embeddings")
            original = original or getattr(text, "original_max_position_embeddings", None)
            return original or getattr(text, "max_position_embeddings", None)
    return None


def difference(logits: torch.Tensor, others: torch.Tensor) -> float:
    """How far two readings of the same positions are apart.

    The root mean square of the difference of their log-probabilities, as a share of their spread over the
    vocabulary.

    Args:
        logits, others: (..., vocabulary). Entries that are minus infinity in both are left out.

    Returns:
        0 for equal readings; infinity where one holds a NaN.
    """
    one, other = logits.double().log_softmax(dim=-1), others.double().log_softmax(dim=-1)
    kept = ~(one.isneginf() & other.isneginf())
    one, other = one[kept], other[kept]
    apart = float((one - other).square().mean().sqrt() / other.std().clamp(min=1e-6))
    return apart if apart == apart else float("inf")


def tolerance(dtype: torch.dtype) -> float:
    """The largest `difference` that rounding explains."""
    return _TOLERANCE.get(dtype, _TOLERANCE[torch.bfloat16])

"""Whether a model reads a text from left to right, and is a whole one: judged by what it computes.

A model that is in memory already may say anything in its configuration. So a few tokens are read twice, with
another last token. What stands before it must not notice, and every part of the decoder must have been used.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pftools.errors import PftoolsError
from pftools.layers import linear_modules
from pftools.memory import ran_out

_TOKENS = 16
# How far two equal readings may be apart, as a share of the largest number.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
_LOW_PRECISION = 3e-2


def check_causal(model: nn.Module, tokens: torch.Tensor) -> None:
    """Refuse a model that is no causal language model. One forward of two short rows.

    Args:
        tokens: LongTensor (length,), of which the first few are read.

    Raises:
        PftoolsError: earlier positions depend on later tokens, as in an encoder; or parts of the decoder wait
            for an encoder that is not there.
    """
    if len(tokens) < 3:
        return
    rows = pair_of(tokens[:_TOKENS]).to(next(model.parameters()).device)
    used: set[str] = set()
    watched = _parts_that_may_wait(model)
    hooks = [
        module.register_forward_hook(lambda *_, name=name: used.add(name)) for name, module in watched.items()
    ]
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), reading(model, rows.shape[1]):
            logits = model(input_ids=rows, **without_cache(model)).logits
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    if reads_ahead(logits):
        raise ahead(model)
    if idle := [name for name in watched if name not in used]:
        raise PftoolsError(
            f"{type(model).__name__} is half of an encoder-decoder, whose {idle[0]} waits for an encoder: "
            "give a decoder-only model."
        )


def check_bare(model: nn.Module) -> None:
    """Refuse a model with an adapter around its matrices, whose factors would be taken for weights.

    Raises:
        PftoolsError: PEFT has wrapped it.
    """
    if hasattr(model, "peft_config"):
        raise PftoolsError(
            f"{type(model).__name__} has an adapter of PEFT in it: merge that first, with "
            "model.merge_and_unload()."
        )


@contextmanager
def reading(model: nn.Module, length: int) -> Iterator[None]:
    """A plain forward of rows of ``length`` tokens. What a model raises within becomes one sentence."""
    try:
        yield
    except PftoolsError:
        raise
    except Exception as error:  # its own code may fail in any way
        if ran_out(error):
            raise
        cause = " ".join(str(error).split())[:150] or type(error).__name__
        raise PftoolsError(
            f"{type(model).__name__} itself cannot read a row of {length} tokens: {cause}"
        ) from error


def pair_of(tokens: torch.Tensor) -> torch.Tensor:
    """A row, and the same row with another last token: (length,) -> (2, length)."""
    rows = torch.stack([tokens, tokens])
    rows[1, -1] = rows[1, -1] - 1 if rows[1, -1] else rows[1, -1] + 1
    return rows


def reads_ahead(output: torch.Tensor) -> bool:
    """Whether the positions before the last differ between the rows of a pair (`pair_of`).

    All of the four before it, so that rounding in one of them is not taken for it.

    Args:
        output: hidden states or logits, (2, length, width).
    """
    if output.dim() != 3 or len(output) != 2 or output.shape[1] < 3:
        return False
    one, other = output[:, -5:-1].float()
    off = (one - other).abs().amax(dim=1) > tolerance(output) * output.abs().amax()
    return bool(off.all())


def ahead(model: nn.Module, where: str = "it") -> PftoolsError:
    """The refusal of an encoder. where: the part that was seen to read ahead."""
    return PftoolsError(
        f"{type(model).__name__} reads ahead: {where} sees later tokens, so it is an encoder and no causal "
        "language model; give a decoder (or set is_decoder in its config.json)."
    )


def tolerance(tensor: torch.Tensor) -> float:
    """How far two equal readings of that dtype may be apart, as a share of the largest number."""
    return _TOLERANCE.get(tensor.dtype, _LOW_PRECISION)


def without_cache(model: nn.Module) -> dict[str, bool]:
    """The argument that keeps a model from filling a cache, where it takes one."""
    names = inspect.signature(inspect.unwrap(type(model).forward)).parameters
    return {"use_cache": False} if "use_cache" in names or "kwargs" in names else {}


def _parts_that_may_wait(model: nn.Module) -> dict[str, Any]:
    """The linear modules of a decoder that can be given an encoder's output."""
    names = inspect.signature(inspect.unwrap(type(model).forward)).parameters
    if not any(name.startswith("encoder_") for name in names):
        return {}
    try:
        return linear_modules(model)
    except PftoolsError:  # of another layout, which is no matter of this check
        return {}

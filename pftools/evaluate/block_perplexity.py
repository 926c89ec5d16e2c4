"""Perplexity as the pruning papers compute it: consecutive blocks of a stated length, read one by one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from pftools.bars import progress_bar
from pftools.base_models import context_length
from pftools.errors import PftoolsError

# Nats a token. The exponential of more is no float; a model that loses as much has collapsed anyway.
_MOST = 700.0
# Logits that may exist at a time, in numbers: a vocabulary is far wider than a model, so they are what fills
# the memory.
_LOGITS_BUDGET = 50_000_000
_TOKENS_A_FORWARD = 4096


@dataclass(frozen=True)
class PerplexityResult:
    """perplexity: e to the mean of ``block_nll``.

    block_nll: float64 tensor (n_blocks,), mean loss of each block in nats a token.
    """

    perplexity: float
    block_nll: torch.Tensor


def perplexity(
    model: nn.Module, blocks: torch.Tensor, *, batch_size: int | None = None, progress: bool = True
) -> PerplexityResult:
    """The perplexity of a model on blocks of tokens.

    The loss of a block is the mean over its tokens but the first, which nothing predicts; the result is e to
    the mean over blocks, as in the code of SparseGPT and Wanda.

    Args:
        blocks: LongTensor (n_blocks, block_length).
        batch_size: blocks a forward; None: chosen by size.

    Raises:
        PftoolsError: no blocks, blocks longer than the model's context, or a loss that is not a number (the
            block is named).
    """
    if blocks.dim() != 2 or not len(blocks) or blocks.shape[1] < 2:
        raise PftoolsError(
            f"the blocks have shape {tuple(blocks.shape)}: "
            "(n_blocks, block_length) with at least 2 tokens is needed."
        )
    context = context_length(model)
    if context and blocks.shape[1] > context:
        raise PftoolsError(
            f"blocks of {blocks.shape[1]} tokens are longer than the model's context of {context}: "
            "choose a block_length up to that."
        )
    batch_size = batch_size or max(1, _TOKENS_A_FORWARD // blocks.shape[1])
    losses = []
    training = model.training
    model.eval()
    try:
        with (
            torch.no_grad(),
            progress_bar(total=len(blocks), desc="perplexity", unit="block", disable=not progress) as bar,
        ):
            for batch in blocks.split(batch_size):
                losses.append(_block_losses(model, batch.to(model.device)))
                bar.update(len(batch))
    finally:
        model.train(training)
    block_nll = torch.cat(losses)
    if not torch.isfinite(block_nll).all():
        first = int((~torch.isfinite(block_nll)).nonzero()[0])
        raise PftoolsError(
            f"the loss of block {first} is not a number: "
            "the model is broken, or float16 overflows; try dtype float32."
        )
    return PerplexityResult(math.exp(min(float(block_nll.mean()), _MOST)), block_nll)


def _block_losses(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Mean loss of each row, float64 on the CPU; the log-softmax is float32, a few rows at a time."""
    logits = model(input_ids=batch, use_cache=False).logits
    rows = max(1, _LOGITS_BUDGET // logits[0].numel())
    losses = []
    for part, tokens in zip(logits.split(rows), batch.split(rows)):
        nll = F.cross_entropy(part[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
        losses.append(nll.view(len(tokens), -1).double().mean(dim=1).cpu())
    return torch.cat(losses)

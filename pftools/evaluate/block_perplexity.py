"""Perplexity as the pruning papers compute it: consecutive blocks of a stated length, read one by one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pftools.bars import progress_bar
from pftools.causal import check_causal, reading, without_cache
from pftools.errors import PftoolsError
from pftools.memory import in_halves
from pftools.pretrained.base_models import check_blocks

# Nats a token. The exponential of more is no float; a model that loses as much has collapsed anyway.
_MOST = 700.0
# Logits that may exist at a time, in numbers: a vocabulary is far wider than a model, so they are what fills
# the memory.
_LOGITS_BUDGET = 50_000_000
_TOKENS_A_FORWARD = 4096
# Model types whose published perplexities are of blocks without a first token, though their tokenizer has one
# (SparseGPT: OPT; Wanda: LLaMA, LLaMA-2 and OPT).
_PUBLISHED_WITHOUT = ("llama", "opt")


@dataclass(frozen=True)
class PerplexityResult:
    """perplexity: e to the mean of ``block_nll``.

    block_nll: float64 tensor (n_blocks,), mean loss of each block in nats a token.
    """

    perplexity: float
    block_nll: torch.Tensor


def first_token(model: nn.Module, tokenizer: Any) -> int | None:
    """The token that a model is given before every block; None: none, and the block begins the text.

    Models that were trained with a first token, such as Gemma, read a text badly without it. So the tokenizer
    is followed, as in lm-eval: what it puts before a text is put before every block. The exceptions are the
    families in `_PUBLISHED_WITHOUT`: the papers read their blocks without it, and their numbers are compared
    with ours.
    """
    config: Any = model.config
    if config.get_text_config().model_type in _PUBLISHED_WITHOUT:
        return None
    tokens = tokenizer("a")["input_ids"]
    begins = len(tokens) > 1 and tokens[0] == tokenizer.bos_token_id
    return tokens[0] if begins else None


def first_token_in_words(tokenizer: Any, first: int | None) -> str:
    """For a run's record: what every block begins with."""
    return "their own first token" if first is None else f"the tokenizer's {tokenizer.decode([first])}"


def perplexity(
    model: nn.Module,
    blocks: torch.Tensor,
    *,
    first: int | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> PerplexityResult:
    """The perplexity of a model on blocks of tokens.

    The loss of a block is the mean over its tokens but the first, which nothing predicts; the result is e to
    the mean over blocks, as in the code of SparseGPT and Wanda.

    Args:
        blocks: LongTensor (n_blocks, block_length).
        first: a token that is put in the place of every block's first one, which nothing predicts: see
            `first_token`. None: blocks are read as they are.
        batch_size: blocks a forward; None: chosen by size.

    Raises:
        PftoolsError: no blocks, blocks that the model cannot read, a model that is no causal language model,
            or a loss that is not a number (the block is named).
    """
    if blocks.dim() != 2 or not len(blocks) or blocks.shape[1] < 2:
        raise PftoolsError(
            f"the blocks have shape {tuple(blocks.shape)}: (n_blocks, block_length) with at least 2 tokens "
            "is needed."
        )
    check_blocks(model, blocks)
    check_causal(model, blocks[0])
    if first is not None:
        blocks = torch.cat([torch.full_like(blocks[:, :1], first), blocks[:, 1:]], dim=1)
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
                losses += in_halves(partial(_block_losses, model), batch, of="blocks of the perplexity")
                bar.update(len(batch))
    finally:
        model.train(training)
    block_nll = torch.stack(losses)
    if not torch.isfinite(block_nll).all():
        first = int((~torch.isfinite(block_nll)).nonzero()[0])
        raise PftoolsError(
            f"the loss of block {first} is not a number: the model is broken, or float16 overflows; try "
            "dtype float32."
        )
    return PerplexityResult(math.exp(min(float(block_nll.mean()), _MOST)), block_nll)


def _block_losses(model: Any, batch: torch.Tensor) -> list[torch.Tensor]:
    """Mean loss of each row, float64 on the CPU; the log-softmax is float32, a few rows at a time."""
    batch = batch.to(model.device)
    with reading(model, batch.shape[1]):
        logits = model(input_ids=batch, **without_cache(model)).logits
    rows = max(1, _LOGITS_BUDGET // logits[0].numel())
    losses: list[torch.Tensor] = []
    for part, tokens in zip(logits.split(rows), batch.split(rows)):
        nll = F.cross_entropy(part[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
        losses += nll.view(len(tokens), -1).double().mean(dim=1).cpu()
    return losses

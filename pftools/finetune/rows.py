"""Training rows.

Packed: blocks of real tokens only. Padded: a line a row, the rest filled up (published). Chat: whole
conversations, as many as fit a row, with a loss on the answers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from pftools import corpora
from pftools.corpora.chat import Conversation, tokens_of
from pftools.errors import PftoolsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pftools.settings import Finetune

IGNORED = -100  # the label that torch's cross entropy leaves out


class Rows(torch.utils.data.Dataset):
    """Rows for transformers' Trainer: input_ids, attention_mask and labels, LongTensors (n_rows, length).

    Without labels, every token that is not padding is learnt.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> None:
        if input_ids.dim() != 2 or not input_ids.numel():
            raise PftoolsError(
                f"the training rows have shape {tuple(input_ids.shape)}: "
                "(rows, length) is needed, with tokens."
            )
        self.input_ids, self.attention_mask = input_ids, attention_mask
        if labels is None:
            labels = (
                input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, IGNORED)
            )
        self.labels = labels

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        item = {"input_ids": self.input_ids[row], "labels": self.labels[row]}
        return item if self.attention_mask is None else {**item, "attention_mask": self.attention_mask[row]}

    @property
    def real_tokens(self) -> int:
        """Tokens that are not padding."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())

    @property
    def learnt_tokens(self) -> int:
        """Tokens that have a loss."""
        return int((self.labels != IGNORED).sum())

    def __str__(self) -> str:
        length = self.input_ids.shape[1]
        share = self.learnt_tokens / self.real_tokens
        answers = "" if share == 1 else f", {share:.0%} of the real ones in answers, which alone have a loss"
        return f"{len(self)} rows of {length} tokens to learn from{answers}"


def training_rows(parameters: Finetune, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """The rows of a step's train split: of conversations, of lines (``packing=False``), or packed blocks."""
    corpus, length = parameters.corpus, parameters.block_length
    documents = corpora.documents(corpus, split="train")
    conversations = [document for document in documents if isinstance(document, Conversation)]
    if conversations:
        return chat_rows(tokenizer, conversations, length)
    if not parameters.packing:
        return padded_rows(tokenizer, documents, length)
    blocks = corpora.blocks_of(
        tokenizer, documents, corpus, split="train", block_length=length, seed=parameters.seed
    )
    return Rows(blocks)


def training_order(n_rows: int, length: int, seed: int) -> list[int]:
    """``length`` row numbers: the rows shuffled, then shuffled again, for as long as it takes.

    So a step may hold rows of two passes, and none is short because a pass ends.
    """
    generator = torch.Generator().manual_seed(seed)
    passes = [torch.randperm(n_rows, generator=generator) for _ in range(-(-length // n_rows))]
    return torch.cat(passes)[:length].tolist()


def padded_rows(tokenizer: PreTrainedTokenizerBase, lines: list[str], block_length: int) -> Rows:
    """One line a row, cut or padded to ``block_length`` tokens; lines without a token are left out.

    The published study keeps even those; a row of nothing but padding has no loss and only costs time.

    Raises:
        PftoolsError: no line has a token.
    """
    tokens = [ids[:block_length] for ids in tokenizer(lines, add_special_tokens=False)["input_ids"] if ids]
    if not tokens:
        raise PftoolsError("the corpus has no line with a token in it: choose another corpus or split.")
    return Rows(
        _filled(tokens, block_length, tokenizer.pad_token_id),
        _filled([[1] * len(t) for t in tokens], block_length, 0),
    )


def chat_rows(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation], block_length: int
) -> Rows:
    """Whole conversations, as many as fit a row, in their order; the loss is on the answers only.

    Raises:
        PftoolsError: no chat template, or a conversation longer than a row: cut short, it would teach to stop
            in the middle.
    """
    packed: list[tuple[list[int], list[int]]] = [([], [])]
    for number, conversation in enumerate(conversations, 1):
        tokens, is_answer = tokens_of(tokenizer, conversation)
        if len(tokens) > block_length:
            raise PftoolsError(
                f"conversation {number} of the train split has {len(tokens)} tokens, and a row has "
                f"{block_length}: give a block_length of at least that, or leave it out."
            )
        if len(packed[-1][0]) + len(tokens) > block_length:
            packed.append(([], []))
        packed[-1][0].extend(tokens)
        packed[-1][1].extend(token if known else IGNORED for token, known in zip(tokens, is_answer))
    pad = tokenizer.pad_token_id
    inputs = _filled(
        [tokens for tokens, _ in packed], block_length, tokenizer.eos_token_id if pad is None else pad
    )
    mask = _filled([[1] * len(tokens) for tokens, _ in packed], block_length, 0)
    return Rows(inputs, mask, _filled([labels for _, labels in packed], block_length, IGNORED))


def _filled(rows: list[list[int]], length: int, value: int) -> torch.Tensor:
    """(n_rows, length): each row, and ``value`` behind it."""
    filled = torch.full((len(rows), length), value, dtype=torch.long)
    for row, numbers in enumerate(rows):
        filled[row, : len(numbers)] = torch.tensor(numbers)
    return filled

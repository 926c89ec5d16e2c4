"""Training rows. Packed: blocks of real tokens only. Padded: a line a row, the rest filled up (published)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pftools.errors import PftoolsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that torch's cross entropy leaves out


class Rows(torch.utils.data.Dataset):
    """Rows for transformers' Trainer: input_ids, attention_mask and labels, LongTensors (n_rows, length)."""

    def __init__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> None:
        if input_ids.dim() != 2 or not input_ids.numel():
            raise PftoolsError(
                f"the training rows have shape {tuple(input_ids.shape)}: "
                "(rows, length) is needed, with tokens."
            )
        self.input_ids, self.attention_mask = input_ids, attention_mask
        self.labels = (
            input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, IGNORED)
        )

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        item = {"input_ids": self.input_ids[row], "labels": self.labels[row]}
        return item if self.attention_mask is None else {**item, "attention_mask": self.attention_mask[row]}

    @property
    def real_tokens(self) -> int:
        """Tokens that are not padding."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())


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
    input_ids = torch.full((len(tokens), block_length), tokenizer.pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(tokens):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = 1
    return Rows(input_ids, mask)

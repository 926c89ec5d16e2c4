"""A corpus as blocks of tokens: chosen by split and seed, kept as the input of a run."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pftools import run_folder
from pftools.corpora.chat import Conversation, tokens_of
from pftools.corpora.sources import documents
from pftools.errors import PftoolsError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

# The papers join the lines of WikiText with a blank line between them; documents elsewhere likewise.
_JOINT = "\n\n"


def token_blocks(
    tokenizer: PreTrainedTokenizerBase,
    corpus: str = "pydocs",
    *,
    split: str,
    n_blocks: int | None = None,
    block_length: int,
    seed: int = 0,
    data: str | Path | None = None,
) -> Tensor:
    """Blocks of ``block_length`` tokens from a split of a corpus, its documents joined by blank lines.

    How blocks are chosen depends on what the split is for:

    - `validation`, `test`: consecutive blocks from the start, as papers compute perplexity; ``seed`` has no
      effect.
    - `train`: consecutive blocks, in an order shuffled by ``seed``.
    - `calibration`: blocks at random, drawn by ``seed`` without overlap; where the split is too short for
      that, random windows that may overlap, and a warning says so.

    Args:
        n_blocks: how many; None: all that the split holds.
        data: the data root; None: `PFTOOLS_DATA`.

    Returns:
        LongTensor of shape (n_blocks, block_length).

    Raises:
        PftoolsError: unknown corpus or split, an empty corpus, or fewer blocks than asked.
    """
    if block_length < 2:
        raise PftoolsError(
            f"block_length is {block_length}: a block needs at least 2 tokens, one to predict the next."
        )
    if n_blocks is not None and n_blocks < 1:
        raise PftoolsError(f"n_blocks is {n_blocks}: ask for at least 1 block, or None for all.")
    found = documents(corpus, split=split, data=data)
    return blocks_of(
        tokenizer, found, corpus, split=split, n_blocks=n_blocks, block_length=block_length, seed=seed
    )


def blocks_of(
    tokenizer: PreTrainedTokenizerBase,
    found: Sequence[str],
    corpus: str,
    *,
    split: str,
    n_blocks: int | None = None,
    block_length: int,
    seed: int = 0,
) -> Tensor:
    """`token_blocks` of a split whose documents were read already.

    Args:
        found: its documents.
        corpus: its name, for messages.
    """
    import torch

    stream = _token_stream(tokenizer, found)
    available = len(stream) // block_length
    if available == 0:
        raise PftoolsError(
            f"the {split} split of {corpus!r} has {len(stream)} tokens, less than one block of "
            f"{block_length}: choose a shorter block_length or another corpus."
        )
    chooser = random.Random(seed)
    if split == "calibration" and n_blocks is not None and n_blocks > available:
        warnings.warn(
            f"{n_blocks} calibration blocks of {block_length} tokens are asked and {corpus!r} holds "
            f"{available} without overlap: random windows that overlap are used.",
            stacklevel=3,
        )
        starts = [chooser.randrange(len(stream) - block_length + 1) for _ in range(n_blocks)]
    elif n_blocks is not None and n_blocks > available:
        raise PftoolsError(
            f"{n_blocks} blocks of {block_length} tokens are asked and the {split} split of {corpus!r} holds "
            f"{available}: ask for at most that many, or None for all."
        )
    else:
        starts = [block * block_length for block in range(available)]
        if split in ("calibration", "train"):
            chooser.shuffle(starts)
        starts = starts[:n_blocks]
    return torch.stack([stream[start : start + block_length] for start in starts])


def blocks_for(parameters: Any, tokenizer: PreTrainedTokenizerBase, *, split: str | None = None) -> Tensor:
    """`token_blocks` with what a step's parameters say of corpus, blocks, seed and data root.

    Args:
        parameters: those of a step that reads blocks.
        tokenizer: of the model that will read them.
        split: where the step's parameters name none.
    """
    return token_blocks(
        tokenizer,
        parameters.corpus,
        split=split or parameters.split,
        n_blocks=getattr(parameters, "n_blocks", None),
        block_length=parameters.block_length,
        seed=parameters.seed,
        data=getattr(parameters, "data", None),
    )


def save_blocks(path: str | Path, blocks: Tensor) -> None:
    """Keep chosen blocks as safetensors (int32: half the size, and every vocabulary fits)."""
    import torch
    from safetensors.torch import save_file

    save_file({"blocks": blocks.to(torch.int32)}, path)


def load_blocks(run: str | Path) -> Tensor:
    """The blocks that a calibrate run chose, (n_blocks, block_length), checked against their seal.

    Raises:
        PftoolsError: the run is not finished, damaged, or not a calibrate run.
    """
    from safetensors.torch import load_file

    if run_folder.verify(run)["step"] != "calibrate":
        raise PftoolsError(f"{run} holds no calibration blocks: give the folder of a finished calibrate run.")
    return load_file(Path(run) / "blocks.safetensors")["blocks"].long()


def _token_stream(tokenizer: PreTrainedTokenizerBase, found: Sequence[str]) -> Tensor:
    import torch

    if isinstance(found[0], Conversation):
        written = [
            tokens_of(tokenizer, document)[0] for document in found if isinstance(document, Conversation)
        ]
        return torch.tensor([token for tokens in written for token in tokens], dtype=torch.long)
    # Without a warning about its length: it is cut into blocks, and never given to a model whole.
    tokens = tokenizer(_JOINT.join(found), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(tokens, dtype=torch.long)

"""When memory runs out: one sentence with the levers, and the size that would fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from pftools.layers import matrices
from pftools.memory import OutOfMemory, ran_out
from pftools.prune.inputs import widest_output


@contextmanager
def naming_the_levers(
    place: str, layer: nn.Module, blocks: torch.Size, batch_size: int, *, harmless: bool = False
) -> Iterator[None]:
    """Turn an allocation that fails within into an `OutOfMemory` that says what to lower, and how far.

    Args:
        blocks: (n_blocks, block_length) of the tokens that are walked through the layers.
        harmless: whether nothing is changed within.
    """
    try:
        yield
        return
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        failure = error
    failure.__traceback__ = None  # its frames hold the tensors of the forward that failed
    found = OutOfMemory(_advice(place, layer, blocks, batch_size))
    found.harmless = harmless
    raise found from failure


def _advice(place: str, layer: nn.Module, blocks: torch.Size, batch_size: int) -> str:
    n_blocks, block_length = blocks
    weight = next(layer.parameters())
    width = min(matrix.weight(layer).shape[1] for matrix in matrices(layer).values())
    # A layer holds some eight tensors as wide as the model at a time, and up to four as wide as its widest
    # output.
    block = (8 * width + 4 * widest_output(layer)) * block_length * weight.element_size()
    free = free_memory(weight.device)
    fits = int(free // block)
    tried = (
        f"out of memory at {place} with batch_size {batch_size} and {n_blocks} blocks of "
        f"{block_length} tokens on {weight.device}"
    )
    there = f"{free / 2**30:.1f} GiB are free, a block takes about {block / 2**30:.2f} GiB"
    if 0 < fits < batch_size:
        return (
            f"{tried}: {there}, so batch_size={fits} should fit; a smaller block_length or fewer "
            "blocks (n_blocks) save more."
        )
    if fits == 0:
        length = int(block_length * free // block) // 8 * 8
        return (
            f"{tried}: {there}, so a block_length of about {max(length, 8)} should fit; fewer blocks "
            "(n_blocks) leave more room."
        )
    half, states = max(1, n_blocks // 2), n_blocks * block_length * width * weight.element_size()
    return (
        f"{tried}: {there}, and the hidden states of all blocks {states / 2**30:.1f} GiB: n_blocks={half} or "
        f"batch_size={max(1, batch_size // 2)} should fit; a smaller block_length saves both."
    )


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a device now."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available

"""Weights in a file that is mapped into memory: the system reads what is used, and forgets it again.

A model that is larger than the machine's memory is an ordinary model here, whose matrices lie in such a file.
Everything that reads or writes a weight works as always. Whoever goes through many of them lets go of each
after its turn (`in_turn`, `release`), so that no more than a few are in memory at a time; where somebody does
not, the system does it under pressure. The file has no name in any folder, and is gone with its last tensor.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pftools.errors import PftoolsError
from pftools.files import as_bytes

if TYPE_CHECKING:
    import torch

_files: weakref.WeakSet[Scratch] = weakref.WeakSet()


class Scratch(mmap.mmap):
    """A nameless file of a given size, mapped into memory, which tensors are placed in one after the other.

    Attributes:
        base: the address of its first byte.
    """

    base: int
    _end: int

    def __new__(cls, size: int, folder: Path) -> Scratch:
        """
        Args:
            size: in bytes; see `room_for`.
            folder: on a disk with that much room.

        Raises:
            PftoolsError: the disk has less room.
        """
        import torch

        size = max(size, mmap.PAGESIZE)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)  # room that is promised: no fault later on
                file.truncate(size)
                found = super().__new__(cls, file.fileno(), size)
        except OSError as error:
            raise PftoolsError(
                f"the weights need {as_bytes(size)} of scratch in {folder}, which cannot be had "
                f"({error.strerror}): free some room, or let PFTOOLS_CACHE name a folder of a larger disk."
            ) from None
        found.base, found._end = torch.frombuffer(found, dtype=torch.uint8).data_ptr(), 0
        _files.add(found)
        return found

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a tensor that lies in the file, and takes no memory until it is used."""
        import torch

        flat = torch.frombuffer(self, dtype=tensor.dtype, count=tensor.numel(), offset=self._end)
        self._end += _aligned(tensor.nbytes)
        placed = flat.view(tensor.shape)
        placed.copy_(tensor.detach())
        release(placed)
        return placed


def room_for(tensors: Iterable[torch.Tensor]) -> int:
    """The size in bytes of a `Scratch` for these tensors, which may be on the meta device."""
    return sum(_aligned(tensor.nbytes) for tensor in tensors)


def _aligned(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies in a `Scratch`."""
    return _file_of(tensor) is not None


def release(tensor: torch.Tensor) -> None:
    """Let go of the memory of a mapped tensor, which keeps its values; nothing is done to any other."""
    file = _file_of(tensor)
    if file is not None and hasattr(mmap, "MADV_DONTNEED"):
        storage = tensor.untyped_storage()
        file.madvise(mmap.MADV_DONTNEED, storage.data_ptr() - file.base, storage.nbytes())


def in_turn(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor), one after the other; a mapped one is let go of after its turn."""
    for name, tensor in tensors:
        yield name, tensor
        release(tensor)


def _file_of(tensor: torch.Tensor) -> Scratch | None:
    if tensor.device.type != "cpu":
        return None
    address = tensor.untyped_storage().data_ptr()
    return next((file for file in _files if file.base <= address < file.base + len(file)), None)

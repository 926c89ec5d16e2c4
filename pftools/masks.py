"""Masks as packed bits: eight weights a byte, True = kept. All that packs bits is here."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    import numpy as np
    import torch

MASKS = "masks.safetensors"  # the file of a run that holds the masks of all its weights


def pack(mask: torch.Tensor) -> np.ndarray:
    """A bool mask of any shape as uint8 (ceil(size / 8),), row by row, the first in the highest bit."""
    import numpy as np

    return np.packbits(mask.detach().cpu().numpy().reshape(-1))


def unpack(bits: np.ndarray, shape: Sequence[int]) -> torch.Tensor:
    """The bool mask of this shape that `pack` wrote."""
    import numpy as np
    import torch

    return torch.from_numpy(np.unpackbits(bits, count=math.prod(shape)).astype(bool)).view(*shape)


def unpack_on_device(bits: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """`unpack` for bits that are a uint8 tensor: nothing leaves their device."""
    import torch

    places = torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)
    spread = bits[:, None].bitwise_right_shift(places).bitwise_and_(1)
    return spread.flatten()[: math.prod(shape)].view(*shape).bool()


def save_masks(path: str | Path, masks: Mapping[str, torch.Tensor]) -> None:
    """Write masks {weight name: bool tensor, True = kept} as packed bits, in a safetensors file."""
    with Path(path).open("wb") as file:
        MaskWriter(file, {name: tuple(mask.shape) for name, mask in masks.items()}).write(masks)


def load_masks(path: str | Path) -> dict[str, torch.Tensor]:
    """Read what `save_masks` wrote: {weight name: bool tensor, True = kept}."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        shapes = file.metadata() or {}
        return {name: unpack(file.get_tensor(name), json.loads(shapes[name])) for name in file.keys()}


class MaskWriter:
    """Writes masks one after the other: the header of a safetensors file needs their shapes only.

    Attributes:
        kept: how many weights the masks keep that were written so far.
        size: the number of weights of all masks.
    """

    def __init__(self, file: BinaryIO, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """shapes: {weight name: shape} of all masks that will come."""
        self.file, self.kept, self.size = file, 0, sum(math.prod(shape) for shape in shapes.values())
        self._offsets: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": {name: json.dumps(shapes[name]) for name in shapes}}
        end = 0
        for name, shape in shapes.items():
            start, end = end, end + -(-math.prod(shape) // 8)
            header[name] = {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
            self._offsets[name] = start
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._data = file.write(struct.pack("<Q", len(text)) + text)

    def write(self, masks: Mapping[str, torch.Tensor]) -> None:
        """Write masks {weight name: bool, True = kept}, in any order."""
        for name, mask in masks.items():
            self.file.seek(self._data + self._offsets[name])
            self.file.write(pack(mask).tobytes())
            self.kept += int(mask.count_nonzero())

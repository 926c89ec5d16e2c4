"""Masks as packed bits: eight weights a byte, True = kept. All that packs bits is here.

And safetensors files that are written a tensor at a time, which masks of a large model need first."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from pftools.errors import PftoolsError
from pftools.mapped import in_turn, release

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

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


class PackedMasks(MutableMapping[str, "torch.Tensor"]):
    """{weight name: bool tensor, True = kept}, held as one bit a weight and unpacked when asked for."""

    def __init__(self) -> None:
        self._packed: dict[str, tuple[np.ndarray, tuple[int, ...]]] = {}

    def __setitem__(self, name: str, mask: torch.Tensor) -> None:
        self._packed[name] = pack(mask), tuple(mask.shape)

    def __getitem__(self, name: str) -> torch.Tensor:
        return unpack(*self._packed[name])

    def __delitem__(self, name: str) -> None:
        del self._packed[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{weight name: shape}"""
        return {name: shape for name, (_, shape) in self._packed.items()}


def save_masks(path: str | Path, masks: Mapping[str, torch.Tensor]) -> None:
    """Write masks {weight name: bool tensor, True = kept} as packed bits, in a safetensors file."""
    if isinstance(masks, PackedMasks):
        shapes = masks.shapes()
    else:
        shapes = {name: tuple(mask.shape) for name, mask in masks.items()}
    with Path(path).open("wb") as file:
        MaskWriter(file, shapes).write(masks)


def read_masks(path: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """What `save_masks` wrote, one after the other: (weight name, bool tensor, True = kept)."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        shapes = file.metadata() or {}
        for name in file.keys():
            yield name, unpack(file.get_tensor(name), json.loads(shapes[name]))


def load_masks(path: str | Path) -> dict[str, torch.Tensor]:
    """`read_masks`, all at once."""
    return dict(read_masks(path))


def apply_masks(
    model: nn.Module,
    masks: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    *,
    place: str = "the masks",
) -> None:
    """Set every weight to zero whose mask is False, in place.

    Args:
        masks: {weight name: bool tensor, True = kept}, or such pairs, one after the other.
        place: where they are from, for the message.

    Raises:
        PftoolsError: a mask has no weight of its name and shape.
    """
    import torch

    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, mask in masks.items() if isinstance(masks, Mapping) else masks:
            weight = fitting(parameters, name, mask.shape, place)
            weight.masked_fill_(~mask.to(weight.device), 0)
            release(weight)


def fitting(parameters: Mapping[str, torch.Tensor], name: str, shape: torch.Size, place: str) -> torch.Tensor:
    """The weight of that name.

    Args:
        parameters: {name: weight} of a model.
        place: what holds something of that name and shape, for the message.

    Raises:
        PftoolsError: the model has none, or one of another shape.
    """
    weight = parameters.get(name)
    if weight is None or weight.shape != shape:
        found = "has no such weight" if weight is None else f"has {tuple(weight.shape)} there"
        raise PftoolsError(
            f"{place} does not fit the model: it holds {name} of shape {tuple(shape)}, and the model {found}."
        )
    return weight


class TensorWriter:
    """Writes tensors into a safetensors file one after the other: its header needs their shapes only."""

    def __init__(
        self,
        file: BinaryIO,
        tensors: Mapping[str, tuple[str, tuple[int, ...], int]],
        metadata: Mapping[str, str],
    ) -> None:
        """tensors: {name: (safetensors' name of the dtype, shape, bytes)} of all that will come."""
        self.file = file
        self._offsets: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        end = 0
        for name, (dtype, shape, size) in tensors.items():
            start, end = end, end + size
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
            self._offsets[name] = start
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._data = file.write(struct.pack("<Q", len(text)) + text)

    def put(self, name: str, content: bytes | memoryview) -> None:
        """Write one tensor's bytes in its place."""
        self.file.seek(self._data + self._offsets[name])
        self.file.write(content)


class MaskWriter(TensorWriter):
    """A `TensorWriter` of masks.

    Attributes:
        kept: how many weights the masks keep that were written so far.
        size: the number of weights of all masks.
    """

    def __init__(self, file: BinaryIO, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """shapes: {weight name: shape} of all masks that will come."""
        self.kept, self.size = 0, sum(math.prod(shape) for shape in shapes.values())
        packed = {name: -(-math.prod(shape) // 8) for name, shape in shapes.items()}
        tensors = {name: ("U8", (size,), size) for name, size in packed.items()}
        super().__init__(file, tensors, {name: json.dumps(shape) for name, shape in shapes.items()})

    def write(self, masks: Mapping[str, torch.Tensor]) -> None:
        """Write masks {weight name: bool, True = kept}, in any order."""
        for name, mask in masks.items():
            self.put(name, pack(mask).tobytes())
            self.kept += int(mask.count_nonzero())


def save_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors into a safetensors file, of which one at a time is in memory.

    safetensors' own `save_file` copies all of them first.
    """
    import torch
    from safetensors.torch import _TYPES  # its names of dtypes

    names = {dtype: name for name, dtype in _TYPES.items()}
    shapes = {
        name: (names[tensor.dtype], tuple(tensor.shape), tensor.nbytes) for name, tensor in tensors.items()
    }
    with Path(path).open("wb") as file:
        writer = TensorWriter(file, shapes, {"format": "pt"})
        for name, tensor in in_turn(tensors.items()):
            content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            writer.put(name, content.numpy().data)


def read_tensors(path: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a safetensors file on the CPU, one after the other, by name."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        for name in file.keys():
            yield name, file.get_tensor(name)

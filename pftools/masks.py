"""Masks as packed bits: eight weights a byte, True = kept."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch

MASKS = "masks.safetensors"  # the file of a run that holds the masks of all its weights


def pack(mask: torch.Tensor) -> np.ndarray:
    """A bool mask of any shape as uint8, eight weights a byte in row-major order, the first in the highest bit."""
    import numpy as np

    return np.packbits(mask.detach().cpu().numpy().reshape(-1))


def unpack(bits: np.ndarray, shape: tuple[int, ...] | list[int]) -> torch.Tensor:
    """The bool mask of this shape that `pack` wrote."""
    import numpy as np
    import torch

    return torch.from_numpy(np.unpackbits(bits, count=math.prod(shape)).astype(bool)).view(*shape)


def save_masks(path: str | Path, masks: dict[str, torch.Tensor]) -> None:
    """Write masks {weight name: bool tensor, True = kept} as packed bits."""
    from safetensors.numpy import save_file

    packed = {name: pack(mask) for name, mask in masks.items()}
    save_file(packed, path, metadata={name: json.dumps(list(mask.shape)) for name, mask in masks.items()})


def load_masks(path: str | Path) -> dict[str, torch.Tensor]:
    """Read what `save_masks` wrote: {weight name: bool tensor, True = kept}."""
    from safetensors import safe_open

    masks = {}
    with safe_open(path, framework="numpy") as file:
        shapes = file.metadata()
        for name in file.keys():
            shape = json.loads(shapes[name])
            masks[name] = unpack(file.get_tensor(name), shape)
    return masks

"""How fast this machine is with a model: a second's timing of its products of matrices.

Random numbers stand in for the weights, whose shapes the model's files tell, so that a model of any size is
timed in about a second. Attention, norms and the reading of files are left out: the figure is of the right
order, and the first run tells more.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING

from pftools.base_models import resolve_device, resolve_dtype
from pftools.model_files import Shapes, matrices

if TYPE_CHECKING:
    import torch

_TOKENS = 256
_SECONDS = 1.0


def seconds_a_token(shapes: Shapes, *, dtype: str = "auto", device: str = "auto") -> float:
    """Seconds of a forward pass, a token.

    Args:
        shapes: {weight: shape} of the whole model.
        dtype: as in every step.
        device: as in every step.
    """
    import torch

    device = resolve_device(device)
    kinds: Counter[tuple[int, ...]] = Counter(shape for shape in matrices(shapes).values() if len(shape) == 2)
    head = next((shape for name, shape in shapes.items() if name.endswith("embed_tokens.weight")), None)
    if head:
        kinds[head] += 1
    with torch.inference_mode():
        operands = {
            shape: (
                torch.randn(_TOKENS, shape[1], dtype=resolve_dtype(dtype, device), device=device),
                torch.randn(shape, dtype=resolve_dtype(dtype, device), device=device),
            )
            for shape in kinds
        }
        return sum(
            times * _seconds(*operands[shape], patience=_SECONDS / len(kinds)) / _TOKENS
            for shape, times in kinds.items()
        )


def _seconds(inputs: torch.Tensor, weight: torch.Tensor, *, patience: float) -> float:
    """Seconds of one product, the fastest of as many as fit into ``patience`` seconds."""
    best, end = float("inf"), time.perf_counter() + patience
    while best == float("inf") or time.perf_counter() < end:
        started = time.perf_counter()
        result = inputs @ weight.T
        result[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return best


def main() -> None:
    """Read {shapes, dtype, device} as JSON from standard input, and print the seconds a token.

    A process of its own, so that who asks does not load torch.
    """
    given = json.load(sys.stdin)
    shapes = {name: tuple(shape) for name, shape in given["shapes"].items()}
    print(seconds_a_token(shapes, dtype=given["dtype"], device=given["device"]))


if __name__ == "__main__":
    main()

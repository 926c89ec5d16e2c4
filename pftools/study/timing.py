"""How fast this machine is with a model: some seconds' timing of one of its layers, and of its head.

Random numbers stand in for the weights, so that only the model's settings have to be here, and one layer for
all of them, so that a model of any size is timed in seconds. The reading of files is left out, and layers
that differ count as the first one: the figure is of the right order, and the first run tells more.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pftools.errors import PftoolsError
from pftools.files import as_bytes
from pftools.pretrained.base_models import resolve_device, resolve_dtype

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_TOKENS = 256
_VOCABULARY = 8192  # of the head that is timed
_SECONDS = 1.5
_RANDOM = 2**20  # numbers of the weights, such as a router's, that are random


@dataclass(frozen=True)
class Speed:
    """How fast a machine is.

    Attributes:
        seconds_a_token: of a forward pass with its loss.
        busy: how many times as long as on a free processor the same work takes now, at least 1.
    """

    seconds_a_token: float
    busy: float = 1.0


def speed(config: dict[str, Any], *, dtype: str = "auto", device: str = "auto") -> Speed:
    """Time a model here.

    Args:
        config: the model's settings, as its config.json has them.
        dtype: as in every step.
        device: as in every step.

    Raises:
        PftoolsError: one layer takes more than a quarter of the memory.
    """
    import torch

    device = resolve_device(device)
    model, n_layers, share = _one_layer(config, resolve_dtype(dtype, device), device)
    tokens = torch.arange(_TOKENS, device=device)[None]
    began, worked = time.perf_counter(), time.thread_time()
    with torch.inference_mode():
        layer = _seconds(lambda: model.base_model(input_ids=tokens, use_cache=False)[0])
        whole = _seconds(lambda: model(input_ids=tokens, labels=tokens, use_cache=False).loss)
    # On a GPU the processor waits, which says nothing of how busy it is.
    waited = (time.perf_counter() - began) / (time.thread_time() - worked) if device == "cpu" else 1.0
    return Speed((n_layers * layer + max(0.0, whole - layer) / share) / _TOKENS, max(1.0, waited))


def _one_layer(config: dict[str, Any], dtype: torch.dtype, device: str) -> tuple[PreTrainedModel, int, float]:
    """(the model with one layer and a smaller vocabulary, its layers, the share of its vocabulary)"""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    given = {"model_type": "llama", **config}
    small = AutoConfig.for_model(given.pop("model_type"), **given)
    n_layers, vocabulary = small.num_hidden_layers, small.vocab_size
    small.num_hidden_layers, small.vocab_size = 1, min(vocabulary, _VOCABULARY)
    small.pad_token_id = None
    with suppress(AttributeError):  # where it is told from the number of layers
        small.layer_types = small.layer_types[:1]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(small, dtype=dtype)
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory / 4:
        raise PftoolsError(f"one layer takes {as_bytes(size)}")
    model = model.to_empty(device=device).eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.numel() < _RANDOM and tensor.is_floating_point():
                tensor.uniform_(-0.05, 0.05)  # no infinities, and no numbers that are slow for being tiny
            else:
                tensor.fill_(0.01)  # as fast to multiply with, and much faster to make; 0 of whole numbers
    return model, n_layers, small.vocab_size / vocabulary


def _seconds(forward: Callable[[], torch.Tensor]) -> float:
    """Seconds of a forward: the mean of as many as fit into some seconds, as the machine is used now."""
    forward().flatten()[0].item()  # prepares, and waits for the device
    number, started = 0, time.perf_counter()
    while not number or time.perf_counter() - started < _SECONDS:
        forward().flatten()[0].item()
        number += 1
    return (time.perf_counter() - started) / number


def main() -> None:
    """Read {config, dtype, device} as JSON from standard input, and print the speed as JSON.

    A process of its own, so that who asks does not load torch.
    """
    given = json.load(sys.stdin)
    print(json.dumps(asdict(speed(given["config"], dtype=given["dtype"], device=given["device"]))))


if __name__ == "__main__":
    main()

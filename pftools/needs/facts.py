"""What a model's files tell of its size: the numbers that memory follows from."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pftools import run_folder
from pftools.pretrained.model_files import (
    Shapes,
    count,
    llama_shapes,
    matrices,
    model_folder,
    module_name,
    read_config,
    weight_shapes,
)
from pftools.settings import SHAPE

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
_LAYER = re.compile(r"\.(\d+)\.")
_KEYS, _QUERIES = ("k_proj",), ("q_proj",)


@dataclass(frozen=True)
class Facts:
    """A model before it is loaded.

    Attributes:
        shapes: {weight: shape} of all weights.
        stored: bytes of a number on disk.
        config: what its config.json says; it may be empty.
        run_dtype: the number format of the run that the model is; empty where it is none.
        is_run: whether it is a run, whose deltas are replayed on its base.
        streams: whether its files are such that it can be streamed from them; so it is taken of those that
            are not here yet.
    """

    shapes: Shapes
    stored: int
    config: dict[str, Any]
    run_dtype: str = ""
    is_run: bool = False
    streams: bool = True

    @cached_property
    def total(self) -> int:
        """Numbers of the whole model."""
        return count(self.shapes)

    @cached_property
    def linear(self) -> int:
        """Numbers of the matrices that are pruned and counted."""
        return count(matrices(self.shapes))

    @cached_property
    def layers(self) -> int:
        """Decoder layers."""
        return len({_LAYER.search(name).group(1) for name in matrices(self.shapes)}) or 1  # type: ignore[union-attr]

    @cached_property
    def layer(self) -> Shapes:
        """{weight: shape} of the matrices of the largest decoder layer."""
        by_layer: dict[str, Shapes] = {}
        for name, shape in matrices(self.shapes).items():
            by_layer.setdefault(_LAYER.search(name).group(1), {})[name] = shape  # type: ignore[union-attr]
        return max(by_layer.values(), key=count, default={})

    @cached_property
    def outside(self) -> int:
        """Numbers outside of the matrices of the layers: embeddings, head, norms."""
        return self.total - self.linear

    @cached_property
    def embeddings(self) -> tuple[int, int]:
        """(vocabulary, width) of the embeddings."""
        shapes = [shape for name, shape in self.shapes.items() if len(shape) == 2 and name not in self.layer]
        by_name = [
            shape
            for name, shape in self.shapes.items()
            if re.search(r"(embed_tokens|wte|word_embeddings|embed_in)\.weight$", name)
        ]
        vocabulary, width = next(iter(by_name or sorted(shapes, reverse=True)), (32_000, 4096))
        return vocabulary, width

    @property
    def vocabulary(self) -> int:
        return self.embeddings[0]

    @property
    def hidden(self) -> int:
        """The width of the hidden states."""
        return self.embeddings[1]

    @cached_property
    def widest(self) -> int:
        """The widest output or input of a matrix: the inner width of the MLP."""
        return max((max(shape[-2:]) for shape in self.layer.values()), default=4 * self.hidden)

    @cached_property
    def largest(self) -> int:
        """Numbers of the largest matrix of a layer."""
        return max((math.prod(shape[-2:]) for shape in self.layer.values()), default=self.hidden**2)

    @cached_property
    def queries(self) -> int:
        """The width of all queries of a token."""
        return self._rows_of(_QUERIES)

    @cached_property
    def keys(self) -> int:
        """The width of all keys of a token, and of all values."""
        return self._rows_of(_KEYS)

    def _rows_of(self, names: tuple[str, ...]) -> int:
        found = [shape[0] for name, shape in self.layer.items() if module_name(name) in names]
        return found[0] if found else self.hidden

    @cached_property
    def gated(self) -> bool:
        """Whether the MLP multiplies two of its inner activations."""
        return any("gate" in module_name(name) for name in self.layer)


def facts_of(model: str, shape: dict[str, int] | None = None) -> Facts | None:
    """The facts of a model by any name; None where no file of it is on this machine.

    Args:
        model: the embedded model, a hub id, a folder, or a run folder, planned or finished.
        shape: numbers of its config.json, for a model that is not here yet (see `settings.SHAPE`).
    """
    base, dtype, is_run = _base_of(model)
    folder, config = model_folder(base), read_config(base) or dict(shape or {})
    shapes = weight_shapes(folder) if folder else {}
    if not shapes:
        if not all(config.get(name) for name in SHAPE):
            return None
        shapes = llama_shapes(config)
    streams = folder is None or any(folder.glob("*.safetensors")) or not any(folder.glob("*.bin"))
    return Facts(shapes, _stored(config), config, dtype, is_run, streams)


def facts_of_shapes(config: dict[str, Any]) -> Facts:
    """The facts of a Llama with these settings, which need not exist."""
    return Facts(llama_shapes(config), _stored(config), config)


def _stored(config: dict[str, Any]) -> int:
    return _BYTES.get(str(config.get("dtype") or config.get("torch_dtype") or "float16"), 2)


def _base_of(model: str) -> tuple[str, str, bool]:
    """(base model, the run's number format or nothing, whether it is a run), through finished runs."""
    dtype, is_run = "", False
    while run_folder.is_finished(model):
        record = run_folder.read_record(model)
        dtype, is_run = dtype or str(record["results"].get("dtype", "")), True
        parent = str(record["parameters"]["model"])
        beside = Path(model).parent / Path(parent).name
        model = str(beside) if run_folder.is_finished(beside) else parent
    return model, dtype, is_run

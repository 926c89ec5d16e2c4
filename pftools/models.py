"""A model by any name: the embedded SmolLM2, a hub id, a folder, or a run, whose deltas are replayed on its base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pftools import checkpoints
from pftools.base_models import load_pretrained
from pftools.layers import measured_sparsity

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["load_for", "load_model", "measured_sparsity"]


def load_model(
    name: str | Path, *, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, ready for evaluation.

    Args:
        name: `smollm2-135m` (embedded), a Hugging Face hub id, a folder in Hugging Face format, or a run folder of
            pftools, whose masks and adapters are replayed on its base model.
        dtype: `auto`, `float32`, `bfloat16` or `float16` (or a torch dtype).
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.
        trust_remote_code: let a hub model run code of its own.

    Raises:
        PftoolsError: no such model, or it cannot be fetched.
    """
    name = str(name)
    if (Path(name) / "run.json").exists():
        return checkpoints.load(name, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    return load_pretrained(name, dtype=dtype, device=device, trust_remote_code=trust_remote_code)


def load_for(parameters: Any, *, model: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """`load_model` with what a step's parameters say of model, dtype, device and remote code.

    Args:
        model: another model than the step's own.
    """
    return load_model(
        model or parameters.model,
        dtype=parameters.dtype,
        device=parameters.device,
        trust_remote_code=parameters.trust_remote_code,
    )

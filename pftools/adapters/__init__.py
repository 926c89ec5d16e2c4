"""Adapters: what fine-tuning leaves beside a model, and how it becomes part of the weights.

folder  an adapter, read from the PEFT folder that it is kept in, and made fit for one
merge   the merge into plain weights: in float32, cast once, zeros kept where it is masked
"""

from pftools.adapters.folder import Adapter, add_masks, factors_of, load_adapter, mark_masked, set_base
from pftools.adapters.merge import (
    Kind,
    mask_digest,
    merge_adapter,
    resolve_merge,
    row_slices,
    updated_weight,
)

__all__ = [
    "Adapter",
    "Kind",
    "add_masks",
    "factors_of",
    "load_adapter",
    "mark_masked",
    "mask_digest",
    "merge_adapter",
    "resolve_merge",
    "row_slices",
    "set_base",
    "updated_weight",
]

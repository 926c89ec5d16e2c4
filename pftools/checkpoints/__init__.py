"""Checkpoints: a model is its base plus what the steps changed.

A prune step leaves packed masks (one bit a weight), a finetune step leaves its adapter, and only a method
that changes the kept weights (SparseGPT, reconstruction) leaves full weights. `load` replays these deltas on
the base, oldest first. Files are safetensors and JSON, never pickles; every file is checked against the
sha256 in its run's record.

    runs/prune-4f.../checkpoint.json      {"parent": "smollm2-135m", "kind": "masks"}
                     masks.safetensors    uint8, eight weights a byte, shapes in the header
    runs/finetune-a1.../checkpoint.json   {"parent": "../prune-4f...", "kind": "adapter", "merge": "masked"}
                        adapter/          a PEFT adapter folder

Where the parent is a folder that is no run, `checkpoint.json` also has "contents", its digest, and "near",
its path from the run.

deltas        what a step leaves, and the chain of steps behind a model
replay        `load`: the base with all deltas
exported      a plain Hugging Face folder, or an adapter that PEFT reads
card          the model card of what is exported
reload_check  before a run is sealed: would it load what was measured
"""

from pftools.checkpoints.deltas import lineage, parent_of, read_manifest, save_finetune, save_prune
from pftools.checkpoints.exported import export, export_adapter, push
from pftools.checkpoints.replay import load
from pftools.masks import apply_masks, load_masks

__all__ = [
    "apply_masks",
    "export",
    "export_adapter",
    "lineage",
    "load",
    "load_masks",
    "parent_of",
    "push",
    "read_manifest",
    "save_finetune",
    "save_prune",
]

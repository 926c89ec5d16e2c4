"""Prune a model that does not fit into memory: `prune_checkpoint` loads one layer at a time from safetensors
files.

At any time there are one decoder layer, the calibration tokens' hidden states and, at the beginning, the
embeddings.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch

from pftools.errors import PftoolsError
from pftools.files import refuse_full, replacing, write_json
from pftools.layers import linear_weights
from pftools.masks import MASKS, MaskWriter
from pftools.pretrained.base_models import resolve_device
from pftools.pretrained.on_disk import OnDisk
from pftools.prune.calls import inference
from pftools.prune.request import Request, check_request
from pftools.prune.result import PruneResult
from pftools.prune.walk import prune_layers


def prune_checkpoint(
    name: str | Path,
    blocks: torch.Tensor,
    folder: str | Path,
    *,
    write: Literal["model", "masks"] = "model",
    method: str = "wanda",
    sparsity: float = 0.5,
    pattern: str = "unstructured",
    batch_size: int | None = None,
    inputs: str = "pruned",
    allocation: str = "uniform",
    owl_lambda: float = 0.08,
    owl_m: float = 5.0,
    reconstruct_steps: int = 0,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: bool = True,
) -> PruneResult:
    """`prune_model` for a model on disk, which is never held whole; the same masks come out.

    Args:
        name: a folder in Hugging Face format with safetensors, or a hub id.
        blocks: LongTensor (n_blocks, block_length), the calibration tokens.
        folder: where the result goes; new or empty. It appears there only when all is done:
            `masks.safetensors` (packed bits, for `checkpoints.load_masks`), `layers.parquet` (the table) and
            `pftools.json`.
        write: `model`: also the pruned model, as a plain Hugging Face folder with a shard a layer; `masks`:
            no more.
        dtype: `auto` is the dtype on disk.
        device: where layers are computed.

    The other arguments are those of `prune_model`.

    Returns:
        the table and the seconds; masks are in the folder only.

    Raises:
        PftoolsError: as `prune_model`; or the folder is not empty, or the checkpoint is not whole.
    """
    started = time.perf_counter()
    source = OnDisk(name, dtype, resolve_device(device), trust_remote_code)
    folder = Path(folder)
    refuse_full(folder)
    request = check_request(
        source.model,
        blocks,
        method=method,
        sparsity=sparsity,
        pattern=pattern,
        inputs=inputs,
        batch_size=batch_size,
        allocation=allocation,
        owl_lambda=owl_lambda,
        owl_m=owl_m,
        reconstruct_steps=reconstruct_steps,
        progress=progress,
    )
    if request.changes_weights and write == "masks":
        raise PftoolsError(
            f"{method!r} with reconstruct_steps={reconstruct_steps} changes the kept weights, and masks do "
            "not hold them: write='model'."
        )
    with replacing(folder) as partial:
        partial.mkdir()
        table, measured = _prune_into(partial, source, blocks, request, write_model=write == "model")
        facts = {"pruned_from": str(name), "method": method, "pattern": pattern, "asked": sparsity}
        write_json(partial / "pftools.json", facts | {"sparsity": measured})
    return PruneResult({}, table, time.perf_counter() - started)


def _prune_into(
    folder: Path, source: OnDisk, blocks: torch.Tensor, request: Request, *, write_model: bool
) -> tuple[pd.DataFrame, float]:
    """Write masks, table and, if asked for, the model; returns the table and the sparsity."""
    shapes = {key: tuple(weight.shape) for key, weight in linear_weights(source.model).items()}
    rows: list[dict[str, Any]] = []
    with inference(source.model), (folder / MASKS).open("wb") as file:
        masks = MaskWriter(file, shapes)
        for done in prune_layers(source, blocks, request, None):
            masks.write(done.masks)
            rows += done.rows
            if write_model:
                source.write_layer(folder, done.index)
    if write_model:
        source.write_rest(folder)
    table = pd.DataFrame(rows)
    table.to_parquet(folder / "layers.parquet")
    return table, 1 - masks.kept / masks.size

"""What pruning and fine-tuning did to the weights, layer by layer: the study's weight analysis.

Three tables: statistics of the linear weights, statistics of an adapter's two matrices, and the difference between a
model and the one that it was made from. All are computed in float32, a matrix at a time.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from pftools.errors import PftoolsError
from pftools.models import linear_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LAYER = re.compile(r"\.(\d+)\.")
# Two-sided 95% of a normal distribution; the study counts the weights outside mean +- 1.96 standard errors.
_Z95 = 1.96


def weight_statistics(model: PreTrainedModel) -> pd.DataFrame:
    """A row for every linear weight: layer, module, group, size, sparsity, mean, std, minimum, maximum, norm and
    outside_share (the share outside mean +- 1.96 standard errors, as the study counts it)."""
    rows = []
    for name, module in linear_modules(model).items():
        weight = module.weight.detach().float()
        rows.append({**_place(name), "sparsity": float((weight == 0).float().mean()), **_moments(weight)})
    return pd.DataFrame(rows)


def adapter_statistics(folder: str | Path) -> pd.DataFrame:
    """A row for each of an adapter's matrices: layer, module, matrix (A or B), mean, std, minimum, maximum, norm,
    outside_share.

    Args:
        folder: a PEFT adapter folder, such as `adapter/` in the run of a finetune step.

    Raises:
        PftoolsError: there is no adapter.
    """
    from safetensors import safe_open

    path = Path(folder) / "adapter_model.safetensors"
    if not path.exists():
        raise PftoolsError(f"there is no adapter in {folder}: give the adapter folder of a finished finetune run.")
    rows = []
    with safe_open(path, framework="pt") as file:
        for name in file.keys():
            module, found, matrix = re.sub(r"(lora|hira)_([AB])", r"\2", name).rpartition(".A")
            if not found:
                module, found, matrix = re.sub(r"(lora|hira)_([AB])", r"\2", name).rpartition(".B")
            if found:
                rows.append({**_place(module), "matrix": found[-1], **_moments(file.get_tensor(name).float())})
    return pd.DataFrame(rows).sort_values(["layer", "module", "matrix"], ignore_index=True)


def weight_differences(model: PreTrainedModel, parent: PreTrainedModel, *, top_percent: float = 1.0) -> pd.DataFrame:
    """A row for every linear weight: how far ``model`` is from ``parent``.

    Returns:
        Columns layer, module, group, mean_difference (mean absolute difference over all weights), top_difference
        (over the ``top_percent`` per cent largest), relative (norm of the difference / norm of the parent), zeroed
        (share of weights that became zero) and filled (share of weights that were zero and no longer are).

    Raises:
        PftoolsError: the two models do not have the same linear weights.
    """
    ours, theirs = linear_modules(model), linear_modules(parent)
    if {name: module.weight.shape for name, module in ours.items()} != {
        name: module.weight.shape for name, module in theirs.items()
    }:
        raise PftoolsError("the two models cannot be compared: their linear weights differ in name or shape.")
    rows = []
    for name in ours:
        new, old = ours[name].weight.detach().float(), theirs[name].weight.detach().float()
        difference = (new - old).abs()
        largest = difference.flatten().topk(max(1, math.ceil(difference.numel() * top_percent / 100))).values
        rows.append(
            {
                **_place(name),
                "mean_difference": float(difference.mean()),
                "top_difference": float(largest.mean()),
                "relative": float(difference.norm() / old.norm().clamp_min(1e-30)),
                "zeroed": float(((new == 0) & (old != 0)).float().mean()),
                "filled": float(((new != 0) & (old == 0)).float().mean()),
            }
        )
    return pd.DataFrame(rows)


def _place(name: str) -> dict[str, Any]:
    module = name.rpartition(".")[2]
    group = "attention" if re.search(r"attn|attention", name) else "MLP"
    found = _LAYER.search(name)
    return {"layer": int(found.group(1)) if found else -1, "module": module, "group": group}


def _moments(weight: torch.Tensor) -> dict[str, float]:
    mean, std = float(weight.mean()), float(weight.std())
    margin = _Z95 * std / math.sqrt(weight.numel())
    return {
        "mean": mean,
        "std": std,
        "minimum": float(weight.min()),
        "maximum": float(weight.max()),
        "norm": float(weight.norm()),
        "outside_share": float(((weight - mean).abs() > margin).float().mean()),
        "size": weight.numel(),
    }

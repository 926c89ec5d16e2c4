"""What pruning and fine-tuning did to the weights, layer by layer: the study's weight analysis.

Tables: statistics of the linear weights, statistics of an adapter's two matrices and its effective ranks, and
the difference between a model and the one that it was made from, or its base. All are computed in float32, a
matrix at a time.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import torch

from pftools.adapters import load_adapter
from pftools.errors import PftoolsError
from pftools.layers import linear_modules
from pftools.mapped import in_turn, release

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LAYER = re.compile(r"\.(\d+)\.")
_FACTOR = re.compile(r"(.+)\.(?:lora|hira)_([AB])(?:\.weight)?$")
# A safetensors file is sorted by name; a reader knows the modules in this order.
_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Two-sided 95% of a normal distribution; the study counts the weights outside mean +- 1.96 standard errors.
_Z95 = 1.96


def weight_statistics(model: PreTrainedModel) -> pd.DataFrame:
    """A row for every linear weight.

    Returns:
        Columns layer, module, group (attention or MLP), size, sparsity, mean, std, minimum, maximum, norm;
        kurtosis (3 is normal; larger: a few weights far out);
        outside_share, the share outside mean +- 1.96 standard errors, as the study counts it; and
        outside_share_normal, what that share is of normal numbers.
    """
    rows = []
    for name, stored in in_turn((name, module.weight) for name, module in linear_modules(model).items()):
        weight = stored.detach().float()
        rows.append({**_place(name), "sparsity": float((weight == 0).float().mean()), **_moments(weight)})
    return pd.DataFrame(rows)


def adapter_statistics(folder: str | Path) -> pd.DataFrame:
    """A row for each of an adapter's matrices: layer, module, matrix (A or B), and the columns of
    `weight_statistics` from mean on.

    Args:
        folder: a PEFT adapter folder, such as `adapter/` in the run of a finetune step.

    Raises:
        PftoolsError: there is no adapter.
    """
    from safetensors import safe_open

    path = Path(folder) / "adapter_model.safetensors"
    if not path.exists():
        raise PftoolsError(
            f"there is no adapter in {folder}: give the adapter folder of a finished finetune run."
        )
    rows = []
    with safe_open(path, framework="pt") as file:
        for name in file.keys():
            if found := _FACTOR.match(name):
                module, matrix = found.groups()
                rows.append({**_place(module), "matrix": matrix, **_moments(file.get_tensor(name).float())})
    table = pd.DataFrame(rows)
    by_model = table["module"].map({name: place for place, name in enumerate(_ORDER)}).fillna(len(_ORDER))
    return (
        table.assign(place=by_model)
        .sort_values(["layer", "place", "module", "matrix"], ignore_index=True)
        .drop(columns="place")
    )


def effective_ranks(folder: str | Path) -> pd.DataFrame:
    """How many directions an adapter's update takes: a row an adapted weight.

    Args:
        folder: a PEFT adapter folder (LoRA, masked LoRA or HiRA).

    Returns:
        Columns layer, module, group, rank (of the adapter) and effective_rank (of its product BA, before a
        mask or, with HiRA, the weight multiplies it).

    Raises:
        PftoolsError: as of `adapters.load_adapter`.
    """
    rows = [
        {**_place(name), "rank": len(a), "effective_rank": effective_rank(a, b)}
        for name, (a, b) in load_adapter(folder).factors.items()
    ]
    return pd.DataFrame(rows)


def effective_rank(a: torch.Tensor, b: torch.Tensor) -> float:
    """exp of the entropy of BA's squared singular values, as shares of their sum; 0 where BA is 0.

    It lies between 1 and the rank: the number of directions among which the update's squared norm is shared
    (Roy and Vetterli 2007 define it so, with singular values that are not squared). BA itself is never
    formed: with B = Q R and A^T = Q' R', its singular values are those of R R'^T.

    Args:
        a: (rank, columns). b: (rows, rank).
    """
    right, left = (torch.linalg.qr(factor.double(), mode="r").R for factor in (a.T, b))
    squares = torch.linalg.svdvals(left @ right.T).square()
    total = squares.sum()
    return float(torch.special.entr(squares / total).sum().exp()) if total > 0 else 0.0


def weight_differences(
    model: PreTrainedModel,
    parent: PreTrainedModel,
    *,
    top_percent: float = 1.0,
    by: Literal["module", "group"] = "module",
) -> pd.DataFrame:
    """How far ``model`` is from ``parent``: a row for every linear weight, or, by group, one for all
    attention weights of a layer together and one for its MLP weights.

    Returns:
        Columns layer, group and (by module) module, mean_difference (mean absolute difference over all
        weights of the row), top_difference (over the ``top_percent`` per cent largest of them), relative
        (norm of the difference / norm of the parent), zeroed (share of weights that became zero), filled
        (share of weights that were zero and no longer are), on_zeros (the share of the squared change that
        is on weights that were zero) and size.

    Raises:
        PftoolsError: the two models do not have the same linear weights.
    """
    ours, theirs = linear_modules(model), linear_modules(parent)
    if {name: module.weight.shape for name, module in ours.items()} != {
        name: module.weight.shape for name, module in theirs.items()
    }:
        raise PftoolsError("the two models cannot be compared: their linear weights differ in name or shape.")
    members: dict[tuple[Any, ...], list[str]] = {}
    for name in ours:
        place = _place(name)
        members.setdefault(
            tuple(place.items())
            if by == "module"
            else (("layer", place["layer"]), ("group", place["group"])),
            [],
        ).append(name)
    return pd.DataFrame(
        [{**dict(place), **_difference(ours, theirs, names, top_percent)} for place, names in members.items()]
    )


def _difference(
    ours: dict[str, Any], theirs: dict[str, Any], names: list[str], top_percent: float
) -> dict[str, float]:
    device = ours[names[0]].weight.device  # others of a streamed or spread model may be elsewhere
    new, old = (
        torch.cat([model[name].weight.detach().to(device).float().flatten() for name in names])
        for model in (ours, theirs)
    )
    for name in names:
        release(ours[name].weight)
        release(theirs[name].weight)
    difference = (new - old).abs()
    largest = difference.topk(max(1, math.ceil(difference.numel() * top_percent / 100))).values
    return {
        "mean_difference": float(difference.mean()),
        "top_difference": float(largest.mean()),
        "relative": float(difference.norm() / old.norm().clamp_min(1e-30)),
        "zeroed": float(((new == 0) & (old != 0)).float().mean()),
        "filled": float(((new != 0) & (old == 0)).float().mean()),
        "on_zeros": float(difference[old == 0].norm() ** 2 / (difference.norm() ** 2).clamp_min(1e-30)),
        "size": new.numel(),
    }


def _place(name: str) -> dict[str, Any]:
    module = name.rpartition(".")[2]
    group = "attention" if re.search(r"attn|attention", name) else "MLP"
    found = _LAYER.search(name)
    return {"layer": int(found.group(1)) if found else -1, "module": module, "group": group}


def _moments(weight: torch.Tensor) -> dict[str, float]:
    mean, std = float(weight.mean()), float(weight.std())
    margin = _Z95 * std / math.sqrt(weight.numel())
    # The margin shrinks with the size, so most of any large matrix is outside: this share of one whose
    # numbers are normal.
    normal = math.erfc(_Z95 / math.sqrt(2 * weight.numel()))
    return {
        "mean": mean,
        "std": std,
        "minimum": float(weight.min()),
        "maximum": float(weight.max()),
        "norm": float(weight.norm()),
        "outside_share": float(((weight - mean).abs() > margin).float().mean()),
        "outside_share_normal": normal,
        "kurtosis": float((((weight - mean) / max(std, 1e-30)) ** 4).mean()),
        "size": weight.numel(),
    }

"""What the orderings of a study did inside the weights: which were pruned, and what changed where.

Masks are read from the prune runs behind a model; everything else from the analyses, which a study runs where
it says `analyse: true`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pftools import run_folder
from pftools.compare import sparsity_words
from pftools.masks import MASKS
from pftools.report.lineage import runs_behind
from pftools.report.matrix import STYLE, square
from pftools.report.results import entry_table, final_states, ordering_names, plan_of

if TYPE_CHECKING:
    import altair as alt

_MOST_BYTES = 64 * 2**20  # of a mask that are read; of a larger one every second layer, or fewer
_LAYERS_OF = {
    "sparsity": (
        "Zeros, layer by layer",
        "Share of zeros in the linear weights of each decoder layer.",
        True,
    ),
    "std": (
        "Spread, layer by layer",
        "Standard deviation of the linear weights, averaged over modules.",
        False,
    ),
    "kurtosis": (
        "Tails, layer by layer",
        "Kurtosis, averaged over modules: 3 is normal; more: a few weights far out.",
        False,
    ),
    "relative": (
        "What the last step changed",
        "Norm of the difference from the model before, over that model's norm, averaged over modules.",
        False,
    ),
    "on_zeros": (
        "Change on zeros",
        "Share of the last step's squared change on weights that were zero: a dense merge fills them.",
        True,
    ),
}


def overlap_matrix(table: pd.DataFrame) -> str:
    """Do two orderings prune the same weights? The Jaccard index of every two sets of pruned weights.

    At the highest sparsity, for the first two seeds. Empty where fewer than two models have masks.
    """
    models = _pruned_models(table)
    if len(models) < 2:
        return ""
    bits = {label: _bits(folder / MASKS) for label, _, folder in models}
    asked = float(final_states(table)["asked"].max())
    chance = asked / (2 - asked)

    def cell(label: str, other: str, column: int) -> str:
        if label == other:
            return f'<td class="o-{column}"></td>'
        found = jaccard(bits[label], bits[other])
        says = f"{label} and {other}: of all weights that one of the two pruned, both pruned {found:.1%}."
        weight = 45 * max(0.0, (found - chance) / (1 - chance))
        style = f'style="--w:{weight:.0f}%" tabindex="0" title="{escape(says)}"'
        return f'<td class="better o-{column}" {style}>{found:.2f}</td>'

    where = sparsity_words([asked])[round(asked, 10)]
    labels = [(label, ordering) for label, ordering, _ in models]
    drawn = square(
        f"Pruned weights in common, at {where}",
        "Pruned weights in common",
        labels,
        cell,
        ordering_names(table),
    )
    key = (
        f"1 is the same weights; two masks drawn by chance would have {chance:.2f} in common. "
        "The index is |A and B| / |A or B| of the weights that A and B set to zero."
    )
    return f'{STYLE}{drawn}<p class="matrix-key">{key}</p>'


def jaccard(first: dict[str, tuple[np.ndarray, int]], second: dict[str, tuple[np.ndarray, int]]) -> float:
    """|A and B| / |A or B| of the weights that two masks prune.

    Args:
        first, second: {weight: (packed bits of what is kept, how many weights)}.
    """
    both = either = 0
    for name, (bits, size) in first.items():
        others, _ = second[name]
        both += size - int(np.bitwise_count(bits | others).sum())
        either += size - int(np.bitwise_count(bits & others).sum())
    return both / either if either else 1.0


def _pruned_models(table: pd.DataFrame) -> list[tuple[str, str, Path]]:
    """(label, ordering, the last prune run) of the models at the highest sparsity; of two seeds at most."""
    ends = final_states(table)
    top = ends[ends["asked"] == ends["asked"].max()]
    models, seeds = dict(zip(top["run"], top["model"])), dict(zip(top["run"], top["seed"]))
    found = []
    for _, entry in entry_table(top).iterrows():
        for run in entry["runs"][:2]:
            behind = [folder for folder in runs_behind(models[run]) if (folder / MASKS).exists()]
            if behind:
                several = len(entry["runs"]) > 1
                label = f"{entry['label']}, seed {seeds[run]}" if several else str(entry["label"])
                found.append((label, str(entry["ordering"]), behind[0]))
    return found


def _bits(path: Path) -> dict[str, tuple[np.ndarray, int]]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        shapes = {name: json.loads(shape) for name, shape in (file.metadata() or {}).items()}
        names = sorted(file.keys())
        step = max(1, math.ceil(path.stat().st_size / _MOST_BYTES))
        return {name: (file.get_tensor(name), math.prod(shapes[name])) for name in names[::step]}


def weight_charts(table: pd.DataFrame) -> list[alt.LayerChart]:
    """What the analyses found, a line an ordering over the layers; empty where the study has none."""
    from pftools import figures

    found = pd.DataFrame(list(_analysed(table)))
    if not len(found):
        return []
    charts = []
    for value, (title, subtitle, percent) in _LAYERS_OF.items():
        if value not in found or not found[value].notna().any() or not found[value].abs().max():
            continue
        rows = found.dropna(subset=[value])
        by_layer = rows.groupby(["ordering", "label", "layer"], sort=False)[value].mean().reset_index()
        means = by_layer.groupby("label", sort=False)[value].mean()
        described = "; ".join(f"{label} {mean:.3g}" for label, mean in means.items())
        chart = figures.orderings_by_layer(
            by_layer, value, title=title, subtitle=subtitle, orderings=ordering_names(table), percent=percent
        )
        charts.append(chart.properties(description=f"{title}. Mean over layers: {described}."))
    return charts


def _analysed(table: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """A row a weight of every analysed model at the highest sparsity, and of the dense one: one seed each."""
    ends = final_states(table)
    kept = ends[(ends["asked"] == ends["asked"].max()) | (ends["asked"] == 0)]
    models = dict(zip(kept["run"], kept["model"]))
    analyses = {
        step.parameters.model: step.folder
        for step in plan_of(table).steps.values()
        if step.parameters.step == "analyse" and run_folder.is_finished(step.folder)
    }
    for _, entry in entry_table(kept).iterrows():
        folder = analyses.get(models[entry["runs"][0]])
        if folder is None:
            continue
        weights = pd.read_parquet(folder / "weights.parquet")
        if (folder / "differences.parquet").exists():
            changes = pd.read_parquet(folder / "differences.parquet")
            new = [name for name in ("relative", "on_zeros") if name in changes]
            weights = weights.merge(changes[["layer", "module", *new]], on=["layer", "module"], how="left")
        for row in weights.to_dict("records"):
            yield {
                "ordering": entry["ordering"],
                "label": entry["label"],
                **{str(k): v for k, v in row.items()},
            }

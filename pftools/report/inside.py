"""What the orderings of a study did inside the weights: which were pruned, and what changed where.

Masks are read from the prune runs behind a model, adapters from its finetune runs; everything else from the
analyses, which a study runs where it says `analyse: true`.
"""

from __future__ import annotations

import json
import math
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from pftools import run_folder
from pftools.checkpoints.reload_check import ADAPTER
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
    "distance": (
        "Distance from the base",
        "Norm of the difference from the base model, over that model's norm, averaged over modules.",
        False,
    ),
    "on_zeros": (
        "Change on zeros",
        "Share of the last step's squared change on weights that were zero: a dense merge fills them.",
        True,
    ),
    "effective_rank": (
        "Effective rank of the last adapter",
        "Over how many directions its update is spread, averaged over modules; 1 is a single one.",
        False,
    ),
}


_ANALYSED = ("weights.parquet", "differences.parquet", "distance.parquet")


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
    """What is known of the weights, a line an ordering over the layers; empty where nothing is."""
    layers = layers_of(table)
    charts = [layer_chart(table, layers, value) for value in layer_values(layers)]
    return [chart for chart in charts if chart is not None]


def layer_values(layers: pd.DataFrame) -> list[str]:
    """The columns of `layers_of` that can be drawn, in the order of the report."""
    return [value for value in _LAYERS_OF if value in layers]


def layer_chart(table: pd.DataFrame, layers: pd.DataFrame, value: str) -> alt.LayerChart | None:
    """A column of `layers_of`, a line an ordering: means over modules and seeds. None: it is all zeros."""
    from pftools import figures

    title, subtitle, percent = _LAYERS_OF[value]
    rows = layers.dropna(subset=[value])
    if not rows[value].abs().max() > 0:
        return None
    by_layer = rows.groupby(["ordering", "label", "layer"], sort=False)[value].mean().reset_index()
    means = by_layer.groupby("label", sort=False)[value].mean()
    described = "; ".join(f"{label} {mean:.3g}" for label, mean in means.items())
    chart = figures.orderings_by_layer(
        by_layer, value, title=title, subtitle=subtitle, orderings=ordering_names(table), percent=percent
    )
    return chart.properties(description=f"{title}. Mean over layers: {described}.")


def layers_of(table: pd.DataFrame) -> pd.DataFrame:
    """What is known of the weights of every model at the highest sparsity, and of the dense one.

    Returns:
        A row a model, layer and module: ordering, label, seed, layer, module, and the means over that
        module's weights which charts are made of. Empty where there is neither analysis nor adapter.
    """
    ends = final_states(table)
    kept = ends[(ends["asked"] == ends["asked"].max()) | (ends["asked"] == 0)]
    models, seeds = dict(zip(kept["run"], kept["model"])), dict(zip(kept["run"], kept["seed"]))
    analyses = {
        step.parameters.model: step.folder
        for step in plan_of(table).steps.values()
        if step.parameters.step == "analyse" and run_folder.is_finished(step.folder)
    }
    found = [
        known.assign(ordering=entry["ordering"], label=entry["label"], seed=seeds[run])
        for _, entry in entry_table(kept).iterrows()
        for run in entry["runs"]
        for known in [_known_of(models[run], analyses.get(models[run]))]
    ]
    return pd.concat(found, ignore_index=True) if any(map(len, found)) else pd.DataFrame()


def _known_of(model: str, analysis: Path | None) -> pd.DataFrame:
    """Of one model, a row a layer and module: what its analysis and its last adapter tell."""
    files = [analysis / name for name in _ANALYSED] if analysis is not None else []
    parts = [_means(pd.read_parquet(file)) for file in files if file.exists()]
    adapter = next((path for run in runs_behind(model) if (path := run / ADAPTER).is_dir()), None)
    if adapter is not None:
        from pftools.weights import effective_ranks

        parts.append(_means(effective_ranks(adapter)))
    return pd.concat(parts, axis=1).reset_index() if parts else pd.DataFrame()


def _means(weights: pd.DataFrame) -> pd.DataFrame:
    """What is drawn, by layer and module: experts are many weights of one name."""
    drawn = [value for value in _LAYERS_OF if value in weights]
    return weights.groupby(["layer", "module"], sort=False)[drawn].mean()

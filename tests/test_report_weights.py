"""What a report says of the weights, on masks and analyses that are made up."""

import re
from html import unescape
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pftools import masks, report, weights
from pftools.report import inside, lineage
from tests.made_up import GAIN, SHAPES, fill_weights, seal_study


@pytest.fixture(scope="module")
def analysed(tmp_path_factory):
    """A study with masks in its prune runs and tables in its analyses: {run: masks}, and its results."""
    folder = tmp_path_factory.mktemp("analysed")
    file = seal_study(folder, orderings=["base", *GAIN], seeds=[0, 1], analyse=True)
    kept = {}
    for number, run in enumerate(sorted((folder / "runs").glob("prune-*"))):
        generator = torch.Generator().manual_seed(number)
        kept[run.name] = {
            name: torch.rand(shape, generator=generator) > 0.5 for name, shape in SHAPES.items()
        }
        masks.save_masks(run / masks.MASKS, kept[run.name])
    fill_weights(folder / "runs")
    return report.study_results(file, runs=folder / "runs"), kept


def by_hand(first, second):
    """Jaccard's index of two sets of pruned weights, weight by weight."""
    a, b = (
        {(name, *place) for name in m for place in (~m[name]).nonzero().tolist()} for m in (first, second)
    )
    return len(a & b) / len(a | b)


def test_the_overlap_of_masks_is_jaccards_index_over_orderings_and_seeds(analysed):
    table, kept = analysed
    html = report.overlap_matrix(table)
    labels = [(label, folder.name) for label, _, folder in inside._pruned_models(table)]
    assert len(labels) == 2 * len(GAIN) and all("seed" in label for label, _ in labels)
    said = unescape(" ".join(re.findall(r'title="([^"]*both pruned[^"]*)"', html)))
    for one, first in labels:
        for other, second in labels:
            if one != other:
                share = by_hand(kept[first], kept[second])
                assert (
                    f"{one} and {other}: of all weights that one of the two pruned, both pruned {share:.1%}."
                    in said
                )
    # Two orderings that begin with P share the run of their first step, and so its mask.
    assert "both pruned 100.0%" in said and "would have 0.33 in common" in html


def test_the_layers_of_analysed_models_are_drawn_an_ordering_a_line(analysed):
    table, _ = analysed
    charts = {inside_title(chart): chart.to_dict() for chart in report.weight_charts(table)}
    assert list(charts) == [
        "Zeros, layer by layer",
        "Spread, layer by layer",
        "Tails, layer by layer",
        "What the last step changed",
        "Distance from the base",
        "Change on zeros",
        "Effective rank of the last adapter",
    ]
    for chart in charts.values():
        assert "Mean over layers" in chart["description"]
    drawn = charts["Spread, layer by layer"]["datasets"].values()
    rows = [row for rows in drawn for row in rows if "place" not in row]  # but the names at the ends
    assert {row["label"] for row in rows} == {"base", *GAIN} and len(rows) == 2 * len(
        {row["label"] for row in rows}
    )


def test_the_effective_rank_of_an_ordering_is_that_of_its_last_adapter(analysed):
    table, _ = analysed
    layers = report.layers_of(table)
    tuned = layers[layers["ordering"].isin(["finetune_prune", "prune_finetune"])]
    assert set(tuned["seed"]) == {0, 1} and tuned["effective_rank"].between(1, 2).all()
    assert layers.loc[layers["ordering"].isin(["base", "prune"]), "effective_rank"].isna().all()
    models = dict(zip(zip(table["ordering"], table["seed"]), table["model"]))
    for (ordering, seed), rows in tuned.groupby(["ordering", "seed"]):
        (run, *_) = [run for run in lineage.runs_behind(models[ordering, seed]) if "finetune" in run.name]
        factors = load_file(run / "adapter" / "adapter_model.safetensors")
        for row in rows.itertuples():
            place = f"layers.{row.layer}."
            (a,) = [factors[name].double() for name in factors if place in name and "lora_A" in name]
            (b,) = [factors[name].double() for name in factors if place in name and "lora_B" in name]
            shares = torch.linalg.svdvals(b @ a)[:2] ** 2 / (b @ a).norm() ** 2
            assert row.effective_rank == pytest.approx(float(torch.exp(-(shares * shares.log()).sum())))


def inside_title(chart):
    return chart.to_dict()["title"]["text"]


def test_a_study_without_masks_and_analyses_says_nothing_of_weights(tmp_path):
    table = report.study_results(seal_study(tmp_path), runs=Path(tmp_path) / "runs")
    assert report.overlap_matrix(table) == "" and report.weight_charts(table) == []


def test_change_on_zeros_is_the_share_of_the_squared_change_where_nothing_was():
    class Layer:
        def __init__(self, values):
            self.weight = torch.tensor(values)

    old, new = Layer([[1.0, 0.0], [0.0, 2.0]]), Layer([[2.0, 2.0], [0.0, 2.0]])
    found = weights._difference({"w": new}, {"w": old}, ["w"], 100.0)
    assert found["on_zeros"] == pytest.approx(4 / 5) and found["filled"] == 0.25

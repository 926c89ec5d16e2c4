"""Every chart is drawn, and says what it should."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from pftools import figures
from pftools.figures import labels
from pftools.orderings import PUBLISHED, parse_ordering

LAYERS = pd.DataFrame(
    {"layer": [0, 0, 1, 1], "module": ["q_proj", "up_proj"] * 2, "value": [0.1, 0.2, 0.3, 0.4]}
)
LOSSES = pd.DataFrame(
    {
        "step": [1, 2, 3],
        "tokens": [512, 1024, 1536],
        "loss": [3.0, 2.8, 2.7],
        "learning_rate": [1e-4, 2e-4, 1e-4],
    }
)
RESULTS = pd.DataFrame(
    {
        "ordering": ["base", "prune", "prune_finetune"],
        "asked": [0.0, 0.5, 0.5],
        "measured": [0.0, 0.5, 0.42],
        "perplexity": [12.2, 23.6, 19.3],
        "facts": [0.9, 0.6, 0.6],
        "facts_low": [0.85, 0.53, 0.53],
        "facts_high": [0.95, 0.67, 0.67],
    }
)
PAIRS = pd.DataFrame(
    {
        "pair": ["a / b", "a / c"],
        "ratio": [1.05, 0.99],
        "low": [1.03, 0.97],
        "high": [1.07, 1.01],
        "verdict_kind": ["differs", "cannot be told apart"],
    }
)
PLAN = pd.DataFrame(
    {
        "key": ["prune-1", "evaluate-2"],
        "parent": ["", "prune-1"],
        "depth": [0, 1],
        "lane": [0, 0],
        "step": ["prune", "evaluate"],
        "label": ["wanda 50%", "evaluate"],
        "state": ["finished", "to do"],
    }
)
HISTOGRAM = pd.DataFrame({"low": [0.0, 0.5], "high": [0.5, 1.0], "kept": [0, 5], "pruned": [4, 1]})
MATRICES = pd.DataFrame(
    [
        {
            "layer": layer,
            "module": module,
            "matrix": matrix,
            "mean": 0.001,
            "std": 0.02 + layer,
            "minimum": -0.1,
            "maximum": 0.1,
            "outside_share": 0.97,
            "outside_share_normal": 0.98,
        }
        for layer in (0, 1)
        for module in ("q_proj", "v_proj")
        for matrix in ("A", "B")
    ]
)
PRUNED = LAYERS.assign(
    weight="w",
    asked=0.5,
    measured=[0.5, 0.5, 0.4, 0.6],
    output_error=0.1,
    error_is=["measured", "estimated"] * 2,
)
SCORES = pd.DataFrame({"task": ["facts"], "value": [0.6], "low": [0.5], "high": [0.7], "chance": [0.25]})

CHARTS = {
    "heat map": (
        lambda: figures.heat_map(LAYERS, "value", title="Heat"),
        ["Heat", "q_proj", "decoder layer"],
    ),
    "share": (lambda: figures.heat_map(LAYERS, "value", title="Share", percent=True), ["100%"]),
    "lines": (lambda: figures.lines_by_layer(LAYERS, "value", title="Lines", log=True), ["Lines", "up_proj"]),
    "histogram": (lambda: figures.score_histogram(HISTOGRAM, title="Scores"), ["Scores", "pruned", "kept"]),
    "adapter": (
        lambda: figures.adapter_matrices(MATRICES, title="Adapter"),
        ["Matrix A", "Matrix B", "q_proj", "share outside", "smallest, largest"],
    ),
    "output error": (
        lambda: figures.output_error(PRUNED),
        ["measured over all calibration tokens", "estimated", "relative error"],
    ),
    "zeros": (lambda: figures.sparsity_by_layer(PRUNED), ["Where the zeros are", "up_proj", "60%"]),
    "loss": (lambda: figures.loss_curve(LOSSES), ["Training loss", "training tokens"]),
    "learning rate": (lambda: figures.learning_rate_curve(LOSSES), ["Learning rate"]),
    "blocks": (
        lambda: figures.block_losses(pd.DataFrame({"block": [0, 1], "nll": [2.0, 3.0]}), title="Blocks"),
        ["Blocks"],
    ),
    "tasks": (lambda: figures.task_scores(SCORES), ["facts", "level of guessing"]),
    "metric": (
        lambda: figures.metric_chart(RESULTS, "perplexity", by="sparsity", title="Perplexity", log=True),
        ["prune_finetune", "measured sparsity", "50%"],
    ),
    "accuracy": (
        lambda: figures.metric_chart(
            RESULTS, "facts", by="sparsity", title="Facts", percent=True, chance=0.25
        ),
        ["Facts", "base"],
    ),
    "orderings": (
        lambda: figures.metric_chart(
            RESULTS, "facts", by="ordering", title="Facts", percent=True, chance=0.25
        ),
        ["prune_finetune", "60.0%"],
    ),
    "pairs": (lambda: figures.pair_ratios(PAIRS, title="Pairs"), ["a / b", "cannot be told apart"]),
    "sparsity": (lambda: figures.asked_and_measured(RESULTS), ["asked", "measured"]),
    "ordering": (lambda: figures.ordering_chart(parse_ordering("(P F)*3").steps(0.6)), ["step"]),
    "plan": (lambda: figures.plan_chart(PLAN), ["wanda 50%", "finished"]),
}


@pytest.mark.parametrize("name", CHARTS)
def test_every_chart_is_drawn_with_its_words(name):
    draw, words = CHARTS[name]
    svg = figures.as_svg(draw())
    for word in words:
        assert word in svg
    assert "NaN" not in svg and "http" not in svg.replace("http://www.w3.org", "")


BARE = re.compile(r'"(#[0-9a-fA-F]{3,8}|white|black)"')


@pytest.mark.parametrize("name", CHARTS)
def test_a_live_chart_follows_the_theme_of_its_place(name):
    """In JupyterLab's dark theme charts stood on white ground."""
    bundle, _ = CHARTS[name][0]()._repr_mimebundle_()
    live = {part: value for part, value in bundle[figures.LIVE].items() if part != "datasets"}
    assert live["config"]["background"].startswith("light-dark(white, ")
    assert not BARE.search(json.dumps(live)), "a colour that is the same on dark ground"
    assert "light-dark" not in bundle["image/svg+xml"]
    drawing = figures.drawn_on_both_grounds(bundle["image/svg+xml"])
    assert 'fill="light-dark(white, ' in drawing and f'fill="{figures.theme.INK}"' not in drawing


def contrast(one, other):
    """WCAG's ratio of two colours."""

    def light(colour):
        parts = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
        linear = np.where(parts <= 0.03928, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    lower, higher = sorted((light(one), light(other)))
    return (higher + 0.05) / (lower + 0.05)


def test_what_is_drawn_is_seen_on_dark_ground_too():
    ground = figures.DARK["white"]
    for name in (figures.theme.INK, figures.theme.SOFT):
        assert contrast(figures.DARK[name], ground) >= 4.5
    for colour, _ in figures.looks_of([*PUBLISHED, *map(str, range(6))]).values():
        assert contrast(figures.DARK[colour], ground) >= 3


@pytest.mark.parametrize("wished", [[5], [50, 50, 50], [0, 1, 2, 90], [99, 100, 98, 3], [40, 20, 60]])
def test_names_of_lines_are_a_line_of_text_apart_and_near_their_ends(wished):
    placed = labels.apart(wished, 100)
    assert np.diff(np.sort(placed)).min(initial=13) >= 13 - 1e-9 and placed.min() >= 0 and placed.max() <= 100
    order = np.argsort(wished, kind="stable")
    assert (np.argsort(placed, kind="stable") == order).all()
    if np.diff(np.sort(wished)).min(initial=13) >= 13:
        assert placed == pytest.approx(wished)


def test_a_name_that_marks_would_lie_on_is_in_the_key_instead():
    crossing = pd.DataFrame({"ordering": "prune", "measured": [0.03, 0.5], "perplexity": [12.3, 23.6]})
    free = crossing.assign(perplexity=[19.0, 23.6])
    for line, in_key in ((crossing, ["base"]), (free, None)):
        table = pd.concat([RESULTS[RESULTS["ordering"] == "base"], line])
        chart = figures.metric_chart(table, "perplexity", by="sparsity", title="", log=True).to_dict()
        drawn = {row["label"] for rows in chart["datasets"].values() for row in rows if "place" in row}
        assert drawn == {"base", "prune"} - set(in_key or [])
        keys = [
            layer["encoding"]["shape"]["legend"] for layer in chart["layer"] if "shape" in layer["encoding"]
        ]
        assert [key and key["values"] for key in keys] == [in_key]


def test_no_layer_is_named_twice():
    for n_layers, most in ((2, 2), (3, 3), (30, 15), (80, 16)):
        table = pd.DataFrame({"layer": range(n_layers), "module": "q_proj", "value": range(n_layers)})
        lines = figures.lines_by_layer(table, "value", title="Lines").to_dict()["layer"][0]
        named = lines["encoding"]["x"]["axis"]["values"]
        assert len(named) == most and named == sorted(set(named) & set(range(n_layers)))


def test_where_there_are_too_many_names_there_is_a_key():
    rows = [(layer, f"expert{n}", n + layer) for layer in (0, 1) for n in range(30)]
    table = pd.DataFrame(rows, columns=["layer", "module", "value"])
    few = table[table["module"].isin(["expert1", "expert2"])]
    for drawn, marks in ((table, ["legend"]), (few, [])):
        svg = figures.as_svg(figures.lines_by_layer(drawn, "value", title="Lines"))
        assert ("role-legend-symbol" in svg) == bool(marks) and "expert2" in svg


def test_a_logarithmic_axis_spans_the_values_not_whole_decades():
    svg = figures.as_svg(figures.metric_chart(RESULTS, "perplexity", by="sparsity", title="", log=True))
    labels = {float(text) for text in re.findall(r">(\d+(?:\.\d+)?)</text>", svg)}
    assert labels and min(labels) > 10 and max(labels) < 30


def test_every_published_ordering_has_a_colour_of_its_own():
    assert set(figures.ORDERING_COLOURS) == set(PUBLISHED)
    assert len(set(figures.ORDERING_COLOURS.values())) == len(PUBLISHED)
    custom = figures.colours_of(["base", "(P F)*2", "F P F"]).to_dict()["range"]
    assert len(set(custom)) == 3


def test_figures_are_saved_in_the_format_of_their_name(tmp_path):
    chart = figures.loss_curve(LOSSES)
    for ending, start in {"svg": b"<svg", "png": b"\x89PNG", "html": b"<!DOCTYPE html>"}.items():
        assert figures.save(chart, tmp_path / f"loss.{ending}").read_bytes().startswith(start)

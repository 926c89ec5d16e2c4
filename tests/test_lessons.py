"""The notebooks' lessons: cells that show the idea by hand, and assert that the library does the same."""

from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

from pftools import compare, evaluate, figures, layers, prune
from tests.tiny import tiny_blocks, tiny_llama

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def execute(notebook, /, *ids, **namespace):
    """The names that these cells of a notebook leave, each executed as it stands."""
    cells = {cell.id: cell for cell in nbformat.read(NOTEBOOKS / f"{notebook}.ipynb", 4).cells}
    for number in ids:
        exec(cells[number].source, namespace)
    return namespace


@pytest.fixture(scope="module")
def matrix():
    network = tiny_llama()
    name, module = list(layers.linear_modules(network).items())[0]
    return {
        "name": name,
        "module": module,
        "sample": prune.measure_activations(network, tiny_blocks()),
    }


def test_wanda_in_five_lines_is_the_librarys_and_a_slip_is_found(matrix, capsys):
    tools = {"torch": torch, "prune": prune}
    execute("02_prune", "02-33", **tools, **matrix)
    assert "The same mask" in capsys.readouterr().out
    other = type(matrix["sample"])({matrix["name"]: torch.rand(matrix["module"].weight.shape[1])}, 1, {})
    found = execute("02_prune", "02-33", **tools, **{**matrix, "sample": other})
    norms = matrix["sample"].norms[matrix["name"]]
    assert not torch.equal(found["by_hand"], prune.mask_of(matrix["module"].weight, norms))


def test_the_slider_knows_every_step_from_stored_norms(matrix):
    weight, norms = matrix["module"].weight.detach(), matrix["sample"].norms[matrix["name"]]
    steps = prune.score_steps(weight, norms)
    assert sorted(set(steps["percent"])) == list(range(5, 100, 5))
    errors = steps.groupby("percent")["error"].first()
    assert errors.is_monotonic_increasing and 0 < errors[5] < errors[95] < 1
    # By hand: the norm of what is cut of W diag(norms), over the norm of the whole.
    signal = (weight.float() * norms) ** 2
    cut = signal.sort(dim=1).values[:, : int(weight.shape[1] * 0.5)].sum()
    assert errors[50] == pytest.approx(float((cut / signal.sum()).sqrt()), rel=1e-5)
    counted = steps[steps["percent"] == 50][["kept", "pruned"]].sum()
    assert counted["pruned"] == pytest.approx(counted["kept"], rel=0.05)
    svg = figures.as_svg(figures.score_slider(steps, chosen=0.52))
    assert "Which scores go" in svg and f"{errors[50]:.1%}" in svg


def test_a_dense_product_fills_every_zero_and_a_masked_one_none():
    found = execute("03_finetune", "03-21", torch=torch, pd=pd)
    assert (found["w"] == 0).sum() == 8 and (found["dense"] == 0).sum() == 0
    assert torch.equal(found["masked"] == 0, found["w"] == 0)


class Letters:
    def decode(self, token):
        return str(token)


def test_a_perplexity_by_hand_is_the_librarys(capsys):
    network, blocks = tiny_llama(), tiny_blocks()
    result = evaluate.perplexity(network, blocks)
    losses = pd.DataFrame({"nll": result.block_nll.tolist()})
    names = {"torch": torch, "pd": pd, "network": network, "blocks": blocks, "tokenizer": Letters()}
    execute("04_evaluate", "04-21", **names, losses=losses)
    assert f"mean loss {losses['nll'][0]:.3f}" in capsys.readouterr().out
    with pytest.raises(AssertionError):
        execute("04_evaluate", "04-21", **names, losses=losses + 0.1)


def test_two_like_models_are_not_told_apart_until_a_difference_is_added():
    found = execute("06_compare_orderings", "06-41", "06-43", np=np, pd=pd, compare=compare, figures=figures)
    table = found["table"]
    assert table["ratio"].is_monotonic_increasing
    assert table["verdict_kind"].tolist()[::4] == ["cannot be told apart", "differs"]


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("0*.ipynb")), ids=lambda path: path.stem)
def test_every_notebook_ends_with_something_to_try_and_has_no_formula_that_needs_a_script(path):
    cells = nbformat.read(path, 4).cells
    assert cells[-1].cell_type == "markdown" and cells[-1].source.partition("**To try:**")[2].count("?") == 2
    assert not any("$" in cell.source for cell in cells if cell.cell_type == "markdown")

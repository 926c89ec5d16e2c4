"""Stepping through the notebooks by hand: cells executed again, in other orders, with other parameters.

Whatever is executed again, a sealed run stays as it was, and what cannot be right is refused in one sentence.
"""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import start_new_kernel

from pftools import models, run_folder, settings
from tests.tiny import save_tiny

ROOT = Path(__file__).parent.parent
TINY = {"dtype": "float32", "block_length": 32}
STEPS = {
    "01_calibrate": {**TINY, "n_blocks": 4},
    "02_prune": {**TINY, "n_blocks": 4, "held_out_blocks": 2, "sparsity": 0.6},
    "03_finetune": {**TINY, "steps": 2, "blocks_per_step": 2, "held_out_blocks": 2},
    "04_evaluate": {**TINY, "n_blocks": 2, "tasks": ["facts"], "limit": 2},
    "05_analyse_weights": {"dtype": "float32"},
}


def given(name, folder):
    """The parameters of a step on a tiny model."""
    return {**STEPS[name], "model": str(save_tiny(folder / "tiny")), "runs": str(folder / "runs")}


class Hand:
    """A kernel, and the code cells of a notebook, to execute in any order."""

    def __init__(self, client, name):
        self.client, self.errors = client, []
        cells = [cell for cell in nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4).cells]
        self.cells = {cell.id: cell.source for cell in cells if cell.cell_type == "code"}
        first = next(cell.id for cell in cells if "parameters" in cell.metadata.get("tags", []))
        self.order = list(self.cells)[list(self.cells).index(first) :]  # without the one for Colab

    def execute(self, source):
        """The (name, message) of the error that a cell shows; None: none."""
        shown = []

        def listen(message):
            if message["msg_type"] == "error":
                shown.append((message["content"]["ename"], message["content"]["evalue"]))

        self.client.execute_interactive(source, output_hook=listen, timeout=120, allow_stdin=False)
        return shown[0] if shown else None

    def run(self, ids, **parameters):
        """Execute cells until one fails; parameters come in a cell of their own, as papermill's do."""
        for number in ids:
            error = self.execute(self.cells[number])
            if error is None and number == self.order[0] and parameters:
                words = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
                error = self.execute(f"# Parameters\n{words}\n")
            if error:
                return error
        return None


@contextmanager
def by_hand(name, folder):
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(folder), env=dict(os.environ))
    try:
        yield Hand(client, name)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def sealed(folder):
    """{run: its record} of all runs that are sealed and whole."""
    found = sorted((folder / "runs").glob("*/run.json"))
    for path in found:
        run_folder.verify(path.parent)
    return {path.parent.name: path.read_bytes() for path in found}


def is_one_sentence(error):
    name, message = error
    return name == "PftoolsError" and "\n" not in message and ":" in message and message.endswith(".")


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_executing_the_last_cells_again_leaves_the_sealed_run_as_it_was_or_is_refused(name, tmp_path):
    parameters = given(name, tmp_path)
    with by_hand(name, tmp_path) as hand:
        assert hand.run(hand.order, **parameters) is None
        before = sealed(tmp_path)
        assert len(before) == 1
        refused = {}
        for start in range(len(hand.order) - 1, -1, -1):
            error = hand.run(hand.order[start:], **parameters)
            assert error is None or is_one_sentence(error), (hand.order[start], error)
            assert sealed(tmp_path) == before, hand.order[start]
            refused[hand.order[start]] = error
        assert refused[hand.order[0]] is None and refused[hand.order[1]] is None  # from the top, all is well
    changing = {"02_prune": "02-08", "03_finetune": "03-07"}.get(name)
    if changing:
        assert "was changed since it was loaded" in refused[changing][1]


@pytest.mark.slow
def test_other_parameters_with_the_model_of_the_first_are_refused(tmp_path):
    """02 at 0.6, then at 0.3 without the model cell: the model in memory has 60% zeros already."""
    parameters = given("02_prune", tmp_path)
    with by_hand("02_prune", tmp_path) as hand:
        assert hand.run(hand.order, **parameters) is None
        before = sealed(tmp_path)
        assert hand.run(hand.order[:2], **{**parameters, "sparsity": 0.3}) is None
        error = hand.run(["02-08"])
        assert is_one_sentence(error) and "was made from parameters that were read before" in error[1]
        error = hand.run(["02-15"])  # the last cell alone would seal what was measured before
        assert is_one_sentence(error) and sealed(tmp_path) == before
        assert hand.run(hand.order[2:]) is None  # from the model cell on
        (other,) = set(sealed(tmp_path)) - set(before)
    record = run_folder.read_record(tmp_path / "runs" / other)
    assert record["results"]["asked"] == 0.3 and abs(record["results"]["measured"] - 0.3) < 0.02
    network, _ = models.load_model(tmp_path / "runs" / other, dtype="float32")
    assert models.measured_sparsity(network) == record["results"]["measured"]


@pytest.mark.slow
def test_parameters_that_were_executed_and_not_read_stop_the_cells_below(tmp_path):
    parameters = given("01_calibrate", tmp_path)
    with by_hand("01_calibrate", tmp_path) as hand:
        assert hand.run(hand.order[:3], **parameters) is None
        assert hand.run(hand.order[:1], **{**parameters, "seed": 5}) is None
        error = hand.run(hand.order[3:])
        assert is_one_sentence(error) and "was made from parameters that were read before" in error[1]
        assert not sealed(tmp_path)
        assert hand.execute("no_such_name")[0] == "NameError"  # other mistakes look as they always do


@pytest.mark.slow
def test_an_edited_cell_by_hand_makes_a_run_of_its_own(tmp_path):
    """The batch would take a run of the notebook's own name for one that the notebook has made."""
    parameters = given("01_calibrate", tmp_path)
    with by_hand("01_calibrate", tmp_path) as hand:
        edited = hand.cells["01-04"] + "\nblocks = blocks[:2]"
        own, hand.cells["01-04"] = hand.cells["01-04"], edited
        assert hand.run(hand.order, **parameters) is None
        (first,) = sealed(tmp_path)
        hand.cells["01-04"] = own
        assert hand.run(hand.order[:3], **parameters) is None
        assert hand.execute("print(blocks.shape)\nlen(blocks)") is None  # who only looks changes nothing
        assert hand.run(hand.order[3:]) is None
        (second,) = set(sealed(tmp_path)) - {first}
    assert run_folder.folder_of(settings.Calibrate(**parameters)).name == second
    assert "own_cells" in json.loads((tmp_path / "runs" / first / "run.json").read_text())
    counts = [
        run_folder.read_record(tmp_path / "runs" / name)["results"]["n_blocks"] for name in (first, second)
    ]
    assert counts == [2, 4]


def studied(folder):
    """A study with finished runs, as the parameters of 00 and 06."""
    from tests.made_up import seal_study

    return {"study": str(seal_study(folder)), "runs": str(folder / "runs")}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["00_plan_study", "06_compare_orderings"])
def test_executing_cells_again_that_only_read_runs_changes_none_and_shows_no_traceback(name, tmp_path):
    parameters = studied(tmp_path)
    before = sealed(tmp_path)
    with by_hand(name, ROOT) as hand:
        assert hand.run(hand.order, **parameters) is None
        for start in (len(hand.order) // 2, 2):
            assert hand.run(hand.order[start:]) is None, hand.order[start]
        assert hand.run(hand.order[:1], **parameters) is None  # executed, and not read
        for number in hand.order[2:]:
            error = hand.run([number])
            assert error is None or is_one_sentence(error), (number, error)
        assert hand.run(hand.order[:3], **parameters) is None
    assert sealed(tmp_path) == before

"""Every step on an imitated GPU gives what it gives on the CPU: see `run` beside this file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from pftools import criteria, layers, models, needs, run_folder, settings
from pftools.evaluate import evaluate_tasks, perplexity
from pftools.finetune import finetune_model, merge_adapter
from pftools.prune import prune_model
from tests.tiny import save_tiny, tiny_blocks

pytestmark = pytest.mark.skipif("PFTOOLS_IMITATED_GPU" not in os.environ, reason="tests/gpu/run runs them")
# Wide enough for its matrices to go to the file of a streamed model; keys and values are not.
WIDE = {"hidden_size": 256, "intermediate_size": 512}
PLACES = [("one", 0), ("stream", 0), ("stream", 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("gpu") / "wide", **WIDE)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PFTOOLS_CACHE", str(tmp_path / "cache"))


def both(folder, placement="one", resident=0):
    """The model on the GPU, and on the CPU."""
    on_gpu, _ = models.load_model(
        folder, dtype="float32", device="cuda", placement=placement, resident=resident
    )
    return on_gpu, models.load_model(folder, dtype="float32", device="cpu")[0]


def test_tensors_of_two_devices_are_refused():
    weight = torch.ones(3, 3, device="cuda", requires_grad=True)
    (weight @ weight).sum().backward()
    assert weight.grad.device.type == "cuda" and weight.grad.tolist() == 3 * [[6.0] * 3]
    with pytest.raises(RuntimeError, match="two devices, cuda:0 and cpu"):
        weight @ torch.ones(3, 3)
    with pytest.raises(TypeError, match="cuda:0 device type tensor to numpy"):
        weight.detach().numpy()


@pytest.mark.parametrize(("placement", "resident"), PLACES)
@pytest.mark.parametrize(
    "words",
    [
        *({"method": method} for method in criteria.METHODS),
        {"pattern": "2:4"},
        {"inputs": "dense"},
        {"allocation": "owl"},
        {"reconstruct_steps": 2},
    ],
    ids=str,
)
def test_pruning_gives_the_masks_of_the_cpu(folder, words, placement, resident):
    on_gpu, on_cpu = both(folder, placement, resident)
    one, other = (prune_model(model, tiny_blocks(), progress=False, **words) for model in (on_gpu, on_cpu))
    assert len(one.masks) == 14
    # Where weights are mended one after the other, what is rounded in one column decides about others.
    updates = criteria.METHODS[words.get("method", "wanda")].update or "reconstruct_steps" in words
    for name, mask in one.masks.items():
        assert (mask != other.masks[name]).float().mean() <= (0.05 if updates else 0)
    assert models.measured_sparsity(on_gpu) == models.measured_sparsity(on_cpu)


@pytest.mark.parametrize(("placement", "resident"), PLACES)
def test_reading_gives_the_losses_and_answers_of_the_cpu(folder, placement, resident):
    found = []
    for model in both(folder, placement, resident):
        tokenizer = models.load_model(folder, device="cpu")[1]
        text = perplexity(model, tiny_blocks(), progress=False)
        tasks = evaluate_tasks(model, tokenizer, ["facts"], limit=6, num_fewshot=2, progress=False)
        found.append((text.block_nll, tasks.samples["correct"].tolist()))
    (losses, answers), (wanted, expected) = found
    assert losses == pytest.approx(wanted, rel=1e-5) and answers == expected


@pytest.mark.parametrize("base", ["plain", "nf4", "8bit"])
@pytest.mark.parametrize("placement", ["one", "stream"])
@pytest.mark.parametrize("words", [{}, {"gradient_checkpointing": True}, {"adapter": "hira"}], ids=str)
def test_training_gives_the_losses_of_the_cpu(folder, base, placement, words):
    if (base, placement) == ("plain", "stream"):
        pytest.skip("refused: a GPU would read a streamed base again for every gradient")
    found = []
    for model in both(folder, placement):
        prune_model(model, tiny_blocks(), progress=False)
        done = finetune_model(model, tiny_blocks(), steps=3, rank=2, base=base, progress=False, **words)
        merge_adapter(model, done.adapter)
        found.append(done.losses["loss"].tolist())
        assert models.measured_sparsity(model) == 0.5
    assert found[0] == pytest.approx(found[1], rel=1e-3)  # bitsandbytes rounds by other kernels


def test_an_evaluation_keeps_layers_on_the_gpu(folder):
    parameters = settings.Evaluate(model=str(folder), dtype="float32", placement="stream")
    assert needs.resolve(parameters) == ("stream", 2)
    model, _ = models.load_for(parameters)
    assert {weight.device.type for weight in layers.linear_weights(model).values()} == {"cuda"}


@pytest.mark.parametrize(("placement", "base"), [("stream", "nf4"), ("one", "plain")])
def test_a_study_runs_through_all_notebooks(tmp_path, folder, placement, base):
    words = {
        "name": "gpu",
        "model": str(folder),
        "orderings": ["prune_finetune"],
        "dtype": "float16",
        "placement": placement,
        "tokens": 128,
        "analyse": True,
        "calibrate": {"n_blocks": 4, "block_length": 32},
        "finetune": {"block_length": 32, "blocks_per_step": 2, "base": base},
        "evaluate": {"block_length": 32, "n_blocks": 4, "tasks": ["facts"], "limit": 4},
    }
    (tmp_path / "gpu.yaml").write_text(yaml.safe_dump(words))
    command = [sys.executable, "-c", "from pftools.cli import main; main()", "run", "gpu.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [run_folder.read_record(path.parent) for path in Path(tmp_path, "runs").glob("*/run.json")]
    assert len(records) == 5 and {record["machine"]["gpu"] for record in records} == {"an imitation"}

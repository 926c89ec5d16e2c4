"""A model that is streamed from a file is the same model: same masks, same training, same losses."""

import gc
import subprocess
import sys

import pytest
import torch
import yaml

from pftools import checkpoints, layers, loading, mapped, models, run_folder, settings, weights
from pftools.errors import PftoolsError
from pftools.evaluate import evaluate_tasks, perplexity
from pftools.finetune import finetune_model, merge_adapter
from pftools.prune import prune_model
from tests.tiny import save_tiny, tiny_blocks

# Wide enough for its matrices to go to the file.
WIDE = {"hidden_size": 256, "intermediate_size": 512}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PFTOOLS_CACHE", str(tmp_path / "cache"))
    return save_tiny(tmp_path / "wide", **WIDE)


def load(folder, placement):
    return loading.load_pretrained(str(folder), dtype="float32", device="cpu", placement=placement)


def both(folder):
    return load(folder, "one")[0], load(folder, "stream")[0]


def same(one, other):
    return layers.fingerprint(one) == layers.fingerprint(other)


def test_a_streamed_model_is_the_model_and_leaves_no_file(folder, tmp_path):
    plain, streamed = both(folder)
    assert {name for name, weight in streamed.named_parameters() if mapped.is_mapped(weight)} == {
        name for name, weight in plain.named_parameters() if weight.numel() >= 2**16
    }
    with torch.no_grad():
        assert torch.equal(plain(tiny_blocks()).logits, streamed(tiny_blocks()).logits)
    assert same(plain, streamed) and not list((tmp_path / "cache").rglob("*.*"))
    del streamed
    gc.collect()
    assert not len(mapped._files)


def test_a_head_that_is_tied_to_the_embeddings_is_one_weight_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("PFTOOLS_CACHE", str(tmp_path / "cache"))
    plain, streamed = both(save_tiny(tmp_path / "tied", tie_word_embeddings=True, **WIDE))
    assert streamed.lm_head.weight is streamed.model.embed_tokens.weight and same(plain, streamed)
    with torch.no_grad():
        assert torch.equal(plain(tiny_blocks()).logits, streamed(tiny_blocks()).logits)


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"pattern": "2:4"},
        {"method": "sparsegpt"},
        {"inputs": "dense"},
        {"reconstruct_steps": 2},
        {"allocation": "owl"},
    ],
    ids=str,
)
def test_pruning_a_streamed_model_gives_the_same_masks_and_weights(folder, request_):
    plain, streamed = both(folder)
    one, other = (
        prune_model(model, tiny_blocks(), progress=False, **request_) for model in (plain, streamed)
    )
    assert list(one.masks) == list(other.masks) and len(one.masks) == 14
    assert all(torch.equal(one.masks[name], other.masks[name]) for name in one.masks)
    assert list(one.weights) == list(other.weights)
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)
    assert same(plain, streamed)


@pytest.mark.parametrize("base", ["plain", "nf4", "8bit"])
def test_training_a_streamed_model_gives_the_same_adapter(folder, base):
    found = []
    for model in both(folder):
        prune_model(model, tiny_blocks(), progress=False)
        done = finetune_model(model, tiny_blocks(), steps=3, rank=2, base=base, progress=False)
        merge_adapter(model, done.adapter)
        found.append((model, done))
    (plain, one), (streamed, other) = found
    assert one.losses["loss"].tolist() == other.losses["loss"].tolist()
    assert same(plain, streamed) and models.measured_sparsity(streamed) == 0.5


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_run_is_replayed_evaluated_analysed_and_exported_streamed(folder, tmp_path, method):
    """What a chain of a prune and a finetune run gives, streamed and not."""
    prune = settings.Prune(
        model=str(folder), dtype="float32", placement="stream", runs=str(tmp_path / "runs"), method=method
    )
    run = run_folder.start(prune)
    network, _ = models.load_for(prune)
    result = prune_model(models.as_loaded(network), tiny_blocks(), method=method, progress=False)
    outputs = checkpoints.save_prune(run, result.masks, result.weights, model=network)
    pruned = run.seal(outputs, measured=models.measured_sparsity(network))
    tune = settings.Finetune(
        model=str(pruned), dtype="float32", placement="stream", runs=str(tmp_path / "runs")
    )
    run = run_folder.start(tune)
    network, _ = models.load_for(tune)
    done = finetune_model(network, tiny_blocks(), steps=2, base="nf4", output=run.path(""), progress=False)
    merge_adapter(network, done.adapter)
    tuned = run.seal(checkpoints.save_finetune(run, "masked", adapter=done.adapter, model=network))

    plain, tokenizer = models.load_model(tuned, dtype="float32", device="cpu")
    streamed, _ = models.load_model(tuned, dtype="float32", device="cpu", placement="stream")
    assert same(network, streamed) and same(plain, streamed) and models.measured_sparsity(streamed) == 0.5
    losses = [perplexity(model, tiny_blocks(), progress=False).block_nll for model in (plain, streamed)]
    assert torch.equal(*losses)
    answers = [
        evaluate_tasks(model, tokenizer, ["facts"], limit=4, progress=False) for model in (plain, streamed)
    ]
    assert answers[0].samples.equals(answers[1].samples)
    tables = [weights.weight_statistics(model) for model in (plain, streamed)]
    assert tables[0].equals(tables[1])
    exported = checkpoints.export(
        tuned, tmp_path / "exported", dtype="float32", device="cpu", placement="stream"
    )
    assert same(load(exported, "one")[0], plain) and len(list(exported.glob("*.safetensors"))) > 2


@pytest.mark.slow
def test_the_notebooks_give_the_same_numbers_wherever_the_weights_are(folder, tmp_path):
    """Every step but the calibration, through `pftools run`: all results of each are equal, bit for bit."""
    found = []
    for placement in ("one", "stream"):
        words = {
            "name": "placed",
            "model": str(folder),
            "dtype": "float32",
            "placement": placement,
            "orderings": ["prune_finetune"],
            "tokens": 128,
            "calibrate": {"n_blocks": 2, "block_length": 32},
            "finetune": {"block_length": 32, "blocks_per_step": 2, "base": "nf4"},
            "evaluate": {"block_length": 32, "n_blocks": 4, "tasks": ["facts"], "limit": 4},
            "analyse": True,
        }
        (tmp_path / "placed.yaml").write_text(yaml.safe_dump(words))
        command = [sys.executable, "-c", "from pftools.cli import main; main()", "run", "placed.yaml"]
        runs = tmp_path / placement
        done = subprocess.run(
            [*command, "--runs", str(runs), "--no-report"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        records = {path.parent.name: run_folder.read_record(path.parent) for path in runs.glob("*/run.json")}
        found.append({name: (record["results"], record["outputs"]) for name, record in records.items()})
    one, other = found
    assert len(one) == 5 and list(sorted(one)) == list(sorted(other))
    for name, (results, outputs) in one.items():
        timed = {"prune_seconds", "tokens_per_second"}
        for key in results.keys() - timed:
            assert results[key] == other[name][0][key] or key == "parent", (name, key)
        kept = [file for file in outputs if file.endswith(".safetensors") or "block_nll" in file]
        assert all(outputs[file] == other[name][1][file] for file in kept), name


def test_spreading_over_the_cpu_and_the_disk_gives_equal_logits(folder, monkeypatch):
    """Two devices that every machine has stand for two GPUs; accelerate moves what it needs."""
    plain, _ = load(folder, "one")
    whole, _ = load(folder, "spread")
    assert same(plain, whole)
    room = 4 * sum(weight.numel() for weight in plain.parameters()) // 2
    monkeypatch.setattr("transformers.integrations.accelerate.get_max_memory", lambda *_: {"cpu": room})
    spread, _ = load(folder, "spread")
    assert set(spread.hf_device_map.values()) == {"cpu", "disk"}
    with torch.no_grad():
        assert torch.equal(plain(tiny_blocks()).logits, spread(tiny_blocks()).logits)
    with pytest.raises(PftoolsError, match="a part of it went to cpu and disk: use placement='stream'"):
        checkpoints._refuse_offloaded(spread)


def test_a_disk_without_room_is_one_sentence(tmp_path):
    with pytest.raises(PftoolsError, match="of scratch in .*, and there is less room"):
        mapped.Scratch(2**60, tmp_path)


def test_masks_of_a_result_are_bits(folder):
    plain, _ = load(folder, "one")
    result = prune_model(plain, tiny_blocks(), progress=False)
    bits = sum(packed.nbytes for packed, _ in result.masks._packed.values())
    assert bits == sum(weight.numel() for weight in layers.linear_weights(plain).values()) // 8

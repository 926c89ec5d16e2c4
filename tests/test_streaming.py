"""A model that is streamed from a file is the same model: same masks, same training, same losses."""

import gc
import json
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
import yaml

from pftools import checkpoints, layers, mapped, models, needs, run_folder, settings, weights
from pftools.checkpoints import exported, replay
from pftools.errors import PftoolsError
from pftools.evaluate import evaluate_tasks, perplexity
from pftools.finetune import finetune_model, merge_adapter
from pftools.pretrained import loading, streamed
from pftools.prune import prune_model, source
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


def test_layers_that_stay_on_the_device_are_not_in_the_file(folder, tmp_path, monkeypatch):
    plain, _ = load(folder, "one")
    monkeypatch.setattr(needs, "resolve", lambda parameters: ("stream", 1))
    streamed, _ = models.load_for(settings.Evaluate(model=str(folder), dtype="float32", device="cpu"))
    in_file = {name for name, weight in streamed.named_parameters() if mapped.is_mapped(weight)}
    assert in_file == {
        name
        for name, weight in plain.named_parameters()
        if weight.numel() >= 2**16 and not name.startswith("model.layers.0.")
    }
    assert same(plain, streamed)
    with torch.no_grad():
        assert torch.equal(plain(tiny_blocks()).logits, streamed(tiny_blocks()).logits)


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


@pytest.fixture
def gpu(monkeypatch):
    """A GPU imitated: what a streamed layer is given "on the device" is a copy of what is in the file."""
    visits = []

    def begin(self, module, *_):
        if "forward" in vars(module):
            return
        with torch._C.DisableTorchFunction():
            for weight in module.parameters():
                if mapped.is_mapped(weight):
                    visits.append(weight)
                    self.homes.append((weight, weight.data))
                    weight.data = weight.data.clone()

    @contextmanager
    def layer(self, index):
        found = layers.decoder_layers(self.model)[1][index]
        homes = [(weight, weight.data) for weight in found.parameters()]
        for weight, home in homes:
            weight.data = home.clone() if mapped.is_mapped(home) else home
        yield found
        for weight, home in homes:
            if weight.data_ptr() != home.data_ptr():
                weight.data = home.copy_(weight.data)

    monkeypatch.setattr(streamed._Visit, "begin", begin)
    monkeypatch.setattr(source.InMemory, "layer", layer)
    return visits


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_layers_are_visited_on_a_gpu_and_come_back(folder, gpu, method):
    """The check before the walk opens a layer once, and recording calls visits none."""
    plain, other = both(folder)
    one = prune_model(plain, tiny_blocks(), method=method, batch_size=1, progress=False)
    two = prune_model(other, tiny_blocks(), method=method, batch_size=1, progress=False)
    assert all(torch.equal(one.masks[name], two.masks[name]) for name in one.masks) and same(plain, other)
    weights = layers.linear_weights(other).values()
    assert sum(map(mapped.is_mapped, weights)) == sum(weight.numel() >= 2**16 for weight in weights)
    assert all(
        mapped.is_mapped(two.weights[name]) for name in two.weights if two.weights[name].numel() >= 2**16
    )
    assert len(gpu) <= 2 * len(weights)  # whatever the number of batches


def test_a_head_that_is_stored_beside_other_embeddings_stays_apart(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    plain, other = both(folder)
    assert same(plain, other) and other.lm_head.weight is not other.model.embed_tokens.weight
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    plain, other = both(folder)
    assert same(plain, other) and other.lm_head.weight is other.model.embed_tokens.weight


def test_a_model_without_large_matrices_is_streamed_too(tmp_path, monkeypatch):
    monkeypatch.setenv("PFTOOLS_CACHE", str(tmp_path / "cache"))
    plain, other = both(save_tiny(tmp_path / "tiny"))
    assert same(plain, other)
    with pytest.raises(PftoolsError, match="unknown placement 'steam': did you mean 'stream'"):
        load(tmp_path / "tiny", "steam")


def test_files_that_hold_the_same_weights_are_not_copied_into_an_export(folder, tmp_path):
    (folder / "consolidated.00.pth").write_bytes(b"dense")
    (folder / "LICENSE").write_text("free")
    _, other = both(folder)
    exported._write_model(other, tmp_path / "written")
    assert (tmp_path / "written" / "LICENSE").exists()
    assert not (tmp_path / "written" / "consolidated.00.pth").exists()


def test_a_model_in_other_files_is_not_streamed_by_itself(tmp_path):
    folder = save_tiny(tmp_path / "tiny")
    assert needs.facts_of(str(folder)).streams
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    facts = needs.facts_of(str(folder))
    nowhere = needs.Machine(memory=1, total=1, gpus=(), disk=1, scratch=1)
    assert not facts.streams and needs.fitting(settings.Analyse(), facts, nowhere) == "one"


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
        replay._refuse_offloaded(spread)


def test_a_disk_without_room_is_one_sentence(tmp_path):
    with pytest.raises(PftoolsError, match="of scratch in .*, which cannot be had"):
        mapped.Scratch(2**60, tmp_path)


def test_masks_of_a_result_are_bits(folder):
    plain, _ = load(folder, "one")
    result = prune_model(plain, tiny_blocks(), progress=False)
    bits = sum(packed.nbytes for packed, _ in result.masks._packed.values())
    assert bits == sum(weight.numel() for weight in layers.linear_weights(plain).values()) // 8

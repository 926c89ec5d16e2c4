import json
import os
import subprocess
import sys
import time

import pytest
import torch

from pftools import checkpoints, contents, files, inputs, masks, models, run_folder, settings
from pftools.errors import PftoolsError
from pftools.finetune import finetune_model, merge_adapter
from pftools.prune import prune_model
from pftools.run_folder import attempt
from tests.tiny import save_tiny, tiny_blocks


@pytest.fixture
def sealed(tmp_path):
    """A finished prune run of a tiny model, made without a notebook."""
    parameters = settings.Prune(
        model=str(save_tiny(tmp_path / "tiny")), dtype="float32", runs=str(tmp_path / "runs")
    )
    run = run_folder.start(parameters)
    model, _ = models.load_for(parameters)
    result = prune_model(model, tiny_blocks(), progress=False)
    return run.seal(checkpoints.save_prune(run, result.masks), measured=0.5), model


def tuned(sealed):
    parameters = settings.Finetune(model=str(sealed[0]), dtype="float32", runs=str(sealed[0].parent))
    run = run_folder.start(parameters, inputs=inputs.visible)
    model, _ = models.load_for(parameters)
    finetune_model(model, tiny_blocks(), steps=2, output=run.path(""), progress=False)
    return run.seal(checkpoints.save_finetune(run, "masked"), measured=0.5)


def test_masks_are_one_bit_a_weight_and_come_back(tmp_path):
    kept = {"a": torch.rand(7, 9) > 0.5, "b": torch.rand(64, 64) > 0.5}
    masks.save_masks(tmp_path / "masks.safetensors", kept)
    again = checkpoints.load_masks(tmp_path / "masks.safetensors")
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    assert (tmp_path / "masks.safetensors").stat().st_size < 64 * 64 / 8 + 500


def test_a_chain_of_deltas_replays(sealed):
    folder, pruned = sealed
    replayed, _ = checkpoints.load(folder, dtype="float32")
    assert all(
        torch.equal(one, other)
        for one, other in zip(pruned.state_dict().values(), replayed.state_dict().values())
    )
    last = tuned(sealed)
    model, _ = models.load_model(last, dtype="float32")
    assert models.measured_sparsity(model) == 0.5
    base, chain = checkpoints.lineage(last)
    assert base.endswith("tiny") and [path.name for path in chain] == [folder.name, last.name]


def test_a_base_with_a_relative_path_is_found_from_anywhere(tmp_path, monkeypatch):
    save_tiny(tmp_path / "models" / "tiny")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    parameters = settings.Prune(model="../models/tiny", dtype="bfloat16", runs="runs")
    run = run_folder.start(parameters)
    model, _ = models.load_for(parameters)
    folder = run.seal(
        checkpoints.save_prune(run, prune_model(model, tiny_blocks(), progress=False).masks), dtype="bfloat16"
    ).resolve()
    monkeypatch.chdir(tmp_path)
    again, _ = checkpoints.load(folder)
    assert again.dtype == torch.bfloat16  # a run is loaded in the dtype that it was made in
    assert models.measured_sparsity(again) == pytest.approx(0.5)


def test_what_a_path_holds_counts_in_the_key_and_not_when_it_was_written(tmp_path, monkeypatch):
    model, corpus = save_tiny(tmp_path / "tiny"), tmp_path / "text.txt"
    corpus.write_text("some text")
    key = lambda: run_folder.run_key(settings.Finetune(model=str(model), corpus=str(corpus)))  # noqa: E731
    first = key()
    for path in (model / "model.safetensors", corpus):
        os.utime(path, (0, 0))
        (tmp_path / "tiny" / ".notes.json").write_text("not the model's")
        assert key() == first
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        os.utime(path, (1, 1))
        assert key() != first
        path.write_bytes(whole)
        os.utime(path, (2, 2))
        assert key() == first
    monkeypatch.setattr(contents, "_WHOLE", 1000)  # so that it is read in pieces
    monkeypatch.setattr(contents, "_PIECE", 100)
    contents._read.cache_clear()
    in_pieces = key()
    save_tiny(model, seed=1)
    assert len({first, in_pieces, key()}) == 3
    monkeypatch.chdir(tmp_path)
    embedded = run_folder.run_key(settings.Finetune())
    for name in ("smollm2-135m", "pydocs"):  # folders that have the name of what is embedded
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.txt").write_text("some text")
    assert run_folder.run_key(settings.Finetune()) == embedded


def test_a_run_is_not_replayed_on_a_base_that_was_changed(sealed, tmp_path):
    last = tuned(sealed)
    save_tiny(tmp_path / "tiny", seed=1)
    with pytest.raises(
        PftoolsError, match="was made from the model in .*tiny, which is gone or was changed since"
    ):
        checkpoints.load(last)


def test_runs_can_be_moved_together(sealed, tmp_path):
    last = tuned(sealed)
    moved = tmp_path / "elsewhere"
    last.parent.rename(moved)
    model, _ = checkpoints.load(moved / last.name, dtype="float32")
    assert models.measured_sparsity(model) == 0.5


def test_a_project_that_was_moved_whole_finds_its_base_model(sealed, tmp_path):
    last = tuned(sealed)
    moved = tmp_path.parent / f"{tmp_path.name}-moved"
    tmp_path.rename(moved)
    network, _ = checkpoints.load(moved / "runs" / last.name, dtype="float32")
    assert models.measured_sparsity(network) == 0.5


def test_a_run_is_not_replayed_on_a_parent_that_was_made_anew_from_something_else(sealed):
    last = tuned(sealed)
    parameters = settings.Prune(**run_folder.read_record(sealed[0])["parameters"])
    run_folder.remove(sealed[0])
    run = run_folder.start(parameters)
    network, _ = models.load_for(parameters)
    masks = prune_model(network, tiny_blocks(seed=5), progress=False).masks
    assert run.seal(checkpoints.save_prune(run, masks), measured=0.5) == sealed[0]
    with pytest.raises(PftoolsError, match="was made from other contents of .*prune-"):
        checkpoints.load(last, dtype="float32")


def test_every_damaged_file_is_detected_and_named(sealed):
    last = tuned(sealed)
    for folder in (sealed[0], last):
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            whole = path.read_bytes()
            for damaged in (whole[:-3], whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], None):
                path.unlink() if damaged is None else path.write_bytes(damaged)
                with pytest.raises(PftoolsError, match=f"{path.name}|not finished|no model|not there"):
                    checkpoints.load(last, dtype="float32")
                path.write_bytes(whole)
    checkpoints.load(last, dtype="float32")


def test_a_changed_number_in_the_record_breaks_its_seal(sealed):
    path = sealed[0] / "run.json"
    path.write_text(path.read_text().replace('"measured": 0.5', '"measured": 0.6'))
    with pytest.raises(PftoolsError, match="damaged"):
        run_folder.read_record(sealed[0])


def test_a_run_under_the_name_of_another_is_refused_and_never_removed(sealed, tmp_path, capsys):
    """A folder that was given another run's name stood for that run, with other numbers."""
    run = sealed[0]
    other = run.rename(run.with_name("prune-000000000000"))
    with pytest.raises(PftoolsError, match=f"by its record it is {run.name}; give it that name"):
        run_folder.verify(other)
    with attempt.attempting(other) as begun:
        assert begun is not None and not other.exists()
    (kept,) = (other.parent / ".replaced").iterdir()
    assert run_folder.verify(kept) and "has the name of another run" in capsys.readouterr().out


def test_work_is_not_finished_until_it_is_sealed(tmp_path):
    run = run_folder.start(settings.Calibrate(model="somebody/model", runs=str(tmp_path)))
    run.path("table.txt").write_text("half")
    assert not run_folder.is_finished(run.folder) and run_folder.is_locked(run.folder)
    run.seal(["table.txt"], answer=1)
    assert run_folder.is_finished(run.folder) and not run_folder.is_locked(run.folder)
    assert sorted(path.name for path in run.folder.iterdir()) == ["run.json", "table.txt"]


def test_a_finished_run_is_never_overwritten(tmp_path):
    parameters = settings.Calibrate(model="somebody/model", runs=str(tmp_path))
    for answer in (1, 2):
        run = run_folder.start(parameters)
        run.path("table.txt").write_text(str(answer))
        run.seal(["table.txt"], answer=answer)
    assert (
        run_folder.verify(run.folder)["results"]["answer"] == 1
        and (run.folder / "table.txt").read_text() == "1"
    )


def test_a_step_does_not_start_from_an_unfinished_run(tmp_path):
    with pytest.raises(PftoolsError, match="that run is not finished"):
        run_folder.start(settings.Prune(model=str(tmp_path / "prune-0123456789ab"), runs=str(tmp_path)))


def test_a_killed_owner_leaves_no_lock(tmp_path):
    code = (
        "import time; from pathlib import Path; from pftools import run_folder\n"
        f"with run_folder.attempting(Path({str(tmp_path)!r}) / 'prune-0123456789ab'):\n"
        " print('held', flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline().strip() == "held"
    folder = tmp_path / "prune-0123456789ab"
    assert run_folder.is_locked(folder) and f"process {owner.pid}" in run_folder.owner(folder)
    owner.kill()
    owner.wait()
    began = time.monotonic()
    with run_folder.attempting(folder):
        assert time.monotonic() - began < 5


def test_garbage_collection_spares_what_is_kept(sealed):
    last = tuned(sealed)
    root = last.parent
    assert [path.name for path in run_folder.unneeded(root, {last.name})] == [sealed[0].name]
    run_folder.remove(sealed[0])
    with pytest.raises(PftoolsError, match="run its step again"):
        checkpoints.load(last)


@pytest.mark.smollm2
def test_half_of_smollm2_takes_less_than_a_twelfth_of_it_and_exports_to_plain_transformers(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parameters = settings.Prune(method="magnitude", dtype="bfloat16", runs=str(tmp_path / "runs"))
    run = run_folder.start(parameters)
    model, _ = models.load_for(parameters)
    masks = prune_model(model, torch.zeros(1, 8, dtype=torch.long), method="magnitude", progress=False).masks
    folder = run.seal(checkpoints.save_prune(run, masks))
    whole = 2 * sum(weight.numel() for weight in model.parameters())
    assert files.size_of(folder) < whole / 12
    exported = checkpoints.export(folder, tmp_path / "exported", dtype="bfloat16")
    plain = AutoModelForCausalLM.from_pretrained(exported, dtype="auto")
    text = AutoTokenizer.from_pretrained(exported)(
        "The order of pruning and fine-tuning", return_tensors="pt"
    )
    with torch.no_grad():
        assert plain.dtype == torch.bfloat16 and torch.equal(plain(**text).logits, model(**text).logits)


def test_a_file_that_was_not_sealed_is_not_read(sealed):
    from safetensors.torch import save_file

    folder, pruned = sealed
    save_file(
        {name: torch.zeros_like(weight) for name, weight in pruned.named_parameters()},
        folder / "weights.safetensors",
    )
    replayed, _ = checkpoints.load(folder, dtype="float32")
    assert all(
        torch.equal(one, other)
        for one, other in zip(pruned.state_dict().values(), replayed.state_dict().values())
    )


def test_export_refuses_a_full_folder(sealed, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(PftoolsError, match="not empty"):
        checkpoints.export(sealed[0], tmp_path / "full")


def test_the_record_tells_how_it_was_made(sealed):
    record = json.loads((sealed[0] / "run.json").read_text())
    assert (
        record["parameters"]["sparsity"] == 0.5
        and record["versions"]["torch"]
        and record["peak_memory_bytes"] > 1e6
    )
    assert record["machine"]["cores"] >= 1 and record["finished"].endswith("Z")


def test_importing_pftools_is_instant():
    heavy = "('torch', 'transformers', 'pandas', 'altair')"
    code = f"import sys, pftools, pftools.cli; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------------------
# What was measured is what a reload gives


def under_way(kind, tmp_path, **words):
    parameters = kind(
        model=str(save_tiny(tmp_path / "tiny")), dtype="float32", runs=str(tmp_path / "runs"), **words
    )
    return run_folder.start(parameters), models.load_for(parameters)[0]


def zeroed(network, times=1):
    with torch.no_grad():
        network.model.layers[0].mlp.up_proj.weight[0, : 8 * times] = 0


def grown(network):
    with torch.no_grad():
        network.model.layers[0].mlp.up_proj.weight.add_(1)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("change", [None, zeroed, grown])
def test_masks_that_would_not_give_the_measured_model_are_never_sealed(tmp_path, method, change):
    run, network = under_way(settings.Prune, tmp_path, method=method)
    result = prune_model(network, tiny_blocks(), method=method, progress=False)
    if change is None:
        assert checkpoints.save_prune(run, result.masks, result.weights, model=network)
        return
    change(network)
    with pytest.raises(PftoolsError, match="is not what was measured.*nothing is sealed"):
        checkpoints.save_prune(run, result.masks, result.weights, model=network)


def test_a_model_that_was_pruned_twice_in_memory_is_never_sealed(tmp_path):
    run, network = under_way(settings.Prune, tmp_path)
    prune_model(network, tiny_blocks(), sparsity=0.6, progress=False)
    result = prune_model(network, tiny_blocks(), sparsity=0.3, progress=False)
    with pytest.raises(PftoolsError, match="its masks do not have the zeros of .* in memory"):
        checkpoints.save_prune(run, result.masks, model=network)


def test_zeros_of_the_parent_are_no_difference(sealed):
    parameters = settings.Prune(
        model=str(sealed[0]), sparsity=0.7, dtype="float32", runs=str(sealed[0].parent)
    )
    run, (network, _) = run_folder.start(parameters), models.load_for(parameters)
    result = prune_model(network, tiny_blocks(), sparsity=0.7, progress=False)
    assert checkpoints.save_prune(run, result.masks, model=network)


@pytest.mark.parametrize(
    ("fault", "says"), [("adapter", "is not the one that was merged"), ("zeros", "other zeros")]
)
def test_an_adapter_that_would_not_give_the_measured_model_is_never_sealed(sealed, fault, says):
    parameters = settings.Finetune(model=str(sealed[0]), dtype="float32", runs=str(sealed[0].parent))
    run, (network, _) = run_folder.start(parameters), models.load_for(parameters)
    options = {"steps": 2, "output": run.path(""), "progress": False}
    result = finetune_model(network, tiny_blocks(), **options)
    if fault == "adapter":
        finetune_model(network, tiny_blocks(seed=1), seed=1, **options)  # trained again, and not merged
    merge_adapter(network, result.adapter)
    if fault == "zeros":
        zeroed(network, times=4)
    with pytest.raises(PftoolsError, match=says):
        checkpoints.save_finetune(run, "masked", adapter=result.adapter, model=network)

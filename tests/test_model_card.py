"""An exported model says what it is, and an exported adapter how it is to be merged."""

from __future__ import annotations

import json

import pytest
import torch
from huggingface_hub import ModelCard

from pftools import checkpoints, cli, layers, models, run_folder, settings
from pftools.errors import PftoolsError
from pftools.finetune import finetune_model, merge_adapter
from pftools.masks import load_masks, save_masks
from pftools.prune import prune_model
from tests.tiny import save_tiny, tiny_blocks


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """(base folder, prune run, finetune run, the model that they lead to)"""
    root = tmp_path_factory.mktemp("chain")
    base, runs = save_tiny(root / "base"), str(root / "runs")
    (base / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    pruning = settings.Prune(model=str(base), runs=runs, sparsity=0.5, seed=3)
    model, _ = models.load_for(pruning)
    run = run_folder.start(pruning)
    masks = prune_model(model, tiny_blocks(), progress=False).masks
    pruned = run.seal(checkpoints.save_prune(run, masks), measured=models.measured_sparsity(model))
    training = settings.Finetune(
        model=str(pruned), runs=runs, corpus="wikitext2", tokens=64, learning_rate=0.01
    )
    run = run_folder.start(training)
    result = finetune_model(
        model,
        tiny_blocks(),
        keep_sparsity=True,
        tokens=64,
        learning_rate=0.01,
        output=run.path(""),
        progress=False,
    )
    merge_adapter(model, result.adapter, merge="masked")
    tuned = run.seal(checkpoints.save_finetune(run, "masked"), measured=models.measured_sparsity(model))
    for of, perplexity in ((base, 5.0), (tuned, 7.5)):
        run = run_folder.start(settings.Evaluate(model=str(of), runs=runs))
        found = {"n_blocks": 4, "block_length": 32, "corpus": "pydocs", "split": "test", "measured": 0.5}
        facts = {"metric": "acc", "value": 0.5, "low": 0.4, "high": 0.6, "n": 20}
        run.seal([], perplexity=perplexity, tasks={"facts": facts}, **found)
    return base, pruned, tuned, model


def test_the_card_says_what_was_done_and_what_it_is_worth(chain, tmp_path):
    base, _, tuned, model = chain
    folder = checkpoints.export(tuned, tmp_path / "exported")
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "mit" and card.data.datasets == ["Salesforce/wikitext"]
    assert card.data.metrics == ["perplexity"] and card.data.pipeline_tag == "text-generation"
    text = card.text
    assert "**P F**" in text and "50.00% was asked, and 50.00% of the linear weights" in text
    assert (
        "method wanda" in text
        and "sparsity 0.5" in text
        and "seed 3" in text
        and "learning_rate 0.01" in text
    )
    assert "| pydocs, test | 4 of 32 tokens | 7.50 | 5.00 |" in text and "acc 50.0%" in text
    assert "papermill notebooks/03_finetune.ipynb" in text and '-p corpus "wikitext2"' in text
    assert str(base.parent) not in text  # nothing of this machine


def same(one, other):
    with torch.no_grad():
        return torch.equal(one(tiny_blocks()).logits, other(tiny_blocks()).logits)


def test_an_adapter_is_exported_with_its_masks_and_merges_into_the_base(chain, tmp_path):
    from peft import PeftModel

    base, pruned, tuned, model = chain
    folder = checkpoints.export_adapter(tuned, tmp_path / "adapter")
    text = (folder / "README.md").read_text()
    assert "PEFT adds the whole product, which fills the zeros and is another" in text
    assert str(base.parent) not in text + (folder / "adapter_config.json").read_text()
    dense, _ = models.load_model(str(base))
    assert len(PeftModel.from_pretrained(dense, folder).active_adapters) == 1, "PEFT reads it"
    kept = load_masks(folder / "masks.safetensors")
    parent, _ = models.load_model(pruned)
    for name, weight in layers.linear_weights(parent).items():
        assert torch.equal(kept[name], weight != 0)
    for start in (pruned, base):  # the model that it was trained on, or its dense base
        again, _ = models.load_model(str(start))
        assert same(merge_adapter(again, folder), model)


def test_the_lines_of_an_exported_adapter_work(chain, tmp_path, monkeypatch):
    base, _, tuned, model = chain
    folder = checkpoints.export_adapter(tuned, tmp_path / "this" / "folder")
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "base").symlink_to(base)
    monkeypatch.chdir(tmp_path)
    lines = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    exec(lines, {})
    again, _ = models.load_model(str(tmp_path / "merged"))
    assert same(again, model)


def test_an_exported_adapter_refuses_other_zeros_and_other_masks(chain, tmp_path):
    base, _, tuned, _ = chain
    folder = checkpoints.export_adapter(tuned, tmp_path / "adapter")
    other, _ = models.load_model(str(base))
    prune_model(other, tiny_blocks(seed=1), sparsity=0.6, progress=False)
    before = {name: weight.clone() for name, weight in other.state_dict().items()}
    with pytest.raises(PftoolsError, match="trained on other zeros"):
        merge_adapter(other, folder)
    assert all(torch.equal(weight, before[name]) for name, weight in other.state_dict().items())
    masks = load_masks(folder / "masks.safetensors")
    next(iter(masks.values()))[0, 0] ^= True
    save_masks(folder / "masks.safetensors", masks)
    with pytest.raises(PftoolsError, match="masks.safetensors holds other masks .*: export the adapter"):
        merge_adapter(models.load_model(str(base))[0], folder)
    (folder / "masks.safetensors").write_bytes(b"short")
    with pytest.raises(PftoolsError, match="masks.safetensors cannot be read"):
        merge_adapter(models.load_model(str(base))[0], folder)


def trained_on(parent, runs, **options):
    """A finetune run on a model, sealed."""
    training = settings.Finetune(model=str(parent), runs=runs, tokens=64, seed=5)
    run = run_folder.start(training)
    model, _ = models.load_for(training)
    recipe = {"tokens": 64, "learning_rate": 0.01, "progress": False, **options}
    result = finetune_model(model, tiny_blocks(), output=run.path(""), **recipe)
    merge_adapter(model, result.adapter)
    return run.seal(checkpoints.save_finetune(run, "masked"), measured=0.5), model


def test_an_adapter_trained_behind_another_asks_for_the_model_between(chain, tmp_path):
    base, _, tuned, _ = chain
    run, model = trained_on(tuned, str(tuned.parent))
    folder = checkpoints.export_adapter(run, tmp_path / "adapter")
    assert f"`pftools export {tuned.name} parent`" in (folder / "README.md").read_text()
    with pytest.raises(PftoolsError, match="trained on other zeros"):
        merge_adapter(models.load_model(str(base))[0], folder)
    assert same(merge_adapter(models.load_model(tuned)[0], folder), model)


def test_an_exported_hira_adapter_stays_one(chain, tmp_path):
    run, model = trained_on(chain[1], str(chain[1].parent), adapter="hira")
    folder = checkpoints.export_adapter(run, tmp_path / "adapter")
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "HIRA"
    assert not (folder / "masks.safetensors").exists(), "its update is zero where the weight is"
    assert same(merge_adapter(models.load_model(chain[1])[0], folder), model)


def test_a_run_without_an_adapter_has_none_to_export(chain, tmp_path):
    with pytest.raises(PftoolsError, match="has no adapter"):
        checkpoints.export_adapter(chain[1], tmp_path / "none")


def test_what_cannot_be_pushed_stays_and_says_how_to_log_in(chain, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no route to the hub")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    with pytest.raises(PftoolsError, match="no route to the hub.*hf auth login"):
        cli.export(chain[2], tmp_path / "exported", push="somebody/pruned")
    assert (tmp_path / "exported" / "README.md").exists()

"""An exported model says what it is, and an exported adapter how it is to be merged."""

from __future__ import annotations

import json

import pytest
import torch
from huggingface_hub import ModelCard

from pftools import adapters, checkpoints, cli, models, run_folder, settings
from pftools.errors import PftoolsError
from pftools.finetune import finetune_model, merge_adapter
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


def test_an_adapter_is_exported_as_peft_reads_it_and_says_how_it_is_merged(chain, tmp_path):
    _, pruned, tuned, model = chain
    folder = checkpoints.export_adapter(tuned, tmp_path / "adapter")
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert "PEFT adds the whole product, which fills the zeros" in (folder / "README.md").read_text()
    again, _ = models.load_model(pruned)
    merge_adapter(again, adapters.load_adapter(folder), merge="masked")
    with torch.no_grad():
        assert torch.equal(again(tiny_blocks()).logits, model(tiny_blocks()).logits)
    with pytest.raises(PftoolsError, match="has no adapter"):
        checkpoints.export_adapter(pruned, tmp_path / "none")


def test_what_cannot_be_pushed_stays_and_says_how_to_log_in(chain, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no route to the hub")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    with pytest.raises(PftoolsError, match="no route to the hub.*hf auth login"):
        cli.export(chain[2], tmp_path / "exported", push="somebody/pruned")
    assert (tmp_path / "exported" / "README.md").exists()

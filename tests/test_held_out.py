"""The held-out text that tells at once what a step did."""

import pytest
import torch

from pftools import evaluate, layers, models, settings
from pftools.errors import PftoolsError
from tests.tiny import save_tiny, tiny_llama, tiny_tokenizer


def text_of(tmp_path, **words):
    words = {"runs": str(tmp_path / "runs"), "block_length": 32, "held_out_blocks": 3, **words}
    return evaluate.held_out_text(settings.Finetune(**words), tiny_tokenizer())


def test_it_is_the_validation_split_of_the_steps_own_corpus(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "validation.txt").write_text("z" * 200)
    text = text_of(tmp_path, corpus=str(tmp_path / "mine"))
    assert text.blocks.shape == (3, 32) and tiny_tokenizer().decode(text.blocks[0]) == "z" * 32
    assert text.perplexity(tiny_llama()) == pytest.approx(
        evaluate.perplexity(tiny_llama(), text.blocks).perplexity
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [({"held_out_blocks": 0}, "held_out_blocks is 0"), ({"block_length": 10**6}, "less than one block")],
)
def test_none_is_measured_where_none_is_asked_or_there_is_none(tmp_path, words, says):
    text = text_of(tmp_path, **words)
    assert text.perplexity(tiny_llama()) is None and says in text.says(None)


def test_a_model_is_measured_once(tmp_path, monkeypatch):
    text, measured = text_of(tmp_path), []

    def counted(model, blocks, **options):
        measured.append(model)
        return evaluate.perplexity(model, blocks, **options)

    monkeypatch.setattr("pftools.evaluate.held_out.perplexity", counted)
    found = text.perplexity(tiny_llama())
    assert text_of(tmp_path).perplexity(tiny_llama()) == found and len(measured) == 1
    other = tiny_llama()
    with torch.no_grad():
        other.lm_head.weight[3, 5] = 0
    assert text.perplexity(other) != found and len(measured) == 2
    assert text_of(tmp_path, block_length=16).perplexity(tiny_llama()) != found and len(measured) == 3
    for path in (tmp_path / "runs" / ".held_out").iterdir():
        path.write_text("cut short")
    assert text.perplexity(tiny_llama()) == found and len(measured) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fingerprint_sees_one_changed_number(dtype):
    model = tiny_llama(dtype=dtype)
    assert layers.fingerprint(model) == layers.fingerprint(tiny_llama(dtype=dtype))
    for _name, weight in model.named_parameters():
        before = layers.fingerprint(model)
        with torch.no_grad():
            weight.flatten()[-1] = 0.25
        assert layers.fingerprint(model) != before


def test_a_model_that_was_changed_since_it_was_loaded_is_refused(tmp_path):
    parameters = settings.Prune(model=str(save_tiny(tmp_path / "tiny")), dtype="float32")
    network, _ = models.load_for(parameters)
    assert models.as_loaded(network) is network
    with torch.no_grad():
        network.lm_head.weight[0, 0] = 0
    with pytest.raises(PftoolsError, match="was changed since it was loaded"):
        models.as_loaded(network)

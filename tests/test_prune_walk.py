"""The walk through the layers: exact against the naive one, for every family, in memory and from disk."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from pftools import checkpoints, prune
from pftools.errors import PftoolsError
from pftools.layers import linear_weights, measured_sparsity
from pftools.models import load_model
from pftools.pretrained import on_disk
from pftools.prune import levers
from tests import oracles
from tests.tiny import save_tiny, tiny_blocks, tiny_llama


def same(one, other):
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_the_walk_equals_the_naive_walk_mask_for_mask(batch_size):
    model = tiny_llama()
    expected = oracles.wanda_walk(model, tiny_blocks(), 0.5)
    result = prune.prune_model(model, tiny_blocks(), sparsity=0.5, batch_size=batch_size, progress=False)
    assert same(result.masks, expected)
    for name, mask in result.masks.items():
        weight = model.get_parameter(name)
        assert ((weight == 0) == ~mask).all() and ((~mask).sum(dim=1) == weight.shape[1] // 2).all()


def test_dense_inputs_with_stored_statistics_need_no_forward(tmp_path, monkeypatch):
    model = tiny_llama()
    statistics = prune.measure_activations(model, tiny_blocks(), progress=False)
    statistics.save(tmp_path / "statistics.safetensors")
    measured = copy.deepcopy(model)
    one = prune.prune_model(measured, tiny_blocks(), inputs="dense", progress=False).masks
    for layer in model.model.layers:
        monkeypatch.setattr(layer, "forward", None)
    loaded = prune.ActivationStatistics.load(tmp_path / "statistics.safetensors")
    assert same(
        one, prune.prune_model(model, tiny_blocks(), inputs="dense", statistics=loaded, progress=False).masks
    )


def test_the_first_layer_is_measured_alike_behind_dense_and_pruned_layers():
    results = {
        given: prune.prune_model(
            tiny_llama(), tiny_blocks(), method="sparsegpt", inputs=given, progress=False
        )
        for given in ("pruned", "dense")
    }
    first, last = (f"model.layers.{index}.mlp.up_proj.weight" for index in (0, 1))
    assert torch.equal(results["dense"].weights[first], results["pruned"].weights[first])
    assert not torch.equal(results["dense"].weights[last], results["pruned"].weights[last])


FAMILIES = {
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8},
    "phi": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt_neox": {},
    "phi3": {"pad_token_id": 0},
    "granite": {},
    "olmo2": {},
    "falcon": {},
    "mpt": {"d_model": 32, "n_layers": 3, "n_heads": 4},
}


def family_of(name, **options):
    common = {
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if name in ("gpt_neox", "phi", "opt") else 2,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    model = (
        AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**common, **options})).float().eval()
    )
    for weight in linear_weights(model).values():
        torch.nn.init.normal_(weight, std=0.2)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_walk_fits_every_family(family):
    model = family_of(family, **FAMILIES[family])
    expected = oracles.wanda_walk(model, tiny_blocks(4), 0.5)
    result = prune.prune_model(model, tiny_blocks(4), progress=False)
    agreement = sum(int((result.masks[name] == expected[name]).sum()) for name in expected) / sum(
        mask.numel() for mask in expected.values()
    )
    assert list(result.masks) == list(expected) and agreement >= 0.999


MIXTURES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 1},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 32,
        "decoder_sparse_step": 1,
    },
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "head_dim": 8,
        "decoder_sparse_step": 1,
    },
}


@pytest.mark.parametrize("family", MIXTURES)
def test_each_expert_is_pruned_by_the_tokens_that_it_sees(family, monkeypatch):
    monkeypatch.setattr("pftools.prune.layer.FEW_TOKENS", 1)
    model, blocks = family_of(family, **MIXTURES[family]), tiny_blocks(8, 32)
    layer = model.model.layers[0]
    fused = layer.mlp.experts.gate_up_proj.detach().clone()
    tokens = []
    hook = layer.mlp.experts.register_forward_pre_hook(lambda module, args: tokens.append((args[0], args[1])))
    with torch.no_grad():
        model(blocks)
    hook.remove()
    hidden, routes = tokens[0]
    result = prune.prune_model(model, blocks, progress=False)
    mask = result.masks["model.layers.0.mlp.experts.gate_up_proj"]
    for expert in range(4):
        seen = hidden[(routes == expert).any(dim=1)]
        for rows in fused[expert].shape[0] // 2 * torch.tensor([[0, 1], [1, 2]]):
            part = fused[expert, rows[0] : rows[1]]
            if len(seen):
                assert (
                    oracles.wanda_mask(part, seen, 0.5) == mask[expert, rows[0] : rows[1]]
                ).float().mean() > 0.999
    assert measured_sparsity(model) == pytest.approx(0.5, abs=0.01)
    assert not any(
        "forward" in module.__dict__ or "0" in module._modules
        for module in model.modules()
        if hasattr(module, "down_proj")
    )


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_experts_with_few_tokens_fall_back_to_magnitude_and_say_so(method):
    model = family_of("mixtral", num_local_experts=8, num_experts_per_tok=1)
    before = copy.deepcopy(model)
    result = prune.prune_model(model, tiny_blocks(2, 40), method=method, progress=False)
    notes = result.layers[result.layers["note"] != ""]
    assert (
        len(notes)
        and notes["note"].str.contains("pruned by magnitude").all()
        and notes["weight"].str.contains("experts").all()
    )
    name = notes["weight"].iloc[0]
    parent, expert, part, _ = name.rsplit(".", 3)
    row, parameter = int(expert), f"{parent}.{part}"
    weight, mask = before.get_parameter(parameter)[row], result.masks[parameter][row]
    assert torch.equal(mask, oracles.wanda_mask(weight, torch.eye(weight.shape[1]), 0.5))
    assert torch.equal(
        model.get_parameter(parameter)[row], weight * mask
    )  # nothing is mended by what was not seen


# ------------------------------------------------------------------------------------------------------------
# From disk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"method": "sparsegpt"}, {"inputs": "dense", "allocation": "owl"}, {"reconstruct_steps": 3}],
)
def test_a_checkpoint_on_disk_is_pruned_like_the_model_in_memory(tmp_path, options, dtype):
    source = save_tiny(tmp_path / "dense", tie_word_embeddings=bool(options), dtype=dtype)
    blocks, model = tiny_blocks(), load_model(source, dtype=dtype)[0]
    expected = prune.prune_model(model, blocks, progress=False, **options)
    result = prune.prune_checkpoint(source, blocks, tmp_path / "pruned", progress=False, **options)
    assert same(checkpoints.load_masks(tmp_path / "pruned" / "masks.safetensors"), expected.masks)
    plain, _ = load_model(tmp_path / "pruned", dtype=dtype)
    assert all(torch.equal(plain.get_parameter(name), weight) for name, weight in model.named_parameters())
    assert result.layers.drop(columns="seconds").equals(expected.layers.drop(columns="seconds"))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gemma2", "opt"])
def test_a_checkpoint_of_any_family_is_pruned_from_disk(tmp_path, family):
    model = family_of(family, **{**FAMILIES, **MIXTURES}[family])
    model.save_pretrained(tmp_path / "dense")  # with one tensor an expert, which the walk sees stacked
    result = prune.prune_checkpoint(tmp_path / "dense", tiny_blocks(), tmp_path / "pruned", progress=False)
    expected = prune.prune_model(model, tiny_blocks(), progress=False)
    assert same(checkpoints.load_masks(tmp_path / "pruned" / "masks.safetensors"), expected.masks)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype="float32")
    assert all(torch.equal(plain.get_parameter(name), weight) for name, weight in model.named_parameters())
    assert result.layers["weight"].tolist() == expected.layers["weight"].tolist()


def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path):
    source = save_tiny(tmp_path / "dense")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PftoolsError, match="nothing that becomes model.layers.1.mlp.up_proj.weight"):
        prune.prune_checkpoint(source, tiny_blocks(), tmp_path / "pruned", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_masks_alone_hold_all_there_is_and_only_where_they_do(tmp_path):
    source = save_tiny(tmp_path / "dense")
    prune.prune_checkpoint(source, tiny_blocks(), tmp_path / "masks", write="masks", progress=False)
    assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == [
        "layers.parquet",
        "masks.safetensors",
        "pftools.json",
    ]
    model, _ = load_model(source, dtype="float32")
    checkpoints.apply_masks(model, checkpoints.load_masks(tmp_path / "masks" / "masks.safetensors"))
    assert measured_sparsity(model) == pytest.approx(0.5)
    with pytest.raises(PftoolsError, match="write='model'"):
        prune.prune_checkpoint(
            source, tiny_blocks(), tmp_path / "no", method="sparsegpt", write="masks", progress=False
        )
    with pytest.raises(PftoolsError, match="not empty"):
        prune.prune_checkpoint(source, tiny_blocks(), tmp_path / "masks", progress=False)
    assert not (tmp_path / "no").exists() and not list(tmp_path.glob(".*partial"))


def test_only_one_layer_of_a_checkpoint_is_in_memory(tmp_path, monkeypatch):
    source, held = save_tiny(tmp_path / "dense", num_hidden_layers=4), []
    real = prune.walk.prune_layer

    def look(layer, index, *rest):
        model = held[0]
        held.append([not any(weight.is_meta for weight in each.parameters()) for each in model.model.layers])
        return real(layer, index, *rest)

    init = on_disk.OnDisk.__init__
    monkeypatch.setattr(
        on_disk.OnDisk,
        "__init__",
        lambda self, *args: (init(self, *args), held.append(self.model))[0],
    )
    monkeypatch.setattr(prune.walk, "prune_layer", look)
    prune.prune_checkpoint(source, tiny_blocks(), tmp_path / "pruned", progress=False)
    assert held[1:] == [[place == index for place in range(4)] for index in range(4)]


# ------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("family", ["llama", "mpt"])
def test_calibration_blocks_longer_than_the_context_are_refused(tmp_path, family):
    model = tiny_llama(max_position_embeddings=24)
    if family == "mpt":  # another name for it
        sizes = {"d_model": 32, "n_layers": 1, "n_heads": 4, "vocab_size": 260, "max_seq_len": 24}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mpt", **sizes))
    model.save_pretrained(tmp_path / "model")
    says, blocks = "blocks have 32 tokens and the model's context is 24", tiny_blocks(4, 32)
    with pytest.raises(PftoolsError, match=says):
        prune.prune_model(model, blocks, progress=False)
    with pytest.raises(PftoolsError, match=says):
        prune.measure_activations(model, blocks, progress=False)
    with pytest.raises(PftoolsError, match=says):
        prune.prune_checkpoint(tmp_path / "model", blocks, tmp_path / "pruned", progress=False)
    assert measured_sparsity(model) == 0 and not (tmp_path / "pruned").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sparsity": 1.0}, "sparsity is 1.0"),
        ({"sparsity": -0.1}, "sparsity is -0.1"),
        ({"method": "wnada"}, "did you mean 'wanda'"),
        ({"sparsity": float("nan")}, "sparsity is nan"),
        ({"pattern": "4:2"}, "N < M"),
        ({"pattern": "3:5", "sparsity": 0.4}, "no multiple of 5"),
        ({"pattern": "2:4", "sparsity": 0.7}, "fixes it at 0.5"),
        ({"inputs": "dens"}, "did you mean 'dense'"),
        ({"allocation": "olw"}, "did you mean 'owl'"),
        ({"allocation": "owl", "pattern": "2:4"}, "use one of the two"),
    ],
)
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


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_nan_in_the_activations_names_the_layer(method):
    model = tiny_llama()
    model.model.layers[1].input_layernorm.weight.data.fill_(torch.inf)
    with pytest.raises(PftoolsError, match=r"model.layers.1.self_attn.q_proj"):
        prune.prune_model(model, tiny_blocks(), method=method, progress=False)
    assert not any(module._forward_pre_hooks or "forward" in module.__dict__ for module in model.modules())


def test_nan_in_a_weight_names_it():
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = torch.nan
    with pytest.raises(PftoolsError, match=r"model.layers.1.mlp.down_proj.weight holds NaN"):
        prune.prune_model(model, tiny_blocks(), method="magnitude", progress=False)


def test_huge_weights_are_no_infinite_ones():
    """Their sum was infinite, and the model was called broken."""
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj.weight.data.mul_(1e37)
    prune.prune_model(model, tiny_blocks(), method="magnitude", progress=False)
    assert measured_sparsity(model) == pytest.approx(0.5, abs=0.01)


def test_inputs_that_are_all_zero_are_reported():
    model = tiny_llama()
    model.model.layers[0].post_attention_layernorm.weight.data.zero_()
    for method in ("wanda", "sparsegpt"):
        twin = copy.deepcopy(model)
        table = prune.prune_model(twin, tiny_blocks(), method=method, progress=False).layers.set_index(
            "weight"
        )
        assert "all zero" in table.loc["model.layers.0.mlp.up_proj.weight", "note"] and measured_sparsity(
            twin
        ) == pytest.approx(0.5, abs=0.02)


def test_a_model_sparser_than_asked_is_reported_and_keeps_its_zeros():
    model = tiny_llama()
    prune.prune_model(model, tiny_blocks(), sparsity=0.7, progress=False)
    result = prune.prune_model(model, tiny_blocks(), sparsity=0.5, progress=False)
    assert result.layers["note"].str.contains("sparse before").all()
    assert measured_sparsity(model) == pytest.approx(0.7, abs=0.02)


def test_statistics_of_another_model_are_refused():
    statistics = prune.measure_activations(tiny_llama(intermediate_size=48), tiny_blocks(), progress=False)
    with pytest.raises(PftoolsError, match="do not fit the model at model.layers.0.mlp.down_proj"):
        prune.prune_model(tiny_llama(), tiny_blocks(), inputs="dense", statistics=statistics, progress=False)


@pytest.mark.parametrize(
    ("free_blocks", "says"),
    [
        (2.5, "batch_size=2 should fit"),
        (0.5, "block_length of about 8 should fit"),
        (50, "n_blocks=4 or batch_size=4 should fit"),
    ],
)
def test_out_of_memory_names_the_levers_and_a_size_that_fits(monkeypatch, free_blocks, says):
    model = tiny_llama()
    block = (8 * 32 + 4 * 64) * 16 * 4
    monkeypatch.setattr(levers, "free_memory", lambda device: int(free_blocks * block))

    def no_room(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(model.model.layers[1].mlp, "forward", no_room)
    with pytest.raises(
        PftoolsError,
        match=rf"out of memory at model.layers.1 with batch_size 8 and 8 blocks of 16 tokens.*{says}",
    ):
        prune.prune_model(model, tiny_blocks(), batch_size=8, progress=False)


def test_the_model_is_left_in_its_mode():
    model = tiny_llama().train()
    model.config.use_cache = True
    prune.prune_model(model, tiny_blocks(), progress=False)
    assert model.training and model.config.use_cache
    assert not any("forward" in layer.__dict__ for layer in model.model.layers)


@pytest.mark.smollm2
def test_wanda_on_smollm2_is_far_better_than_magnitude(smollm2):
    from pftools.corpora import token_blocks
    from pftools.evaluate import perplexity

    model, tokenizer = smollm2
    calibration = token_blocks(tokenizer, "pydocs", split="calibration", n_blocks=8, block_length=256)
    test = token_blocks(tokenizer, "pydocs", split="test", n_blocks=8, block_length=256)
    found = {"dense": perplexity(model, test, progress=False).perplexity}
    for method in ("wanda", "magnitude", "sparsegpt"):
        twin = copy.deepcopy(model)
        prune.prune_model(twin, calibration, method=method, progress=False)
        assert measured_sparsity(twin) == pytest.approx(0.5, abs=1e-3)
        found[method] = perplexity(twin, test, progress=False).perplexity
    assert 10 < found["dense"] < 22 < found["wanda"] < 60 and found["magnitude"] > 4 * found["wanda"], found
    assert found["dense"] < found["sparsegpt"] < 60, found

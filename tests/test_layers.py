"""What a decoder is made of, kind by kind: layouts of weights, the text decoder, and what is refused."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn

from pftools import layers
from pftools.errors import PftoolsError
from pftools.finetune import finetune_model
from pftools.models import load_model
from pftools.prune import prune_checkpoint, prune_model
from tests import oracles
from tests.families import checks, zoo
from tests.tiny import save_tiny, tiny_blocks, tiny_llama


def pruned(kind, **options):
    model = zoo.build(kind)
    return model, prune_model(model, checks.blocks(), batch_size=3, progress=False, **options)


def test_gpt2s_conv1d_is_a_linear_weight_laid_out_the_other_way():
    model = zoo.build("gpt2")
    inputs = []
    hook = model.transformer.h[0].mlp.c_fc.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    weight = model.transformer.h[0].mlp.c_fc.weight.detach().clone()  # (inputs, outputs)
    with torch.no_grad():  # behind the pruned attention, as the walk has it
        result = prune_model(model, checks.blocks(), batch_size=8, progress=False)
        hook.remove()
    mask = result.masks["transformer.h.0.mlp.c_fc.weight"]
    expected = oracles.wanda_mask(weight.t(), inputs[-1].flatten(0, 1), 0.5)
    assert mask.shape == weight.shape
    # The last forward that reached it was of the pruned layer; the first choice was made on what came before.
    assert (mask.t() == expected).float().mean() > 0.9 and (~mask).sum(dim=0).eq(weight.shape[0] // 2).all()


@pytest.mark.parametrize(
    ("kind", "parameter", "axis"),
    [
        ("gpt2", "transformer.h.1.mlp.c_proj.weight", 0),
        ("llama4", "model.layers.0.feed_forward.experts.gate_up_proj", 1),
        ("gpt_oss", "model.layers.0.mlp.experts.down_proj", 1),
        ("llama", "model.layers.1.mlp.down_proj.weight", 1),
        ("jetmoe", "model.layers.0.mlp.input_linear.weight", 2),
    ],
)
def test_n_of_m_runs_along_the_inputs_however_weights_are_laid_out(kind, parameter, axis):
    model, result = pruned(kind, pattern="2:4")
    kept = result.masks[parameter].movedim(axis, -1)
    assert (kept.unflatten(-1, (-1, 4)).sum(dim=-1) == 2).all()
    assert torch.equal(model.get_parameter(parameter) != 0, result.masks[parameter])
    assert layers.measured_sparsity(model) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("method", ["sparsegpt", "magnitude", "ria"])
@pytest.mark.parametrize("kind", ["gpt2", "jetmoe", "llama4"])
def test_every_criterion_works_on_every_layout(kind, method):
    model, _ = pruned(kind, method=method)
    assert layers.measured_sparsity(model) == pytest.approx(0.5, abs=0.02)


def test_sparsegpt_on_conv1d_equals_the_published_algorithm_on_the_transposed_weight():
    model = zoo.build("gpt2")
    inputs = []
    attention = model.transformer.h[0].attn.c_attn
    weight = attention.weight.detach().clone().t()
    hook = attention.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(checks.blocks())
    hook.remove()
    result = prune_model(model, checks.blocks(), method="sparsegpt", progress=False)
    expected = oracles.sparsegpt(weight, inputs[0], 0.5)
    torch.testing.assert_close(
        result.weights["transformer.h.0.attn.c_attn.weight"].t().double(), expected, atol=1e-4, rtol=1e-3
    )


def test_the_text_decoder_of_a_multimodal_model_is_pruned_and_counted():
    model, result = pruned("gemma3")
    assert layers.decoder_layers(model)[0] == "model.language_model.layers"
    assert all(name.startswith("model.language_model.") for name in result.masks)
    assert layers.measured_sparsity(model) == pytest.approx(0.5, abs=1e-3)
    before = zoo.build("gemma3").state_dict()
    other = [name for name in before if ".language_model.layers." not in name]
    assert any("vision" in name for name in other)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in other)


class _Strange(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(32, 32))

    def forward(self, x):
        return torch.einsum("...i,oi->...o", x, self.kernel)


def test_a_matrix_in_an_unknown_layout_is_an_error_that_names_it():
    model = tiny_llama()
    model.model.layers[1].mlp.extra = _Strange()
    for act in (
        lambda: layers.linear_weights(model),
        lambda: prune_model(model, tiny_blocks(), progress=False),
    ):
        with pytest.raises(PftoolsError, match=r"mlp\.extra\.kernel .* neither pruned nor counted"):
            act()


class _Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_subclass_of_linear_with_a_forward_of_its_own_is_an_error_that_names_it():
    model = tiny_llama()
    model.model.layers[0].mlp.down_proj.__class__ = _Doubled
    with pytest.raises(PftoolsError, match=r"mlp\.down_proj\.weight .*_Doubled"):
        prune_model(model, tiny_blocks(), progress=False)


def test_routers_are_known_and_not_counted():
    for kind in ("phimoe", "mixtral", "llama4"):
        model = zoo.build(kind)
        names = set(layers.uncounted_weights(model))
        assert any("router" in name or "gate" in name for name in names)
        assert not names & set(layers.linear_weights(model))


@pytest.mark.parametrize("kind", ["bloom", "gemma3n_text", "gemma4_text", "falcon_mamba"])
def test_arguments_that_depend_on_tokens_or_on_the_batch_are_recorded_for_every_batch(kind):
    assert checks.run(checks.masks_equal_naive_wanda, kind).status == "exact"


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("bert", "reads ahead"),
        ("bart", "never multiplied with"),
        ("hrm_text", "one after the other"),
        ("dory", "once and in order"),
        ("zamba", "share"),
        ("xlnet", "layout that is not known"),
    ],
)
def test_what_cannot_be_pruned_layer_by_layer_is_refused_in_one_sentence(kind, says):
    model = zoo.build(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PftoolsError, match=says):
        prune_model(model, checks.blocks(), progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_walk_checks_itself_against_the_models_own_forward():
    """A model whose layers are called with something else when they really run: here, a scale that counts
    calls."""
    model = tiny_llama()
    layer = model.model.layers[1]
    real, calls = layer.forward, []

    def forward(hidden, *args, **kwargs):
        calls.append(1)
        return real(hidden, *args, **kwargs) * (1 + 0.1 * len(calls))

    layer.forward = forward
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    with pytest.raises(PftoolsError, match="layer 1 computes something else when it is run alone"):
        prune_model(model, tiny_blocks(), progress=False)
    assert torch.equal(before, model.model.layers[0].mlp.up_proj.weight)


# ------------------------------------------------------------------------------------------------------------
# Fine-tuning and bad input, kind by kind


@pytest.mark.parametrize("kind", ["gpt2", "mamba", "deepseek_v2", "axk2", "phimoe"])
@pytest.mark.parametrize(
    "check",
    [checks.masked_adapters_keep_zeros, checks.a_quantized_base_keeps_zeros],
    ids=lambda check: check.__name__,
)
def test_adapters_are_exact_where_weights_are_laid_out_or_read_in_other_ways(kind, check):
    outcome = checks.run(check, kind)
    assert outcome.status == "exact", outcome.says


def test_what_gets_no_adapter_is_said_before_training(caplog):
    model = zoo.build("mixtral")
    trained = finetune_model(model, checks.blocks(2), steps=1, progress=False)
    assert 0 < trained.summary["left_out"] < 1
    assert re.search(
        r"[\d.]+% of the linear weights, and [\d.]+% of the whole model, get no adapter", caplog.text
    )


def test_a_module_whose_weight_the_model_reads_itself_cannot_be_a_target():
    with pytest.raises(
        PftoolsError, match="dt_proj, out_proj can have no adapter: the model reads the weight itself"
    ):
        finetune_model(zoo.build("mamba"), checks.blocks(2), targets="dt_proj", steps=1, progress=False)


def test_gradient_checkpointing_is_refused_where_there_is_none():
    with pytest.raises(PftoolsError, match="CTRLLMHeadModel has no gradient checkpointing"):
        finetune_model(
            zoo.build("ctrl"), checks.blocks(2), steps=1, gradient_checkpointing=True, progress=False
        )


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "bert"}, "is an encoder"),
        ({"model_type": "bart", "is_encoder_decoder": True}, "only half of a model"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
    ],
)
def test_unsuitable_models_are_refused_by_their_settings(tmp_path, config, says):
    save_tiny(tmp_path / "tiny")
    path = tmp_path / "tiny" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    for act in (
        lambda: load_model(tmp_path / "tiny", dtype="float32", device="cpu"),
        lambda: prune_checkpoint(tmp_path / "tiny", tiny_blocks(), tmp_path / "pruned", progress=False),
    ):
        with pytest.raises(PftoolsError, match=says):
            act()


@pytest.mark.parametrize("kind", ["deepseek_v3", "apertus"])
def test_buffers_that_a_checkpoint_holds_are_read_and_written_from_disk(kind):
    outcome = checks.run(checks.from_disk_equals_in_memory, kind)
    assert outcome.status == "exact", outcome.says

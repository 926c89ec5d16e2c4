import copy

import pytest
import torch

from pftools.errors import PftoolsError
from pftools.finetune import finetune_model, merge_adapter
from pftools.finetune.masked import _MaskedLinear, add_masked
from pftools.finetune.recipe import find_targets, steps_of_budget
from pftools.models import linear_modules, measured_sparsity
from pftools.prune import prune_model
from tests.tiny import tiny_blocks, tiny_llama

QUICK = {"steps": 3, "blocks_per_step": 4, "learning_rate": 1e-2, "progress": False}


def pruned_llama(dtype=torch.float32, sparsity=0.5):
    model = tiny_llama(dtype=dtype)
    prune_model(model, tiny_blocks(), sparsity=sparsity, progress=False)
    return model


def zeros(model):
    return sum(int((module.weight == 0).sum()) for module in linear_modules(model).values())


def logits(model):
    with torch.no_grad():
        return model(tiny_blocks(seed=5)).logits


def test_the_fused_product_has_the_gradients_of_the_formula():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True), torch.randn(7, 6, dtype=torch.float64)
    weight[weight.abs() < 0.5] = 0
    a, b = torch.randn(3, 6, dtype=torch.float64, requires_grad=True), torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    naive = x @ (weight + 0.7 * (weight != 0) * (b @ a)).T
    expected = torch.autograd.grad(naive.square().sum(), (x, a, b))
    fused = _MaskedLinear.apply(x.float(), weight.float(), None, a.float(), b.float(), 0.7)
    found = torch.autograd.grad(fused.square().sum(), (x, a, b))
    torch.testing.assert_close(fused.double(), naive, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_masked_sum_keeps_the_number_of_zeros_even_where_a_weight_cancels(dtype):
    weight = torch.tensor([[1.0, 0.0, 2e-5]]).to(dtype)
    a, b = torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[-1.0]])
    assert (add_masked(weight, a, b, 1.0) == 0).tolist() == [[False, True, False]]


@pytest.mark.parametrize("base", ["plain", "8bit", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_number_of_zeros_is_the_same_after_fine_tuning(base, dtype):
    model = pruned_llama(dtype)
    before, first = zeros(model), logits(model)
    result = finetune_model(model, tiny_blocks(), base=base, **QUICK)
    assert torch.equal(logits(model), first)  # untouched by training
    merge_adapter(model, result.adapter)
    assert zeros(model) == before
    assert not torch.equal(logits(model), first)


def test_a_dense_merge_fills_the_zeros():
    model = pruned_llama()
    result = finetune_model(model, tiny_blocks(), keep_sparsity=False, **QUICK)
    merge_adapter(model, result.adapter, merge="dense")
    assert measured_sparsity(model) < 0.01


def test_only_the_published_targets_lose_zeros_in_the_published_merge():
    model = pruned_llama()
    result = finetune_model(model, tiny_blocks(), keep_sparsity=False, targets="published", **QUICK)
    merge_adapter(model, result.adapter, merge="dense")
    sparse = {name.rpartition(".")[2]: float((module.weight == 0).float().mean()) for name, module in linear_modules(model).items()}
    assert sparse["q_proj"] == sparse["v_proj"] == 0 and sparse["k_proj"] == sparse["up_proj"] == 0.5


def test_hira_keeps_zeros_with_any_merge():
    model = pruned_llama()
    before, first = zeros(model), logits(model)
    merge_adapter(model, finetune_model(model, tiny_blocks(), adapter="hira", **QUICK).adapter, merge="dense")
    assert zeros(model) == before and not torch.equal(logits(model), first)


@pytest.mark.parametrize("options", [{}, {"dropout": 0.1}, {"gradient_checkpointing": True}, {"adapter": "hira"}])
def test_the_merged_model_is_the_one_that_was_trained(options, monkeypatch):
    """The logits of the unmerged model at the end of training, against those of the merged one."""
    from pftools.finetune import train

    seen = {}

    def spy(peft_model, *rest):
        peft_model.eval()
        seen["logits"] = logits(peft_model)
        return original(peft_model, *rest)

    original = train._read_adapter
    monkeypatch.setattr(train, "_read_adapter", spy)
    model = pruned_llama()
    merge_adapter(model, finetune_model(model, tiny_blocks(), **QUICK, **options).adapter)
    torch.testing.assert_close(logits(model), seen["logits"], rtol=1e-4, atol=1e-4)


def test_training_lowers_the_loss_and_leaves_the_model_as_it_was():
    model = pruned_llama()
    state = copy.deepcopy(model.state_dict())
    result = finetune_model(model, tiny_blocks(), steps=30, blocks_per_step=8, learning_rate=2e-2, progress=False)
    assert result.losses["loss"].iloc[-3:].mean() < result.losses["loss"].iloc[0] - 0.3
    assert list(model.state_dict()) == list(state) and all(torch.equal(model.state_dict()[name], state[name]) for name in state)
    assert all(parameter.requires_grad for parameter in model.parameters()) and not model.training
    assert type(linear_modules(model)["model.layers.0.self_attn.q_proj"]) is torch.nn.Linear


def test_same_seed_same_adapter():
    def train(seed):
        return finetune_model(pruned_llama(), tiny_blocks(), seed=seed, dropout=0.1, **QUICK).adapter.factors

    one, again, other = train(1), train(1), train(2)
    assert all(torch.equal(one[name][1], again[name][1]) for name in one)
    assert any(not torch.equal(one[name][1], other[name][1]) for name in one)


def test_a_killed_training_goes_on_and_ends_bit_for_bit_the_same(tmp_path):
    class Kill(Exception):
        pass

    from transformers import TrainerCallback

    class Killer(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 5:
                raise Kill

    options = {"steps": 8, "blocks_per_step": 4, "learning_rate": 1e-2, "dropout": 0.1, "save_every": 2, "progress": False}
    undisturbed = finetune_model(pruned_llama(), tiny_blocks(), output=tmp_path / "one", **options)
    with pytest.raises(Kill):
        finetune_model(pruned_llama(), tiny_blocks(), output=tmp_path / "two", callbacks=[Killer()], **options)
    assert (tmp_path / "two" / "trainer" / "checkpoint-4").is_dir()
    resumed = finetune_model(pruned_llama(), tiny_blocks(), output=tmp_path / "two", **options)
    assert not (tmp_path / "two" / "trainer").exists()
    for name, pair in undisturbed.adapter.factors.items():
        assert all(torch.equal(one, other) for one, other in zip(pair, resumed.adapter.factors[name]))
    assert resumed.losses["loss"].tolist() == undisturbed.losses["loss"].tolist()


def test_a_saved_adapter_merges_like_the_one_in_memory_and_stops_plain_peft(tmp_path):
    from peft import PeftModel

    model, twin = pruned_llama(), pruned_llama()
    result = finetune_model(model, tiny_blocks(), output=tmp_path, **QUICK)
    merge_adapter(model, result.adapter)
    assert torch.equal(logits(model), logits(merge_adapter(twin, result.folder)))
    with pytest.raises(Exception, match="load it with pftools"):
        PeftModel.from_pretrained(pruned_llama(), result.folder)


def test_an_adapter_is_refused_by_a_model_with_other_zeros(tmp_path):
    result = finetune_model(pruned_llama(), tiny_blocks(), **QUICK)
    with pytest.raises(PftoolsError, match="other zeros"):
        merge_adapter(pruned_llama(sparsity=0.6), result.adapter)
    with pytest.raises(PftoolsError, match="does not fit"):
        merge_adapter(tiny_llama(intermediate_size=48), result.adapter)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"targets": "qproj"}, "the linear modules of this model are"),
        ({"tokens": 100, "steps": 3}, "exactly one of"),
        ({"adapter": "dora"}, "unknown adapter"),
        ({"base": "4bit"}, "unknown base"),
        ({"learning_rate": 1e30, "steps": 20}, "the loss became nan at step"),
    ],
)
def test_bad_requests_are_one_sentence(options, says):
    with pytest.raises(PftoolsError, match=says):
        finetune_model(pruned_llama(), tiny_blocks(), **{"progress": False, "warmup_steps": 0, **options})


def test_a_block_longer_than_the_context_is_refused():
    with pytest.raises(PftoolsError, match="context is 512"):
        finetune_model(pruned_llama(), tiny_blocks(2, 600), steps=1, progress=False)


def test_eight_bit_without_bitsandbytes_is_one_sentence(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(PftoolsError, match="pip install bitsandbytes"):
        finetune_model(pruned_llama(), tiny_blocks(), base="8bit", steps=1, progress=False)


def test_budgets():
    assert steps_of_budget(100, 512, 8, tokens=49_152, steps=None, epochs=None) == 12
    assert steps_of_budget(100, 512, 8, tokens=None, steps=None, epochs=0.5) == 7
    assert steps_of_budget(100, 512, 8, tokens=None, steps=5, epochs=None) == 5


def test_targets_by_name():
    model = tiny_llama()
    assert len(find_targets(model, "all-linear")) == 14
    assert len(find_targets(model, "attention")) == 8
    assert len(find_targets(model, "up_proj, down_proj")) == 4

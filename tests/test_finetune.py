import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

from pftools.adapters import updated_weight
from pftools.errors import PftoolsError
from pftools.finetune import finetune_model, merge_adapter, padded_rows
from pftools.finetune.quantize import quantized
from pftools.finetune.recipe import find_targets, rows_of_budget, warmup_of
from pftools.finetune.rows import training_order
from pftools.finetune.update import dense_weight, kept_of, remember_kept, updated_linear
from pftools.layers import linear_modules, measured_sparsity
from pftools.prune import prune_model
from tests.tiny import tiny_blocks, tiny_llama, tiny_tokenizer

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


def layer_with(weight, bias=None, kept=None):
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    if kept is not None:
        remember_kept(layer, kept)
    return layer


@pytest.mark.parametrize("kind", ["masked", "hira", "masked beside"])
@pytest.mark.parametrize("dropout", [False, True])
def test_the_fused_product_has_the_gradients_of_the_formula(kind, dropout):
    """Against autograd on the formula in float64; the matrix is larger than what is worked on at once."""
    torch.manual_seed(0)
    x, weight = (
        torch.randn(2, 5, 300, dtype=torch.float64, requires_grad=True),
        torch.randn(1000, 300, dtype=torch.float64),
    )
    weight[weight.abs() < 0.7] = 0
    kept = torch.rand(weight.shape) < 0.5 if kind == "masked beside" else weight != 0
    a, b = (
        torch.randn(3, 300, dtype=torch.float64, requires_grad=True),
        torch.randn(1000, 3, dtype=torch.float64, requires_grad=True),
    )
    bias, scaling = torch.randn(1000, dtype=torch.float64), 0.7
    drop = (
        torch.nn.Threshold(0.0, 0.0) if dropout else None
    )  # like dropout, it acts on the input of the update alone
    factor = weight if kind == "hira" else kept
    if dropout:
        naive = x @ weight.T + drop(x) @ (scaling * factor * (b @ a)).T + bias
    else:
        naive = x @ ((weight + scaling * factor * (b @ a)) * kept).T + bias
    expected = torch.autograd.grad(naive.square().mean(), (x, a, b))
    layer = layer_with(weight.float(), bias.float(), kept if kind == "masked beside" else None)
    fused = updated_linear(x.float(), layer, a.float(), b.float(), scaling, kind.split()[0], dropout=drop)
    found = torch.autograd.grad(fused.square().mean(), (x, a, b))
    torch.testing.assert_close(fused.double(), naive, rtol=1e-4, atol=1e-4)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["masked", "hira"])
def test_an_updated_weight_keeps_the_number_of_zeros_even_where_a_weight_cancels(dtype, kind):
    weight = torch.tensor([[1.0, 0.0, 2e-5, -1.0]]).to(dtype)
    a, b = torch.tensor([[1.0, 1.0, 0.0, 1.0 if kind == "hira" else -1.0]]), torch.tensor([[-1.0]])
    assert (updated_weight(weight, a, b, kind=kind) == 0).tolist() == [[False, True, False, False]]
    assert (
        updated_weight(weight, a, b, kind=kind)[0, 2] == weight[0, 2]
    )  # what is not touched stays, subnormals too


@pytest.mark.parametrize(("dtype", "fraction_bits"), [(torch.bfloat16, 7), (torch.float16, 10)])
def test_the_cast_is_dithered_so_that_small_updates_are_not_lost(dtype, fraction_bits):
    """Against the pattern written out: the fraction that is left over is rounded up where the pattern's
    number is large enough. The matrix is larger than what is worked on at once."""
    torch.manual_seed(0)
    weight, a, b = torch.randn(1000, 300).to(dtype), torch.randn(2, 300) * 0.01, torch.randn(1000, 2) * 0.01
    assert torch.equal(updated_weight(weight, a, 0 * b), weight)
    result = updated_weight(weight, a, b).double()
    exact = torch.addmm(weight.float(), b, a).double()
    unit = (2.0 ** (exact.abs().log2().floor() - fraction_bits)).clamp_min(
        torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    )
    rows, columns = torch.arange(1000)[:, None], torch.arange(300)
    pattern = ((rows * 49471 + columns * 37345) % 2**16 / 2**16).double()
    expected = exact.sign() * (exact.abs() / unit + pattern).floor() * unit
    assert ((result - expected).abs() > unit / 100).double().mean() < 1e-3  # all but those on an edge
    assert ((result - exact).abs() <= unit).all()
    lost = weight.double() - exact  # what rounding to the nearest leaves out here, nearly always
    assert (result - exact).mean().abs() < 0.02 * lost.abs().mean()


def test_an_updated_weight_is_formed_in_float32_under_autocast():
    weight, a, b = torch.randn(50, 40), torch.randn(4, 40), torch.randn(50, 4)
    expected = updated_weight(weight, a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(updated_weight(weight, a, b), expected)


def test_the_mask_beside_a_layer_is_bits():
    layer, kept = torch.nn.Linear(13, 7), torch.rand(7, 13) < 0.4
    remember_kept(layer, kept)
    assert torch.equal(kept_of(layer), kept) and layer.kept[0].numel() == 12
    assert kept_of(torch.nn.Linear(2, 2)) is None


@pytest.mark.parametrize("base", ["8bit", "nf4"])
def test_quantizing_keeps_zeros_and_covers_every_linear_weight(base):
    model = pruned_llama()
    kept = {name: module.weight != 0 for name, module in linear_modules(model).items()}
    with quantized(model, base, keep_masks_of=kept):
        for name, mask in kept.items():
            layer = model.get_submodule(name)
            assert type(layer).__name__.startswith("Linear") and type(layer) is not torch.nn.Linear
            dense = dense_weight(layer).float()
            assert (dense[~mask] == 0).all() and torch.equal(kept_of(layer), mask)
    assert all(type(module) is torch.nn.Linear for module in linear_modules(model).values())


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


def test_a_dense_merge_is_that_of_peft(tmp_path):
    from peft import PeftModel

    model = pruned_llama()
    result = finetune_model(model, tiny_blocks(), keep_sparsity=False, output=tmp_path, **QUICK)
    expected = PeftModel.from_pretrained(copy.deepcopy(model), result.folder).merge_and_unload()
    merge_adapter(model, result.adapter, merge="dense")
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-5, atol=1e-5)


def test_only_the_published_targets_lose_zeros_in_the_published_merge():
    model = pruned_llama()
    result = finetune_model(model, tiny_blocks(), keep_sparsity=False, targets="published", **QUICK)
    merge_adapter(model, result.adapter, merge="dense")
    sparse = {
        name.rpartition(".")[2]: float((module.weight == 0).float().mean())
        for name, module in linear_modules(model).items()
    }
    assert sparse["q_proj"] == sparse["v_proj"] == 0 and sparse["k_proj"] == sparse["up_proj"] == 0.5


@pytest.mark.parametrize("base", ["plain", "8bit", "nf4"])
def test_hira_keeps_zeros_with_any_merge(base):
    model = pruned_llama()
    before, first = zeros(model), logits(model)
    merge_adapter(
        model, finetune_model(model, tiny_blocks(), adapter="hira", base=base, **QUICK).adapter, merge="dense"
    )
    assert zeros(model) == before and not torch.equal(logits(model), first)


class AtTheEnd(TrainerCallback):
    """What the unmerged model says at the end of its training, and the weights that it stands on."""

    def on_train_end(self, args, state, control, model, **_):
        model.eval()
        self.logits = logits(model)
        layers = {
            name: module.base_layer for name, module in model.named_modules() if hasattr(module, "base_layer")
        }
        self.weights = {
            name.removeprefix("base_model.model."): dense_weight(layer).clone()
            for name, layer in layers.items()
        }


@pytest.mark.parametrize("base", ["plain", "8bit", "nf4"])
@pytest.mark.parametrize(
    "options", [{}, {"dropout": 0.1}, {"gradient_checkpointing": True}, {"adapter": "hira"}]
)
def test_the_merged_model_is_the_one_that_was_trained(options, base):
    """Logits of the unmerged model at the end of training against those of the merged one. On a quantized
    base the merge goes into what the quantized weights stand for, since those were trained on."""
    model, end = pruned_llama(), AtTheEnd()
    adapter = finetune_model(model, tiny_blocks(), base=base, callbacks=[end], **QUICK, **options).adapter
    kept = {name: module.weight != 0 for name, module in linear_modules(model).items()}
    merged = merge_adapter(copy.deepcopy(model), adapter)
    if base != "plain":
        for name, (a, b) in adapter.factors.items():
            weight = updated_weight(
                end.weights[name].float(),
                a,
                b,
                adapter.scaling,
                kind="masked" if adapter.kind == "lora" else "hira",
                kept=kept[name] if adapter.masked else None,
            )
            merged.get_submodule(name).weight.data.copy_(weight)
    torch.testing.assert_close(logits(merged), end.logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(model), end.logits, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("adapter", ["lora", "hira"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_merged_model_is_the_trained_one_bit_for_bit(dtype, adapter):
    model, end = pruned_llama(dtype), AtTheEnd()
    options = {**QUICK, "learning_rate": 0.1 if adapter == "hira" else 1e-2}
    merge_adapter(
        model, finetune_model(model, tiny_blocks(), adapter=adapter, callbacks=[end], **options).adapter
    )
    assert torch.equal(logits(model), end.logits)


def test_training_lowers_the_loss_and_leaves_the_model_as_it_was():
    model = pruned_llama()
    state = copy.deepcopy(model.state_dict())
    result = finetune_model(
        model, tiny_blocks(), steps=30, blocks_per_step=8, learning_rate=2e-2, progress=False
    )
    assert result.losses["loss"].iloc[-3:].mean() < result.losses["loss"].iloc[0] - 0.3
    assert list(model.state_dict()) == list(state) and all(
        torch.equal(model.state_dict()[name], state[name]) for name in state
    )
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

    class Killer(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 5:
                raise Kill

    options = {
        "steps": 8,
        "blocks_per_step": 4,
        "learning_rate": 1e-2,
        "dropout": 0.1,
        "save_every": 2,
        "progress": False,
    }
    undisturbed = finetune_model(pruned_llama(), tiny_blocks(), output=tmp_path / "one", **options)
    with pytest.raises(Kill):
        finetune_model(
            pruned_llama(), tiny_blocks(), output=tmp_path / "two", callbacks=[Killer()], **options
        )
    assert (tmp_path / "two" / "trainer" / "checkpoint-4").is_dir()
    for step, state in ((5, None), (6, '{"global_ste')):  # as a kill in the middle of writing leaves them
        (half := tmp_path / "two" / "trainer" / f"checkpoint-{step}").mkdir()
        if state:
            (half / "trainer_state.json").write_text(state)
    with pytest.raises(PftoolsError, match="unfinished training with other learning_rate"):
        finetune_model(
            pruned_llama(), tiny_blocks(), output=tmp_path / "two", **{**options, "learning_rate": 1e-3}
        )
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
    with pytest.raises(Exception, match="load it with pftools"):
        pruned_llama().load_adapter(str(result.folder))  # transformers' own way


def test_an_adapter_is_refused_by_a_model_with_other_zeros(tmp_path):
    result = finetune_model(pruned_llama(), tiny_blocks(), **QUICK)
    with pytest.raises(PftoolsError, match="other zeros"):
        merge_adapter(pruned_llama(sparsity=0.6), result.adapter)
    with pytest.raises(PftoolsError, match="unknown merge 'mask'"):
        merge_adapter(pruned_llama(), result.adapter, merge="mask")
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


def test_a_block_longer_than_a_context_of_another_name_is_refused():
    sizes = {"d_model": 32, "n_layers": 1, "n_heads": 4, "vocab_size": 260, "max_seq_len": 24}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mpt", **sizes))
    with pytest.raises(PftoolsError, match="blocks have 32 tokens and the model's context is 24"):
        finetune_model(model, tiny_blocks(2, 32), steps=1, progress=False)


def test_what_peft_would_do_with_a_masked_adapter_is_refused():
    model = pruned_llama()

    class Merging(TrainerCallback):
        def on_train_end(self, args, state, control, model, **_):
            with pytest.raises(PftoolsError, match="PEFT's merge would fill the zeros"):
                model.merge_adapter()

    finetune_model(model, tiny_blocks(), callbacks=[Merging()], **QUICK)


def test_eight_bit_without_bitsandbytes_is_one_sentence(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(PftoolsError, match="pip install bitsandbytes"):
        finetune_model(pruned_llama(), tiny_blocks(), base="8bit", steps=1, progress=False)


def test_a_budget_in_tokens_is_met_exactly_across_the_ends_of_passes():
    result = finetune_model(
        pruned_llama(), tiny_blocks(10), tokens=16 * 24, blocks_per_step=4, progress=False
    )
    assert result.summary["tokens"] == 16 * 24 and result.losses["tokens"].tolist() == [
        64 * step for step in range(1, 7)
    ]
    order = training_order(10, 24, seed=3)
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10)) and order[:10] != order[10:20]
    assert order == training_order(10, 24, seed=3) != training_order(10, 24, seed=4)


def test_padded_rows_hold_a_line_each_and_only_real_tokens_count():
    rows = padded_rows(tiny_tokenizer(), ["abc", "", "de", "fghijklm"], 5)
    assert (
        rows.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
        and rows.real_tokens == 10
    )
    assert rows.labels[1].tolist() == [*rows.input_ids[1][:2].tolist(), -100, -100, -100]
    result = finetune_model(tiny_llama(), rows, epochs=1, blocks_per_step=3, progress=False)
    assert result.summary["tokens"] == 10 and result.losses["loss"].iloc[0] == pytest.approx(
        padded_loss(tiny_llama(), rows), rel=1e-5
    )


def padded_loss(model, rows):
    """Mean loss over the real tokens, a line at a time without its padding."""
    losses = []
    for ids, mask in zip(rows.input_ids, rows.attention_mask):
        ids = ids[mask.bool()]
        with torch.no_grad():
            losses.append(
                torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
            )
    return float(torch.cat(losses).mean())


def test_empty_corpora_are_refused():
    with pytest.raises(PftoolsError, match="no line with a token"):
        padded_rows(tiny_tokenizer(), ["", ""], 8)
    with pytest.raises(PftoolsError, match="training rows have shape"):
        finetune_model(tiny_llama(), torch.empty(0, 16, dtype=torch.long), steps=1, progress=False)


def test_the_published_preset_is_complete_and_gives_way_to_what_is_given():
    from pftools import settings

    published = settings.check(settings.Finetune, {"preset": "published"})
    assert (published.base, published.batch_size, published.blocks_per_step, published.epochs) == (
        "8bit",
        4,
        16,
        0.1,
    )
    assert (published.rank, published.alpha, published.dropout, published.targets) == (
        8,
        16,
        0.05,
        "published",
    )
    assert (published.learning_rate, published.warmup_steps, published.dtype, published.merge) == (
        2e-4,
        100,
        "float16",
        "dense",
    )
    assert not published.packing and published.gradient_checkpointing
    other = settings.check(
        settings.Finetune, {"preset": "published", "tokens": 100, "rank": 4, "dtype": "bfloat16"}
    )
    assert (other.epochs, other.tokens, other.rank, other.dtype) == (None, 100, 4, "bfloat16")


def test_a_budget_that_is_no_multiple_of_a_step_is_met_to_the_row_and_trains_from_its_first_step():
    result = finetune_model(pruned_llama(), tiny_blocks(), tokens=7 * 16, blocks_per_step=4, progress=False)
    assert result.losses["tokens"].tolist() == [4 * 16, 7 * 16] and result.summary["tokens"] == 7 * 16
    assert (result.losses["learning_rate"] > 0).all()
    once = finetune_model(pruned_llama(), tiny_blocks(), tokens=16, progress=False)
    assert once.summary["steps"] == 1 and any(b.abs().max() > 0 for _, b in once.adapter.factors.values())


def test_budgets():
    assert rows_of_budget(100, 512, 8, tokens=49_152, steps=None, epochs=None) == 96
    assert rows_of_budget(100, 512, 8, tokens=None, steps=None, epochs=0.5) == 50
    assert rows_of_budget(100, 512, 8, tokens=None, steps=5, epochs=None) == 40
    assert [warmup_of(4, steps) for steps in (1, 2, 12, 100)] == [0, 0, 4, 4]


def test_targets_by_name():
    model = tiny_llama()
    assert len(find_targets(model, "all-linear")) == 14
    assert len(find_targets(model, "attention")) == 8
    assert len(find_targets(model, "up_proj, down_proj")) == 4


def test_a_training_is_tracked_where_it_is_asked(tmp_path, monkeypatch):
    """Through transformers' own integrations: here one that only remembers; one that is missing is named."""
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    logged = []

    class Remembers(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            logged.append((args.project, args.run_name, logs))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "trackio", Remembers)
    options = {"steps": 2, "blocks_per_step": 2, "progress": False}
    finetune_model(tiny_llama(), tiny_blocks(), track="trackio", output=tmp_path / "mine", **options)
    assert [name for name, run, logs in logged if "loss" in logs] == ["pftools"] * 2
    assert {run for _, run, _ in logged} == {"mine"}
    monkeypatch.undo()
    for absent in ("trackio", "notebook_of_mine"):
        with pytest.raises(PftoolsError, match=f"track is '{absent}'.*pip install {absent}"):
            finetune_model(tiny_llama(), tiny_blocks(), track=absent, **options)


def test_what_gets_no_adapter_is_said_before_the_training_with_its_share(caplog):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 260}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **sizes)).float()
    said = []

    class Listener(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            said.extend(record.getMessage() for record in caplog.records)

    options = {"rank": 2, "steps": 1, "progress": False}
    found = finetune_model(model, tiny_blocks(), **options, callbacks=[Listener()])
    experts = 2 * 4 * 3 * 32 * 64
    attention = 2 * (32 * 32 + 2 * 16 * 32 + 32 * 32)
    whole = sum(parameter.numel() for parameter in model.parameters())
    share, of_all = experts / (experts + attention), experts / whole
    (sentence,) = [text for text in said if "get no adapter" in text]
    assert f"{share:.1%} of the linear weights, and {of_all:.1%} of the whole model" in sentence
    assert "mlp.experts.gate_up_proj, mlp.experts.down_proj" in sentence
    assert found.summary["left_out"] == pytest.approx(share)
    assert not any("expert" in name for name in found.adapter.factors)


def test_nothing_is_said_where_all_linear_weights_are_adapted(caplog):
    finetune_model(tiny_llama(), tiny_blocks(), rank=2, steps=1, progress=False)
    assert "get no adapter" not in caplog.text


def test_the_loss_of_training_is_that_of_the_logits_alone():
    """Models have losses of their own: GIT's leaves out as many tokens as an image would have."""
    from pftools.finetune.train import next_token_loss

    model, tokens = tiny_llama(), tiny_blocks()
    with torch.no_grad():
        outputs = model(input_ids=tokens, labels=tokens)
        assert torch.allclose(next_token_loss(outputs, tokens), outputs.loss, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"modules_to_save": ["lm_head"]}, "holds more than low-rank factors .*lm_head"),
        ({"bias": "lora_only"}, "holds more than low-rank factors .*bias"),
        ({"alpha_pattern": {"q_proj": 64}}, "has alpha_pattern: merge it with PEFT"),
    ],
)
def test_an_adapter_that_does_more_than_its_factors_is_refused(tmp_path, options, says):
    from peft import LoraConfig, get_peft_model

    from pftools.adapters import load_adapter

    model = tiny_llama(attention_bias=True)
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options))
    peft_model.save_pretrained(tmp_path)
    with pytest.raises(PftoolsError, match=says):
        load_adapter(tmp_path)


def test_a_model_that_passes_no_gradient_on_is_refused():
    from tests.families import zoo

    with pytest.raises(PftoolsError, match="ReformerModelWithLMHead passes no gradient on to adapters"):
        finetune_model(zoo.build("reformer"), tiny_blocks(), rank=2, steps=1, progress=False)

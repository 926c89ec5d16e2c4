"""Which weights go: every criterion, pattern, update and allocation against its oracle."""

import pytest
import torch

from pftools import criteria, prune, settings
from pftools.errors import PftoolsError
from pftools.layers import linear_modules, linear_weights, measured_sparsity
from pftools.prune import allocation, inputs, patterns, sparsegpt
from tests import oracles
from tests.tiny import tiny_blocks, tiny_llama


def weight_and_inputs(rows=48, columns=64, tokens=400, seed=0):
    """Inputs whose columns differ in size and are correlated, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator)
    x = (
        torch.randn(tokens, columns, generator=generator)
        @ mix
        * (0.2 + 3 * torch.rand(columns, generator=generator))
    )
    return torch.randn(rows, columns, generator=generator), x


def test_the_names_in_the_settings_are_those_of_the_registry():
    assert all(settings.check(settings.Prune, {"method": name}).method == name for name in prune.METHODS)
    assert list(criteria.methods_table().index) == list(prune.METHODS)
    with pytest.raises(
        PftoolsError, match="parameter method of the prune step is 'sparsgpt': did you mean 'sparsegpt'"
    ):
        settings.check(settings.Prune, {"method": "sparsgpt"})


def test_the_lowest_of_every_row_are_those_of_a_stable_sort():
    scores = torch.randint(0, 5, (50, 40), generator=torch.Generator().manual_seed(0)).float()  # full of ties
    for count in (0, 1, 13, 39):
        expected = torch.zeros_like(scores, dtype=torch.bool).scatter_(
            1, scores.argsort(dim=1, stable=True)[:, :count], True
        )
        assert torch.equal(patterns.lowest_per_row(scores, count), expected)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (3, 4), (1, 2), (5, 10)])
def test_the_lowest_of_every_group_are_those_of_a_stable_sort(n, m):
    for scores in (torch.rand(30, 40), torch.randint(0, 3, (30, 40)).float()):
        groups = scores.view(30, -1, m)
        expected = torch.zeros_like(groups, dtype=torch.bool).scatter_(
            2, groups.argsort(dim=2, stable=True)[..., : m - n], True
        )
        assert torch.equal(patterns.lowest_per_group(scores, patterns.Pattern(n, m)), expected.view(30, 40))


def test_wanda_equals_the_oracle_given_the_same_inputs():
    weight, x = weight_and_inputs()
    scores = criteria.wanda(weight, inputs.squared_column_sums(x).sqrt())
    assert torch.equal(~patterns.lowest_per_row(scores, 32), oracles.wanda_mask(weight, x, 0.5))
    for n, m in ((2, 4), (4, 8), (1, 4)):
        mask = ~patterns.lowest_per_group(scores, patterns.Pattern(n, m))
        assert torch.equal(mask, oracles.wanda_nm_mask(weight, x, n, m))


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.6])
def test_wandas_variant_equals_the_oracle(sparsity):
    weight, x = weight_and_inputs(rows=40, columns=120)
    weight[3] *= 0  # a row that is all zero
    scores = criteria.wanda(weight, x.norm(dim=0))
    pruned = patterns.choose(scores, sparsity, patterns.Pattern(), compare="share")
    assert torch.equal(~pruned, oracles.variant_mask(scores, sparsity))
    assert pruned.float().mean() == pytest.approx(sparsity, abs=0.02) and len(pruned.sum(dim=1).unique()) > 5


def test_ria_equals_the_oracle():
    weight, x = weight_and_inputs(9, 12)
    expected = oracles.ria_scores(weight, x.norm(dim=0))
    torch.testing.assert_close(criteria.ria(weight, x.norm(dim=0)).double(), expected, rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------------------------------------
# SparseGPT


def gram(x, batches=3):
    total = torch.zeros(x.shape[1], x.shape[1])
    for part in x.chunk(batches):
        inputs.add_gram(total, part)
    return total.triu() + total.triu(1).T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_second_moments_are_exact_products_summed_in_float32(dtype):
    _, x = weight_and_inputs(columns=300)
    x = x.to(dtype)
    expected = x.double().T @ x.double()
    assert (gram(x).double() - expected).abs().max() < 3e-6 * expected.abs().max()
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"


def test_the_inverse_root_is_that_of_the_damped_inverse():
    hessian = gram(weight_and_inputs()[1])
    root, damping = sparsegpt.inverse_root(hessian)
    damped = hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(64)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    assert damping == 0.01 and (root - expected).abs().max() < 1e-4 * expected.abs().max()


CASES = {
    "sparsegpt": ("unstructured", {}),
    "sparsegpt 2:4": ("2:4", {"n": 2, "m": 4}),
    "sparsegpt 3:6": ("3:6", {"n": 3, "m": 6}),
    "ablate_mag_iter": ("unstructured", {"scores": "mag"}),
    "ablate_wanda_iter": ("unstructured", {"scores": "wanda"}),
    "ablate_mag_iter 4:8": ("4:8", {"scores": "mag", "n": 4, "m": 8}),
    "ablate_wanda_iter 2:4": ("2:4", {"scores": "wanda", "n": 2, "m": 4}),
    "ablate_mag_seq": ("unstructured", {}),
    "ablate_wanda_seq": ("unstructured", {}),
    "ablate_wanda_seq 2:4": ("2:4", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_mended_weights_equal_the_float64_oracle(case):
    name = case.partition(" ")[0]
    pattern, options = CASES[case]
    shape = patterns.parse_pattern(pattern)
    columns = 252 if shape.group == 6 else 320  # more than two blocks of 128, the last one short
    one, x = weight_and_inputs(20, columns, tokens=900)
    other = weight_and_inputs(12, columns, seed=1)[0]
    x[:, 7] = 0  # a dead column
    method = prune.METHODS[name]
    solved = sparsegpt.solve([one, other], gram(x), method, 0.5, shape)
    for weight, found in zip((one, other), solved):
        if not method.renew:
            options = {
                **options,
                "mask": patterns.choose(
                    method.score(weight, x.norm(dim=0)), 0.5, shape, compare=method.compare
                ),
            }
        expected = oracles.sparsegpt(weight, x, 0.5, block=126 if shape.group == 6 else 128, **options)
        assert torch.equal(found.pruned | (found.weight == 0), expected == 0)
        assert (found.weight - expected).norm() < 1e-3 * expected.norm()
        assert found.pruned.float().mean() == pytest.approx(0.5, abs=0.01)
        error = ((weight - found.weight) @ x.T).norm() / (weight @ x.T).norm()
        assert found.output_error == pytest.approx(float(error), rel=2e-2)


def test_mending_is_better_than_only_choosing():
    weight, x = weight_and_inputs(64, 128, tokens=1000)
    x = x @ (torch.ones(128, 128) + torch.eye(128))  # strongly correlated: much can be made up for
    mended = sparsegpt.solve([weight], gram(x), prune.METHODS["ablate_wanda_seq"], 0.5, patterns.Pattern())[0]
    only = weight * ~mended.pruned
    assert mended.output_error < 0.5 * float(((weight - only) @ x.T).norm() / (weight @ x.T).norm())


def test_nearly_dependent_inputs_raise_the_damping_and_say_so(monkeypatch):
    real, calls = torch.linalg.cholesky_ex, []

    def fails_once(matrix):
        calls.append(1)
        lower, info = real(matrix)
        return lower, info + (len(calls) == 1)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", fails_once)
    weight, x = weight_and_inputs()
    assert (
        "damping raised to 10%"
        in sparsegpt.solve([weight], gram(x), prune.METHODS["sparsegpt"], 0.5, patterns.Pattern())[0].note
    )


# ------------------------------------------------------------------------------------------------------------
# Through a model


@pytest.mark.parametrize("method", prune.METHODS)
@pytest.mark.parametrize(
    ("pattern", "sparsity"), [("unstructured", 0.6), ("2:4", 0.5), ("4:8", 0.5), ("1:4", 0.75)]
)
def test_every_method_and_pattern_reaches_the_sparsity_asked(method, pattern, sparsity):
    model = tiny_llama()
    result = prune.prune_model(
        model, tiny_blocks(), method=method, pattern=pattern, sparsity=sparsity, progress=False
    )
    assert measured_sparsity(model) == pytest.approx(sparsity, abs=0.02)
    assert result.layers["measured"].tolist() == pytest.approx([sparsity] * 14, abs=0.04)
    assert (result.layers["output_error"] > 0).all() and (result.layers["score_kept"] < 1).all()
    found_by = {"magnitude": "estimated"} | {
        name: "measured" for name, rule in prune.METHODS.items() if rule.update
    }
    assert set(result.layers["error_is"]) == {found_by.get(method, "sampled")}
    for name, mask in result.masks.items():
        weight = model.get_parameter(name)
        assert not weight[~mask].any()
        if ":" in pattern:
            n, m = (int(part) for part in pattern.split(":"))
            assert (mask.view(-1, m).sum(dim=1) == n).all()
        elif prune.METHODS[method].compare == "row":
            assert ((~mask).sum(dim=1) == int(weight.shape[1] * sparsity)).all()
        if name in result.weights:
            assert torch.equal(result.weights[name], weight)
    assert bool(result.weights) == prune.METHODS[method].update


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_the_output_error_is_that_of_the_outputs(method):
    model, blocks = tiny_llama(), tiny_blocks(16, 32)
    dense, seen = tiny_llama(), []
    name = "model.layers.0.mlp.down_proj"
    hook = dense.get_submodule(name).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].flatten(0, 1))
    )
    with torch.no_grad():
        dense(blocks)
    hook.remove()
    table = prune.prune_model(model, blocks, method=method, inputs="dense", progress=False).layers.set_index(
        "weight"
    )
    before, after = (each.get_submodule(name).weight.detach() for each in (dense, model))
    error = float((seen[0] @ (before - after).T).norm() / (seen[0] @ before.T).norm())
    assert table.loc[f"{name}.weight", "output_error"] == pytest.approx(
        error, rel=0.02 if method == "sparsegpt" else 0.1
    )


@pytest.mark.parametrize("method", prune.METHODS)
def test_a_sparsity_of_zero_changes_nothing(method):
    model, before = tiny_llama(), tiny_llama().state_dict()
    result = prune.prune_model(model, tiny_blocks(), method=method, sparsity=0.0, progress=False)
    assert all(mask.all() for mask in result.masks.values()) and (result.layers["output_error"] == 0).all()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_sparsegpt_through_a_model_keeps_the_outputs_best():
    blocks = tiny_blocks(32, 32)
    dense = tiny_llama(hidden_size=64, intermediate_size=128)
    errors = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        model = tiny_llama(hidden_size=64, intermediate_size=128)
        prune.prune_model(model, blocks, method=method, progress=False)
        with torch.no_grad():
            errors[method] = float((model(blocks).logits - dense(blocks).logits).norm())
    assert errors["sparsegpt"] < 0.97 * errors["wanda"] < errors["wanda"] < errors["magnitude"], errors


def test_owl_equals_its_formula_and_keeps_the_total():
    model, blocks = tiny_llama(num_hidden_layers=4, initializer_range=0.5), tiny_blocks()
    statistics = prune.measure_activations(model, blocks, progress=False)
    layers = []
    for index in range(4):
        modules = {
            name: module
            for name, module in linear_modules(model).items()
            if name.startswith(f"model.layers.{index}.")
        }
        layers.append(
            torch.cat(
                [
                    (module.weight.detach().abs() * statistics.norms[name]).flatten()
                    for name, module in modules.items()
                ]
            )
        )
    expected = oracles.owl_sparsities(layers, 0.5, 0.08, 5.0)
    result = prune.prune_model(model, blocks, allocation="owl", statistics=statistics, progress=False)
    found = result.layers.groupby("layer")["asked"].first().tolist()
    assert found == pytest.approx(expected, abs=1e-9) and max(found) - min(found) == pytest.approx(0.16)
    assert measured_sparsity(model) == pytest.approx(
        0.5, abs=0.03
    )  # whole weights a row: int(32 x 0.46) is 14


def test_owl_weighs_layers_by_size_and_refuses_to_empty_one():
    assert allocation.owl([0.0, 1.0], [1, 3], 0.5, 0.1) == pytest.approx([0.65, 0.45])
    assert allocation.owl([0.2, 0.2], [1, 3], 0.5, 0.1) == [0.5, 0.5]
    with pytest.raises(PftoolsError, match="layer 0 103"):
        allocation.owl([0.0, 1.0], [1, 1], 0.95, 0.08)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", ["pruned", "dense"])
def test_reconstruction_brings_the_model_closer_and_keeps_the_masks(dtype, given):
    blocks, dense = tiny_blocks(16, 32), tiny_llama(dtype=dtype)
    errors = []
    for steps in (0, 60):
        model = tiny_llama(dtype=dtype)
        result = prune.prune_model(model, blocks, inputs=given, reconstruct_steps=steps, progress=False)
        assert all(not model.get_parameter(name)[~mask].any() for name, mask in result.masks.items())
        with torch.no_grad():
            errors.append(float((model(blocks).logits - dense(blocks).logits).float().norm()))
    assert errors[1] < 0.9 * errors[0]
    assert (result.layers["block_error"] < result.layers["block_error_before"]).all() and len(
        result.weights
    ) == 14


def test_the_histogram_counts_every_weight_above_its_lowest_bin():
    weight, norms = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), torch.ones(64)
    for method in prune.METHODS:
        table = prune.score_histogram(weight, norms, method=method, sparsity=0.5)
        assert (
            table["kept"].sum() == pytest.approx(64 * 32, abs=64)
            and 0.95 * 64 * 32 < table["pruned"].sum() <= 64 * 33
        )


MENDING = [name for name, method in prune.METHODS.items() if method.update]


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("method", MENDING)
def test_old_zeros_stay_zero_when_a_pruned_model_is_pruned_again(method, pattern):
    model = tiny_llama(hidden_size=256, intermediate_size=384, num_hidden_layers=1)
    prune.prune_model(model, tiny_blocks(), pattern=pattern, progress=False)
    before = {name: weight == 0 for name, weight in linear_weights(model).items()}
    result = prune.prune_model(model, tiny_blocks(32), method=method, pattern=pattern, progress=False)
    after = linear_weights(model)
    assert all(not after[name][zero].any() for name, zero in before.items())
    assert result.zeros_returned == 0 and measured_sparsity(model) == pytest.approx(0.5, abs=1e-3)
    assert not result.layers["note"].str.contains("came back").any()


@pytest.mark.parametrize("method", MENDING)
def test_zeros_for_which_a_pattern_has_no_room_come_back_and_are_counted(method):
    model = tiny_llama(num_hidden_layers=1)
    prune.prune_model(model, tiny_blocks(), progress=False)
    before = {name: weight == 0 for name, weight in linear_weights(model).items()}
    groups = {name: zero.view(-1, 4).sum(dim=1) for name, zero in before.items()}
    no_room = sum(int((zeros - 2).clamp_min(0).sum()) for zeros in groups.values())
    result = prune.prune_model(model, tiny_blocks(32), method=method, pattern="2:4", progress=False)
    returned = {name: int((linear_weights(model)[name][zero] != 0).sum()) for name, zero in before.items()}
    assert 0 < result.zeros_returned == sum(returned.values()) <= no_room
    assert result.layers.set_index("weight")["zeros_returned"].to_dict() == returned
    noted = result.layers[result.layers["zeros_returned"] > 0]["note"]
    assert noted.str.contains("zeros came back: the pattern has no room for them").all()


def test_a_model_that_is_pruned_further_keeps_its_zeros_in_every_block_of_columns():
    model = tiny_llama(hidden_size=256, intermediate_size=384, num_hidden_layers=1)
    for weight in linear_weights(model).values():
        weight.data[:, :128] = 0  # the first block has more zeros than a block may have, the others none
    result = prune.prune_model(model, tiny_blocks(32), method="sparsegpt", sparsity=0.7, progress=False)
    assert result.zeros_returned == 0 and measured_sparsity(model) == pytest.approx(0.7, abs=0.01)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_reconstruction_brings_no_zeros_back(pattern):
    model = tiny_llama(num_hidden_layers=1)
    prune.prune_model(model, tiny_blocks(), sparsity=0.6, progress=False)
    before = {name: weight == 0 for name, weight in linear_weights(model).items()}
    prune.prune_model(model, tiny_blocks(32), pattern=pattern, reconstruct_steps=20, progress=False)
    after = linear_weights(model)
    assert all(not after[name][zero].any() for name, zero in before.items())

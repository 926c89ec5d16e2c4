import numpy as np
import pytest
import torch

from pftools import weights
from pftools.errors import PftoolsError
from pftools.layers import linear_modules
from tests.tiny import tiny_llama


def test_statistics_agree_with_numpy_in_float64():
    model = tiny_llama(dtype=torch.bfloat16)
    table = weights.weight_statistics(model)
    assert len(table) == 14 and set(table["group"]) == {"attention", "MLP"}
    for row, module in zip(table.itertuples(), linear_modules(model).values()):
        exact = module.weight.detach().double().numpy()
        margin = 1.96 * exact.std(ddof=1) / np.sqrt(exact.size)
        assert row.mean == pytest.approx(exact.mean(), abs=1e-6)
        assert row.std == pytest.approx(exact.std(ddof=1), rel=1e-5)
        assert row.outside_share == pytest.approx((abs(exact - exact.mean()) > margin).mean(), abs=2e-3)


def test_differences_count_what_was_zeroed_and_what_was_filled():
    parent, child = tiny_llama(), tiny_llama()
    first, second = list(linear_modules(child))[:2]
    size = linear_modules(child)[first].weight.numel()
    linear_modules(child)[first].weight.data.flatten()[:10] = 0
    linear_modules(parent)[second].weight.data.flatten()[:20] = 0
    table = weights.weight_differences(child, parent, top_percent=1)
    assert table.loc[0, "zeroed"] == pytest.approx(10 / size) and table.loc[0, "filled"] == 0
    assert table.loc[1, "filled"] == pytest.approx(20 / linear_modules(child)[second].weight.numel())
    assert (
        table.loc[2:, ["mean_difference", "top_difference", "relative", "zeroed", "filled"]].to_numpy().max()
        == 0
    )


def test_the_top_difference_is_the_mean_of_the_largest():
    parent, child = tiny_llama(), tiny_llama()
    module = next(iter(linear_modules(child).values()))
    module.weight.data += torch.linspace(0, 1, module.weight.numel()).view_as(module.weight)
    exact = np.sort(np.linspace(0, 1, module.weight.numel()))[-52:].mean()  # 5% of 1,024, rounded up
    assert weights.weight_differences(child, parent, top_percent=5).loc[0, "top_difference"] == pytest.approx(
        exact, rel=1e-4
    )


def test_differences_by_group_are_over_all_weights_of_a_layer_together():
    parent, child = tiny_llama(), tiny_llama(seed=1)
    table = weights.weight_differences(child, parent, top_percent=10, by="group")
    assert table[["layer", "group"]].to_numpy().tolist() == [
        [0, "attention"],
        [0, "MLP"],
        [1, "attention"],
        [1, "MLP"],
    ]
    names = [name for name in linear_modules(child) if ".1.self_attn." in name]
    exact = np.sort(
        np.concatenate(
            [
                (child.get_submodule(name).weight - parent.get_submodule(name).weight)
                .detach()
                .double()
                .abs()
                .flatten()
                for name in names
            ]
        )
    )
    row = table.iloc[2]
    assert row["size"] == exact.size and row["mean_difference"] == pytest.approx(exact.mean(), rel=1e-5)
    assert row["top_difference"] == pytest.approx(exact[-int(np.ceil(exact.size / 10)) :].mean(), rel=1e-5)


def test_normal_numbers_lie_outside_the_margin_as_often_as_is_said():
    moments = weights._moments(torch.randn(4096, generator=torch.Generator().manual_seed(0)))
    assert moments["outside_share"] == pytest.approx(moments["outside_share_normal"], abs=0.005)
    assert moments["outside_share_normal"] == pytest.approx(1 - 1.96 / 64 * np.sqrt(2 / np.pi), abs=1e-3)


def test_models_of_other_shapes_are_not_compared():
    with pytest.raises(PftoolsError, match="cannot be compared"):
        weights.weight_differences(tiny_llama(), tiny_llama(intermediate_size=48))


def test_adapter_statistics_read_a_peft_folder(tmp_path):
    from peft import LoraConfig, get_peft_model

    get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).save_pretrained(
        tmp_path
    )
    table = weights.adapter_statistics(tmp_path)
    assert (
        len(table) == 2 * 2 * 2
        and set(table["module"]) == {"q_proj", "v_proj"}
        and set(table["layer"]) == {0, 1}
    )
    assert (table[table["matrix"] == "B"]["norm"] == 0).all() and (
        table[table["matrix"] == "A"]["norm"] > 0
    ).all()
    with pytest.raises(PftoolsError, match="no adapter"):
        weights.adapter_statistics(tmp_path / "elsewhere")


@pytest.mark.parametrize(("rows", "columns", "rank"), [(40, 30, 6), (3, 50, 8), (7, 7, 1)])
def test_the_effective_rank_is_that_of_the_product(rows, columns, rank):
    generator = torch.Generator().manual_seed(rank)
    a = torch.randn(rank, columns, generator=generator) * torch.logspace(0, -2, rank)[:, None]
    b = torch.randn(rows, rank, generator=generator)
    squares = np.linalg.svd((b.double() @ a.double()).numpy(), compute_uv=False) ** 2
    shares = squares[squares > 0] / squares.sum()
    found = weights.effective_rank(a, b)
    assert found == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-6)
    assert 1 - 1e-9 <= found <= min(rows, columns, rank) + 1e-9


def test_effective_ranks_at_their_ends():
    evenly, once = torch.eye(4, 9), torch.ones(4, 9)
    assert weights.effective_rank(evenly, torch.eye(5, 4)) == pytest.approx(4)
    assert weights.effective_rank(once, torch.randn(5, 4)) == pytest.approx(1)
    assert weights.effective_rank(evenly, torch.zeros(5, 4)) == 0


def test_effective_ranks_are_of_every_adapted_weight(tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    table = weights.effective_ranks(tmp_path)
    assert len(table) == 4 and set(table["module"]) == {"q_proj", "up_proj"} and set(table["rank"]) == {4}
    assert table["effective_rank"].between(1, 4).all()

"""Every causal language model: a third of all classes a day; `make families` walks all, with every check."""

from __future__ import annotations

import datetime

import pytest

from tests.families import zoo
from tests.families.checks import masks_equal_naive_wanda, run
from tests.families.walk import part_of

_TODAY = part_of(zoo.built(), f"{datetime.date.today().toordinal() % 3 + 1}/3")


@pytest.mark.parametrize("name", _TODAY)
def test_masks_are_exact_or_the_class_is_refused_in_one_sentence(name: str) -> None:
    outcome = run(masks_equal_naive_wanda, _TODAY[name])
    assert outcome.status not in ("WRONG", "TRACEBACK"), outcome.says
    assert outcome.status != "refused" or (outcome.says.strip() and "\n" not in outcome.says)


def test_nine_classes_of_ten_can_be_built() -> None:
    assert len(zoo.NOT_BUILT) <= len(zoo.kinds()) / 10
    assert set(zoo.NOT_BUILT) <= set(zoo.kinds())


@pytest.mark.parametrize("seed", [0, 1])
def test_the_zoo_leaves_no_weight_trivial(seed: int) -> None:
    """A weight of zeros or ones would hide a fault in all that it is multiplied with."""
    for kind in ("deepseek_v3", "gpt2", "mamba", "apertus"):
        model = zoo.build(kind, seed)
        for name, value in model.state_dict().items():
            assert value.numel() == 1 or value.float().std() > 0.01, f"{kind}: {name}"

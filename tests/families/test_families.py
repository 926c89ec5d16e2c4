"""The zoo itself: nine classes of ten, and no weight in it that would hide a fault."""

from __future__ import annotations

import pytest

from tests.families import zoo


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

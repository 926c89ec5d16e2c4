"""Every causal language model: each day another part of all classes; `make families` walks all of them.

The masks of a third of all classes are checked a day, and everything else (from disk, adapters, quantized
bases, shared beginnings) of a fifteenth: so all masks in three days, and all checks in fifteen.
"""

from __future__ import annotations

import datetime

import pytest

from tests.families import zoo
from tests.families.checks import CHECKS, masks_equal_naive_wanda, run
from tests.families.walk import part_of

_DAY = datetime.date.today().toordinal()
_MASKS = part_of(zoo.built(), f"{_DAY % 3 + 1}/3")
_ALL = part_of(zoo.built(), f"{_DAY % 15 + 1}/15")


@pytest.mark.parametrize("name", _MASKS)
def test_masks_are_exact_or_the_class_is_refused_in_one_sentence(name: str) -> None:
    outcome = run(masks_equal_naive_wanda, _MASKS[name])
    assert outcome.status not in ("WRONG", "TRACEBACK"), outcome.says
    assert outcome.status != "refused" or (outcome.says.strip() and "\n" not in outcome.says)


@pytest.mark.parametrize("name", _ALL)
def test_all_that_a_study_does_is_exact_or_the_class_is_refused_in_one_sentence(name: str) -> None:
    outcomes = {check: run(CHECKS[check], _ALL[name]) for check in CHECKS if check != "prune"}
    bad = {check: found.says for check, found in outcomes.items() if found.status in ("WRONG", "TRACEBACK")}
    assert not bad
    refused = [found.says for found in outcomes.values() if found.status == "refused"]
    assert all(says.strip() and "\n" not in says for says in refused)


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

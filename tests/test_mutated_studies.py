"""Two hundred study files that a slip has changed: each is understood, or refused in one sentence."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from pftools.errors import PftoolsError
from pftools.study import load_study, plan_study
from pftools.study.checks import check_plan
from pftools.study.costs import summary

_WHOLE = """\
name: whole
description: A study with a word of everything.
model: smollm2-135m
dtype: float32
orderings:
  - base
  - prune
  - "(P F)*2"
  - {ordering: P F, sparsities: [0.4]}
sparsities: [0.5, 0.6]
methods: [wanda, magnitude]
patterns: [unstructured]
merges: [auto]
seeds: [0, 1]
schedule: cubic
budget: total
tokens: 65536
calibrate: {corpus: pydocs, n_blocks: 4, block_length: 128}
prune: {inputs: dense}
finetune:
  corpus: pydocs
  block_length: 128
  rank: 4
  learning_rate: 1e-3
  targets: all-linear
evaluate: {corpus: pydocs, block_length: 128, tasks: [facts], limit: 20}
analyse: false
"""
_VALUES = (
    "010", "true", "null", "2:4", "-1", "0", "1e400", ".nan", ".inf", "''", "[]", "{}", "[[1]]",
    "{a: {b: c}}",
    "'word'", "0.5", "1000000000000", "~", "!!int x", "*gone", "&a [*a]", "\xff", "🦙", "yes", "[1, true]",
    "/nowhere", "./x", "a/b/c", "hf_" + 24 * "x", 30 * "9", "- x", "@x", "%x", "`x`",
)  # fmt: skip
_PIECES = ("{", "}", "[", "]", ":", "#", "'", '"', "\t", "  ", "\n", "-", "&", "*", "!", "\x00", "\x85", ",")


def mutated(number: int) -> bytes:
    """A whole study with one to three slips, the same for the same number."""
    choose = random.Random(number)
    text = _WHOLE
    for _ in range(choose.randint(1, 3)):
        lines = text.splitlines()
        place = choose.randrange(len(lines))
        kind = choose.choice(["value", "drop", "double", "swap", "piece", "letter", "indent", "key", "cut"])
        key, colon, _ = lines[place].partition(":")
        if kind == "value":
            lines[place] = f"{key}: {choose.choice(_VALUES)}"
        elif kind == "drop":
            del lines[place]
        elif kind == "double":
            lines.insert(choose.randrange(len(lines)), lines[place])
        elif kind == "swap":
            other = choose.randrange(len(lines))
            lines[place], lines[other] = lines[other], lines[place]
        elif kind in ("piece", "letter") and lines[place]:
            at = choose.randrange(len(lines[place]))
            piece = (
                choose.choice(_PIECES) if kind == "piece" else choose.choice("abcdefghijklmnopqrstuvwxyz01")
            )
            lines[place] = lines[place][:at] + piece + lines[place][at + (kind == "letter") :]
        elif kind == "indent":
            lines[place] = choose.choice(["  ", "    ", "\t", " "]) + lines[place]
        elif kind == "key":
            lines[place] = choose.choice(["1", "null", "[a]", "{a: b}", "''", "true"]) + colon + " x"
        elif kind == "cut":
            lines = lines[:place]
        text = "\n".join(lines) + "\n"
    content = text.encode()
    return content if number % 20 else content.replace(b"a", b"\xe4", 1)  # one in twenty is not UTF-8


@pytest.mark.parametrize("part", range(4))
def test_a_mutated_study_is_understood_or_refused_in_one_sentence(tmp_path, part):
    refused = 0
    for number in range(50 * part, 50 * part + 50):
        path = tmp_path / f"study{number}.yaml"
        path.write_bytes(mutated(number))
        try:
            plan = plan_study(load_study(path), runs=tmp_path / "runs")
            check_plan(plan)
            assert summary(plan)
        except PftoolsError as error:
            says = str(error)
            refused += 1
            assert "\n" not in says and says.endswith(".") and len(says) < 600, (number, says)
            assert re.search(r"study\d+\.yaml, line \d+", says), (number, says)
            assert re.search(r"[:;(]", says.partition("line ")[2]), (number, says)  # what to do comes after
    assert refused > 20


def test_the_study_that_is_mutated_is_whole(tmp_path):
    path = Path(tmp_path / "whole.yaml")
    path.write_text(_WHOLE)
    check_plan(plan_study(load_study(path), runs=tmp_path))

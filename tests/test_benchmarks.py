"""The benchmarks that need what is seldom there run to their end elsewhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(script, *words):
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(BENCHMARKS / script), *words]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.mark.slow
def test_all_claims_about_gpus_are_gone_through_in_a_tiny_model():
    said = run("gpu.py", "--tiny")
    assert "nothing about speed or memory" in said
    assert '"not measured": "2:4 products need a GPU with sparse tensor cores' in said
    assert said.count("not measured") == 1
    for words in ('"ratio":', "requests a second", "tokens a second", "masked / PEFT's"):
        assert words in said


def test_without_a_gpu_the_large_model_is_not_tried():
    assert run("gpu.py", "--store").startswith("There is no GPU here") and "\n{" not in run("gpu.py")

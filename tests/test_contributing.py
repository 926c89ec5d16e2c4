"""The paths that CONTRIBUTING.md describes exist, and enter each module once."""

import importlib
import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
PATHS = {
    title: re.findall(r"^\| (.+?) \| (.+?) \|(.*)\|$", part, flags=re.M)
    for title, part in zip(("sparsity", "learning_rate"), TEXT.split("\n### ")[1:])
}
NAME = re.compile(r"`([a-z_]+(?:\.[A-Za-z_]+)+)`")


@pytest.mark.parametrize("setting", PATHS)
def test_every_function_on_the_way_of_a_setting_exists(setting):
    for row in PATHS[setting]:
        for name in NAME.findall(" ".join(row)):
            if name.endswith(".parquet") or name.endswith(".ipynb"):
                continue
            home, _, leaf = name.rpartition(".")
            if home.rpartition(".")[2][0].isupper():  # a method
                home, _, owner = home.rpartition(".")
                assert hasattr(getattr(importlib.import_module(f"pftools.{home}"), owner), leaf), name
            else:
                assert hasattr(importlib.import_module(f"pftools.{home}"), leaf), name


@pytest.mark.parametrize("setting", PATHS)
def test_the_way_of_a_setting_has_few_modules_and_no_return(setting):
    modules = [NAME.findall(row[0])[0].rpartition(".")[0] for row in PATHS[setting] if NAME.findall(row[0])]
    assert 3 < len(modules) <= 7 and len(set(modules)) == len(modules)

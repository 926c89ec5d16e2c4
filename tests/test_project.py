"""What holds the project together: pins, conda file, published numbers."""

import tomllib
from pathlib import Path

import pandas as pd
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {line.partition("==")[0].lower().replace("_", "-"): Version(line.partition("==")[2]) for line in lines if "==" in line}


def test_every_dependency_is_pinned_to_a_version_that_it_allows():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [item for extra in project["optional-dependencies"].values() for item in extra]
    for text in project["dependencies"] + extras:
        requirement = Requirement(text)
        assert pins()[requirement.name.lower().replace("_", "-")] in requirement.specifier, text


def test_the_conda_file_is_in_step_with_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert f"python{project['requires-python']}" in dependencies
    (pip,) = [item["pip"] for item in dependencies if isinstance(item, dict)]
    assert f"--editable .[{','.join(project['optional-dependencies'])}]" in pip


def test_the_published_numbers_are_whole():
    table = pd.read_csv(ROOT / "data/published/prune_finetune_llm_llama7b.csv")
    assert len(table) == 36 and (table["sparsity_measured"] <= table["sparsity_requested"]).all()
    assert len(pd.read_csv(ROOT / "data/published/wanda_llama2_wikitext2_ppl.csv")) == 10

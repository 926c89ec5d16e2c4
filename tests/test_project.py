"""What holds the project together: pins, conda file, published numbers."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pandas as pd
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {
        line.partition("==")[0].lower().replace("_", "-"): Version(line.partition("==")[2])
        for line in lines
        if "==" in line
    }


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


def check_imports(folder):
    """What import-linter says of the package in ``folder``: (exit code, text)."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    found = subprocess.run(
        [*command, "--no-cache", "--no-logo"], cwd=folder, env=environment, capture_output=True, text=True
    )
    return found.returncode, found.stdout + found.stderr


def test_imports_point_downwards_and_one_that_points_upwards_is_found(tmp_path):
    shutil.copytree(ROOT / "pftools", tmp_path / "pftools", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    code, says = check_imports(tmp_path)
    assert code == 0, says
    module = tmp_path / "pftools/orderings.py"
    module.write_text(module.read_text() + "\n\ndef late():\n    from pftools import study\n")
    code, says = check_imports(tmp_path)
    assert code == 1 and "pftools.orderings is not allowed to import pftools.study" in says


def test_importing_pftools_loads_nothing_heavy():
    """Neither do the rooms that plan a study and those that every other imports."""
    light = ["needs", "study", "cli", "settings", "run_folder", "corpora"]
    planning = ["checks", "costs", "plan_study", "run_study", "load_study"]
    code = (
        f"import sys; from pftools import {', '.join(light)}\n"
        f"from pftools.study import {', '.join(planning)}\n"
        "heavy = ('torch', 'transformers', 'numpy', 'pandas', 'papermill', 'datasets', 'lm_eval')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_published_numbers_are_whole():
    table = pd.read_csv(ROOT / "data/published/prune_finetune_llm_llama7b.csv")
    assert len(table) == 36 and (table["sparsity_measured"] <= table["sparsity_requested"]).all()
    assert len(pd.read_csv(ROOT / "data/published/wanda_llama2_wikitext2_ppl.csv")) == 10

"""The project as a wheel, without a clone beside it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.tiny import save_tiny

ROOT = Path(__file__).parent.parent
_CARRIED = ("pftools", "notebooks", "data")
_FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with what the wheel holds, built from a copy of the project."""
    source = tmp_path_factory.mktemp("source")
    for name in _CARRIED:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in _FILES:
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*build, "--wheel-dir", "dist", "."], cwd=source, check=True, capture_output=True)
    (wheel,) = (source / "dist").glob("*.whl")
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def pftools(site, place, *words):
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-c", "from pftools.cli import main; main()", *words]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)


def test_a_wheel_carries_notebooks_studies_tasks_and_the_page(site):
    for name in _CARRIED[1:]:
        inside = site / "pftools/_shipped" / name
        wanted = [path.relative_to(ROOT / name) for path in (ROOT / name).rglob("*") if path.is_file()]
        hidden = [path for path in wanted if any(part.startswith((".", "__")) for part in path.parts)]
        assert not [path for path in wanted if path not in hidden and not (inside / path).exists()]
    kinds = ("*.html", "*.css", "*.js")
    pages = [path.relative_to(ROOT) for kind in kinds for path in (ROOT / "pftools").rglob(kind)]
    assert pages and all((site / page).exists() for page in pages)


def test_an_installed_pftools_plans_its_own_study_from_elsewhere(site, tmp_path):
    found = pftools(site, tmp_path, "plan", "quick")
    assert found.returncode == 0 and "4 results" in found.stdout, found.stderr


@pytest.mark.slow
def test_an_installed_pftools_runs_a_study_from_elsewhere(site, tmp_path):
    save_tiny(tmp_path / "llama")
    (tmp_path / "mine.yaml").write_text(
        "orderings: [base]\nmodel: ./llama\n"
        "evaluate: {block_length: 64, n_blocks: 2, tasks: [facts], limit: 3}\n"
    )
    found = pftools(site, tmp_path, "run", "mine.yaml", "--no-report")
    assert found.returncode == 0 and "perplexity" in found.stdout, found.stderr

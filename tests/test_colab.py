"""Colab: the first cell and the badge of every notebook, and an installer that replaces nothing."""

import os
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

from pftools import cells, colab

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ADDRESS = PROJECT["urls"]["Repository"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_has_the_badge_and_begins_with_the_cell(path):
    words, first, *others = nbformat.read(path, as_version=4).cells
    assert colab.badge(path.name, ADDRESS) in words.source.splitlines()
    assert first.source == colab.cell(ADDRESS)
    assert not any(colab._HOSTED in cell.source or cell.source.startswith(cells.COLAB) for cell in others)
    assert not any(source.startswith(cells.COLAB) for source in cells.of_notebook(path))  # nothing of a key
    assert colab.without_badge(words.source) == words.source.replace(
        colab.badge(path.name, ADDRESS) + "\n\n", ""
    )


def test_the_cell_does_nothing_elsewhere_and_makes_no_run_of_its_own():
    before, here = list(sys.modules), os.getcwd()
    names = {}
    exec(colab.cell(ADDRESS), names)
    assert (list(sys.modules), os.getcwd()) == (before, here)
    assert set(names) <= {"__builtins__", "sys"}
    assert cells.others([colab.cell(ADDRESS)], []) == ""


def test_on_colab_the_cell_fetches_a_clone_once_and_installs(monkeypatch):
    done = []
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace())
    monkeypatch.setattr(subprocess, "run", lambda command, check: done.append(command[:3]))
    monkeypatch.setattr(os, "chdir", lambda folder: done.append(folder))
    monkeypatch.setattr(os.path, "exists", lambda path: "git" in str(done))
    monkeypatch.setattr(sys, "path", list(sys.path))
    exec(colab.cell(ADDRESS), {})
    install = [sys.executable, "-m", "pftools.colab"]
    assert done == [["git", "clone", "--quiet"], "/content/pftools", install]
    exec(colab.cell(ADDRESS), {})
    assert done[3:] == ["/content/pftools", install] and "/content/pftools" in sys.path


def test_the_address_is_written_everywhere(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    monkeypatch.setattr(colab, "CLONE", tmp_path)
    before = {path.name: path.read_text() for path in (tmp_path / "notebooks").iterdir()}
    colab.write_address("https://github.com/somebody/kit")
    for path in (tmp_path / "notebooks").glob("*.ipynb"):
        words, first, *_ = nbformat.read(path, as_version=4).cells
        assert colab.badge(path.name, "https://github.com/somebody/kit") in words.source
        assert "/github/somebody/kit/blob/main/notebooks/" in words.source
        assert '"https://github.com/somebody/kit"' in first.source
    colab.write_address(ADDRESS)
    assert before == {path.name: path.read_text() for path in (tmp_path / "notebooks").iterdir()}
    assert (tmp_path / "pyproject.toml").read_text() == (ROOT / "pyproject.toml").read_text()


def test_what_stays_is_pinned_and_what_colab_is_by_itself_is_not_asked_for(monkeypatch):
    for name in ("torch", "numpy", "pandas", "pyarrow"):
        assert f"{name}=={metadata.version(name)}" in colab.constraints()
    asked = []

    def run(command, **_):
        if "--constraint" in command:
            asked.append(Path(command[command.index("--constraint") + 1]).read_text().splitlines())
        asked.append(command[command.index("--quiet") + 1 :])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    colab.install()
    pins, packages, clone = asked
    assert pins == colab.constraints() and clone == ["--no-deps", "--editable", str(ROOT)]
    left_out = [text for text in PROJECT["dependencies"] if text not in packages]
    assert left_out == [text for text in PROJECT["dependencies"] if text.startswith("jupyterlab")]


def test_packages_that_do_not_fit_are_one_sentence(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    with pytest.raises(SystemExit, match="do not fit what this runtime holds"):
        colab.install()

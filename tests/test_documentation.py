"""README and documentation do what they say: every block of code in them is executed, as it is printed.

A block begins with its file's name in a comment where it is a file. One that needs what a test does not have
(a cluster, a network, half an hour) has a comment above it that says so, and says where it is tested.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from pftools.study import load_study, plan_study
from tests.tiny import save_tiny

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"(?:<!-- (?P<why>[^>]*) -->\n)?^```(?P<kind>\w*)\n(?P<body>.*?)^```$", re.M | re.S)
_NAMED = re.compile(r"^# ([\w./-]+\.\w+)(, in METHODS)?\n")


@dataclass(frozen=True)
class Block:
    """kind: `sh`, `python`, `yaml`, `text` or nothing. why: what keeps a test from executing it."""

    kind: str
    body: str
    why: str

    @property
    def file(self) -> str:
        found = _NAMED.match(self.body)
        return found[1] if found else ""


def blocks_of(page: Path) -> list[Block]:
    found = _BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Block(block["kind"], block["body"], block["why"] or "") for block in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_not_executed_says_why(page):
    for block in blocks_of(page):
        if block.why:
            assert re.match(r"(not here: needs |elsewhere: tests/\w+)", block.why), block.why
            for test in re.findall(r"tests/\w+(?:\.py)?", block.why):
                assert (ROOT / test).exists(), test
        else:
            assert block.kind in ("sh", "python", "yaml", "text"), block.body


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_study_in_the_documentation_can_be_planned(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_my_files(tmp_path)
    for block in blocks_of(page):
        if block.file and not block.why:
            write(block, tmp_path)
        if block.kind == "yaml" and not block.why and "orderings:" in block.body:
            path = tmp_path / block.file
            assert plan_study(load_study(path)).steps
            assert yaml.safe_load(block.body)["name"] == path.stem


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.parametrize("page", ["README.md", "index.md", "your-own.md", "add-a-task.md"])
def test_the_blocks_of_a_page_run_one_after_the_other(page, tmp_path):
    """The model of the documentation, a few hundred tokens; the pages' commands in a shell."""
    make_my_files(tmp_path)
    (source,) = [path for path in PAGES if path.name == page]
    python: list[str] = []
    for block in blocks_of(source):
        if block.why:
            continue
        if block.file:
            write(block, tmp_path)
        elif block.kind == "python":
            python.append(block.body)
            run([sys.executable, "-c", "\n".join(python)], tmp_path)
        elif block.kind == "sh":
            run(["bash", "-e", "-c", block.body], tmp_path)


def write(block: Block, folder: Path) -> None:
    """A file of a page; the line with its name is no part of a text."""
    path = folder / block.file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block.body.partition("\n")[2] if block.kind == "text" else block.body)


def run(command: list[str], folder: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def test_the_documentation_is_built_without_a_warning_and_asks_nobody(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stderr.splitlines() if line.startswith(("WARNING", "ERROR"))]
    for page in (tmp_path / "site").rglob("*.html"):
        asked = re.findall(
            r"<(?:script|link|img)[^>]+(?:src|href)=[\"']?(https?:[^\"' >]+)", page.read_text()
        )
        assert not [link for link in asked if "canonical" not in link], (page.name, asked)
    assert "prune_checkpoint" in (tmp_path / "site" / "api.html").read_text()


def test_words_are_spelt_and_links_lead_somewhere():
    texts = [str(page.relative_to(ROOT)) for page in [*PAGES, ROOT / "CONTRIBUTING.md"]]
    done = subprocess.run(
        [sys.executable, "-m", "codespell_lib", *texts, "pftools", "notebooks"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            place, _, anchor = link.partition("#")
            if not re.match(r"https?:|mailto:", link) and place:
                assert (page.parent / place).exists(), f"{page.name}: {link}"


def make_my_files(folder: Path) -> None:
    """What the reader has: a text, conversations."""
    (folder / "my").mkdir()
    sentences = [
        f"Paragraph {n} is about the order of things, and says {n * n} words.\n\n" for n in range(400)
    ]
    (folder / "my" / "notes.txt").write_text("".join(sentences))
    talks = [[("user", f"What is {n} and {n}?"), ("assistant", f"It is {2 * n}.")] for n in range(50)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in talk]} for talk in talks]
    (folder / "my" / "talks.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def test_a_criterion_is_added_as_the_guide_says(tmp_path):
    """The guide's three blocks are put where it says, into a copy: the criterion is in the table, in help, in
    a plan, and prunes."""
    for name in ("pftools", "tests", "notebooks", "data"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "published")
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    function, line, test = [
        block.body.partition("\n") for block in blocks_of(ROOT / "docs/add-a-criterion.md")
    ]
    criteria = tmp_path / "pftools" / "criteria.py"
    text = criteria.read_text()
    above, below = text.split("@dataclass(frozen=True)\nclass Method", 1)
    opening = "METHODS: dict[str, Method] = {\n"
    below = below.replace(opening, opening + line[2])
    criteria.write_text(f"{above}{function[2]}\n\n@dataclass(frozen=True)\nclass Method{below}")
    tests = tmp_path / "tests" / "test_prune_methods.py"
    tests.write_text(tests.read_text() + "\n\n" + test[2])
    model = save_tiny(tmp_path / "model")
    seen = f"""
import torch
from pftools import criteria, models, settings
from pftools.prune import prune_model
from pftools.study import plan_study
from pftools.study.file import Study
from tests.tiny import tiny_blocks
assert criteria.methods_table().loc["root", "a weight's score"] == "|W_ij|^0.5 ||X_j||_2"
assert "root" in settings.Prune.model_fields["method"].description
words = dict(name="s", model={str(model)!r}, orderings=["P"], methods=["wanda", "root"])
plan = plan_study(settings.check(Study, words))
assert {{row.method for row in plan.rows}} >= {{"wanda", "root"}}, plan.rows
model, _ = models.load_model({str(model)!r}, dtype="float32")
prune_model(model, tiny_blocks(), method="root", progress=False)
assert models.measured_sparsity(model) == 0.5
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for command in (
        ["-c", seen],
        ["-m", "pytest", "-q", "-x", "tests/test_prune_methods.py", "-k", "root or registry"],
    ):
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

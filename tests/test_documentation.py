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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from IPython.core.interactiveshell import InteractiveShell
from typer.testing import CliRunner

from pftools.cli import app
from pftools.study import load_study, plan_study
from tests.hub import Hub, serving
from tests.made_up import seal_study
from tests.tiny import save_tiny

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NEWCOMER = "tests/newcomer/run"
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
            for test in re.findall(r"tests/\w+(?:\.py|/run)?", block.why):
                assert (ROOT / test).exists(), test
            if NEWCOMER in block.why:
                assert set(commands_of(block)) <= set((ROOT / NEWCOMER).read_text().splitlines()) | SERVED
        else:
            assert block.kind in ("sh", "python", "yaml", "text"), block.body


SERVED = {"make notebooks"}  # whose output is read and which is ended, so it stands in a longer line


def commands_of(block: Block) -> list[str]:
    """The lines of a shell's block, without what is said beside them."""
    return [line.partition("  #")[0].strip() for line in block.body.splitlines()]


# Commands in the running text: which file executes them, and by which word in it.
INLINE = {
    **dict.fromkeys(
        ("make study", "source .venv/bin/activate", "pip install -e .", "pftools doctor"), (NEWCOMER, "")
    ),
    "make notebooks": (NEWCOMER, ""),
    "papermill notebooks/02_prune.ipynb out.ipynb -p method ria -p n_blocks 8": (NEWCOMER, ""),
    "make test": (".ci/run", ""),
    "make docs": ("tests/test_documentation.py", '"mkdocs", "build", "--strict"'),
    "make figures": ("tests/test_sensitivity.py", '"figure.py"'),
    "make gallery": ("tests/test_gallery.py", "gallery.write"),
    "make bench": ("tests/test_benchmarks.py", "benchmarks"),
    "make families": ("tests/families/test_families.py", "walk"),
    "conda env create -f environment.yml": ("tests/test_project.py", "environment.yml"),
    "lm-eval run --include_path data/tasks": ("tests/test_lm_eval_files.py", '"--include_path"'),
    **dict.fromkeys(
        ("pftools settings finetune", "pftools settings prune"), ("tests/test_cli.py", '"settings"')
    ),
    "hf auth login": ("tests/hub.py", "HF_TOKEN"),  # what it leaves is a token
    "pftools plan STUDY --on t4": ("tests/test_needs.py", "paper_lines"),
    "python -m pftools.colab address URL": ("tests/test_colab.py", "address"),
    "pip install pre-commit && pre-commit install": (".pre-commit-config.yaml", "nbstripout"),
    "pftools report data/studies/quick.yaml --runs RUNS --single-file": (
        "tests/test_documentation.py",
        "--single-file)",
    ),
}
_COMMAND = re.compile(
    r"`((?:pftools|papermill|make|pip|python|source|conda|jupyter|pytest|hf|lm-eval) [^`]+)`"
)


def test_every_command_in_the_running_text_is_executed_somewhere():
    texts = [_BLOCK.sub("", page.read_text(encoding="utf-8")) for page in PAGES]
    found = {" ".join(command.split()) for text in texts for command in _COMMAND.findall(text)}
    commands = {command for command in found if not re.fullmatch(r"pftools [a-z-]+", command)} | {
        "pftools doctor"
    }
    assert commands == set(INLINE)
    for command, (place, word) in INLINE.items():
        assert (word or command) in (ROOT / place).read_text(), (command, place)


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


def executed(page: Path) -> bool:
    """Whether a page has blocks that a shell or Python can execute here."""
    return any(
        block.kind in ("sh", "python") and not block.why and not block.file for block in blocks_of(page)
    )


@pytest.fixture(scope="session")
def reader(tmp_path_factory):
    """Somebody who reads one page after the other: a new HOME, whose caches are empty before the first."""
    hub = Hub()
    model = save_tiny(tmp_path_factory.mktemp("hub") / "model", max_position_embeddings=4096)
    hub.add("models/Qwen/Qwen3-0.6B", model)
    home = tmp_path_factory.mktemp("home")
    with serving(hub):
        yield hub.environment(home)
    assert (home / ".cache").is_dir() and not hub.unknown


# What the blocks of a page leave, and a word in it.
LEFT = {
    "README.md": {
        "reports/mine/index.html": "prune_finetune",
        "folder/README.md": "base_model: Qwen/Qwen3-0.6B",
        "A/*/samples_facts_*.jsonl": "question",
    },
    "your-own.md": {"reports/mine/index.html": "prune_finetune", "folder/README.md": "SmolLM2-135M"},
    "add-a-task.md": {"reports/asked/index.html": "capitals", "folder/*/results_*.json": "capitals"},
}


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.parametrize("page", [page for page in PAGES if executed(page)], ids=lambda page: page.name)
def test_the_blocks_of_a_page_run_one_after_the_other(page, tmp_path, reader):
    """As they are printed, in a shell and in Python; the hub is one on this machine."""
    make_my_files(tmp_path)
    python: list[str] = []
    for block in blocks_of(page):
        if block.why:
            continue
        if block.file:
            write(block, tmp_path)
        elif block.kind == "python":
            python.append(block.body)
            run([sys.executable, "-c", "\n".join(python)], tmp_path, reader)
        elif block.kind == "sh":
            run(["bash", "-e", "-c", "\n".join(lines_of(block))], tmp_path, reader)
    for pattern, word in LEFT.get(page.name, {}).items():
        (file,) = tmp_path.glob(pattern)
        assert word in file.read_text(), file


_RUN = re.compile(r"runs/(\w+)-0123456789ab")


def lines_of(block: Block) -> Iterator[str]:
    """The lines of a shell's block: a run has the name that it has here, and there are results to compare."""
    for line in block.body.splitlines():
        if "compare A B" in line:
            yield "for name in A B; do pftools export $(ls -d runs/evaluate-* | head -1) $name; done"
        yield _RUN.sub(r"$(ls -d runs/\1-* | head -1)", line)


def test_a_report_in_one_file_is_shown_as_the_page_about_colab_says(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "colab.md").read_text()
    (command,) = re.findall(r"`(pftools report [^`]* --single-file)`", page)
    (shown,) = [block for block in blocks_of(ROOT / "docs" / "colab.md") if block.kind == "python"]
    study = seal_study(tmp_path, name="quick")
    monkeypatch.chdir(tmp_path)
    words = (
        command.replace("data/studies/quick.yaml", str(study)).replace("RUNS", str(tmp_path / "runs")).split()
    )
    done = CliRunner().invoke(app, words[1:])
    assert done.exit_code == 0, done.output
    assert "prune_finetune" in InteractiveShell.instance().run_cell(shown.body).result.data
    InteractiveShell.clear_instance()


def write(block: Block, folder: Path) -> None:
    """A file of a page; the line with its name is no part of a text."""
    path = folder / block.file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block.body.partition("\n")[2] if block.kind == "text" else block.body)


def run(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, input="y\n", timeout=900
    )
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
    texts = [str(page.relative_to(ROOT)) for page in PAGES]
    done = subprocess.run(
        [sys.executable, "-m", "codespell_lib", *texts, "pftools", "notebooks"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    for page in PAGES:
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


_SEEN = """
import nbformat, papermill
from pathlib import Path
from typer.testing import CliRunner
from pftools import report
from pftools.cli import app
from tests.made_up import seal_study
from tests.tiny import save_tiny

said = CliRunner().invoke(app, ["settings", "prune"]).output
assert "root" in " ".join(said.split()), said
save_tiny("tiny")
Path("mine.yaml").write_text("model: ./tiny\\norderings: [P]\\nmethods: [wanda, roto]\\n")
assert "did you mean 'root'" in str(CliRunner().invoke(app, ["plan", "mine.yaml"]).exception)

given = {"model": "tiny", "method": "root", "dtype": "float32", "n_blocks": 4, "block_length": 32}
papermill.execute_notebook(
    "notebooks/02_prune.ipynb", "out.ipynb", given, kernel_name="python3", progress_bar=False
)
cells = nbformat.read("out.ipynb", 4).cells
tables = [str(cell.get("outputs")) for cell in cells if "methods_table" in cell.source]
assert len(tables) == 1 and "|W_ij|^0.5 ||X_j||_2" in tables[0], tables
(run,) = Path("runs").glob("prune-*")

Path("report").mkdir()
study = seal_study(Path("report"), methods=["wanda", "root"], orderings=["prune"])
page = report.render(study, runs="report/runs", output="page.html").read_text()
assert ">root<" in page, "the report"
"""


@pytest.mark.slow
def test_a_criterion_is_added_as_the_guide_says(tmp_path):
    """The guide's three blocks are put where it says, into a copy: the criterion is in `pftools settings`, in
    the table of 02, which prunes by it, and in a report."""
    for name in ("pftools", "tests", "notebooks", "data"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    function, line, test = [
        block.body.partition("\n") for block in blocks_of(ROOT / "docs/add-a-criterion.md")
    ]
    criteria = tmp_path / "pftools" / "criteria.py"
    above, opening, below = criteria.read_text().partition("METHODS: dict[str, Method] = {\n")
    criteria.write_text(f"{above}{function[2]}\n\n{opening}{line[2]}{below}")
    tests = tmp_path / "tests" / "test_prune_methods.py"
    tests.write_text(tests.read_text() + "\n\n" + test[2])
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for command in (
        ["-c", _SEEN],
        ["-m", "pytest", "-q", "-x", "tests/test_prune_methods.py", "-k", "root or registry"],
    ):
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

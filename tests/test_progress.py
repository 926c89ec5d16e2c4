"""Signs of life where there is no terminal: a line for each step that ends, and a log inside of each step."""

from __future__ import annotations

import json
import re
import time

import pytest

from pftools import bars, run_folder, settings
from pftools.execute import progress, steps
from pftools.study import run_study
from tests.trivial import trivial_plan, write_notebooks

LINE = re.compile(
    r"^\d\d:\d\d:\d\d \[(\d)/3\] (\w+) .*: \d+ s, sparsity 50.0%, perplexity \d.00; "
    r"(none left|\d left, about .*, until \w+ \d\d:\d\d)$"
)


@pytest.mark.slow
def test_without_a_terminal_every_step_that_ends_is_a_line(tmp_path, capfd):
    plan = trivial_plan(tmp_path / "runs", orderings=["P"])
    assert run_study(plan, notebooks=write_notebooks(tmp_path / "notebooks")) == []
    lines = capfd.readouterr().err.splitlines()
    found = [LINE.match(line) for line in lines if "[" in line]  # others tell what is at work
    assert [match and match.groups()[:2] for match in found] == [
        ("1", "calibrate"),
        ("2", "prune"),
        ("3", "evaluate"),
    ]
    assert found[2][3] == "none left" and found[0][3].startswith("2 left, about")
    assert run_study(plan, notebooks=tmp_path / "notebooks") == []
    assert capfd.readouterr().err == ""  # nothing was to do


@pytest.mark.parametrize(
    ("results", "words"),
    [
        ({"n_blocks": 4}, []),
        ({"measured": 0.5, "perplexity_after": 20.256}, ["sparsity 50.0%", "held-out perplexity 20.26"]),
        (
            {"perplexity": 9, "tasks": {"facts": {"value": 0.25}, "wikitext2": {"value": 31.5}}},
            ["perplexity 9.00", "facts 25.0%", "wikitext2 31.50"],
        ),
        ({"perplexity_after": None, "tasks": None}, []),
    ],
)
def test_a_steps_result_in_words(results, words):
    assert progress.result_words(results) == words


def test_in_batch_the_log_of_a_step_moves_with_the_bar_inside_of_it(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv(run_folder.ATTEMPT, str(tmp_path))
    monkeypatch.setattr(steps, "_TELL_SECONDS", 0.05)
    cells = [{"outputs": ["x"], "execution_count": 1}, {"execution_count": 2}, {"execution_count": None}]
    (tmp_path / run_folder.NOTEBOOK).write_text(json.dumps({"cells": cells}))
    with steps._telling(tmp_path):
        for _ in bars.progress_bar(range(4), desc="pruning", unit="layer", mininterval=0):
            time.sleep(0.15)
    told = capfd.readouterr()
    lines = told.out.splitlines()
    assert told.err == "" and len(lines) >= 4
    assert all(re.match(r"\d+ s  cell 2($|  pruning: )", line) for line in lines)
    assert any(re.search(r"pruning: +50%.*2/4", line) for line in lines)
    assert steps._TELL_SECONDS < 10


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("", ""),
        ("a library says something\n", ""),
        ("8 s  cell 1\n", "8 s, cell 1"),
        (
            "8 s  cell 1\n16 s  cell 5  pruning:  50%|#### | 15/30 [00:08<00:08]\n",
            "16 s, cell 5, pruning 50%",
        ),
        (
            "24 s  cell 7  fine-tuning: 12step [00:09,  1.3step/s]\nlast words\n",
            "24 s, cell 7, fine-tuning 12",
        ),
        ("x" * 9999 + "\n32 s  cell 8\n", "32 s, cell 8"),
        ("32 s  cell 8\n40 s  cel", "32 s, cell 8"),
    ],
)
def test_how_far_a_step_is_in_words(tmp_path, lines, told):
    folder = tmp_path / "prune-0123456789ab"
    run_folder.log_path(folder).write_text(lines)
    assert steps.how_far(folder) == told


@pytest.mark.slow
def test_no_log_is_silent_while_a_step_of_any_kind_is_slow(tmp_path, capfd, monkeypatch):
    """Whatever a step does for long, also without a bar: the driver's lines move, and the step's own log."""
    monkeypatch.setattr(progress, "_QUIET", 0.5)
    plan = trivial_plan(tmp_path / "runs", orderings=["P F"])
    slow = dict.fromkeys(settings.STEPS, "time.sleep(11)")
    assert run_study(plan, jobs=4, notebooks=write_notebooks(tmp_path / "notebooks", **slow)) == []
    told = capfd.readouterr().err.splitlines()
    for step in plan.steps.values():
        assert any(re.search(rf"\b{re.escape(step.label)}: \d+ s, cell \d", line) for line in told), (
            step.label
        )
        assert re.search(r"^\d+ s  cell 2$", run_folder.log_path(step.folder).read_text(), re.M), step.label
    assert {step.parameters.step for step in plan.steps.values()} == {
        "calibrate",
        "prune",
        "finetune",
        "evaluate",
    }


@pytest.mark.slow
def test_a_slow_cell_of_an_open_notebook_shows_that_it_is_at_work(tmp_path):
    import nbformat
    from nbclient import NotebookClient

    cells = [
        "from pftools import bars; bars._QUIET = 0.3; bars.watch_cells()",
        "import time; bars.watch_cells(); time.sleep(1.0)",
        "bars.progress_bar(total=1, file=open('bar.txt', 'w')).close()",
        "bar = bars.progress_bar(total=2, file=open('bar.txt', 'w')); bar.refresh = lambda: print('again')\n"
        "time.sleep(1.0); bar.close()",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    shown = []

    class Watching(NotebookClient):
        def process_message(self, message, cell, index):
            if message["msg_type"].endswith("display_data"):
                shown.append((index, message["content"]["data"]["text/plain"]))
            return super().process_message(message, cell, index)

    Watching(notebook, resources={"metadata": {"path": str(tmp_path)}}).execute()
    clock = [text for index, text in shown if index == 1]
    assert len(clock) >= 3 and all(re.fullmatch(r"at work for \d s", text) for text in clock[:-1])
    assert re.fullmatch(r"(took|at work for) \d s", clock[-1]), "one clock, which the end of the cell stops"
    assert not [text for index, text in shown if index == 3 and "at work" in text]
    printed = [output["text"] for output in notebook.cells[3].outputs if output["output_type"] == "stream"]
    assert "again" in "".join(printed), "a bar is drawn anew while it stands still"


def test_a_terminal_shows_every_step_at_work_and_how_far_it_is(monkeypatch, capsys):
    import rich
    from rich.console import Console

    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr(rich, "_console", Console(width=80, force_terminal=True))
    plan = type("Plan", (), {"steps": dict.fromkeys("abcd")})()
    with progress.progress_of(plan, 3, visible=True) as told:
        told.at_work(["wanda 50%: 8 s, cell 9, pruning 30%", "F1, 8,192 tokens: 9 s, cell 9, fine-tuning 5%"])
        told.finished(None)
        told.at_work(["F1, 8,192 tokens: 99 s, cell 9, fine-tuning 50%"])
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", capsys.readouterr().out)
    last = shown.split("steps")[-1]
    assert "2/4" in last and "F1, 8,192 tokens: 99 s, cell 9, fine-tuning 50%" in last and "wanda" not in last

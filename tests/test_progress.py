"""Signs of life where there is no terminal: a line for each step that ends, and a log inside of each step."""

from __future__ import annotations

import json
import re
import time

import pytest

from pftools import bars, progress, run_folder, steps
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
    found = [LINE.match(line) for line in capfd.readouterr().err.splitlines()]
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

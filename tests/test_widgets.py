"""The planner of studies: what is typed is planned, saved, started and stopped."""

import sys
import time

import pytest

from pftools import study, widgets

FILE = """# A comment that only its author needs
orderings: [base, prune]
sparsities: [0.5]
evaluate: {tasks: [facts], limit: 3}
"""


@pytest.fixture
def planner(tmp_path):
    (tmp_path / "begin.yaml").write_text(FILE)
    return widgets.StudyPlanner(tmp_path / "begin.yaml", runs=tmp_path / "runs")


def test_what_is_typed_is_planned_at_once_and_saved_whole(planner, tmp_path):
    assert "2 results" in planner.said.value
    planner.fields["orderings"].value = "base, prune, (P F)*2"
    planner.fields["seeds"].value = "0, 1"
    planner.fields["name"].value = "mine"
    assert "6 results from 18 steps" in planner.said.value
    planner.save.click()
    saved = study.load_study(tmp_path / "mine.yaml")
    assert [entry.ordering for entry in saved.orderings] == ["base", "prune", "(P F)*2"]
    assert saved.seeds == [0, 1] and saved.evaluate == {"tasks": ["facts"], "limit": 3}
    assert (tmp_path / "begin.yaml").read_text() == FILE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["begin.yaml", "mine.yaml"]


@pytest.mark.parametrize(
    ("field", "value", "says"), [("orderings", "prun", "prun"), ("seeds", "one", "numbers with commas")]
)
def test_a_mistake_is_said_and_cannot_be_started(planner, field, value, says):
    planner.fields[field].value = value
    assert says in planner.said.value and planner.start.disabled and planner.save.disabled
    planner.fields[field].value = "prune" if field == "orderings" else "0"
    assert not planner.start.disabled and not planner.save.disabled


def test_a_run_is_watched_and_stopped(planner, monkeypatch):
    monkeypatch.setattr(planner, "_command", lambda: [sys.executable, "-c", "import time; time.sleep(60)"])
    planner.start.click()
    wait(lambda: "steps are finished" in planner.states.value)
    assert planner.start.disabled and not planner.stop.disabled and "to do" in planner.states.value
    planner.stop.click()
    wait(lambda: planner.stop.disabled)
    assert not planner.start.disabled


def wait(until):
    end = time.monotonic() + 60
    while not until():
        assert time.monotonic() < end
        time.sleep(0.05)

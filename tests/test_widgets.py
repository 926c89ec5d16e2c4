"""Widgets answer: what is typed is planned, saved, started and stopped; what is chosen is drawn."""

import sys
import time

import pandas as pd
import pytest

from pftools import choosers, figures, study, widgets
from tests.made_up import seal_study

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


def test_the_report_of_a_finished_study_opens_inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    planner = widgets.StudyPlanner(seal_study(tmp_path), runs=tmp_path / "runs")
    write = "import pathlib as p; f = p.Path('reports/made_up'); f.mkdir(parents=True); "
    write += "(f / 'index.html').write_text('<p>a \"report\"</p>')"
    monkeypatch.setattr(planner, "_command", lambda: [sys.executable, "-c", write])
    planner.start.click()
    wait(lambda: planner.stop.disabled and not planner.start.disabled)
    assert 'srcdoc="&lt;p&gt;a &quot;report&quot;&lt;/p&gt;"' in planner.report.value
    assert "9 of 9 steps are finished" in planner.states.value


def wait(until):
    end = time.monotonic() + 180
    while not until():
        assert time.monotonic() < end
        time.sleep(0.05)


ROWS = pd.DataFrame(
    [
        {
            "ordering": name,
            "seed": seed,
            "layer": layer,
            "std": layer + 0.1 * seed,
            "sparsity": 0.5,
            "step": "P",
        }
        for name in ("prune", "prune_finetune")
        for seed in (0, 1)
        for layer in range(4)
    ]
)


@pytest.fixture
def chooser():
    drawn = []

    def draw(rows, value):
        drawn.append((rows, value))
        return figures.lines_by_layer(rows, value, title=value, colour="ordering")

    found = choosers.Chooser(
        ROWS, by=["ordering", "seed", "layer", "step"], values=["std", "sparsity"], draw=draw
    )
    return found, drawn


def test_what_is_chosen_is_drawn(chooser):
    found, drawn = chooser
    assert list(found.fields) == ["ordering", "seed", "layer", "value"]  # a step is one only
    assert drawn[-1][0].equals(ROWS) and drawn[-1][1] == "std"
    found.fields["ordering"].value = ("prune",)
    found.fields["seed"].value = (1,)
    found.fields["layer"].value = (1, 2)
    found.fields["value"].value = "sparsity"
    rows, value = drawn[-1]
    expected = ROWS.query("ordering == 'prune' and seed == 1 and 1 <= layer <= 2")
    assert rows.equals(expected) and value == "sparsity" and found.said.value == "2 of 16 rows"
    assert {row["layer"] for rows in found.chart.to_dict()["datasets"].values() for row in rows} == {1, 2}


def test_no_row_is_said_and_drawn_by_nobody(chooser):
    found, drawn = chooser
    times = len(drawn)
    found.fields["seed"].value = ()
    assert (
        found.said.value == "0 of 16 rows: nothing to draw." and found.chart is None and len(drawn) == times
    )
    assert "image/svg+xml" not in found._repr_mimebundle_()


def test_without_a_kernel_a_widget_is_a_picture(chooser, planner):
    found, _ = chooser
    bundle = found._repr_mimebundle_()
    assert "std" in bundle["image/svg+xml"] and figures.LIVE in bundle
    assert "application/vnd.jupyter.widget-view+json" in bundle
    explorer = widgets.OrderingExplorer("(P F)*2")
    assert (
        figures.drawn_on_both_grounds(explorer._repr_mimebundle_()["image/svg+xml"]) == explorer.stairs.value
    )
    assert "2 results" in planner._repr_mimebundle_()["text/html"]


def test_an_ordering_that_is_typed_is_drawn_and_a_mistake_is_said():
    explorer = widgets.OrderingExplorer()
    before = explorer.stairs.value
    explorer.fields["ordering"].value = "P F P"
    assert explorer.said.value == "<code>P F P</code>" and explorer.stairs.value != before
    before = explorer.stairs.value
    explorer.fields["ordering"].value = "P ("
    assert "#b3541e" in explorer.said.value and explorer.stairs.value == before
    explorer.fields["ordering"].value = "P F P"
    explorer.fields["sparsity"].value = 0.8
    assert "80" in explorer.stairs.value

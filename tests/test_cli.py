"""The command line, on a study whose runs are made without notebooks."""

import pytest
from typer.testing import CliRunner

from pftools import cli, run_folder
from pftools.study import load_study, plan_study


@pytest.fixture
def call(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.out, "width", 300)
    (tmp_path / "one.yaml").write_text("model: somebody/model\norderings: [P, P F]\n")
    (tmp_path / "other.yaml").write_text("model: somebody/model\norderings: [F]\n")

    def run(*words, **options):
        found = CliRunner().invoke(cli.app, list(words), **options)
        return found.exit_code, found.output

    return run


def finish(study, steps=("calibrate", "prune", "finetune")):
    plan = plan_study(load_study(study))
    for step in plan.steps.values():
        if step.parameters.step in steps:
            run = run_folder.start(step.parameters)
            run.path("result.txt").write_text("something")
            run.seal(["result.txt"])
    return plan


def test_plan_tells_what_is_shared_and_what_is_there(call):
    code, shown = call("plan", "one.yaml")
    assert code == 0 and "2 results from 5 steps; a plan without sharing would take 7" in shown
    assert "0 of the steps are finished, 5 are to do" in shown and "Time" not in shown
    finish("one.yaml")
    _, shown = call("plan", "one.yaml")
    assert (
        "3 of the steps are finished, 2 are to do" in shown
        and "evaluate, of which there is none yet" not in shown
    )


def test_status_names_who_works_and_what_was_cut_short(call):
    plan = finish("one.yaml", steps=("calibrate", "prune"))
    folder = next(step.folder for step in plan.steps.values() if step.parameters.step == "finetune")
    with run_folder.attempting(folder):
        _, shown = call("status", "one.yaml")
        assert "begun 0 seconds ago" in shown and "2 finished, 2 to do, 1 running" in shown
    _, shown = call("status", "one.yaml")
    assert "was cut short" in shown and "2 finished, 3 to do" in shown


def test_clean_shows_what_would_go_and_asks(call):
    finish("one.yaml")
    other = finish("other.yaml")
    code, shown = call("clean", "one.yaml", input="n\n")
    (needless,) = [step.folder for step in other.steps.values() if step.parameters.step == "finetune"]
    assert needless.name in shown and "Remove these 1 runs?" in shown and run_folder.is_whole(needless)
    code, shown = call("clean", "one.yaml", input="y\n")
    assert code == 0 and not needless.exists()
    assert "Nothing to remove" in call("clean", "one.yaml")[1]


def test_a_mistake_is_one_sentence(call, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["pftools", "plan", "nowhere.yaml"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "there is no study file nowhere.yaml" in capsys.readouterr().err

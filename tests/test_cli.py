"""The command line, on a study whose runs are made without notebooks."""

import errno
import json
import os
import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pftools import checkpoints, cli, files, models, run_folder, settings
from pftools.errors import PftoolsError
from pftools.finetune import finetune_model
from pftools.prune import prune_model
from pftools.study import Study, load_study, plan_study, run_study
from tests.made_up import seal_study
from tests.tiny import save_tiny, tiny_blocks


@pytest.mark.parametrize("command", ["run", "report"])
def test_a_disk_that_cannot_be_written_to_is_one_sentence(tmp_path, monkeypatch, capsys, command):
    study = seal_study(tmp_path, orderings=["prune"]) if command == "report" else tmp_path / "one.yaml"
    if command == "run":
        study.write_text(f"model: {save_tiny(tmp_path / 'tiny')}\norderings: [P]\nevaluate: {{tasks: []}}\n")

    def read_only(path, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(sys, "argv", ["pftools", command, str(study), "--runs", str(tmp_path / "runs")])
    monkeypatch.setattr(Path, "mkdir", read_only)
    capsys.readouterr()  # a bar of the model that was saved
    with pytest.raises(SystemExit):
        cli.main()
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("pftools: ") and "Read-only file system" in said and "--runs" in said


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


def test_all_that_can_be_set_is_listed(call):
    for name, kind in {"study": Study, **settings.STEPS}.items():
        code, shown = call("settings", name)
        assert code == 0
        for field, about in kind.model_fields.items():
            (row,) = [line for line in shown.splitlines() if line.startswith(f"│ {field} ")]
            assert about.description and about.description[:40] in row, f"{name}: {field} says what it is"
            assert about.is_required() or json.dumps(about.default) in row
    assert call("settings")[1] == call("settings", "study")[1]
    assert "did you mean 'finetune'" in str(CliRunner().invoke(cli.app, ["settings", "finetun"]).exception)


def test_a_mistake_is_one_sentence(call, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["pftools", "plan", "nowhere.yaml"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "there is no study file nowhere.yaml" in capsys.readouterr().err


def refused(call, *words):
    """The sentence that a command refuses with."""
    with pytest.raises(PftoolsError) as caught:
        assert call(*words) is None  # not reached: the error of the command is raised again
    return str(caught.value)


@pytest.fixture
def strictly(call):
    """As `call`, and an error is raised and not only told."""

    def run(*words):
        found = CliRunner().invoke(cli.app, list(words), catch_exceptions=False)
        return found.output

    return run


# ------------------------------------------------------------------------------------------------------------
# Loss


def test_clean_from_another_folder_removes_nothing_of_a_study_with_a_relative_model(
    call, tmp_path, monkeypatch
):
    save_tiny(tmp_path / "models" / "llama")
    (tmp_path / "mine.yaml").write_text("model: models/llama\norderings: [P]\n")
    plan = finish("mine.yaml")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, shown = call("clean", "../mine.yaml", "--runs", "../runs", "--yes")
    assert code == 0 and "Nothing to remove" in shown
    monkeypatch.chdir(tmp_path)
    assert [step.parameters.step for step in plan.missing()] == ["evaluate"]


def test_clean_never_removes_what_is_no_run(call, tmp_path):
    finish("one.yaml")
    strangers = [
        "my-0123456789ab",
        "prune-0123456789ab",
        "notes",
        ".work/mine",
        ".replaced/prune-0123456789ab.x",
    ]
    for name in strangers:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "thesis.txt").write_text("years of work")
    copy = tmp_path / "runs" / "my-ffffffffffff"  # with a record of another run
    run = next(path for path in (tmp_path / "runs").glob("prune-*/run.json"))
    copy.mkdir()
    (copy / "run.json").write_bytes(run.read_bytes())
    code, shown = call("clean", "other.yaml", "--yes")
    assert code == 0 and "Removed" in shown and not run.exists()
    assert all((tmp_path / "runs" / name / "thesis.txt").exists() for name in strangers) and copy.exists()


def test_a_home_folder_is_understood_in_every_command(call, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    plan = plan_study(load_study("one.yaml"), runs="~/runs")
    assert plan.runs == str(tmp_path / "home" / "runs")
    run_folder.start(next(iter(plan.steps.values())).parameters).seal([])
    for command in ("plan", "status"):
        assert "finished" in call(command, "one.yaml", "--runs", "~/runs")[1]
    assert "Removed 1 runs" in call("clean", "other.yaml", "--runs", "~/runs", "--yes")[1]
    for kind in settings.STEPS.values():  # by hand, the folder of a notebook's parameters cell
        given = settings.check(kind, {"runs": "~/runs", "model": "~/llama"})
        assert given.runs == str(tmp_path / "home/runs") and given.model == str(tmp_path / "home/llama")
    assert settings.check(settings.Compare, {"save_figures": "~/figures"}).save_figures.startswith("/")
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("command", ["plan", "status", "run", "report", "clean"])
def test_a_file_as_the_folder_of_runs_is_one_sentence(strictly, tmp_path, command):
    (tmp_path / "file").write_text("text")
    for runs in ("file", "file/runs"):
        says = refused(strictly, command, "one.yaml", "--runs", runs)
        assert "is a file: give a folder" in says and "\n" not in says


@pytest.mark.parametrize("command", ["plan", "status", "run", "report", "clean"])
def test_a_study_that_is_a_folder_or_no_text_is_one_sentence(strictly, tmp_path, command):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.yaml").write_text("orderings: [P]")
    (tmp_path / "latin.yaml").write_bytes(b"orderings: [P]\ndescription: caf\xe9\n")
    (tmp_path / "utf16.yaml").write_text("orderings: [P]", encoding="utf-16")
    assert "is a folder: give a file, such as folder/mine.yaml" in refused(strictly, command, "folder")
    assert "latin.yaml, line 2: the file is not UTF-8" in refused(strictly, command, "latin.yaml")
    assert "utf16.yaml, line 1: the file is not UTF-8" in refused(strictly, command, "utf16.yaml")


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_all_files_of_runs_and_exports_are_readable_as_the_umask_says(tmp_path, umask):
    before = os.umask(umask)
    try:
        model = str(save_tiny(tmp_path / "tiny"))
        given = {"dtype": "float32", "runs": str(tmp_path / "runs")}
        run = run_folder.start(settings.Prune(model=model, **given))
        network, _ = models.load_model(model, dtype="float32")
        masks = prune_model(network, tiny_blocks(), progress=False).masks
        pruned = run.seal(checkpoints.save_prune(run, masks, dict(network.named_parameters())), measured=0.5)
        run = run_folder.start(settings.Finetune(model=str(pruned), **given))
        finetune_model(network, tiny_blocks(), steps=1, output=run.path(""), progress=False)
        tuned = run.seal(checkpoints.save_finetune(run, "masked"), measured=0.5)
        exported = checkpoints.export(tuned, tmp_path / "exported", dtype="float32")
    finally:
        os.umask(before)
    found = [path for folder in (pruned, tuned, exported) for path in folder.rglob("*")]
    assert {path.suffix for path in found} >= {".safetensors", ".json"}
    for path in found:
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        assert path.stat().st_mode & 0o777 == wanted, path


# ------------------------------------------------------------------------------------------------------------
# Remedies


def test_a_remedy_repeats_what_was_given(call, strictly, tmp_path, monkeypatch):
    save_tiny(tmp_path / "tiny")
    (tmp_path / "mine.yaml").write_text("model: tiny\norderings: [P]\ncalibrate: {block_length: 64}\n")
    with open("mine.yaml", "a") as file:
        file.write("finetune: {block_length: 64}\nevaluate: {block_length: 64}\n")
    given = ["mine.yaml", "--runs", "my runs", "--jobs", "3"]
    command = shlex.join(["pftools", "run", *given])
    failure = run_study.__globals__["Failure"]("prune-0123456789ab", 3, "a cause.")
    monkeypatch.setattr("pftools.study.run_study", lambda *_, **__: [failure])
    says = refused(strictly, "run", *given)
    assert f"`{command}`" in says and "mend the cause" in says

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("pftools.study.run_study", interrupted)
    code, shown = call("run", *given)
    assert code == 130 and f"`{command}` goes on from there" in shown
    says = refused(strictly, "report", *given[:3])
    assert "`pftools run mine.yaml --runs 'my runs'`" in says


def test_a_folder_is_whole_or_not_there_and_shared(tmp_path):
    with files.replacing(tmp_path / "folder") as partial:
        partial.mkdir()
        (partial / "secret").touch(mode=0o600)
    assert (tmp_path / "folder" / "secret").stat().st_mode & 0o044
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["secret"]

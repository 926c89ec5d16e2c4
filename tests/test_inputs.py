"""What runs were made from: one from other contents than are there now is not used any more."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from typer.testing import CliRunner

from pftools import cells, cli, contents, inputs, run_folder, settings, shipped
from pftools.errors import PftoolsError
from pftools.study import load_study, plan_study, run_study
from tests.tiny import save_tiny
from tests.trivial import trivial_plan, write_notebooks

ROWS = {
    "text": [{"text": f"document {number} " * 20} for number in range(30)],
    "mmlu": [{"question": "1+1?", "subject": "sums", "choices": ["1", "2", "3", "4"], "answer": 1}] * 8,
}


def write(root, name, rows):
    path = root / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def data_folder(root):
    """A data root with all that the study below reads."""
    for split in ("train", "validation", "test"):
        write(root, f"mine/{split}", ROWS["text"])
        write(root, f"wikitext2/{split}", ROWS["text"])
    for split in ("dev", "test"):
        write(root, f"mmlu/{split}", ROWS["mmlu"])
    return root


def seal(parameters, **results):
    run = run_folder.start(parameters, inputs=inputs.visible)
    run.path("table.txt").write_text(json.dumps(results))
    run.seal(["table.txt"], tasks={}, measured=0.5, perplexity=5.0, **results)
    return run.folder


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A model, a data root, and a study of P F whose steps are all sealed: `world.plan()`."""
    save_tiny(tmp_path / "tiny")
    monkeypatch.setenv("PFTOOLS_DATA", str(data_folder(tmp_path / "data")))
    study = tmp_path / "mine.yaml"
    study.write_text(
        "orderings: [P F]\nmodel: tiny\nanalyse: true\n"
        "calibrate: {corpus: mine, block_length: 64}\nfinetune: {corpus: mine, block_length: 64}\n"
        "evaluate: {corpus: wikitext2, tasks: [mmlu, facts]}\n"
    )
    made = World(tmp_path, study)
    made.seal()
    return made


class World:
    def __init__(self, folder, study):
        self.folder, self.study = folder, study

    def plan(self):
        return plan_study(load_study(self.study), runs=self.folder / "runs")

    def seal(self):
        for step in self.plan().missing():
            seal(step.parameters)

    def open_steps(self):
        return [step.parameters.step for step in self.plan().missing()]


ALL = ["calibrate", "prune", "finetune", "evaluate", "analyse"]


def test_a_finished_study_stays_finished(world):
    assert world.open_steps() == []
    record = run_folder.read_record(world.plan().rows[0].evaluation)
    assert set(record["inputs"]) == {
        "model",
        "corpus/test",
        "task/mmlu",
        "task/facts",
        "data/mmlu/test",
        "data/mmlu/dev",
        "data/facts/facts.csv",
    }


@pytest.mark.parametrize(
    ("name", "again"),
    [
        ("mine/train", ALL),  # the calibration split is lent by train
        ("mine/validation", ["finetune", "evaluate", "analyse"]),
        ("mine/test", []),  # nobody reads it
        ("wikitext2/test", ["evaluate"]),
        ("wikitext2/train", []),
        ("mmlu/test", ["evaluate"]),
        ("mmlu/dev", ["evaluate"]),
    ],
)
def test_a_data_file_with_other_contents_makes_its_steps_anew(world, name, again):
    path = world.folder / "data" / f"{name}.jsonl"
    whole = path.read_text()
    path.write_text(whole.replace("1", "2"))
    assert world.open_steps() == again
    path.write_text(whole)  # put back: all is as it was
    assert world.open_steps() == []


def test_another_data_root_counts_by_what_it_holds(world, monkeypatch):
    copy = shutil.copytree(world.folder / "data", world.folder / "copy")
    monkeypatch.setenv("PFTOOLS_DATA", str(copy))
    assert world.open_steps() == []
    write(copy, "wikitext2/test", ROWS["text"][:25])
    assert world.open_steps() == ["evaluate"]
    monkeypatch.setenv("PFTOOLS_DATA", str(world.folder / "not-here"))
    assert world.open_steps() == []  # what is not on this machine is taken to be as it was


def test_a_data_root_in_the_study_counts_too(world, monkeypatch):
    other = shutil.copytree(world.folder / "data", world.folder / "other")
    write(other, "mmlu/test", ROWS["mmlu"][:7])
    world.study.write_text(world.study.read_text().replace("{corpus: wiki", "{data: other, corpus: wiki"))
    assert world.open_steps() == ["evaluate"]


def test_a_changed_task_file_makes_the_evaluation_anew(world, monkeypatch):
    from pftools.evaluate import task_names

    tasks = shutil.copytree(shipped.DATA / "tasks", world.folder / "tasks")
    monkeypatch.setattr(task_names, "TASKS", tasks)
    assert world.open_steps() == []
    path = tasks / "facts.yaml"
    path.write_text(path.read_text().replace("{{stem}}", "Q: {{stem}}"))
    assert world.open_steps() == ["evaluate"]


def test_another_python_has_another_pydocs(tmp_path, monkeypatch):
    parameters = settings.Calibrate(model="somebody/model", runs=str(tmp_path))
    seal(parameters)
    assert inputs.changed(parameters) is None
    monkeypatch.setattr(inputs, "_of_pydocs", lambda: "0" * 64)
    assert "corpus/calibration" in inputs.changed(parameters)


def test_a_task_of_lm_eval_counts_by_its_version_and_its_data(tmp_path, monkeypatch):
    task = {"path": None, "metrics": ["acc"], "parts": [], "data": "allenai/ai2_arc", "files": []}
    monkeypatch.setattr(inputs.task_names, "lm_eval_index", lambda: {"arc": task})
    monkeypatch.setattr(contents, "hub_revision", lambda kind, name: f"revision of {kind} {name}")
    inputs._index_for.cache_clear()
    parameters = settings.Evaluate(model="somebody/model", tasks=["arc"], runs=str(tmp_path))
    told = inputs.visible(parameters)
    assert told["data/allenai/ai2_arc"] == "revision of datasets allenai/ai2_arc"
    seal(parameters)
    monkeypatch.setattr(inputs.metadata, "version", lambda package: "99.9")
    assert "other contents of task/arc" in inputs.changed(parameters)
    inputs._index_for.cache_clear()


def test_task_files_of_a_folder_count_by_their_contents_wherever_it_is(tmp_path, monkeypatch):
    (tmp_path / "project" / "tasks" / "deep").mkdir(parents=True)
    (tmp_path / "questions.jsonl").write_text('{"q": "1+1?", "a": "2"}')
    task = tmp_path / "project" / "tasks" / "deep" / "sums.yaml"
    task.write_text(
        "task: sums\ndataset_path: json\ntest_split: test\noutput_type: generate_until\n"
        "doc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\nmetric_list: [{metric: exact_match}]\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'questions.jsonl'}}}}}\n"
    )
    study = tmp_path / "project" / "mine.yaml"
    study.write_text("orderings: [base]\nmodel: somebody/model\nevaluate: {include: tasks, tasks: [sums]}\n")

    def planned(file, runs=tmp_path / "runs"):
        (step,) = plan_study(load_study(file), runs=runs).steps.values()
        return step

    first = planned(study)
    seal(first.parameters)
    assert set(run_folder.read_record(first.folder)["inputs"]) == {"data/questions.jsonl", "corpus/test"}
    monkeypatch.chdir(tmp_path)  # from elsewhere, and another place, it is the same run
    assert planned("project/mine.yaml").name == first.name
    shutil.copytree(tmp_path / "project", tmp_path / "copy")
    assert planned("copy/mine.yaml").name == first.name and planned(study).is_finished()
    (tmp_path / "questions.jsonl").write_text('{"q": "1+2?", "a": "3"}')
    assert "other contents of data/questions.jsonl" in planned(study).outdated()
    task.write_text(task.read_text().replace("{{q}}", "Q: {{q}}"))
    assert planned(study).name != first.name
    study.write_text(study.read_text().replace("include: tasks", "include: tsaks"))
    with pytest.raises(PftoolsError, match="there is no folder of tasks 'tsaks'"):
        load_study(study)


@pytest.mark.parametrize(
    "text", ["metadata: words", "metadata: {files: [a]}", "metadata: {files: {test: 3}}", "[", "1"]
)
def test_an_odd_task_file_is_no_traceback(tmp_path, monkeypatch, text):
    monkeypatch.setattr(inputs.task_names, "TASKS", tmp_path)
    (tmp_path / "odd.yaml").write_text(text)
    assert "task/odd" in inputs.visible(settings.Evaluate(model="somebody/model", tasks=["odd"]))


@pytest.mark.parametrize("kind", ["models", "datasets"])
def test_what_comes_from_the_hub_counts_by_its_revision(tmp_path, monkeypatch, kind):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("PFTOOLS_DATA", raising=False)
    name = {"models": "models--somebody--model", "datasets": "datasets--Salesforce--wikitext"}[kind]
    parameters = settings.Calibrate(model="somebody/model", corpus="wikitext2", runs=str(tmp_path / "runs"))

    def load(revision):
        folder = tmp_path / "hub" / name
        (folder / "snapshots" / revision).mkdir(parents=True)
        os.utime(folder / "snapshots" / revision, (int(revision[0]), int(revision[0])))
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(revision)

    run = run_folder.start(parameters, inputs=inputs.visible)
    load("1" * 40)  # the step itself fetches it
    run.seal([])
    told = run_folder.read_record(run.folder)["inputs"]
    assert list(told.values()) == [f"revision {'1' * 40}"]
    assert inputs.changed(parameters) is None
    load("2" * 40)
    assert "other contents of" in inputs.changed(parameters)


def test_a_parent_that_was_made_again_from_other_text_takes_its_children_with_it(world):
    write(world.folder / "data", "mine/train", ROWS["text"][:20])
    plan = world.plan()
    why = plan.outdated()
    assert [plan.steps[name].parameters.step for name in why] == ALL
    assert "made from other contents of corpus/calibration" in list(why.values())[0]
    assert "which is made again" in list(why.values())[1]
    parent, child = list(plan.steps.values())[:2]
    seal(parent.parameters, answer=1)  # by hand: the old run is set aside, and not lost
    assert run_folder.read_record(parent.folder)["results"]["answer"] == 1
    assert len(list((world.folder / "runs" / ".replaced").glob(f"{parent.name}.*/run.json"))) == 1
    assert parent.is_finished() and "other contents of calibration" in child.outdated()


def test_an_input_that_changes_while_the_step_runs_is_never_sealed(world):
    step = next(step for step in world.plan().steps.values() if step.parameters.step == "finetune")
    run_folder.remove(step.folder)
    run = run_folder.start(step.parameters, inputs=inputs.visible)
    write(world.folder / "data", "mine/train", ROWS["text"][:20])
    with pytest.raises(PftoolsError, match="corpus/train was changed while .* nothing is sealed"):
        run.seal([])
    assert not run_folder.is_finished(step.folder)


def test_status_and_plan_say_which_input_has_changed(world, monkeypatch):
    monkeypatch.setattr(cli.out, "width", 400)
    write(world.folder / "data", "wikitext2/test", ROWS["text"][:25])
    for command in ("status", "plan"):
        told = CliRunner().invoke(cli.app, [command, str(world.study), "--runs", str(world.folder / "runs")])
        assert told.exit_code == 0, told.output
        assert "was made from other contents of corpus/test" in told.output and "to do" in told.output


def test_runs_that_were_set_aside_go_with_clean_and_only_these(world):
    write(world.folder / "data", "wikitext2/test", ROWS["text"][:25])
    world.seal()
    stranger = world.folder / "runs" / ".replaced" / "my-0123456789ab.txt"
    stranger.mkdir()
    found = run_folder.unneeded(world.folder / "runs", set(world.plan().steps))
    assert [path.name.partition("-")[0] for path in found] == ["evaluate"]
    run_folder.remove(found[0])
    assert stranger.exists() and world.open_steps() == []


@pytest.mark.slow
def test_in_batch_only_what_read_the_changed_text_is_made_anew_and_no_notebook_is_written_to(
    tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv("PFTOOLS_DATA", str(data_folder(tmp_path / "data")))
    notebooks = write_notebooks(tmp_path / "notebooks")
    before = {path.name: path.read_bytes() for path in notebooks.iterdir()}
    plan = trivial_plan(
        tmp_path / "runs", orderings=["P"], evaluate={"corpus": "mine"}, calibrate={"corpus": "mine"}
    )
    journal = tmp_path / "runs" / "journal.txt"

    def made():
        journal.unlink(missing_ok=True)
        assert run_study(plan, notebooks=notebooks, progress=False) == []
        words = journal.read_text() if journal.exists() else ""
        return [line.split()[1].partition("-")[0] for line in words.splitlines() if line.startswith("sealed")]

    assert made() == ["calibrate", "prune", "evaluate"]
    write(tmp_path / "data", "mine/test", ROWS["text"][:25])
    assert made() == ["evaluate"]
    assert "Again" in capfd.readouterr().err and made() == []
    assert {path.name: path.read_bytes() for path in notebooks.iterdir()} == before


# ------------------------------------------------------------------------------------------------------------
# Keys


def test_one_folder_by_two_paths_is_one_key(tmp_path, monkeypatch):
    save_tiny(tmp_path / "tiny")
    (tmp_path / "text.txt").write_text("some text")
    (tmp_path / "link").symlink_to(tmp_path / "tiny")
    shutil.copytree(tmp_path / "tiny", tmp_path / "elsewhere" / "model")
    shutil.copy(tmp_path / "text.txt", tmp_path / "elsewhere" / "other.txt")
    monkeypatch.chdir(tmp_path)
    models = ["tiny", str(tmp_path / "tiny"), "./tiny", "link", "elsewhere/model"]
    texts = ["text.txt", str(tmp_path / "text.txt"), "elsewhere/other.txt"]
    keys = {
        run_folder.run_key(settings.Finetune(model=model, corpus=text)) for model in models for text in texts
    }
    assert len(keys) == 1
    (tmp_path / "text.txt").write_text("another text")
    assert run_folder.run_key(settings.Finetune(model="tiny", corpus="text.txt")) not in keys


def test_a_study_that_was_moved_keeps_its_runs(world):
    moved = world.folder.parent / f"{world.folder.name}-moved"
    shutil.copytree(world.folder, moved)
    assert World(moved, moved / "mine.yaml").open_steps() == []


def test_links_to_nothing_and_folders_named_like_files_are_no_traceback(tmp_path):
    folder = save_tiny(tmp_path / "tiny")
    first = contents.digest(str(folder))
    (folder / "gone.json").symlink_to(tmp_path / "nowhere")
    (folder / "original.bin").mkdir()
    assert contents.digest(str(folder)) == first
    assert contents.digest("~nobody/llama") is None


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text("some text")

    def refuse(*_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(contents, "_read", refuse)
    with pytest.raises(PftoolsError, match="text.txt cannot be read .Permission denied.: see that"):
        run_folder.run_key(settings.Finetune(model="somebody/model", corpus=str(path)))


@pytest.mark.parametrize(
    ("finetune", "distinct"), [("{}", 2), ("{adapter: hira}", 1), ("{preset: published}", 3)]
)
def test_merges_that_give_the_same_model_are_one_run(tmp_path, finetune, distinct):
    text = f"model: somebody/model\norderings: [P F]\nfinetune: {finetune}\nmerges: [auto, masked, dense]\n"
    (tmp_path / "mine.yaml").write_text(text + ("dtype: float16\n" if "preset" in finetune else ""))
    plan = plan_study(load_study(tmp_path / "mine.yaml"), runs=tmp_path / "runs")
    assert len(plan.rows) == 3
    if "preset" in finetune:  # there auto is dense, and masked stays masked
        merges = [plan.steps[row.model.rpartition("/")[2]].parameters.merge for row in plan.rows]
        assert merges == ["dense", "masked", "dense"]
    else:
        assert len({row.evaluation for row in plan.rows}) == distinct


def test_a_model_whose_name_ends_like_a_key_counts_by_its_contents(tmp_path):
    folder = save_tiny(tmp_path / "llama-0123456789ab")
    first = run_folder.run_key(settings.Prune(model=str(folder)))
    save_tiny(folder, seed=1)
    assert run_folder.run_key(settings.Prune(model=str(folder))) != first


def test_edited_code_of_a_notebook_makes_another_key(tmp_path, monkeypatch):
    folder = shutil.copytree(shipped.NOTEBOOKS, tmp_path / "notebooks")
    monkeypatch.setattr(shipped, "NOTEBOOKS", folder)
    path = folder / shipped.NOTEBOOK_OF["prune"]
    key = lambda: run_folder.run_key(settings.Prune())  # noqa: E731
    first, others = key(), run_folder.run_key(settings.Evaluate())
    whole = json.loads(path.read_text())

    def edit(change):
        content = json.loads(json.dumps(whole))
        change(content["cells"])
        path.write_text(json.dumps(content))
        return key()

    def cell(found, number):
        return next(cell for cell in found if cell["id"] == number)

    def wrong(found):
        cell(found, "02-08")["source"].insert(
            0, 'parameters = parameters.model_copy(update={"sparsity": 0.1})\n'
        )

    def smuggled(found):
        cell(found, "02-01")["source"].append("\nimport pftools.prune as p; p.METHODS = {}")

    def harmless(found):
        cell(found, "02-00")["source"] = ["# other words"]
        cell(found, "02-01")["source"] = ["# Parameters\n", "sparsity = 0.1\n", "model = 'x'"]
        cell(found, "02-08").update(outputs=[], execution_count=7)

    assert edit(wrong) != first and edit(smuggled) != first
    assert edit(lambda found: found.pop()) == first  # text
    assert edit(harmless) == first
    assert run_folder.run_key(settings.Evaluate()) == others  # of another notebook
    path.write_text("no notebook")
    with pytest.raises(PftoolsError, match="is damaged, or no notebook"):
        key()


def test_an_edited_criterion_makes_another_key_of_pruning_steps(tmp_path, monkeypatch):
    from pftools.run_folder import record

    kinds = (settings.Prune, settings.Finetune)
    before = [run_folder.run_key(kind()) for kind in kinds]
    mine = tmp_path / "criteria.py"
    mine.write_bytes(record._CRITERIA.read_bytes())
    monkeypatch.setattr(record, "_CRITERIA", mine)
    assert [run_folder.run_key(kind()) for kind in kinds] == before
    mine.write_text(mine.read_text().replace(".abs()", ".square()", 1))
    after = [run_folder.run_key(kind()) for kind in kinds]
    assert after[0] != before[0] and after[1] == before[1]


@pytest.mark.parametrize(
    ("source", "looks"),
    [
        ("network.config", True),
        ("print(len(blocks), blocks.shape)", True),
        ("blocks[0]", True),
        ("# a thought", True),
        ("x = 1", False),
        ("network.lm_head.weight.zero_()", False),
        ("blocks[0] = 1", False),
        ("parameters.x = 1", False),
        ("print(network.zero_grad())", False),
        ("import os", False),
        ("(y := 2)", False),
        ("del blocks", False),
        ("%matplotlib inline", False),
    ],
)
def test_a_cell_that_only_looks_makes_no_other_run(source, looks):
    assert cells.only_looks(source) == looks
    assert cells.others([source], []) == ("" if looks else cells.digest([source]))

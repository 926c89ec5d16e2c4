"""Results as lm-eval's own output folder, read by lm-eval's own tools."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import lm_eval
import pytest
from datasets import load_dataset
from lm_eval import utils
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM
from typer.testing import CliRunner

from pftools import evaluate, files, run_folder, settings
from pftools.cli import app
from pftools.compare.other_results import read_results
from pftools.errors import PftoolsError
from pftools.evaluate.tasks import load_tasks
from tests.test_tasks import made_up, write
from tests.tiny import save_tiny, tiny_llama, tiny_tokenizer

ROOT = Path(__file__).parents[1]
# Choices, a group of two, free answers, a perplexity, and one that lm-eval does not know.
TASKS = ["facts", "mmlu", "freebaseqa", "wikitext2", "wikitext2_published"]
JUDGED = {"facts", "mmlu_abstract_algebra", "mmlu_anatomy", "freebaseqa"}
LEAVES = {*JUDGED, "wikitext2"}


def evaluated(folder, tasks, *, seed=0, **more):
    """An evaluation, sealed as its notebook does."""
    parameters = settings.Evaluate(
        model="somebody/tiny",
        runs=str(folder / "runs"),
        tasks=tasks,
        limit=5,
        seed=seed,
        data=str(folder),
        **more,
    )
    run = run_folder.start(parameters)
    answers = evaluate.evaluate_tasks(tiny_llama(), tiny_tokenizer(), **evaluate.tasks_of(parameters))
    outputs = ["lm_eval.json", "lm_eval_samples.jsonl.gz"]
    files.write_json(run.path(outputs[0]), answers.results)
    evaluate.write_samples(run.path(outputs[1]), answers.records)
    return run.seal(outputs, tasks=evaluate.scores_as_json(answers.scores)), answers


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    contents = made_up()
    write(folder, contents | {"wikitext2/test": contents["wikitext2/test"] * 4})
    return folder, *evaluated(folder, TASKS)


def names(folder):
    return [str(path) for path in sorted(folder.rglob("*")) if path.is_file()]


@pytest.fixture(scope="module")
def exported(finished):
    folder = finished[0] / "exported"
    result = CliRunner().invoke(app, ["export", str(finished[1]), str(folder)])
    assert result.exit_code == 0, result.exception
    return folder


def test_lm_evals_tools_find_and_read_what_was_exported(finished, exported):
    _, _, answers = finished
    (path,) = utils.get_results_filenames(names(exported))
    results = json.loads(open(path).read())
    assert results["model_name"] == "somebody/tiny" and "/somebody__tiny/results_2" in path
    table = utils.make_table(results) + utils.make_table(results, "groups")
    for task, value in zip(answers.scores["task"], answers.scores["value"]):
        assert task == "wikitext2_published" or (f"|{task} " in table and f"{value:.4f}" in table)
    samples = utils.get_sample_results_filenames(names(exported))
    assert {utils.get_file_task_name(one.rpartition("/")[2]) for one in samples} == LEAVES
    for one in samples:
        task = utils.get_file_task_name(one.rpartition("/")[2])
        if task not in JUDGED:
            continue
        rows = load_dataset("json", data_files=one, split="train", cache_dir=str(finished[0] / "cache"))
        own = answers.samples[answers.samples["subject"] == task]
        metric = answers.scores.set_index("task").loc[own["task"].iloc[0], "metric"]
        assert {row["doc_id"]: float(row[metric]) for row in rows} == dict(
            zip(own["question"], own["correct"])
        )


def test_files_are_those_of_lm_evals_own_run(finished, exported, tmp_path):
    folder, _, _ = finished
    lm = HFLM(pretrained=tiny_llama(), tokenizer=tiny_tokenizer(), batch_size=1)
    found = [part for parts in load_tasks(TASKS[:4], data=folder).values() for part in parts]
    tracker = EvaluationTracker(output_path=str(tmp_path))
    tracker.general_config_tracker.log_experiment_args("hf", "pretrained=somebody/tiny", None, None, False)
    results = lm_eval.simple_evaluate(lm, tasks=found, limit=5, bootstrap_iters=0, log_samples=True)
    samples = results.pop("samples")
    tracker.save_results_aggregated(results, samples)
    for task, records in samples.items():
        tracker.save_results_samples(task, records)

    def by_task(root):
        paths = utils.get_sample_results_filenames(names(root))
        return {
            utils.get_file_task_name(path.rpartition("/")[2]): [json.loads(line) for line in open(path)]
            for path in paths
        }

    ours, theirs = by_task(exported), by_task(tmp_path)
    assert ours.keys() == theirs.keys() == LEAVES
    for task, rows in theirs.items():
        for row, other in zip(ours[task], rows, strict=True):
            assert row.keys() == other.keys()
            same = row.keys() - {"resps", "filtered_resps"}  # log-likelihoods, which rounding moves
            assert {key: row[key] for key in same} == {key: other[key] for key in same}
    (own,), (reference,) = (utils.get_results_filenames(names(root)) for root in (exported, tmp_path))
    own, reference = json.loads(open(own).read()), json.loads(open(reference).read())
    assert own["task_hashes"] == reference["task_hashes"]
    told = {"results", "groups", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "config"}
    assert told <= own.keys() and told <= reference.keys()
    assert own["results"].keys() == reference["results"].keys()


def test_two_exports_are_compared(finished, exported, tmp_path):
    folder, *_ = finished
    other, _ = evaluated(folder, ["facts"], seed=1)
    second = evaluate.export_results(other, tmp_path / "second")
    assert set(read_results(second)["task"]) == {"facts"} and set(read_results(exported)["task"]) == JUDGED


def test_what_is_not_there_is_said(finished, tmp_path):
    folder, run, _ = finished
    none, _ = evaluated(folder, ["wikitext2_published"])
    with pytest.raises(PftoolsError, match="has asked no tasks of lm-eval"):
        evaluate.export_results(none, tmp_path / "none")
    parameters = settings.Evaluate(model="old", runs=str(folder / "runs"))
    started = run_folder.start(parameters)
    files.write_json(started.path("lm_eval.json"), {})
    with pytest.raises(PftoolsError, match="of an older pftools"):
        evaluate.export_results(started.seal(["lm_eval.json"]), tmp_path / "old")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(PftoolsError, match="is not empty"):
        evaluate.export_results(run, tmp_path / "full")
    result = CliRunner().invoke(app, ["export", str(run), str(tmp_path / "it"), "--adapter"])
    assert isinstance(result.exception, PftoolsError) and "holds no model" in str(result.exception)


def test_a_chat_template_is_told_and_the_same_records_are_the_same_bytes(finished, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    answers = evaluate.evaluate_tasks(tiny_llama(), tokenizer, ["facts"], limit=2, apply_chat_template=True)
    assert answers.results["chat_template"] == tokenizer.chat_template
    for name in ("one", "two"):
        evaluate.write_samples(tmp_path / name, answers.records)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert [row["doc_id"] for row in evaluate.read_samples(tmp_path / "one")["facts"]] == [0, 1]


@pytest.mark.slow
def test_lm_eval_itself_runs_the_task_files(tmp_path):
    model = save_tiny(tmp_path / "tiny", max_position_embeddings=1024)
    command = [Path(sys.executable).parent / "lm-eval", "run", "--include_path", ROOT / "data" / "tasks"]
    words = ["--tasks", "facts", "--model", "hf", "--model_args", f"pretrained={model}"]
    more = ["--limit", "3", "--device", "cpu", "--output_path", tmp_path / "out"]
    done = subprocess.run([*command, *words, *more], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(found.read_text())["n-samples"]["facts"]["effective"] == 3

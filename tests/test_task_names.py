"""Task names and their metrics, checked without torch, data or lm-eval's half minute of indexing."""

import subprocess
import sys
from pathlib import Path

import lm_eval
import pytest

from pftools.errors import PftoolsError
from pftools.evaluate import task_names

SMALL = Path(lm_eval.__file__).parent / "tasks" / "hellaswag"


@pytest.fixture
def small_lm_eval(tmp_path, monkeypatch):
    """A folder of tasks in lm-eval's place: HellaSwag, a group, a tag and a task that translates."""
    folder = tmp_path / "tasks"
    (folder / "a").mkdir(parents=True)
    (folder / "b").mkdir()
    (folder / "a" / "hellaswag.yaml").write_text((SMALL / "hellaswag.yaml").read_text())
    translate = (
        "task: translate\noutput_type: generate_until\nmetric_list:\n  - metric: bleu\ntag: [spoken]\n"
    )
    (folder / "b" / "translate.yaml").write_text(translate)
    (folder / "b" / "plain.yaml").write_text("task: plain\noutput_type: multiple_choice\ntag: spoken\n")
    group = "group: all\ntask: [hellaswag, {group: inner, task: [plain]}]\n"
    (folder / "b" / "all.yaml").write_text(group)
    monkeypatch.setattr(task_names, "_lm_eval_folder", lambda: folder)
    monkeypatch.setenv("PFTOOLS_CACHE", str(tmp_path / "cache"))
    return folder


def test_all_tasks_of_the_kit_pass():
    task_names.check_tasks(list(task_names.own_tasks()))


def test_checking_names_loads_neither_torch_nor_the_index_of_lm_eval():
    code = (
        "import sys\nfrom pftools.evaluate import task_names\ntask_names.lm_eval_index = None\n"
        "task_names.check_tasks(['facts', 'mmlu', 'freebaseqa', 'wikitext2'])\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_refused_with_the_nearest_of_either_kind(small_lm_eval):
    with pytest.raises(PftoolsError, match="unknown task 'helaswag': did you mean 'hellaswag'"):
        task_names.check_tasks(["facts", "helaswag"])
    with pytest.raises(PftoolsError, match="did you mean 'facts'"):
        task_names.check_tasks(["fact"])
    with pytest.raises(PftoolsError, match="no task has a similar name"):
        task_names.check_tasks(["qqqqqq"])


def test_the_index_is_read_once(small_lm_eval, monkeypatch):
    first = task_names.lm_eval_index()
    monkeypatch.setattr(task_names, "_read_index", lambda folder: pytest.fail("read again"))
    assert task_names.lm_eval_index() == first
    monkeypatch.setattr(task_names, "_lm_eval_folder", lambda: small_lm_eval / "another")
    with pytest.raises(pytest.fail.Exception):
        task_names.lm_eval_index()


def test_a_damaged_index_is_read_again(small_lm_eval, tmp_path):
    first = task_names.lm_eval_index()
    (kept,) = (tmp_path / "cache" / "lm_eval").iterdir()
    kept.write_text(kept.read_text()[:50])
    assert task_names.lm_eval_index() == first


def test_groups_and_tags_stand_for_their_tasks(small_lm_eval):
    index = task_names.lm_eval_index()
    assert task_names.parts_of("all", index) == ["hellaswag", "plain"]
    assert task_names.parts_of("spoken", index) == ["plain", "translate"]
    assert task_names.folders_of("all", index) == [small_lm_eval / "a", small_lm_eval / "b"]
    task_names.check_tasks(["all", "hellaswag"])


def test_a_task_without_a_metric_that_pftools_judges_by_is_refused(small_lm_eval):
    with pytest.raises(PftoolsError, match="the task 'translate' reports none of acc_norm"):
        task_names.check_tasks(["spoken"])


@pytest.mark.parametrize(
    ("metrics", "says"),
    [
        ("[{metric: acurracy}]", "unknown metric 'acurracy'"),
        ("[{metric: acc, aggregation: average}]", "unknown aggregation 'average' of acc: .*mean"),
        ("[{metric: bleu}]", "reports none of acc_norm"),
        ("[acc]", "write '- metric: acc'"),
        ("[{metric: acc", "line 4, column 1: this is not valid YAML"),
    ],
)
def test_an_unknown_metric_in_a_task_file_is_one_sentence(tmp_path, monkeypatch, metrics, says):
    (tmp_path / "mine.yaml").write_text(f"task: mine\noutput_type: multiple_choice\nmetric_list: {metrics}\n")
    monkeypatch.setattr(task_names, "TASKS", tmp_path)
    with pytest.raises(PftoolsError, match=says) as caught:
        task_names.check_tasks(["mine"])
    assert "\n" not in str(caught.value)

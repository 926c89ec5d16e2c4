"""Tasks from any folder, with examples, a chat template and a system's words, asked as lm-eval asks."""

from __future__ import annotations

import json

import lm_eval
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from pftools import evaluate
from pftools.errors import PftoolsError
from pftools.evaluate import task_names
from pftools.evaluate.task_names import _read_index, check_tasks
from pftools.evaluate.tasks import load_tasks
from tests.tiny import tiny_llama, tiny_tokenizer

_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{train: {data}, test: {data}}}}}
output_type: multiple_choice
training_split: train
fewshot_split: train
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    rows = [
        {"question": f"The capital of land {n} is", "choices": [f"A{n}", f"B{n}", "C"], "answer": n % 3}
        for n in range(12)
    ]
    (tmp_path / "capitals.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    tasks = tmp_path / "my_tasks"
    tasks.mkdir()
    for name, more in (("capitals", ""), ("bare", "num_fewshot: 0"), ("facts", "")):
        text = _TASK.format(name=name, data=tmp_path / "capitals.jsonl", more=more)
        (tasks / f"file_of_{name}.yaml").write_text(text)
    return tasks


@pytest.mark.parametrize(
    "way",
    [
        {},
        {"num_fewshot": 2},
        {"apply_chat_template": True},
        {"num_fewshot": 2, "apply_chat_template": True, "system_instruction": "Be brief."},
        {"num_fewshot": 1, "system_instruction": "Be brief."},
    ],
)
def test_a_task_of_a_folder_is_asked_as_lm_eval_asks_it(folder, way):
    model, tokenizer = tiny_llama(max_position_embeddings=1024), tiny_tokenizer()
    tokenizer.chat_template = _TEMPLATE
    found = evaluate.evaluate_tasks(model, tokenizer, ["capitals"], include=folder, progress=False, **way)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    oracle = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
        tasks=["capitals"],
        task_manager=manager,
        fewshot_random_seed=0,
        bootstrap_iters=0,
        fewshot_as_multiturn=way.get("apply_chat_template", False),
        **way,
    )
    scores = found.samples["choice_scores"].tolist()
    for sample, ours in zip(oracle["samples"]["capitals"], scores, strict=True):
        theirs = [answer[0] for answer in sample["filtered_resps"]]
        assert list(ours) == pytest.approx(theirs, abs=1e-3)
        prompt = sample["arguments"][0][0]
        assert prompt.count("The capital of") == 1 + way.get("num_fewshot", 0)
        assert ("Be brief." in prompt) == ("system_instruction" in way)
        assert ("<|user|>" in prompt) == way.get("apply_chat_template", False)
    config = found.results["config"]
    assert all(config[name] == value for name, value in way.items())


def test_a_task_of_the_folder_wins_over_one_of_the_same_name(folder):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    found = evaluate.evaluate_tasks(model, tokenizer, ["facts"], include=folder, progress=False)
    assert len(found.samples) == 12


def test_the_folder_is_read_once(folder, monkeypatch):
    read = []
    monkeypatch.setattr(task_names, "_read_index", lambda path: read.append(path) or _read_index(path))
    load_tasks(["capitals", "bare"], include=folder)
    assert read == [folder]


def test_a_task_that_says_no_examples_gets_none(folder, caplog):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    alone = evaluate.evaluate_tasks(model, tokenizer, ["bare"], include=folder, progress=False)
    asked = evaluate.evaluate_tasks(model, tokenizer, ["bare"], include=folder, num_fewshot=2, progress=False)
    assert "bare is asked without examples, as its file says" in caplog.text
    assert asked.samples["choice_scores"].tolist() == alone.samples["choice_scores"].tolist()


def test_what_is_not_there_is_one_sentence(folder, tmp_path):
    with pytest.raises(PftoolsError, match="no task files are there"):
        check_tasks(["capitals"], include=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PftoolsError, match="no task files are there"):
        check_tasks(["capitals"], include=tmp_path / "empty")
    with pytest.raises(PftoolsError, match="has no chat template"):
        evaluate.evaluate_tasks(tiny_llama(), tiny_tokenizer(), ["facts"], limit=1, apply_chat_template=True)


def test_more_examples_than_there_are_is_one_sentence(folder):
    words = {"include": folder, "progress": False}
    with pytest.raises(
        PftoolsError, match="with 13 examples, and has 12 to draw them from: give a num_fewshot"
    ):
        evaluate.evaluate_tasks(tiny_llama(), tiny_tokenizer(), ["capitals"], num_fewshot=13, **words)
    text = (
        (folder / "file_of_capitals.yaml").read_text().replace("fewshot_split: train", "fewshot_split: test")
    )
    (folder / "file_of_capitals.yaml").write_text(text)
    with pytest.raises(PftoolsError, match="with 12 examples, and has 11 to draw them from"):
        evaluate.evaluate_tasks(tiny_llama(), tiny_tokenizer(), ["capitals"], num_fewshot=12, **words)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        (
            "broken.yaml",
            "task: [x\n  y: :",
            "broken.yaml, line 2, column 4: this is not valid YAML .*: look there",
        ),
        ("empty.yaml", "", "empty.yaml holds no settings: it needs lines such as 'task: empty'"),
        ("other.yaml", "include: gone.yaml\ntask: other", "other.yaml cannot be read .*gone.yaml.*: mend it"),
        (
            "below/again.yaml",
            "task: capitals",
            "'capitals' stands in .*again.yaml and in .*capitals.yaml: give",
        ),
    ],
)
def test_files_that_lm_eval_passes_over_are_named(folder, name, text, says):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    with pytest.raises(PftoolsError, match=says):
        check_tasks(["bare"], include=folder)
    (folder / name).rename(folder / "kept.txt")
    check_tasks(["bare"], include=folder)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (
            "capitals.jsonl",
            "gone.jsonl",
            "'capitals' reads .*gone.jsonl, and no such file .*: .*; mend data_files in",
        ),
        (
            "{{question}}",
            "{{questoin}}",
            "UndefinedError: 'questoin' is undefined.: mend its file, or what that reads",
        ),
        ("test_split: test", "test_split: tset", "KeyError: 'tset'.: mend its file, or what that reads, in"),
    ],
)
def test_a_mistake_in_a_task_of_ones_own_is_one_sentence(folder, old, new, says):
    file = folder / "file_of_capitals.yaml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(PftoolsError, match=says):
        evaluate.evaluate_tasks(tiny_llama(), tiny_tokenizer(), ["capitals"], include=folder, progress=False)


@pytest.mark.parametrize("task", ["facts", "reading"])
def test_examples_before_the_embedded_questions(task):
    model, tokenizer = tiny_llama(max_position_embeddings=4096), tiny_tokenizer()
    found = evaluate.evaluate_tasks(model, tokenizer, [task], limit=3, num_fewshot=1, progress=False)
    assert len(found.samples) == 3

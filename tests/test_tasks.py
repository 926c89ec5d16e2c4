"""The published benchmarks, on small made-up data in the hub's columns; on the real data where it is."""

import json
import os
import re
from pathlib import Path

import lm_eval
import pytest
import yaml
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from pftools import evaluate
from pftools.corpora import data_root
from pftools.errors import PftoolsError
from pftools.evaluate import questions
from pftools.evaluate.task_names import TASKS, own_tasks
from pftools.evaluate.tasks import load_tasks
from tests.tiny import tiny_llama, tiny_tokenizer

real_data = pytest.mark.skipif(not os.environ.get("PFTOOLS_DATA"), reason="PFTOOLS_DATA names no data root")
PUBLISHED = ["wikitext2", "mmlu", "bbh_logical_deduction_five_objects", "belebele_eng_Latn", "freebaseqa"]


def mmlu_row(number, subject):
    return {
        "question": f"What is {number}? ",
        "subject": subject,
        "choices": ["one", "two", "three", "four"],
        "answer": number % 4,
    }


def belebele_row(number):
    answers = {f"mc_answer{place}": f"answer {place}" for place in range(1, 5)}
    return {
        "flores_passage": f"Passage {number}.",
        "question": f"Which, {number}?",
        **answers,
        "correct_answer_num": str(1 + number % 4),
    }


def made_up():
    options = "\n".join(f"({letter}) thing {letter}" for letter in "ABCDE")
    lines = [
        "",
        " = A Title = \n",
        "",
        " Some words of the first page . \n",
        " = = A section = = \n",
        " More . \n",
        " = Another = \n",
        " End . \n",
    ]
    return {
        "mmlu/test": [
            mmlu_row(number, "anatomy" if number > 7 else "abstract_algebra") for number in range(16)
        ],
        "mmlu/dev": [
            mmlu_row(number + 20, subject)
            for subject in ("abstract_algebra", "anatomy")
            for number in range(5)
        ],
        "bbh/logical_deduction_five_objects/test": [
            {"input": f"Puzzle {n}.\nOptions:\n{options}", "target": f"({'ABCDE'[n % 5]})"} for n in range(9)
        ],
        "belebele/eng_Latn/test": [belebele_row(number) for number in range(9)],
        "freebaseqa/eval": [
            {"question": f"Who is Mr. {n}?", "answers": [f"Name {n}", "Mr. 1" if n == 1 else "nobody"]}
            for n in range(7)
        ],
        "wikitext2/test": [{"text": line} for line in lines * 3],
    }


@pytest.fixture
def root(tmp_path):
    write(tmp_path, made_up())
    return tmp_path


def write(folder, contents):
    for name, rows in contents.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(map(json.dumps, rows)))


def contexts(name, root, limit=None):
    """{lm-eval's task: the prompts that it asks}."""
    found = {}
    for part in load_tasks([name], data=root)[name]:
        for task in part.get_all_tasks() if hasattr(part, "get_all_tasks") else [part]:
            task.build_all_requests(limit=limit)
            found[task.task_name] = list(dict.fromkeys(request.args[0] for request in task.instances))
    return found


def test_every_task_file_is_named_like_its_task_and_says_what_it_is():
    for name, path in own_tasks().items():
        assert yaml.load(re.sub(r"!function ", "", path.read_text()), yaml.SafeLoader)["task"] == name
        assert path.read_text().startswith("# ")
    assert {*PUBLISHED, *(f"{name}_published" for name in PUBLISHED)} <= set(own_tasks())


def test_all_ten_run_and_give_numbers(root):
    names = [variant for name in PUBLISHED for variant in (name, f"{name}_published")]
    model = tiny_llama(max_position_embeddings=4096)
    write(root, {"wikitext2/test": made_up()["wikitext2/test"] * 20})
    found = evaluate.evaluate_tasks(model, tiny_tokenizer(), names, limit=4, data=root, progress=False)
    scores = found.scores.set_index("task")
    assert set(scores.index) == set(names)
    assert scores["metric"].to_dict() == {
        "wikitext2": "word_perplexity",
        "wikitext2_published": "perplexity",
        "mmlu": "acc",
        "mmlu_published": "exact_match",
        "bbh_logical_deduction_five_objects": "acc_norm",
        "bbh_logical_deduction_five_objects_published": "exact_match",
        "belebele_eng_Latn": "acc",
        "belebele_eng_Latn_published": "exact_match",
        "freebaseqa": "acc",
        "freebaseqa_published": "acc",
    }
    assert scores["value"].notna().all() and scores["n"].to_dict()["mmlu"] == 8
    assert scores["chance"].dropna().to_dict()["bbh_logical_deduction_five_objects"] == 0.2
    mmlu = found.samples[found.samples["task"] == "mmlu"]
    assert (
        mmlu["subject"].unique().tolist() == ["mmlu_abstract_algebra", "mmlu_anatomy"]
        and mmlu["correct"].isin([0, 1]).all()
    )
    assert all(len(scores) == 4 for scores in mmlu["choice_scores"])
    assert found.truncated == 0 and found.results["truncated_prompts"] == 0
    again = json.loads(json.dumps(found.results, allow_nan=False))
    assert "mmlu_anatomy" in make_table(again) and "|acc" in make_table(again, "groups")


def test_the_published_protocol_leaves_out_five_rows_and_repeats_them_as_examples(root):
    (asked,) = contexts("mmlu_published", root).values()
    assert len(asked) == 16 - 5
    lines = []
    for row in made_up()["mmlu/test"][:5]:
        letters = "".join(
            f"    Answer {letter}: {choice}\n" for letter, choice in zip("ABCD", row["choices"])
        )
        lines.append(f"    Question: {row['question']}\n{letters}    Correct answer: {'ABCD'[row['answer']]}")
    last = made_up()["mmlu/test"][5]
    letters = "".join(f"    Answer {letter}: {choice}\n" for letter, choice in zip("ABCD", last["choices"]))
    lines.append(f"    Question: {last['question']}\n{letters}    Correct answer: ")
    assert asked[0] == "\n\n\n".join(lines).strip()
    (asked,) = contexts("bbh_logical_deduction_five_objects_published", root).values()
    assert (
        len(asked) == 4
        and asked[0].startswith("Question: Puzzle 5.")
        and asked[0].endswith("\n    Correct answer:")
    )
    (asked,) = contexts("belebele_eng_Latn_published", root).values()
    assert (
        len(asked) == 4
        and asked[0].startswith("Passage 0.\n    Question: Which, 0?")
        and asked[0].count("Correct answer: ") == 5
    )


LM_EVAL = Path(lm_eval.__file__).parent / "tasks"


@pytest.mark.parametrize(
    ("ours", "theirs", "folder", "data"),
    [
        ("mmlu", "mmlu_anatomy", "mmlu/default", "mmlu"),
        ("belebele_eng_Latn", "belebele_eng_Latn", "belebele", "belebele/eng_Latn"),
        (
            "bbh_logical_deduction_five_objects",
            "leaderboard_bbh_logical_deduction_five_objects",
            "leaderboard/bbh_mc",
            "bbh/logical_deduction_five_objects",
        ),
    ],
)
def test_standard_prompts_are_those_of_lm_eval(root, ours, theirs, folder, data):
    """lm-eval's own file, on the same rows."""
    rows = {
        split: f"root:{data}/{split}"
        for split in ("test", "dev")
        if (root / data / f"{split}.jsonl").exists()
    }
    only = {"subject": "anatomy"} if ours == "mmlu" else None
    manager = TaskManager(include_path=str(LM_EVAL / folder), include_defaults=False)
    changes = {
        "custom_dataset": questions.splits,
        "metadata": {"files": rows, "only": only, "data": str(root)},
        "num_fewshot": {"mmlu": 5, "belebele_eng_Latn": 0}.get(ours, 3),
    }
    (expected,) = manager.load({"group": "g", "task": [{"task": theirs, **changes}]})["tasks"].values()
    expected.build_all_requests()
    found = contexts(ours, root)
    assert found[theirs if ours == "mmlu" else ours] == list(
        dict.fromkeys(request.args[0] for request in expected.instances)
    )
    assert len(expected.instances) >= 4 * 8


def test_pages_of_wikitext_begin_at_titles(root):
    pages = [row["page"] for row in questions.wikitext_pages(made_up()["wikitext2/test"])]
    assert (
        len(pages) == 6
        and pages[0].startswith(" = A Title = \n \n Some words")
        and " = = A section = = \n More" in pages[0]
    )


def test_the_leak_of_the_published_match():
    row = {"question": "Is the Thames in London?", "answers": ["lon don"]}
    assert (
        questions.found_anywhere(row, [" nowhere"])["acc"] == 1
        and questions.found_in_reply(row, [" nowhere"])["acc"] == 0
    )
    assert questions.found_in_reply(row, ["In LONDON."])["acc"] == 1


def test_a_missing_column_a_broken_line_and_missing_data_are_named(root, tmp_path, monkeypatch):
    monkeypatch.delenv("PFTOOLS_DATA", raising=False)
    write(root, {"belebele/eng_Latn/test": [belebele_row(0), {"question": "?"}]})
    with pytest.raises(PftoolsError, match="test.jsonl, row 2, has no column flores_passage, mc_answer1"):
        load_tasks(["belebele_eng_Latn"], data=root)
    (root / "freebaseqa" / "eval.jsonl").write_text('{"question": "?", "answers": ["a"]}\n{"question"')
    with pytest.raises(PftoolsError, match="eval.jsonl, line 2, is not a JSON object"):
        load_tasks(["freebaseqa"], data=root)
    with pytest.raises(PftoolsError, match="could not be fetched.*pftools fetch-data"):
        load_tasks(["mmlu_published"], data=tmp_path / "empty")
    (root / "mmlu" / "test.jsonl").write_text("")
    with pytest.raises(PftoolsError, match="is empty"):
        load_tasks(["mmlu_published"], data=root)


def test_a_data_root_is_filled_and_what_is_there_stays(tmp_path, monkeypatch):
    rows = {
        name: [{column: "x" for column in source.columns}] * 3 for name, source in data_root.DATA_SETS.items()
    }
    monkeypatch.setattr(data_root, "_from_origin", lambda name, split, path: iter(rows[name]))
    written = dict(data_root.fetch(data=tmp_path))
    assert len(written) == 9 and set(written.values()) == {3}
    assert set(dict(data_root.fetch(["mmlu"], data=tmp_path)).values()) == {None}
    assert len(data_root.read_split("mmlu", "test", data=tmp_path)) == 3 and not list(
        tmp_path.rglob("*.partial")
    )
    with pytest.raises(PftoolsError, match="did you mean 'mmlu'"):
        list(data_root.fetch(["mmul"], data=tmp_path))
    monkeypatch.delenv("PFTOOLS_DATA", raising=False)
    with pytest.raises(PftoolsError, match="no data root is named"):
        list(data_root.fetch())


def test_every_file_that_a_task_names_is_fetched():
    fetched = {f"{name}/{split}" for name, source in data_root.DATA_SETS.items() for split in source.splits}
    for path in TASKS.glob("*.yaml"):
        metadata = yaml.load(re.sub(r"!function ", "", path.read_text()), yaml.SafeLoader)["metadata"]
        for place in metadata.get("files", {}).values():
            assert place.startswith("package:") or place.removeprefix("root:") in fetched


@real_data
def test_the_published_protocol_asks_as_many_questions_as_the_study():
    (mmlu,) = load_tasks(["mmlu_published"])["mmlu_published"]
    assert len(mmlu.test_docs()) == 14_037
    (bbh,) = load_tasks(["bbh_logical_deduction_five_objects_published"])[
        "bbh_logical_deduction_five_objects_published"
    ]
    assert len(bbh.test_docs()) == 245
    (factoid,) = load_tasks(["freebaseqa_published"])["freebaseqa_published"]
    assert len(factoid.test_docs()) == 600
    (group,) = load_tasks(["mmlu"])["mmlu"]
    assert len(group) == 57 and sum(len(task.test_docs()) for task in group) == 14_042
    (wikitext,) = load_tasks(["wikitext2"])["wikitext2"]
    assert len(wikitext.test_docs()) == 62

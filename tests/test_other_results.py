"""`pftools compare A B`: what other programs wrote, paired."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from typer.testing import CliRunner

from pftools import cli
from pftools.compare.other_losses import compare_losses, sentences
from pftools.compare.other_results import compare_results, read_results
from pftools.errors import PftoolsError
from tests import oracles


def answers(share, n=200, seeds=1, key=0):
    generator = np.random.default_rng(key)
    ease = generator.random(n)
    rows = []
    for seed in range(seeds):
        right = ease + 0.1 * generator.normal(size=n) < share
        rows += [
            {"seed": seed, "question": f"q{number}", "correct": int(one)} for number, one in enumerate(right)
        ]
    return pd.DataFrame(rows)


def written(folder, name, table):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".csv"):
        table.to_csv(path, index=False)
    else:
        path.write_text("\n".join(json.dumps(row) for row in table.to_dict("records")))
    return path


def lm_eval_samples(folder, table, task="facts", metric="acc", model="org/model"):
    """As lm-eval's own writer leaves them."""
    from lm_eval.loggers import EvaluationTracker

    tracker = EvaluationTracker(output_path=str(folder))
    tracker.general_config_tracker.model_name_sanitized = model.replace("/", "__")
    tracker.date_id = "2026-01-02T03-04-05.678901"
    samples = [
        {
            "doc_id": number,
            "doc": {"question": row["question"] + "\u2028"},
            "target": "x",
            "arguments": [("a question", " x")],
            "resps": [[(-1.0, True)]],
            "filtered_resps": [(-1.0, True)],
            "filter": "none",
            "metrics": [metric],
            "doc_hash": f"hash of {row['question']}",
            "prompt_hash": "p",
            "target_hash": "t",
            metric: float(row["correct"]),
        }
        for number, row in enumerate(table.to_dict("records"))
    ]
    tracker.save_results_samples(task, samples)
    return folder


def test_one_training_each_is_mcnemar_and_says_nothing_of_the_ways_of_training(tmp_path):
    one, other = answers(0.7, key=1), answers(0.55, key=1)
    (found,) = compare_results(
        written(tmp_path, "one.csv", one.drop(columns="seed")), written(tmp_path, "other.jsonl", other)
    )
    ahead = int((one["correct"] > other["correct"]).sum())
    behind = int((one["correct"] < other["correct"]).sum())
    assert found.judged.p == pytest.approx(stats.binomtest(ahead, ahead + behind).pvalue)
    assert found.kind == "differs" and "one training each cannot say" in found.sentence
    assert found.sentence.startswith("one.csv and other.jsonl are not equally often right (")
    assert "beats" not in found.sentence


def test_several_trainings_are_judged_over_seeds_and_questions(tmp_path):
    one, other = answers(0.8, seeds=4, key=2), answers(0.5, seeds=4, key=2)
    (found,) = compare_results(written(tmp_path, "a.csv", one), written(tmp_path, "b.csv", other))
    d = (one["correct"] - other["correct"]).to_numpy().reshape(4, -1)
    made_up = np.concatenate([d, np.tile([1.0, -1.0], (4, 1))], axis=1)
    assert found.judged.mean == pytest.approx(d.mean())
    assert found.judged.interval[1] - d.mean() == pytest.approx(
        oracles.crossed_half_width(made_up, 0.05), rel=0.01
    )
    assert found.kind == "differs" and "4 of 4 seeds" in found.sentence and "% is seeds" in found.sentence


def test_pairing_is_by_question_not_by_place(tmp_path):
    table = answers(0.6)
    shuffled = table.sample(frac=1, random_state=0)
    (found,) = compare_results(written(tmp_path, "a.csv", table), written(tmp_path, "b.csv", shuffled))
    assert found.judged.mean == 0 and found.judged.p == 1


def test_pairing_sees_what_independent_samples_would_not(tmp_path):
    """lm-eval's comparison takes both for independent samples."""
    one, other = answers(0.60, n=400, key=3), answers(0.55, n=400, key=3)
    other["correct"] = np.where(one.index < 20, 0, one["correct"])
    (found,) = compare_results(written(tmp_path, "a.csv", one), written(tmp_path, "b.csv", other))
    gap = one["correct"].mean() - other["correct"].mean()
    unpaired = gap / np.sqrt(one["correct"].var() / 400 + other["correct"].var() / 400)
    assert found.kind == "differs" and abs(unpaired) < 1.96


def test_lm_eval_folders_are_read_by_task_and_training(tmp_path):
    for side, share in (("a", 0.75), ("b", 0.5)):
        for seed in range(3):
            folder = tmp_path / side / f"seed{seed}"
            lm_eval_samples(folder, answers(share, key=seed), model=f"{side}/{seed}")
            lm_eval_samples(folder, answers(0.5, key=seed), "reading", "exact_match", model=f"{side}/{seed}")
    facts, reading = compare_results(tmp_path / "a", tmp_path / "b")
    assert (facts.task, reading.task) == ("facts", "reading") and facts.judged.n_seeds == 3
    assert facts.kind == "differs" and reading.judged.mean == 0
    assert facts.p_corrected == pytest.approx(2 * facts.judged.p)


def test_not_told_apart_says_what_would_be_needed(tmp_path):
    one, other = answers(0.6, n=60, seeds=3, key=4), answers(0.6, n=60, seeds=3, key=5)
    (found,) = compare_results(written(tmp_path, "a.csv", one), written(tmp_path, "b.csv", other))
    assert found.kind == "cannot be told apart"
    assert "to see 2 points takes" in found.sentence and "now 3 seeds, 60 questions" in found.sentence


def test_equivalence_needs_a_margin_and_data(tmp_path):
    table = answers(0.6, n=900, seeds=3, key=6)
    other = table.copy()
    other.loc[:3, "correct"] = 1 - other.loc[:3, "correct"]
    paths = written(tmp_path, "a.csv", table), written(tmp_path, "b.csv", other)
    assert compare_results(*paths)[0].kind == "cannot be told apart"
    assert "equivalent within 2 points" in compare_results(*paths, margin=0.02)[0].sentence


def test_questions_that_one_side_lacks_are_told(tmp_path):
    table = answers(0.6)
    (found,) = compare_results(written(tmp_path, "a.csv", table), written(tmp_path, "b.csv", table[:150]))
    assert found.left_out == 50 and "Left out: 50 questions" in found.sentence


MALFORMED = {
    "there.txt": ("hello", "is not a CSV or JSONL"),
    "empty.jsonl": ("", "is empty"),
    "empty.csv": ("", "cannot be read as CSV"),
    "broken.jsonl": ('{"question": 1, "correct": 1}\n{"question": 2,', "line 2 of .* is not a JSON record"),
    "list.jsonl": ("[1, 2]", "line 1 of .* is not a JSON record"),
    "columns.csv": ("id,right\n1,1\n", "no column 'question' .it has id, right"),
    "half.csv": ("question,correct\nq1,1\nq2,0.5\n", "answer 2 of .* has correct = 0.5 for question q2"),
    "blank.csv": ("question,correct\nq1,1\nq2,\n", "answer 2 of"),
    "twice.csv": ("question,correct\nq1,1\nq1,0\n", "question 'q1' twice"),
    "perplexity.jsonl": (
        '{"doc_id": 0, "metrics": ["word_perplexity"], "word_perplexity": 3.1}',
        "neither acc nor exact_match.*--metric .word_perplexity",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_is_one_sentence(tmp_path, name):
    content, says = MALFORMED[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(PftoolsError, match=says) as caught:
        read_results(tmp_path / name)
    assert str(caught.value).count("\n") == 0 and str(tmp_path) in str(caught.value)


def test_what_cannot_be_paired_is_refused(tmp_path):
    table = written(tmp_path, "a.csv", answers(0.6))
    seeds = written(tmp_path, "seeds.csv", answers(0.6, seeds=2))
    others = written(tmp_path, "others.csv", answers(0.6).assign(question=lambda one: "x" + one["question"]))
    tasks = written(tmp_path, "tasks.csv", answers(0.6).assign(task="reading"))
    for path, says in (
        (seeds, "same seeds"),
        (others, "no question in common"),
        (tasks, "no task in common"),
    ):
        with pytest.raises(PftoolsError, match=says):
            compare_results(table, path)
    with pytest.raises(PftoolsError, match="is not there"):
        compare_results(table, tmp_path / "missing.csv")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(PftoolsError, match="--log_samples"):
        compare_results(table, tmp_path / "nothing")


def test_another_question_under_the_same_number_is_not_paired(tmp_path):
    lm_eval_samples(tmp_path / "a", answers(0.6))
    lm_eval_samples(tmp_path / "b", answers(0.6).assign(question=lambda one: one["question"] + "?"))
    with pytest.raises(PftoolsError, match="question 0 of facts is another one"):
        compare_results(tmp_path / "a", tmp_path / "b")


def test_two_evaluations_of_one_training_are_not_taken_for_seeds(tmp_path):
    (path,) = lm_eval_samples(tmp_path / "a", answers(0.6)).rglob("samples_*.jsonl")
    path.with_name(path.name.replace("03-04-05", "04-04-05")).write_text(path.read_text())
    with pytest.raises(PftoolsError, match="both of facts and of one training"):
        read_results(tmp_path / "a")


def test_the_command_prints_the_sentence(tmp_path):
    one, other = (written(tmp_path, f"{share}.csv", answers(share, key=1)) for share in (0.7, 0.5))
    found = CliRunner().invoke(cli.app, ["compare", str(one), str(other)])
    assert found.exit_code == 0 and "0.7.csv and 0.5.csv are not equally often right" in found.output
    wrong = CliRunner().invoke(cli.app, ["compare", str(one), str(tmp_path / "no.csv")])
    assert isinstance(wrong.exception, PftoolsError)


def losses(seeds=3, blocks=30, gap=0.0, noise=0.02, by_seed=0.01, key=0):
    generator = np.random.default_rng(key)
    text = np.random.default_rng(99).normal(0, 0.4, blocks)
    nll = (
        3
        + gap
        + text
        + generator.normal(0, by_seed, (seeds, 1))
        + generator.normal(0, noise, (seeds, blocks))
    )
    grid = pd.DataFrame(nll).rename_axis(index="seed", columns="block")
    return grid.stack().rename("nll").reset_index()


def test_block_losses_are_compared_over_seeds_and_blocks(tmp_path):
    one, other = losses(key=1), losses(gap=0.1, key=2)
    paths = written(tmp_path, "a.csv", one), written(tmp_path, "b.csv", other)
    found = compare_losses(*paths)
    d = (one["nll"] - other["nll"]).to_numpy().reshape(3, 30)
    assert found.judged.mean == pytest.approx(d.mean())
    assert found.judged.interval[1] - d.mean() == pytest.approx(oracles.crossed_half_width(d, 0.05), rel=0.01)
    shown = CliRunner().invoke(cli.app, ["compare", *map(str, paths)]).output
    assert "a.csv and b.csv differ in perplexity" in shown and "3 of 3 seeds" in shown
    assert f"ratio {np.exp(d.mean()):.3f}" in shown
    same = written(tmp_path, "c.csv", losses(key=3, noise=0.001, by_seed=0.0005))
    like = written(tmp_path, "d.csv", losses(key=4, noise=0.001, by_seed=0.0005))
    assert "equivalent within 1%" in compare_losses(same, like, margin=0.01).sentence
    assert "cannot be told apart" in compare_losses(same, like).sentence


def test_losses_of_one_training_each_say_nothing_of_the_ways_of_training(tmp_path):
    one, other = (losses(seeds=1, gap=gap, key=key).drop(columns="seed") for gap, key in ((0, 5), (0.3, 6)))
    found = compare_losses(written(tmp_path, "a.csv", one), written(tmp_path, "b.csv", other))
    d = (one["nll"] - other["nll"]).to_numpy()
    assert found.judged.p == pytest.approx(stats.ttest_1samp(d, 0).pvalue, rel=1e-3)
    assert "one training each cannot say" in found.sentence


def named(table):
    """The same, with seeds and blocks that have names."""
    return table.assign(
        seed=table["seed"].map(["first", "second", "third"].__getitem__),
        block="b" + table["block"].astype(str),
    )


def test_named_spaced_and_huge_losses_are_compared(tmp_path):
    one, other = named(losses(key=1)), named(losses(key=2, gap=800))
    for name, table in (("a.csv", one), ("b.csv", other)):
        text = table.to_csv(index=False).replace("seed,block,nll", "seed, block, nll")
        (tmp_path / name).write_text("\ufeff" + text, encoding="utf-8")
    (said,) = sentences(tmp_path / "b.csv", tmp_path / "a.csv")
    assert "b.csv and a.csv differ in perplexity (infinite and 2" in said and "ratio infinite [" in said
    (said,) = sentences(tmp_path / "a.csv", tmp_path / "b.csv")
    assert "ratio 0.0e+00 [" in said


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda table: table[table["seed"] != 2], "the seeds 0, 1: give the same seeds"),
        (lambda table: table.iloc[:-1], "no loss for block 29 of the seed 2"),
        (lambda table: pd.concat([table, table.iloc[:1]]), "block 0 of the seed 0 twice"),
        (lambda table: table[table["block"] < 4], "has 4 blocks"),
        (
            lambda table: table.assign(nll=table["nll"].mask(table["block"] == 7, np.inf)),
            "no loss for block 7",
        ),
        (lambda table: pd.concat([named(table)] * 2), "block b0 of the seed first twice"),
    ],
)
def test_losses_that_cannot_be_paired_are_refused(tmp_path, change, says):
    one, other = written(tmp_path, "a.csv", losses()), written(tmp_path, "b.csv", change(losses()))
    with pytest.raises(PftoolsError, match=says):
        compare_losses(one, other)

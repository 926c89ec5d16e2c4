"""Studies that are planned in stages: trials, first trainings, more of those that may still be the best."""

import json
from pathlib import Path

import numpy as np
import pytest

from pftools import report, settings, study
from pftools.errors import PftoolsError
from pftools.execute import local, steps
from pftools.study import costs
from pftools.study.checks import check_plan
from pftools.study.words import TRIAL_SEEDS
from tests.stub_engine import StubEngine

ORDERINGS = ["prune", "finetune_prune", "prune_finetune"]
LOSS = {"prune": 3.6, "finetune_prune": 3.1, "prune_finetune": 3.0, "base": 2.9}
GRID = [1e-3, 2e-3, 4e-3]
BEST_RATE = {"finetune_prune": 1e-3, "prune_finetune": 2e-3}


def trained(variant, seed, rate, *, by_seed=0.004, losses=LOSS):
    """A loss that depends on ordering, seed and, where there is one, on the distance from the best rate."""
    wandering = by_seed * np.random.default_rng([seed, *variant.ordering.encode()]).normal()
    off = 0.0 if rate is None else 0.3 * abs(np.log2(rate / BEST_RATE[variant.ordering]))
    return losses[variant.ordering] + wandering + off


def planned(tmp_path, **words):
    path = tmp_path / "staged.yaml"
    content = {"name": "staged", "orderings": ORDERINGS, "evaluate": {"tasks": ["facts"]}, **words}
    path.write_text(json.dumps(content))
    return study.plan_study(study.load_study(path), runs=tmp_path / "runs")


def stages(plan):
    return list(dict.fromkeys(step.stage for step in plan.steps.values()))


def seeds_of(plan):
    found = {}
    for row in plan.rows:
        found.setdefault(row.ordering, []).append(row.seed)
    return {ordering: len(seeds) for ordering, seeds in found.items()}


# ---------------------------------------------------------------------------------------------- seeds


def test_seeds_are_spent_where_doubt_remains(tmp_path):
    close = {**LOSS, "finetune_prune": 3.0}
    engine = StubEngine(lambda *given: trained(*given, losses=close))
    plan = planned(tmp_path, seeds={"start": 3, "most": 8})
    assert seeds_of(plan) == dict.fromkeys(ORDERINGS, 3) and "more than 3 seeds" in plan.open[0]
    engine.run(plan)
    assert seeds_of(plan) == {"prune": 3, "finetune_prune": 8, "prune_finetune": 8} and not plan.open
    assert stages(plan) == ["3 seeds", "5 seeds", "8 seeds"]


def test_no_seed_is_spent_where_the_answer_is_clear(tmp_path):
    plan = StubEngine(trained).run(planned(tmp_path, seeds={"start": 3, "most": 8}))
    assert seeds_of(plan) == dict.fromkeys(ORDERINGS, 3) and not plan.open


def test_equivalent_orderings_end_the_looks(tmp_path):
    close = {**LOSS, "finetune_prune": 3.0}
    engine = StubEngine(lambda *given: trained(*given, losses=close, by_seed=0.0001), noise=0.001)
    plan = engine.run(planned(tmp_path, seeds={"start": 3, "most": 8}, equivalent_within="5%"))
    assert seeds_of(plan) == dict.fromkeys(ORDERINGS, 3)


def test_an_ordering_that_stands_beside_the_question_gets_the_first_seeds_only(tmp_path):
    close = {**LOSS, "finetune_prune": 3.0}
    engine = StubEngine(lambda *given: trained(*given, losses=close))
    plan = engine.run(planned(tmp_path, orderings=["base", *ORDERINGS], seeds={"start": 3, "most": 5}))
    assert seeds_of(plan)["base"] == 3 and seeds_of(plan)["prune_finetune"] == 5


def test_a_plan_is_the_same_whoever_makes_it(tmp_path):
    close = {**LOSS, "finetune_prune": 3.0}
    words = {"seeds": {"start": 3, "most": 8}, "tune": {"learning_rate": GRID}}
    plan = StubEngine(lambda *given: trained(*given, losses=close)).run(planned(tmp_path, **words))
    again = planned(tmp_path, **words)
    assert list(again.steps) == list(plan.steps) and again.rows == plan.rows and not again.missing()


def test_a_damaged_result_is_made_again_before_the_next_look(tmp_path):
    close = {**LOSS, "finetune_prune": 3.0}
    engine = StubEngine(lambda *given: trained(*given, losses=close))
    plan = planned(tmp_path, seeds={"start": 3, "most": 5})
    engine.stage(plan)
    damaged = Path(plan.rows[-1].evaluation) / "block_nll.parquet"
    damaged.write_bytes(b"gone")
    assert seeds_of(planned(tmp_path, seeds={"start": 3, "most": 5})) == dict.fromkeys(ORDERINGS, 3)


# --------------------------------------------------------------------------------------------- tuning


def test_every_ordering_tries_the_same_rates_and_gets_its_own(tmp_path):
    plan = planned(tmp_path, tune={"learning_rate": GRID, "seeds": 2}, seeds=[0, 1])
    assert {trial.seed for trial in plan.trials} == {TRIAL_SEEDS, TRIAL_SEEDS + 1}
    tried = [(trial.variant.ordering, trial.learning_rate) for trial in plan.trials]
    assert sorted(tried) == sorted((name, rate) for name in BEST_RATE for rate in GRID for _ in range(2))
    assert {row.ordering for row in plan.rows} == {"prune"}  # the others wait for their rates
    assert len(plan.open) == 2 and any("not planned yet" in line.lower() for line in costs.summary(plan))
    StubEngine(trained).run(plan)
    assert {one.ordering: rate for one, rate in plan.rates.items()} == BEST_RATE and not plan.open
    rates = {row.ordering: row.learning_rate for row in plan.rows}
    assert rates == {**BEST_RATE, "prune": None}
    assert {row.seed for row in plan.rows} == {0, 1} and stages(plan)[0] == "trials"
    for row in plan.rows:
        if row.learning_rate:
            made = plan.steps[Path(row.model).name].parameters
            chain = [
                made,
                *(plan.steps[name].parameters for name in plan.steps[Path(row.model).name].parents),
            ]
            assert any(getattr(step, "learning_rate", None) == row.learning_rate for step in chain)


def test_trials_are_judged_on_text_that_no_result_is_of(tmp_path):
    plan = planned(tmp_path, tune={"learning_rate": GRID, "n_blocks": 7})
    for trial in plan.trials:
        parameters = plan.steps[Path(trial.evaluation).name].parameters
        assert (parameters.split, parameters.n_blocks, parameters.tasks) == ("validation", 7, [])
    assert all(plan.steps[Path(row.evaluation).name].parameters.split == "test" for row in plan.rows)


def test_the_curve_says_where_the_choice_is_at_the_edge(tmp_path):
    plan = StubEngine(trained).run(planned(tmp_path, tune={"learning_rate": GRID}))
    curves = study.trials(plan).set_index(["ordering", "learning_rate"])
    assert curves.loc[("finetune_prune", 1e-3), "edge"] and curves.loc[("finetune_prune", 1e-3), "chosen"]
    assert curves.loc[("prune_finetune", 2e-3), "chosen"] and not curves["edge"].loc["prune_finetune"].any()
    for (ordering, rate), row in curves.iterrows():
        assert row["loss"] == pytest.approx(
            LOSS[ordering] + 0.3 * abs(np.log2(rate / BEST_RATE[ordering])), abs=0.05
        )
    assert curves["chosen"].sum() == 2


def test_a_rate_that_ruins_the_model_is_never_chosen(tmp_path):
    ruined = lambda variant, seed, rate: 20.0 if rate == 2e-3 else trained(variant, seed, rate)  # noqa: E731
    plan = StubEngine(ruined).run(planned(tmp_path, tune={"learning_rate": GRID}))
    assert 2e-3 not in plan.rates.values() and len(plan.rates) == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"seeds": {"start": 1, "most": 3}}, "greater than or equal to 2"),
        ({"seeds": {"start": 3, "most": 2}}, "most cannot be less"),
        ({"seeds": {"begin": 3, "most": 2}}, "unknown parameter 'begin'"),
        ({"tune": {"learning_rate": [0.001]}}, "at least 2"),
        ({"tune": {"learning_rate": [0.001, 0.001]}}, "each rate should be given once"),
        ({"tune": {"learning_rate": GRID}, "finetune": {"learning_rate": 0.1}}, "stands under finetune"),
        ({"tune": {"learning_rate": GRID}, "orderings": ["prune"]}, "nothing to tune"),
        ({"tune": {"learning_rate": GRID}, "evaluate": {"split": "validation"}}, "set split to test"),
        ({"tune": {"learning_rate": GRID}, "seeds": [TRIAL_SEEDS]}, "those of the trials"),
        (
            {
                "tune": {"learning_rate": GRID},
                "finetune": {"preset": "published"},
                "merges": ["dense"],
                "dtype": "float16",
            },
            "a rate of its own",
        ),
    ],
)
def test_mistakes_in_seeds_and_tune_are_named(tmp_path, words, says):
    with pytest.raises(PftoolsError, match=says):
        planned(tmp_path, **words)


def test_a_corpus_without_the_text_of_trials_is_refused_before_the_first(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for split in ("train", "test"):
        (corpus / f"{split}.txt").write_text("Some words, and more of them.\n\n" * 50)
    words = {"finetune": {"corpus": str(corpus)}, "calibrate": {"corpus": str(corpus), "split": "train"}}
    words["evaluate"] = {"corpus": str(corpus), "tasks": []}
    check_plan(planned(tmp_path, **words))
    with pytest.raises(PftoolsError, match="validation"):
        check_plan(planned(tmp_path, tune={"learning_rate": GRID}, **words))


def test_a_study_in_stages_is_the_same_study_after_a_trip_through_json(tmp_path):
    plan = planned(tmp_path, tune={"learning_rate": GRID}, seeds={"start": 3, "most": 8})
    again = settings.check(study.Study, json.loads(plan.study.model_dump_json()))
    assert list(study.plan_study(again, runs=tmp_path / "runs").steps) == list(plan.steps)


# ----------------------------------------------------------------------------------------- the report


def test_the_report_tells_the_looks_and_spends_the_level_once(tmp_path):
    close = {**LOSS, "finetune_prune": 3.0}
    engine = StubEngine(lambda *given: trained(*given, losses=close))
    engine.run(planned(tmp_path, seeds={"start": 3, "most": 8}))
    table = report.study_results(tmp_path / "staged.yaml", runs=tmp_path / "runs")
    found = {one.metric: one for one in report.best_sets(table)}
    assert [look.n_seeds for look in found["perplexity"].looks] == [3, 5, 8]
    assert sum(look.level for look in found["perplexity"].looks) == pytest.approx(0.05)
    assert set(found["perplexity"].members) == {"finetune_prune", "prune_finetune"}
    words = report.headline(table)
    assert "over looks at 3, 5 and 8 seeds" in words and "out: prune after 3 seeds" in words
    pairs = report.pair_table(table).set_index(["first", "second"])
    assert pairs.loc[("finetune_prune", "prune_finetune"), "seeds"] == 8
    assert pairs.loc[("prune", "prune_finetune"), "seeds"] == 3


def test_the_main_chart_rings_what_may_be_the_best(tmp_path):
    StubEngine(trained).run(planned(tmp_path, seeds={"start": 3, "most": 8}))
    table = report.study_results(tmp_path / "staged.yaml", runs=tmp_path / "runs")
    drawn = report.perplexity_chart(table).to_dict()
    assert "Ringed: may be the best" in json.dumps(drawn["title"])
    rows = [row for rows in drawn["datasets"].values() for row in rows if "may_be_best" in row]
    assert {row["label"] for row in rows if row["may_be_best"]} == {"prune_finetune"}
    rings = [layer for layer in drawn["layer"] if "may_be_best" in json.dumps(layer.get("transform", ""))]
    assert len(rings) == 1 and rings[0]["mark"]["filled"] is False


def test_the_report_shows_each_ordering_s_curve_and_an_edge(tmp_path):
    StubEngine(trained).run(planned(tmp_path, tune={"learning_rate": GRID}))
    table = report.study_results(tmp_path / "staged.yaml", runs=tmp_path / "runs")
    words = report.tuning_words(table)
    assert "finetune_prune at 50% (wanda): 0.001, which is the edge of the grid" in words
    assert "prune_finetune at 50% (wanda): 0.002." in words and "same 3 rates" in words
    drawn = report.tuning_chart(table).to_dict()
    rows = [row for rows in drawn["datasets"].values() for row in rows]
    assert len(rows) == 6 and sum(row["chosen"] for row in rows) == 2


def test_a_study_without_trials_has_no_word_of_them(tmp_path):
    StubEngine(trained).run(planned(tmp_path))
    table = report.study_results(tmp_path / "staged.yaml", runs=tmp_path / "runs")
    assert report.tuning_words(table) == "" and report.tuning_chart(table) is None


def test_a_report_before_the_last_look_says_that_the_study_goes_on(tmp_path):
    plan = planned(tmp_path, seeds={"start": 3, "most": 8}, tune={"learning_rate": GRID})
    engine = StubEngine(trained)
    engine.stage(plan)
    table = report.study_results(tmp_path / "staged.yaml", runs=tmp_path / "runs")
    assert "The study goes on: which orderings get more than 3 seeds" in report.headline(table)
    engine.run(study.plan_study(plan.study, runs=plan.runs))
    table = report.study_results(tmp_path / "staged.yaml", runs=tmp_path / "runs")
    assert "goes on" not in report.headline(table)


# -------------------------------------------------------------------------------------------- running


def test_run_study_goes_through_all_stages_and_the_plan_grows(tmp_path, monkeypatch):
    engine, calls = StubEngine(trained), []

    def run_plan(plan, **options):
        calls.append(len(plan.missing()))
        engine.stage(plan)
        return []

    monkeypatch.setattr(local, "run_plan", run_plan)
    plan = planned(tmp_path, seeds={"start": 2, "most": 3}, tune={"learning_rate": GRID})
    assert study.run_study(plan) == [] and not plan.open and not plan.missing()
    assert len(calls) >= 2 and len(study.results(plan)) == len(plan.rows) > 0


def test_a_failure_ends_the_stages(tmp_path, monkeypatch):
    failure = steps.Failure("finetune-0123456789ab", 3, "no")
    calls = []
    monkeypatch.setattr(local, "run_plan", lambda plan, **options: calls.append(plan) or [failure])
    plan = planned(tmp_path, tune={"learning_rate": GRID})
    assert study.run_study(plan) == [failure] and len(calls) == 1 and plan.open

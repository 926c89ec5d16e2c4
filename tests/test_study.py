import subprocess
import sys

import pytest

from pftools import run_folder, settings
from pftools.errors import PftoolsError
from pftools.study import Study, load_study, plan_study
from pftools.study.costs import estimate_disk
from pftools.study.durations import estimate_seconds
from pftools.study.layout import plan_layout


def study(**changes) -> Study:
    words = {
        "name": "test",
        "model": "somebody/model",
        "orderings": ["base", "prune", "finetune_prune", "prune_finetune"],
    }
    return settings.check(Study, {**words, **changes})


def steps_of(plan):
    return [step.parameters.step for step in plan.steps.values()]


def test_the_shipped_studies_are_valid():
    for name in ("quick", "published"):
        assert load_study(f"data/studies/{name}.yaml").name == name


def test_common_beginnings_are_shared():
    plan = plan_study(study())
    assert sorted(steps_of(plan)) == ["calibrate"] + ["evaluate"] * 4 + ["finetune"] * 2 + ["prune"] * 2
    assert [row.ordering for row in plan.rows] == ["base", "prune", "finetune_prune", "prune_finetune"]
    assert plan.unshared == 12


def test_every_step_comes_after_the_ones_it_starts_from():
    plan = plan_study(study(orderings=["iter_pf", "iter_fp", "finetune_iter_prune"], sparsities=[0.5, 0.7]))
    seen = set()
    for name, step in plan.steps.items():
        assert set(step.parents) <= seen
        seen.add(name)


def test_another_sparsity_leaves_what_does_not_depend_on_it():
    one, other = plan_study(study(sparsities=[0.5])), plan_study(study(sparsities=[0.6]))
    shared = set(one.steps) & set(other.steps)
    assert sorted(name.partition("-")[0] for name in shared) == ["calibrate", "evaluate", "finetune"]


def test_the_published_grid_shares_its_prefixes():
    plan = plan_study(load_study("data/studies/published.yaml"))
    # base 1, finetune 1, finetune_iter 5, three one-shot pipelines and finetune_iter_prune 7 each,
    # P F*5 7 x 5, two chains of 7
    assert len(plan.rows) == 1 + 1 + 5 + 4 * 7 + 7 * 5 + 2 * 7
    # F's: 5 of the chain F*5 (finetune and finetune_prune are its first), 7 x 5 after each P (the first is
    # prune_finetune), 7 + 6
    finetunes = steps_of(plan).count("finetune")
    # iter_pf starts with P(0.1) F, which prune_finetune has; iter_fp with F, which finetune has
    assert finetunes == 5 + 7 * 5 + 6 + 6
    disk = estimate_disk(plan)
    assert disk["deltas"] < 60e9 < 700e9 < disk["copies"]


def test_a_total_budget_is_split_and_a_step_budget_is_not():
    blocks = {"block_length": 50}
    total = plan_study(study(orderings=["F*4"], tokens=1000, finetune=blocks))
    each = plan_study(study(orderings=["F*4"], tokens=1000, finetune=blocks, budget="per_step"))
    assert {
        step.parameters.tokens for step in total.steps.values() if step.parameters.step == "finetune"
    } == {250}
    assert {step.parameters.tokens for step in each.steps.values() if step.parameters.step == "finetune"} == {
        1000
    }
    assert (total.rows[0].finetune_tokens, each.rows[0].finetune_tokens) == (1000, 4000)


def test_a_split_budget_adds_up_to_the_token():
    plan = plan_study(study(orderings=["(P F)*3", "P F"], tokens=1000, finetune={"block_length": 10}))
    shares = [step.parameters.tokens for step in plan.steps.values() if step.parameters.step == "finetune"]
    assert sorted(shares) == [330, 330, 340, 1000]  # whole blocks, so that what is planned is what is trained
    assert [row.finetune_tokens for row in plan.rows] == [1000, 1000]
    with pytest.raises(PftoolsError, match="each needs at least one block"):
        study(orderings=["F*3"], tokens=1000, finetune={"block_length": 500})


def test_everything_is_crossed_with_everything():
    crossed = {
        "orderings": ["P", "P F", {"ordering": "F P", "sparsities": [0.4]}],
        "sparsities": [0.5, 0.6],
        "methods": ["wanda", "magnitude"],
        "patterns": ["unstructured", "2:4"],
        "merges": ["masked", "dense"],
        "seeds": [0, 1],
    }
    plan = plan_study(study(**crossed))
    per_method_and_seed = (
        2 * (2 + 2 + 1) + 2 * 3
    )  # both merges: unstructured at their sparsities, and 2:4 at its own
    assert len(plan.rows) == len(set(plan.rows)) == 2 * 2 * per_method_and_seed
    # prunes: before any F they do not know the merge: 3 targets; after F (no zeros yet, so one F a seed): 2
    assert steps_of(plan).count("prune") == 2 * 2 * (3 + 2)
    assert steps_of(plan).count("finetune") == 2 * (1 + 2 * 3 * 2)


def test_planning_loads_no_library_that_takes_seconds_to_load():
    code = (
        "import sys; from pftools import study\n"
        "from pftools.study import costs\n"
        "plan = study.plan_study(study.load_study('data/studies/published.yaml'))\n"
        "costs.summary(plan); plan.missing()\n"
        "heavy = ('torch', 'transformers', 'pandas', 'papermill', 'numpy')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_time_is_estimated_from_past_runs_of_the_same_kind_and_model(tmp_path):
    plan = plan_study(
        study(orderings=["P", "P F"], tokens=1000, finetune={"block_length": 100}), runs=tmp_path
    )
    assert estimate_seconds(plan) == (0, {"calibrate", "prune", "finetune", "evaluate"})
    for step, seconds in zip(
        plan.steps.values(), (1, 10, 100, 1000)
    ):  # calibrate, prune, evaluate the pruned model, finetune
        run = run_folder.start(step.parameters)
        run.started -= seconds
        run.seal([])
    assert [step.parameters.step for step in plan.missing()] == ["evaluate"]
    assert estimate_seconds(plan)[0] == pytest.approx(100, rel=0.01)
    longer = plan_study(
        study(orderings=["P", "P F"], tokens=3000, sparsities=[0.6], finetune={"block_length": 100}),
        runs=tmp_path,
    )
    assert estimate_seconds(longer)[0] == pytest.approx(10 + 2 * 100 + 3 * 1000, rel=0.01)
    elsewhere = plan_study(study(orderings=["P"], model="another/model"), runs=tmp_path)
    assert estimate_seconds(elsewhere) == (0, {"calibrate", "prune", "evaluate"})


def test_the_chart_of_a_plan_draws_every_model_once_and_no_line_through_another():
    from pftools import figures

    plan = plan_study(load_study("data/studies/published.yaml"))
    table = plan_layout(plan).set_index("key")
    assert len(table) == 1 + steps_of(plan).count("prune") + steps_of(plan).count("finetune")
    assert not table.duplicated(["depth", "lane"]).any() and table["evaluated"].sum() == steps_of(plan).count(
        "evaluate"
    )
    for row in table[table["parent"] != ""].itertuples():
        parent = table.loc[row.parent]
        assert row.depth == parent["depth"] + 1 and row.lane >= parent["lane"]
        between = table[
            (table["depth"] == parent["depth"])
            & (table["lane"] > parent["lane"])
            & (table["lane"] <= row.lane)
        ]
        assert not len(between)  # the way down from the parent is free
    assert figures.plan_chart(table.reset_index()).to_dict()["layer"]


def test_the_kth_finetune_has_seed_k_and_seeds_never_meet():
    plan = plan_study(study(orderings=["F*3"], seeds=[0, 1]))
    seeds = [step.parameters.seed for step in plan.steps.values() if step.parameters.step == "finetune"]
    assert seeds == [1, 2, 3, 1001, 1002, 1003]


@pytest.mark.parametrize("options", [{"inputs": "dense"}, {"allocation": "owl"}])
def test_what_reads_statistics_calibrates_every_parent(options):
    plan = plan_study(study(orderings=["prune", "finetune_prune"], prune=options))
    assert steps_of(plan).count("calibrate") == 2


def test_a_preset_is_refused_where_the_rest_of_the_study_says_otherwise():
    with pytest.raises(PftoolsError, match="merges: \\[dense\\].*dtype: float16"):
        study(finetune={"preset": "published"})
    study(finetune={"preset": "published"}, merges=["dense"], dtype="float16")


def test_a_pattern_fixes_the_sparsity():
    plan = plan_study(study(orderings=["prune"], patterns=["2:4", "unstructured"], sparsities=[0.3]))
    assert [(row.pattern, row.asked) for row in plan.rows] == [("2:4", 0.5), ("unstructured", 0.3)]
    with pytest.raises(PftoolsError, match="several P's"):
        study(orderings=["iter_pf"], patterns=["2:4"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("orderings: [prune]\nsparsites: [0.5]\n", "line 2.*did you mean 'sparsities'"),
        ("orderings:\n  - prune\n  - prune_finetnue\n", "line 3.*did you mean 'prune_finetune'"),
        (
            "sparsities: [0.5]\norderings:\n  - F\n  - {ordering: prune, sparsities: [1.5]}\n",
            "line 4.*from 0 up to 1",
        ),
        ("orderings:\n  - F\n  - {ordering: P, sparsites: [0.5]}\n", "line 3.*did you mean 'sparsities'"),
        ("orderings:\n  - P\n  - (P F\n", "line 3.*closing bracket"),
        ("orderings:\n  - P\n  - [P]\n", "line 3.*"),
        ("orderings: [prune]\nmethods:\n  - wanda\n  - wnada\n", "line 4.*did you mean 'wanda'"),
        ("orderings: [prune]\nmethods: [nonsense]\n", "line 2.*unknown pruning method 'nonsense'"),
        ("orderings: [prune]\npatterns:\n  - '4:2'\n", "line 3.*N:M with N < M"),
        ("patterns: ['2:4']\norderings:\n  - P\n  - iter_pf\n", "line 4.*several P's"),
        ("orderings: [iter_pf]\ntokens: 5\n", "line 1.*cannot be split over the 7 F's"),
        ("orderings: [prune]\nseeds: [0, -1]\n", "line 2.*seeds"),
        ("orderings: [prune]\nmerges: [masked, dens]\n", "line 2.*merges"),
        ("orderings: [prune]\nsparsities: []\n", "line 2.*sparsities"),
        ("orderings: [prune]\nevaluate:\n  limit: 0\n", "line 3.*limit"),
        ("orderings: [prune]\nhf_token: x\n", "looks like a secret"),
        ("orderings: [prune]\nfinetune:\n  rnak: 8\n", "line 3.*did you mean 'rank'"),
        ("orderings: [prune]\nprune:\n  sparsity: 0.5\n", "line 3.*set by the plan"),
        ("orderings: [prune\n", "not valid YAML"),
        ("- prune\n", "is not a study"),
        ("orderings: [prune]\nbudget: totl\n", "line 2.*budget"),
    ],
)
def test_mistakes_in_a_study_file_are_named_with_their_line(tmp_path, text, says):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(PftoolsError, match=says):
        load_study(path)


def test_a_missing_study_file_names_those_there_are():
    with pytest.raises(PftoolsError, match="data/studies/quick.yaml"):
        load_study("nowhere.yaml")


@pytest.mark.parametrize("kind", settings.STEPS.values(), ids=settings.STEPS)
def test_only_what_changes_results_changes_the_key(kind):
    """Every parameter of every step, one after the other."""
    other = {
        int: lambda value: (value or 0) + 1,
        float: lambda value: (value or 0) * 0.5 + 0.01,
        bool: lambda value: not value,
        str: lambda value: value + "x",
        list: lambda value: [*value, "x"],
        type(None): lambda value: 1,
    }
    plain = kind()
    for name in kind.model_fields:
        value = getattr(plain, name)
        changed = plain.model_copy(update={name: other[type(value)](value)})
        same_key = run_folder.run_key(changed) == run_folder.run_key(plain)
        assert same_key == (
            name
            in {
                "device",
                "runs",
                "batch_size",
                "gradient_checkpointing",
                "placement",
                "save_every",
                "track",
                "data",
                "show_dense_cost",
                "held_out_blocks",
            }
        ), name

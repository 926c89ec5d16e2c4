"""Which step has which GPU, on machines with fewer of them than steps, and what is asked of a cluster."""

from dataclasses import replace

import pytest

from pftools import needs, settings, study
from pftools.execute import local, sbatch
from pftools.study import Study, costs, plan_study
from tests.test_needs import GB, HUGE, LLAMA_7B, SEVEN
from tests.trivial import trivial_plan, write_notebooks

SHAPE = {name: value for name, value in LLAMA_7B.items() if name != "dtype"}


def gpus(needed, *room):
    return local._Gpus({str(number): free for number, free in enumerate(room)}, needed)


def test_steps_share_a_gpu_for_as_long_as_they_fit_on_it():
    two = gpus({name: (1, 6 * GB) for name in "abcde"}, 16 * GB, 16 * GB)
    assert [two.take(name) for name in "abcde"] == [("0",), ("1",), ("0",), ("1",), None]
    two.give("b")
    assert two.take("e") == ("1",)


def test_a_step_that_is_spread_has_its_gpus_to_itself():
    three = gpus({"a": (1, 6 * GB), "b": (2, 9 * GB), "c": (1, 6 * GB)}, *[16 * GB] * 3)
    assert three.take("a") == ("0",) and three.take("b") == ("1", "2") and three.take("c") == ("0",)
    three.give("a")
    three.give("c")
    assert three.take("b") is None or len(three.take("b")) == 2
    assert gpus({"b": (4, 9 * GB)}, 16 * GB, 16 * GB).take("b") == ("0", "1")  # there are no more


def test_what_is_not_known_has_a_gpu_alone_and_what_needs_none_waits_for_none():
    one = gpus({"cpu": (0, 0), "known": (1, GB)}, 16 * GB)
    assert one.take("?") == ("0",) and one.take("known") is None and one.take("cpu") == ()
    assert gpus({}, *[]).take("anything") == ()


def test_a_step_larger_than_a_gpu_begins_when_it_is_free():
    one = gpus({"large": (1, 99 * GB), "small": (1, GB)}, 16 * GB)
    assert one.take("large") == ("0",) and one.take("small") is None


@pytest.mark.parametrize(
    ("room", "wanted"), [((20, 20), (1, 20)), ((12, 12), (2, 12)), ((6, 6, 6, 6), (3, 6)), ((3, 3), (1, 3))]
)
def test_a_model_is_spread_over_as_few_gpus_as_it_fits_on(room, wanted):
    parameters = settings.Evaluate(dtype="float16", batch_size=1, tasks=[], block_length=128)
    found = replace(HUGE, gpus=tuple(size * GB for size in room))
    count, size = needs.gpus_for(parameters, SEVEN, found)
    assert count == wanted[0] and 0 < size < wanted[1] * GB
    assert needs.gpus_for(parameters.model_copy(update={"device": "cpu"}), SEVEN, found) == (0, 0)


def test_memory_and_time_are_asked_of_a_cluster_where_nobody_said_them():
    estimate = costs.JobEstimate(memory=20 * GB, minutes=50, spread=False)
    assert sbatch.asked_for(estimate, {}) == {"mem": "24G", "time": "150"}
    given = {"mem_per_cpu": "4G", "time": "2:00:00", "partition": "gpu"}
    assert sbatch.asked_for(estimate, given) == given
    assert sbatch.asked_for(replace(estimate, minutes=0), {}) == {"mem": "24G"}  # the executor's own limit
    assert sbatch.asked_for(replace(estimate, minutes=0.1), {})["time"] == "30"
    assert sbatch.asked_for(None, {"gres": "gpu:2"}) == {"gres": "gpu:2"}


@pytest.mark.parametrize(
    ("name", "given", "one"),
    [
        ("gres", "gpu:2", "gpu:1"),
        ("gres", "gpu:a100:4", "gpu:a100:1"),
        ("gpus", "2", "1"),
        ("gres", "gpu:1", "gpu:1"),
    ],
)
def test_only_a_step_that_is_spread_has_all_gpus_that_were_asked_for(name, given, one):
    estimate = costs.JobEstimate(memory=GB, minutes=0, spread=False)
    assert sbatch.asked_for(estimate, {name: given})[name] == one
    assert sbatch.asked_for(replace(estimate, spread=True), {name: given})[name] == given


def test_the_estimates_of_jobs_are_those_of_their_steps(tmp_path):
    words = {"name": "mine", "model": "somebody/model", "orderings": ["P F"], "shape": SHAPE}
    plan = plan_study(
        settings.check(Study, {**words, "dtype": "float16", "placement": "spread"}), runs=tmp_path
    )
    found = costs.job_estimates(plan)
    assert set(found) == set(plan.steps) and all(one.spread and one.minutes == 0 for one in found.values())
    assert all(one.memory > 2 * SEVEN.total for one in found.values())
    plan = plan_study(settings.check(Study, {**words, "shape": {}}), runs=tmp_path)
    assert costs.job_estimates(plan) == {}


_SHOW = "journal('has ' + os.environ.get('CUDA_VISIBLE_DEVICES', 'none')); time.sleep(0.5); journal('done')"


def at_a_time(journal):
    """The GPUs of the steps that are at work together, at every moment of a journal."""
    having = {}
    for line in journal.read_text().splitlines():
        *words, name = line.split()
        if words[0] == "has":
            having[name] = words[1].split(",")
        having = {other: names for other, names in having.items() if words[0] != "done" or other != name}
        yield [gpu for names in having.values() for gpu in names]


@pytest.mark.slow
@pytest.mark.parametrize("words", [{}, {"shape": SHAPE, "placement": "spread", "dtype": "float16"}])
def test_more_jobs_than_gpus_never_put_two_steps_on_one_that_nothing_is_known_of(
    tmp_path, monkeypatch, words
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    notebooks = write_notebooks(tmp_path / "notebooks", **dict.fromkeys(settings.STEPS, _SHOW))
    plan = trivial_plan(tmp_path / "runs", orderings=["P", "F", "P F", "F P"], **words)
    assert study.run_study(plan, jobs=4, notebooks=notebooks, progress=False) == []
    moments = list(at_a_time(tmp_path / "runs" / "journal.txt"))
    assert all(len(names) == len(set(names)) for names in moments)
    assert {name for names in moments for name in names} == {"2", "5"}
    together = max(len(names) for names in moments)
    assert together == 2 and (not words or all(len(names) in (0, 2) for names in moments))

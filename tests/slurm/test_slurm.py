"""The SLURM executor on a real cluster of one node, which tests/slurm/one_node.sh starts and ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pftools import cli, run_folder, study
from pftools.errors import PftoolsError
from pftools.execute import sbatch, slurm, steps
from pftools.execute.slurm_queue import queue
from tests.tiny import save_tiny
from tests.trivial import contents, trivial_plan, write_notebooks

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.xdist_group("slurm")]
SCRIPT = Path(__file__).parent / "one_node.sh"
ROOT = SCRIPT.parent.parent.parent


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory):
    if not os.environ.get("PFTOOLS_TEST_SLURM"):
        pytest.skip(
            "starts a SLURM cluster on this machine: `tests/slurm/run` does that, and so does .ci/run"
        )
    if os.geteuid() != 0 or not all(shutil.which(name) for name in ("slurmctld", "slurmd", "munged")):
        pytest.skip("a SLURM cluster of one node needs root and Debian's packages slurm-wlm and munge")
    folder = tmp_path_factory.mktemp("slurm")
    try:
        started = subprocess.run([SCRIPT, "start", folder], capture_output=True, text=True)
        assert started.returncode == 0, started.stderr
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("SLURM_CONF", str(folder / "slurm.conf"))
            environment.setenv("PYTHONPATH", str(ROOT))
            yield folder
    finally:
        subprocess.run([SCRIPT, "stop", folder], check=True)


def states(plan):
    return {
        name.partition("-")[0] + f" {number}": study.run_state(step.folder)
        for number, (name, step) in enumerate(plan.steps.items())
    }


def run_all(plan, notebooks, **options):
    return study.run_study(plan, executor="slurm", notebooks=notebooks, progress=False, **options)


def wait_until(true, seconds=60):
    patience = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < patience
        time.sleep(0.1)


def test_a_failing_step_cancels_only_what_depends_on_it_and_is_made_good_later(tmp_path, capsys, monkeypatch):
    notebooks = write_notebooks(tmp_path / "notebooks", finetune="raise OSError('no luck')")
    plan = trivial_plan(tmp_path / "runs")
    (failure,) = run_all(plan, notebooks)
    assert failure.run.startswith("finetune-") and "OSError: no luck" in failure.cause and failure.cell
    assert list(states(plan).values()).count("finished") == 3
    (tmp_path / "trivial.yaml").write_text("model: somebody/model\norderings: [P, F P]\n")
    monkeypatch.setattr(cli.out, "width", 300)
    cli.status(tmp_path / "trivial.yaml", tmp_path / "runs")
    shown = capsys.readouterr().out
    assert (
        "3 finished, 1 failed, 2 to do" in shown
        and "OSError: no luck" in shown
        and "needs finetune-" in shown
    )
    notebooks = write_notebooks(tmp_path / "notebooks")
    assert run_all(plan, notebooks) == []
    local = trivial_plan(tmp_path / "local")
    assert study.run_study(local, notebooks=notebooks, progress=False) == []
    assert contents(plan) == contents(local)


def test_the_driver_may_be_killed_and_a_second_one_submits_nothing_twice(tmp_path):
    notebooks = write_notebooks(tmp_path / "notebooks", calibrate="time.sleep(3)")
    plan = trivial_plan(tmp_path / "runs")
    code = (
        "import sys; from pathlib import Path\n"
        "from pftools.study import run_study; from tests.trivial import trivial_plan\n"
        "run_study(trivial_plan(Path(sys.argv[1])), executor='slurm', notebooks=sys.argv[2], progress=False)"
    )
    driver = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "runs"), str(notebooks)], cwd=ROOT)
    wait_until(lambda: len(queue(tmp_path / "runs")) == len(plan.steps) or driver.poll() is not None)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    queued = queue(tmp_path / "runs")
    assert len(queued) > 3
    slurm.submit(plan, notebooks=notebooks)
    assert {job.id for job in queue(tmp_path / "runs").values()} <= {job.id for job in queued.values()}
    assert run_all(plan, notebooks) == []
    begun = [
        line
        for line in (tmp_path / "runs" / "journal.txt").read_text().splitlines()
        if line.startswith("begins")
    ]
    assert len(begun) == len(set(begun)) == len(plan.steps)


def test_a_job_that_the_cluster_kills_is_not_finished_and_says_its_last_words(tmp_path):
    notebooks = write_notebooks(tmp_path / "notebooks", prune="time.sleep(60)")
    plan = trivial_plan(tmp_path / "runs", orderings=["P"])
    slurm.submit(plan, notebooks=notebooks)
    name = next(name for name in plan.steps if name.startswith("prune"))
    wait_until(lambda: run_folder.is_locked(plan.steps[name].folder))
    subprocess.run(["scancel", "--signal=KILL", queue(tmp_path / "runs")[name].id], check=True)
    wait_until(lambda: not queue(tmp_path / "runs"))
    assert not run_folder.is_finished(plan.steps[name].folder) and not run_folder.is_locked(
        plan.steps[name].folder
    )
    assert list(states(plan).values()) == ["finished", "to do", "to do"]
    assert steps.read_failure(plan.steps[name].folder).cause
    assert run_all(plan, write_notebooks(tmp_path / "notebooks")) == []


def test_the_quick_study_on_a_tiny_model_ends_as_it_does_locally(tmp_path, monkeypatch):
    """Its orderings, its notebooks, both executors, the command line."""
    monkeypatch.chdir(tmp_path)
    words = yaml.safe_load((ROOT / "data/studies/quick.yaml").read_text())
    words |= {"model": str(save_tiny(tmp_path / "tiny")), "dtype": "float32", "tokens": 512}
    words["calibrate"] |= {"n_blocks": 4, "block_length": 64}
    words["finetune"] |= {"block_length": 64}
    words["evaluate"] |= {"block_length": 64, "n_blocks": 8, "limit": 4}
    Path("quick.yaml").write_text(yaml.safe_dump(words))
    found = []
    for executor in ("slurm", "local"):
        command = [
            sys.executable,
            "-m",
            "pftools.cli",
            "run",
            "quick.yaml",
            "--runs",
            executor,
            "--executor",
            executor,
            "--no-report",
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stdout + done.stderr
        found.append(
            study.results(study.plan_study(study.load_study("quick.yaml"), runs=executor)).drop(
                columns=["model", "run"]
            )
        )
    assert found[0].equals(found[1]) and len(found[0]) == 4


_LOSSES = """
import pandas as pd
pd.DataFrame({"block": range(8), "nll": [3.0 + 0.01 * block for block in range(8)]}).to_parquet(
    run.path("block_nll.parquet")
)
outputs.append("block_nll.parquet")
"""


def test_a_study_in_stages_ends_without_a_driver_that_waits(tmp_path):
    """Two seeds, then the third: orderings that are alike stay in until the end."""
    notebooks = write_notebooks(tmp_path / "notebooks", evaluate=_LOSSES)
    words = {"orderings": ["F", "F F"], "seeds": {"start": 2, "most": 3}}
    plan = trivial_plan(tmp_path / "runs", **words)
    assert run_all(plan, notebooks, wait=False) == []
    submitted = queue(tmp_path / "runs")
    assert any(name.startswith("plan-trivial-") for name in submitted)
    assert len(slurm.submit(plan, notebooks=notebooks)) >= 1  # a second driver adds nothing
    assert sum(name.startswith("plan-") for name in queue(tmp_path / "runs")) <= 1
    wait_until(lambda: not queue(tmp_path / "runs"), seconds=900)
    plan = trivial_plan(tmp_path / "runs", **words)
    assert not plan.open and not plan.missing() and {row.seed for row in plan.rows} == {0, 1, 2}
    journal = (tmp_path / "runs" / "journal.txt").read_text().splitlines()
    assert len(journal) == len(set(journal)) == 2 * len(plan.steps)  # no step was executed twice


def test_a_failed_stage_plans_no_other(tmp_path):
    notebooks = write_notebooks(tmp_path / "notebooks", finetune="raise ValueError('no')")
    words = {"orderings": ["F P"], "tune": {"learning_rate": [0.001, 0.002]}}
    plan = trivial_plan(tmp_path / "runs", **words)
    assert [failure.cell for failure in run_all(plan, notebooks)] == [3, 3]
    wait_until(lambda: not queue(tmp_path / "runs"))
    assert not plan.rows


def test_what_sbatch_refuses_is_one_sentence(tmp_path):
    with pytest.raises(PftoolsError, match="sbatch refused the job of calibrate-.*Invalid partition name"):
        slurm.submit(trivial_plan(tmp_path / "runs"), options={"partition": "nowhere"})


@pytest.mark.parametrize(
    ("text", "minutes"), [("90", 90), ("2:30", 3), ("2:00:00", 120), ("1-12", 2160), ("1-0:30", 1470)]
)
def test_time_limits_are_read_as_sbatch_reads_them(text, minutes):
    assert sbatch.minutes(text) == minutes

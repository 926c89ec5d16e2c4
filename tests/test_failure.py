"""Whatever goes wrong, nothing wrong is taken for finished and nothing finished is done again.

The studies here have steps that do next to nothing (tests/trivial.py), in real processes with real kernels.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from pftools import cli, run_folder, settings, study
from pftools.errors import PftoolsError
from pftools.execute import steps
from tests.trivial import contents, trivial_plan, write_notebooks

ROOT = Path(__file__).parent.parent
_DRIVER = """
import sys
from pathlib import Path
from pftools.study import run_study
from tests.trivial import trivial_plan
words = {"orderings": ["P", "F"]} if "study" in Path(sys.argv[1]).name else {}
plan = trivial_plan(Path(sys.argv[1]), **words)
failures = run_study(plan, jobs=int(sys.argv[3]), notebooks=sys.argv[2], progress=False)
print(*failures, sep="\\n")
sys.exit(len(failures))
"""


@pytest.fixture
def temporary(monkeypatch):
    """A temporary folder of its own, as short as the path of a socket has to be."""
    with tempfile.TemporaryDirectory(prefix="k") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(folder)


def drive(root: Path, notebooks: Path, jobs: int = 1) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _DRIVER, str(root), str(notebooks), str(jobs)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        # Background jobs of a shell ignore Ctrl-C and hand that on to what they start; at a keyboard nothing
        # does.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def below(driver: subprocess.Popen[str], word: str) -> list[psutil.Process]:
    """The driver's processes with a word in their command: `ipykernel_launcher`, `pftools.execute.steps`."""
    try:
        return [
            process
            for process in psutil.Process(driver.pid).children(recursive=True)
            if word in " ".join(process.cmdline())
        ]
    except psutil.Error:
        return []


def alive_in(temporary: Path) -> list[psutil.Process]:
    """Processes that were started with this temporary folder: steps and kernels, orphans too."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get("TMPDIR") == str(temporary):
                found.append(process)
    return found


def journal(root: Path) -> list[str]:
    path = root / "journal.txt"
    return path.read_text().splitlines() if path.exists() else []


def leftovers(root: Path) -> list[Path]:
    """Files that belong to nothing: attempts, halves of JSON files, what a step did not seal."""
    return [*root.glob(".work/*"), *root.rglob(".*.partial"), *root.rglob("*.tmp")]


@pytest.mark.slow
def test_a_study_survives_being_killed_twenty_times(tmp_path, temporary):
    notebooks = write_notebooks(tmp_path / "notebooks", prune="time.sleep(0.2)", finetune="time.sleep(0.2)")
    undisturbed = trivial_plan(tmp_path / "undisturbed", orderings=["P", "F"])
    assert study.run_study(undisturbed, notebooks=notebooks, progress=False, jobs=2) == []
    chance = random.Random(1)
    kills = dict.fromkeys(("driver", "step", "kernel", "all"), 0)
    number = 0
    while sum(kills.values()) < 20:
        number += 1
        root = tmp_path / f"study{number}"
        plan, finished = trivial_plan(root, orderings=["P", "F"]), set()
        while len(finished) < len(plan.steps) and sum(kills.values()) < 20:
            before = len(journal(root))
            driver = drive(root, notebooks, jobs=1 + sum(kills.values()) % 2)
            # Most of the moments when kernels are at work, the others any time after the start.
            if chance.random() < 0.8:
                wait_for(
                    lambda driver=driver: below(driver, "ipykernel_launcher") or driver.poll() is not None
                )
            time.sleep(chance.uniform(0, 1.5))
            whom, kernels = chance.choice(list(kills)), below(driver, "ipykernel_launcher")
            if driver.poll() is None and (kernels or whom == "driver"):
                kills[whom] += 1
                # The steps first: what they are to clean up, they cannot.
                for victim in below(driver, "pftools.execute.steps") if whom in ("step", "all") else []:
                    kill_if_there(victim)
                for victim in kernels if whom in ("kernel", "all") else []:
                    kill_if_there(victim)
                if whom in ("driver", "all"):
                    driver.kill()
            # Where only a kernel or a step's process died, it goes on with what does not depend on that.
            driver.communicate(timeout=600)
            again = {line.partition(" ")[2] for line in journal(root)[before:] if line.startswith("begins")}
            assert not again & finished, "a finished step was computed twice"
            finished = {name for name, step in plan.steps.items() if run_folder.is_finished(step.folder)}
            assert steps.unusable(plan) == {}
        # What a killed driver had started ends a moment after it, and holds its run until then.
        wait_for(lambda plan=plan: not any(run_folder.is_locked(step.folder) for step in plan.steps.values()))
        assert study.run_study(plan, notebooks=notebooks, progress=False) == []
        assert contents(plan) == {
            name: (tmp_path / "undisturbed" / name / "result.txt").read_text() for name in plan.steps
        }
        assert leftovers(root) == []
    assert all(kills.values()), kills
    wait_for(lambda: not alive_in(temporary))
    assert list(temporary.rglob("*")) == [], "sockets or other files were left"


def wait_for(true, seconds=300):
    patience = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < patience
        time.sleep(0.02)


def kill_if_there(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        pass


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished study with a run of every kind, and the notebooks that made it."""
    folder = tmp_path_factory.mktemp("finished")
    notebooks = write_notebooks(folder / "notebooks")
    plan = trivial_plan(folder / "runs", orderings=["P F"], analyse=True)
    assert study.run_study(plan, notebooks=notebooks, progress=False, jobs=2) == []
    return plan, notebooks


def damages(path: Path):
    """Ways to damage a file; each is undone afterwards."""
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:20] + bytes([whole[20] ^ 1]) + whole[21:], b"", None):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        yield
        path.write_bytes(whole)


def test_any_damaged_file_of_any_kind_of_run_is_named_and_never_used(finished):
    plan, _ = finished
    assert {step.parameters.step for step in plan.steps.values()} == set(settings.STEPS)
    for name, step in plan.steps.items():
        children = [child for child in plan.steps.values() if name in child.parents]
        for path in sorted(step.folder.iterdir()):
            for _ in damages(path):
                gone = path.name == "run.json" and not path.exists()  # then it is simply not finished
                says = "not finished" if gone else path.name
                with pytest.raises(PftoolsError, match=says):
                    run_folder.verify(step.folder)
                for child in children:
                    with pytest.raises(PftoolsError, match=says):
                        run_folder.start(child.parameters)
                if not gone:
                    assert path.name in steps.unusable(plan).get(name, path.name)
                    if step.parameters.step == "evaluate":
                        with pytest.raises(PftoolsError, match=path.name):
                            study.results(plan)
    assert steps.unusable(plan) == {}


def test_a_damaged_run_that_is_needed_is_made_again(finished, tmp_path, capsys):
    plan, notebooks = finished
    shutil.copytree(plan.runs, tmp_path / "runs")
    plan = trivial_plan(tmp_path / "runs", orderings=["P F"], analyse=True)
    pruned = next(step for step in plan.steps.values() if step.parameters.step == "prune")
    evaluated = next(step for step in plan.steps.values() if step.parameters.step == "evaluate")
    before = contents(plan)
    (pruned.folder / "result.txt").write_text("not what was sealed")
    (evaluated.folder / "run.json").unlink()  # its model goes back to the pruned one
    assert study.run_study(plan, notebooks=notebooks, progress=False) == []
    assert "result.txt differs from what was sealed" in capsys.readouterr().err
    assert contents(plan) == before and not steps.unusable(plan)


def test_ctrl_c_ends_every_process_and_the_next_run_goes_on(tmp_path, temporary):
    notebooks = write_notebooks(tmp_path / "notebooks", prune="time.sleep(60)")
    driver = drive(tmp_path / "runs", notebooks)
    wait_for(lambda: "prune" in "".join(journal(tmp_path / "runs")))
    started = psutil.Process(driver.pid).children(recursive=True)
    assert started and list(temporary.glob("pftools-*"))
    plan = trivial_plan(tmp_path / "runs")
    states = [study.run_state(step.folder) for step in plan.steps.values()]
    assert states.count("running") == 1 and states.count("finished") == 1
    driver.send_signal(signal.SIGINT)
    assert driver.wait(20) != 0
    assert not psutil.wait_procs(started, timeout=5)[1]
    assert not alive_in(temporary) and list(temporary.rglob("*")) == []
    assert [study.run_state(step.folder) for step in plan.steps.values()].count("failed") == 0
    (stopped,) = [step.folder for step in plan.steps.values() if run_folder.was_interrupted(step.folder)]
    assert stopped.name.startswith("prune-") and "process" in run_folder.owner(stopped)
    assert (
        study.run_study(plan, notebooks=write_notebooks(tmp_path / "notebooks"), progress=False, jobs=2) == []
    )
    assert leftovers(tmp_path / "runs") == []


def test_two_drivers_of_one_study_share_the_work(tmp_path):
    notebooks = write_notebooks(tmp_path / "notebooks", prune="time.sleep(0.5)")
    drivers = [drive(tmp_path / "runs", notebooks) for _ in range(2)]
    assert [driver.wait(120) for driver in drivers] == [0, 0]
    begun = [line for line in journal(tmp_path / "runs") if line.startswith("begins")]
    assert len(begun) == len(set(begun)) == 6
    assert leftovers(tmp_path / "runs") == []


def test_a_failure_stops_what_depends_on_it_and_is_named_in_status(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MY_SECRET", "swordfish-swordfish")
    bad = (
        "print(os.environ['MY_SECRET']); raise OSError('no luck with swordfish-swordfish hf_"
        + "a" * 30
        + "')"
    )
    notebooks = write_notebooks(tmp_path / "notebooks", finetune=bad)
    (tmp_path / "trivial.yaml").write_text("model: somebody/model\norderings: [P, F P]\n")
    plan = trivial_plan(tmp_path / "runs")
    (failure,) = study.run_study(plan, notebooks=notebooks, progress=False, jobs=2)
    assert failure.cell and "OSError: no luck with [redacted] [redacted]" in failure.cause
    for path in (tmp_path / "runs").rglob("*"):
        assert not path.is_file() or b"swordfish" not in path.read_bytes(), path
    monkeypatch.setattr(cli.out, "width", 300)
    cli.status(tmp_path / "trivial.yaml", tmp_path / "runs")
    shown = capsys.readouterr().out
    assert (
        "3 finished, 1 failed, 2 to do" in shown
        and f"cell {failure.cell}: OSError: no luck with [redacted]" in shown
    )
    assert shown.count("needs finetune-") == 1 and shown.count("needs prune-") == 1


@pytest.mark.parametrize("where", ["work", "everything"])
def test_a_full_disk_is_a_cause_and_not_a_result(tmp_path, where):
    """A file may grow no further than 2,000 bytes: in the kernel, or on a real small file system."""
    root = tmp_path / "runs"
    fill = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "run.path('big').write_bytes(bytes(9999))"
    )
    if where == "everything":
        root.mkdir()
        if (
            os.geteuid() != 0
            or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", root]).returncode
        ):
            pytest.skip("mounting a small file system needs root")
        fill = "run.path('big').write_bytes(bytes(10**6))"
    try:
        notebooks = write_notebooks(tmp_path / "notebooks", calibrate=fill)
        plan = trivial_plan(root, orderings=["P"])
        (failure,) = study.run_study(plan, notebooks=notebooks, progress=False)
        assert "OSError" in failure.cause and (
            "No space left" in failure.cause or "File too large" in failure.cause
        )
        assert not any(run_folder.is_finished(step.folder) for step in plan.steps.values())
        assert study.run_study(plan, notebooks=write_notebooks(tmp_path / "notebooks"), progress=False) == []
        assert leftovers(root) == []
    finally:
        if where == "everything":
            subprocess.run(["umount", root], check=True)


# ----------------------------------------------------------------------------------------------------
# One run, without kernels


@pytest.fixture
def parameters(tmp_path):
    return settings.Prune(model="somebody/model", runs=str(tmp_path / "runs"))


def test_a_kernel_whose_driver_was_replaced_neither_starts_nor_seals(parameters, monkeypatch):
    folder = run_folder.folder_of(parameters)
    with run_folder.attempting(folder) as attempt:
        monkeypatch.setenv("PFTOOLS_ATTEMPT", str(attempt))
        run = run_folder.start(parameters)
        run.path("result.txt").write_text("mine")
        shutil.rmtree(folder.parent / ".locks")  # by hand, while a step is at work
        with run_folder.attempting(folder):  # so another driver finds no lock
            with pytest.raises(PftoolsError, match="has taken over"):
                run.seal(["result.txt"])
            with pytest.raises(PftoolsError, match="has taken over"):
                run.path("result.txt")
            with pytest.raises(PftoolsError, match="has taken over"):
                run_folder.start(parameters)
    assert not run_folder.is_finished(folder)


def test_a_notebook_that_makes_another_run_than_planned_is_stopped(parameters, monkeypatch):
    with run_folder.attempting(run_folder.folder_of(parameters).with_name("prune-0123456789ab")) as attempt:
        monkeypatch.setenv("PFTOOLS_ATTEMPT", str(attempt))
        with pytest.raises(PftoolsError, match="its parameters make"):
            run_folder.start(parameters)


def sealed_attempt(parameters, monkeypatch, text):
    """An attempt that its kernel has sealed, in batch, and that its process did not live to make the run."""
    folder = run_folder.folder_of(parameters)
    with run_folder.attempting(folder) as attempt, monkeypatch.context() as environment:
        environment.setenv("PFTOOLS_ATTEMPT", str(attempt))
        run = run_folder.start(parameters)
        run.path("result.txt").write_text(text)
        run.seal(["result.txt"])
        return folder, attempt, run


def test_in_batch_a_run_is_sealed_once_and_is_not_finished_before_its_notebook_is_in(parameters, monkeypatch):
    folder, attempt, run = sealed_attempt(parameters, monkeypatch, "one")
    assert not run_folder.is_finished(folder)
    for again in (lambda: run.seal([]), lambda: run.path("other.txt")):
        with pytest.raises(PftoolsError, match="is sealed and stays as it is"):
            again()
    monkeypatch.setenv("PFTOOLS_ATTEMPT", str(attempt))
    with pytest.raises(PftoolsError, match="is sealed and stays as it is"):
        run_folder.start(parameters)
    run_folder.publish(attempt, folder)
    assert run_folder.is_whole(folder) and leftovers(folder.parent) == []


def test_of_two_attempts_that_end_the_first_is_the_run_and_the_other_is_discarded(parameters, monkeypatch):
    folder, attempt, _ = sealed_attempt(parameters, monkeypatch, "one")
    shutil.copytree(attempt, folder)  # the other one, from a machine that could not see the lock
    run_folder.publish(attempt, folder)
    assert run_folder.is_whole(folder) and not attempt.exists() and leftovers(folder.parent) == []


def test_a_crash_between_the_outputs_and_the_record_leaves_an_unfinished_run(parameters, monkeypatch):
    run = run_folder.start(parameters)
    run.path("result.txt").write_text("first")
    run.path("folder/extra.txt").write_text("first")

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_folder.run, "write_record", crash)
    with pytest.raises(KeyboardInterrupt):
        run.seal(["result.txt", "folder"])
    run.lock.release(force=True)
    monkeypatch.undo()
    assert run.path("result.txt").exists() and not run_folder.is_finished(run.folder)
    run = run_folder.start(parameters)
    run.path("result.txt").write_text("second")
    run.seal(["result.txt"])
    assert (run.folder / "result.txt").read_text() == "second" and not (run.folder / "folder").exists()


def test_a_cell_that_is_executed_again_does_not_wait_for_itself(parameters):
    first = run_folder.start(parameters)
    again = run_folder.start(parameters)
    again.path("result.txt").write_text("one")
    again.seal(["result.txt"])
    assert not run_folder.is_locked(first.folder) and run_folder.is_whole(first.folder)


def test_only_finetuning_goes_on_from_what_a_killed_attempt_left(parameters):
    for given, kept in (
        (parameters, False),
        (settings.Finetune(model="somebody/model", runs=parameters.runs), True),
    ):
        dead = run_folder.start(given)
        dead.path("trainer/state").touch()
        dead.lock.release(force=True)
        run = run_folder.start(given)
        assert run.path("trainer/state").exists() == kept
        assert run_folder.attempts(run.folder) == [run.attempt]
        run.lock.release(force=True)


def test_the_notebook_of_a_driver_killed_after_the_seal_is_kept_if_it_is_whole(parameters, monkeypatch):
    for text, kept in (('{"cells": [], "hf_' + "x" * 30 + '": 1}', True), ('{"cells": [', False)):
        folder, attempt, _ = sealed_attempt(parameters, monkeypatch, "one")
        (attempt / "notebook.ipynb").write_text(text)
        with run_folder.attempting(folder) as needed:
            assert needed is None  # what was sealed is not computed again
        assert ("notebook.ipynb" in run_folder.verify(folder)["outputs"]) == kept
        assert not kept or "hf_" not in (folder / "notebook.ipynb").read_text()
        assert leftovers(folder.parent) == []
        run_folder.remove(folder)


def test_what_a_dying_process_still_holds_is_put_in_order_at_the_end(tmp_path):
    notebooks = write_notebooks(tmp_path / "notebooks")
    plan = trivial_plan(tmp_path / "runs", orderings=["P"])
    assert study.run_study(plan, notebooks=notebooks, progress=False) == []
    first, *_, last = [step.folder for step in plan.steps.values()]
    run_folder.remove(last)
    (tmp_path / "runs" / ".work" / f"{first.name}.0123abcd").mkdir()
    held = run_folder.attempt.lock_of(first)
    held.acquire()
    threading.Timer(0.2, held.release).start()
    assert study.run_study(plan, notebooks=notebooks, progress=False) == []
    assert run_folder.is_whole(last) and leftovers(tmp_path / "runs") == []


def test_a_clock_that_is_set_back_changes_nothing(parameters, monkeypatch):
    monkeypatch.setattr(time, "time", lambda now=time.time: now() - 86_400)
    folder = run_folder.folder_of(parameters)
    run = run_folder.start(parameters)
    monkeypatch.undo()
    assert "begun 24 hours ago" in run_folder.owner(folder)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert "begun 0 seconds ago" in run_folder.owner(folder)
    run.path("result.txt").write_text("one")
    run.seal(["result.txt"])
    assert 0 <= run_folder.verify(folder)["seconds"] < 60


def test_a_record_that_was_cut_short_is_damaged_not_finished(parameters):
    run = run_folder.start(parameters)
    run.path("result.txt").write_text("one")
    run.seal(["result.txt"])
    for text in ("", "{", "[]", "null", json.dumps({"step": "prune", "seal": "x"})):
        (run.folder / "run.json").write_text(text)
        assert not run_folder.is_whole(run.folder)
        with pytest.raises(PftoolsError, match="run.json is damaged"):
            run_folder.start(parameters)


@pytest.fixture
def mounted(monkeypatch, tmp_path):
    """The folder of runs takes no locks, as a mounted drive; the machine's own disk does."""
    import fcntl

    flock, outside = fcntl.flock, tmp_path / "own disk"
    outside.mkdir()

    def only_outside(file, operation):
        number = file if isinstance(file, int) else file.fileno()
        if not os.readlink(f"/proc/self/fd/{number}").startswith(str(outside)):
            raise OSError(95, "Operation not supported")
        return flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", only_outside)
    monkeypatch.setattr("tempfile.tempdir", str(outside))
    run_folder.attempt._lock_folder.cache_clear()
    yield outside
    run_folder.attempt._lock_folder.cache_clear()


def test_a_drive_without_locks_is_worked_on_with_locks_beside_it(parameters, mounted, capsys):
    folder = run_folder.folder_of(parameters)
    run = run_folder.start(parameters)
    assert "takes no file locks (Operation not supported)" in capsys.readouterr().err
    assert run_folder.is_locked(folder) and list(mounted.glob("pftools-locks/*/*"))
    run.path("result.txt").write_text("one")
    run.seal(["result.txt"])
    assert run_folder.is_whole(folder) and not run_folder.is_locked(folder)
    assert run_folder.start(parameters).already_finished and capsys.readouterr().err == ""  # said once


def test_a_cluster_without_locks_is_refused(parameters, mounted, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(PftoolsError, match="cannot be locked"):
        run_folder.start(parameters)

"""Run the steps of a plan on a SLURM cluster: every step a job, the whole graph submitted at once through
submitit.

A job waits for the jobs of its parents (`afterok`); where one fails, SLURM cancels what depends on it and
nothing else. After submitting, the driver may go away: the truth is in the run folders and in SLURM's queue,
and nowhere else. A job's name says which run it makes, so a study that is submitted again adds only what is
neither finished nor queued.

Where a study is planned in stages (`stages`), one more job waits for all of them, plans the next stage and
submits that. So nobody has to wait for that either.

What a job executes is `steps.execute_step`, as everywhere. Shortly before its time limit a step that goes on
from its own checkpoints (fine-tuning) is queued again, up to three times; any other says that its time was
too short.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from pftools import run_folder, settings
from pftools.errors import PftoolsError
from pftools.execute.progress import progress_of
from pftools.execute.sbatch import NoSuchMemory, asked_for, sort_options
from pftools.execute.slurm_queue import job_name, queue
from pftools.execute.steps import Failure, execute_step, read_failure, request, unusable
from pftools.study import costs
from pftools.study.stages import grow, plan_study
from pftools.study.words import Study

if TYPE_CHECKING:
    import submitit

    from pftools.study import Plan

DEFAULT_MINUTES = 240  # sbatch's own default is the partition's, which may be endless or a minute
_PLANNING_MINUTES = 30
_POLL_SECONDS = 2.0
_PATIENCE = 300  # seconds for which a controller may be out of reach before that is an error


def run_plan(
    plan: Plan, *, progress: bool, notebooks: str | Path | None, wait: bool, options: dict[str, str]
) -> list[Failure]:
    """Submit the missing steps of a plan, and with ``wait`` stay until all their jobs have ended.

    Args:
        options: of sbatch, such as {"partition": "gpu", "gres": "gpu:1", "time": "2:00:00"}.

    Returns:
        The failures; without ``wait``, none.
    """
    while True:
        submitted = submit(plan, notebooks=notebooks, options=options)
        if not wait:
            return []
        failures = _watch(plan, submitted, progress)
        # The job that plans has submitted the next stage by now; if it could not, this does.
        if failures or not grow(plan):
            return failures


def submit(
    plan: Plan, *, notebooks: str | Path | None = None, options: dict[str, str] | None = None
) -> list[str]:
    """Submit every step that is neither finished nor queued, and the job that plans what comes after them.

    Returns:
        The names of all runs with a job, and that of the planning.
    """
    folder = _folder(Path(plan.runs))
    again = unusable(plan) | plan.outdated()
    for why in again.values():
        print(f"Again: {why}")
    jobs: dict[str, str] = {}
    estimates = costs.job_estimates(plan)
    with FileLock(folder / "submit.lock"):  # two drivers that submit at once would both find the queue empty
        queued = queue(Path(plan.runs))
        _remove_files_of_ended_jobs(folder, {job.id for job in queued.values()})
        for name, step in plan.steps.items():
            if name in queued:
                jobs[name] = queued[name].id
            elif not run_folder.is_finished(step.folder) or name in again:
                parents = [jobs[parent] for parent in step.parents if parent in jobs]
                asked, of_step = request(step, notebooks), asked_for(estimates.get(name), options or {})
                try:
                    jobs[name] = _submit_job(folder, step.folder, StepJob(), asked, parents, of_step)
                except NoSuchMemory:
                    if of_step.get("mem") == (options or {}).get("mem"):
                        raise
                    of_step.pop("mem")  # an estimate, of which the cluster knows nothing or has less
                    jobs[name] = _submit_job(folder, step.folder, StepJob(), asked, parents, of_step)
        if plan.open and jobs:
            name = _planning_name(plan)
            jobs[name] = (
                queued[name].id
                if name in queued
                else _submit_planning(folder, plan, jobs, notebooks, options)
            )
    return list(jobs)


def _planning_name(plan: Plan) -> str:
    """The same for everyone who has planned the same stage."""
    stage = hashlib.sha256(" ".join(plan.steps).encode()).hexdigest()[:8]
    return f"plan-{plan.study.name}-{stage}"


def _submit_planning(
    folder: Path,
    plan: Plan,
    jobs: dict[str, str],
    notebooks: str | Path | None,
    options: dict[str, str] | None,
) -> str:
    asked = {
        "study": plan.study.model_dump(mode="json"),
        "runs": plan.runs,
        "awaited": [str(plan.steps[name].folder) for name in jobs],
        "notebooks": None if notebooks is None else str(notebooks),
        "options": options or {},
    }
    of_planning = {**(options or {}), "time": str(_PLANNING_MINUTES)}
    run = Path(plan.runs) / _planning_name(plan)
    return _submit_job(folder, run, PlanJob(), asked, list(jobs.values()), of_planning)


def _submit_job(
    folder: Path,
    run: Path,
    job: StepJob | PlanJob,
    asked: dict[str, Any],
    parents: list[str],
    options: dict[str, str],
) -> str:
    """Submit ``job(asked)`` under the name of ``run``, after the jobs ``parents``; returns its id."""
    try:
        import submitit
        from submitit.core.utils import FailedJobError
    except ImportError:
        raise PftoolsError(
            "--executor slurm needs submitit, which is not installed: `pip install submitit`."
        ) from None
    executor = submitit.SlurmExecutor(folder, max_num_timeout=3)
    log = str(run_folder.log_path(run).resolve())
    known, other = sort_options(options)
    executor.update_parameters(
        **{"time": DEFAULT_MINUTES, **known},
        job_name=job_name(run),
        dependency=f"afterok:{':'.join(parents)}" if parents else None,
        stderr_to_stdout=True,
        srun_args=["--output", log],  # the same place as the local executor's
        # Values that are set by name, as in `--slurm account=...`, go on as they are.
        additional_parameters={"output": log, "kill-on-invalid-dep": "yes", **other},
    )
    try:
        return str(executor.submit(job, asked).job_id)
    except (FailedJobError, OSError, subprocess.SubprocessError) as error:
        words = str(error).strip().splitlines()
        reason = (words[-1] if words else str(error)).removeprefix("sbatch: error: ").rstrip(".")
        kind = NoSuchMemory if "Memory specification" in str(error) else PftoolsError
        raise kind(f"sbatch refused the job of {run.name}: {reason}.") from None


class StepJob:
    """What submitit calls inside a job."""

    def __call__(self, step: dict[str, Any]) -> None:
        _wait_until_seen(step["parents"])
        execute_step(step)

    def checkpoint(self, step: dict[str, Any]) -> submitit.helpers.DelayedSubmission | None:
        """submitit asks this shortly before the time limit: what to queue again, or None to fail."""
        from submitit.helpers import DelayedSubmission

        if step["resumes"]:
            return DelayedSubmission(self, step)
        return None


class PlanJob:
    """What submitit calls inside the job that plans the next stage of a study, and submits it."""

    def __call__(self, asked: dict[str, Any]) -> None:
        _wait_until_seen(asked["awaited"])
        # What SLURM says of this job, such as its memory and the cores it is bound to, is not for the others.
        for name in [name for name in os.environ if name.startswith("SLURM_") and name != "SLURM_CONF"]:
            del os.environ[name]
        plan = plan_study(settings.check(Study, asked["study"]), runs=asked["runs"])
        submit(plan, notebooks=asked["notebooks"], options=asked["options"])


def _wait_until_seen(runs: list[str]) -> None:
    """A shared file system may take a minute to show what another node has just written."""
    patience = time.monotonic() + 60
    while not all(run_folder.is_finished(run) for run in runs) and time.monotonic() < patience:
        os.listdir(Path(runs[0]).parent)  # asks the server anew
        time.sleep(1)


def _folder(root: Path) -> Path:
    folder = root / ".slurm"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _remove_files_of_ended_jobs(folder: Path, alive: set[str]) -> None:
    """submitit leaves a script and two pickles a job; they are of use to that job only."""
    for path in folder.iterdir():
        job = re.match(r"(\d+)_", path.name)
        if job and job[1] not in alive:
            path.unlink(missing_ok=True)


def _watch(plan: Plan, submitted: list[str], progress: bool) -> list[Failure]:
    """Wait until no job of ``submitted`` is left.

    Returns:
        The failures, without the jobs that SLURM cancelled because of them.
    """
    left = set(submitted)
    reached = time.monotonic()
    with progress_of(plan, len(left), visible=progress, quiet=600) as told:
        while left:
            try:
                queued = queue(Path(plan.runs))
                reached = time.monotonic()
            except PftoolsError:
                if time.monotonic() - reached > _PATIENCE:
                    raise
                time.sleep(10)
                continue
            ended = {name for name in left if name not in queued}
            left -= ended
            running = [
                plan.steps[name].label
                for name, job in queued.items()
                if job.state == "RUNNING" and name in plan.steps
            ]
            told.at_work(running)
            for step in (plan.steps[name] for name in sorted(ended & set(plan.steps))):
                if step.is_finished():
                    told.finished(step)
            if left:
                time.sleep(_POLL_SECONDS)
    if submitted:
        _remove_files_of_ended_jobs(_folder(Path(plan.runs)), {job.id for job in queued.values()})
    time.sleep(0.5 if submitted else 0)  # a shared file system may show the last seal a moment later
    unfinished = [name for name in submitted if name in plan.steps and not plan.steps[name].is_finished()]
    causes = [name for name in unfinished if not set(plan.steps[name].parents) & set(unfinished)]
    return [read_failure(plan.steps[name].folder, "its job ended before it could say why") for name in causes]

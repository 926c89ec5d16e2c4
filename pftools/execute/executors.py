"""Run a whole plan, by the processes of this machine or the jobs of a cluster, stage after stage."""

from __future__ import annotations

from pathlib import Path

from pftools.errors import PftoolsError, nearest
from pftools.execute import local
from pftools.execute import slurm as cluster
from pftools.execute.steps import Failure
from pftools.study.plan import Plan
from pftools.study.stages import grow


def run_study(
    plan: Plan,
    *,
    executor: str = "local",
    jobs: int = 1,
    progress: bool = True,
    notebooks: str | Path | None = None,
    wait: bool = True,
    slurm: dict[str, str] | None = None,
) -> list[Failure]:
    """Execute the missing steps of a plan.

    Where learning rates are tuned or seeds are added where doubt remains, the plan is made in stages: it
    grows by what the finished steps have told, until nothing is left.

    Args:
        plan: what `plan_study` made; it grows.
        executor: `local` (processes of this machine) or `slurm` (jobs of a cluster).
        jobs: local: how many steps at a time, as far as they fit on the GPUs that are here.
        progress: show a bar of steps; without a terminal, a line for each step that ends.
        notebooks: the folder of step notebooks; None: pftools' own.
        wait: slurm: stay until the last job has ended; otherwise leave after submitting.
        slurm: options of sbatch for every job, such as {"partition": "gpu", "gres": "gpu:1", "time": "120"}.

    Returns:
        The failures; empty when every step is finished. What depends on a failed step is not started.
    """
    if executor == "local":
        while True:
            failures = local.run_plan(plan, jobs=jobs, progress=progress, notebooks=notebooks)
            if failures or not grow(plan):
                return failures
    if executor == "slurm":
        return cluster.run_plan(plan, progress=progress, notebooks=notebooks, wait=wait, options=slurm or {})
    raise PftoolsError(f"unknown executor {executor!r}: {nearest(executor, ['local', 'slurm'])}.")

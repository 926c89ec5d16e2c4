"""A whole study: read its file, plan its steps, run them, read their results.

plan = study.plan_study(study.load_study("data/studies/quick.yaml"))
failures = study.run_study(plan)
table = study.results(plan)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pftools import local, run_folder
from pftools import slurm as cluster
from pftools.errors import PftoolsError, nearest
from pftools.plan import Plan, PlannedRow, PlannedStep, plan_study, run_state
from pftools.steps import Failure
from pftools.study_file import Study, load_study

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Plan",
    "PlannedRow",
    "PlannedStep",
    "Study",
    "load_study",
    "plan_study",
    "results",
    "run_state",
    "run_study",
]


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

    Args:
        plan: what `plan_study` made.
        executor: `local` (processes of this machine) or `slurm` (jobs of a cluster).
        jobs: local: how many steps at a time; GPUs are handed out one a step.
        progress: show a bar of steps.
        notebooks: the folder of step notebooks; None: pftools' own.
        wait: slurm: stay until the last job has ended; otherwise leave after submitting.
        slurm: options of sbatch for every job, such as {"partition": "gpu", "gres": "gpu:1", "time": "120"}.

    Returns:
        The failures; empty when every step is finished. What depends on a failed step is not started.
    """
    if executor == "local":
        return local.run_plan(plan, jobs=jobs, progress=progress, notebooks=notebooks)
    if executor == "slurm":
        return cluster.run_plan(plan, progress=progress, notebooks=notebooks, wait=wait, options=slurm or {})
    raise PftoolsError(f"unknown executor {executor!r}: {nearest(executor, ['local', 'slurm'])}.")


def results(plan: Plan) -> pd.DataFrame:
    """A row a finished result, after the files of its evaluation were checked.

    Columns: ordering, asked and measured sparsity (0 to 1), perplexity, one a task, finetune_tokens,
    n_finetunes, seed, method, pattern, merge, and the run folders of the model and of its evaluation (run).

    Raises:
        PftoolsError: an evaluation is damaged.
    """
    import pandas as pd

    rows = []
    for row in plan.rows:
        if not run_folder.is_finished(row.evaluation):
            continue
        found = run_folder.verify(row.evaluation)["results"]
        tasks = {task: score["value"] for task, score in found["tasks"].items()}
        rows.append(
            {
                "ordering": row.ordering,
                "asked": row.asked,
                "measured": found["measured"],
                "perplexity": found["perplexity"],
                **tasks,
                "finetune_tokens": row.finetune_tokens,
                "n_finetunes": row.n_finetunes,
                "seed": row.seed,
                "method": row.method,
                "pattern": row.pattern,
                "merge": row.merge,
                "model": row.model,
                "run": row.evaluation,
            }
        )
    return pd.DataFrame(rows)

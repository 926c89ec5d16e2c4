"""The finished results of a plan: a row each, and the losses and answers that their runs keep."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pftools import run_folder
from pftools.orderings import parse_ordering
from pftools.study.plan import Plan

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd


def results(plan: Plan) -> pd.DataFrame:
    """A row a finished result, after the files of its evaluation were checked.

    Columns: ordering, asked and measured sparsity (0 to 1), perplexity, one a task, finetune_tokens,
    n_finetunes, learning_rate (where it was tuned), seed, method, pattern, merge, and the run folders of the
    model and of its evaluation (run).

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
        tuned = {"learning_rate": row.learning_rate} if plan.study.tune else {}
        rows.append(
            {
                "ordering": row.ordering,
                "asked": row.asked,
                "measured": found["measured"],
                "perplexity": found["perplexity"],
                **tasks,
                "finetune_tokens": row.finetune_tokens,
                "n_finetunes": row.n_finetunes,
                **tuned,
                "seed": row.seed,
                "method": row.method,
                "pattern": row.pattern,
                "merge": row.merge,
                "model": row.model,
                "run": row.evaluation,
            }
        )
    return pd.DataFrame(rows)


def final_states(table: pd.DataFrame, sparsities: list[float]) -> pd.DataFrame:
    """The results at the sparsities that orderings end at, of an ordering with several the most trained one.

    The states between, which an ordering with several P's passes through, are points of its line in the
    charts. As pairs they would only cost the others power.

    Args:
        table: as from `results`.
        sparsities: those that the study asks for.
    """
    import pandas as pd

    ends = table[[parse_ordering(name).n_prunes <= 1 for name in table["ordering"]]]
    asked = ends["asked"] if ends["asked"].max() > 0 else pd.Series(sparsities)
    at_ends = table[table["asked"].round(6).isin({*asked.round(6), 0.0})]
    ordered = at_ends.sort_values("finetune_tokens", kind="stable")
    same = ["ordering", "asked", "method", "pattern", "merge", "seed"]
    return ordered.drop_duplicates(same, keep="last").sort_index()


def block_losses(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """{run: the mean loss of each block, in nats a token} of a table's results, checked by their seals."""
    import pandas as pd

    losses = {}
    for run in table["run"].unique():
        run_folder.verify(run)
        losses[run] = pd.read_parquet(Path(run) / "block_nll.parquet")["nll"].to_numpy()
    return losses


def answers(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """{run: task, subject, question, correct} of the results that have asked any question."""
    import pandas as pd

    kept = [run for run in table["run"].unique() if (Path(run) / "samples.parquet").exists()]
    return {run: pd.read_parquet(Path(run) / "samples.parquet") for run in kept}

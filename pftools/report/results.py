"""What a report is made of: the finished results of a study, its entries, its pairs."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from pftools import compare, run_folder
from pftools.errors import PftoolsError
from pftools.execute.steps import read_failure
from pftools.inference.looks import Looks
from pftools.study import Plan, PlannedStep, load_study, plan_study, results, run_state, trials
from pftools.study.finished import answers, block_losses
from pftools.study.finished import final_states as ends_of


def study_results(study: str | Path, *, runs: str | Path = "runs") -> pd.DataFrame:
    """The finished results of a study, a row each; `attrs` hold the study and how many results it plans.

    Raises:
        PftoolsError: nothing is finished yet.
    """
    plan = plan_study(load_study(study), runs=runs)
    table = results(plan)
    if not len(table):
        command = shlex.join(
            ["pftools", "run", str(study), *(["--runs", str(runs)] if str(runs) != "runs" else [])]
        )
        raise PftoolsError(
            f"the study {plan.study.name!r} has no finished result in {runs}: run it first, with `{command}`."
        )
    found = [run_folder.read_record(run)["results"] for run in table["run"]]
    table["vocabulary"] = pd.Series([record.get("vocabulary") for record in found], dtype=float)
    table.attrs = {
        "study": plan.study.model_dump(mode="json"),
        "planned": len(plan.rows),
        "runs": str(runs),
        "open": plan.open,
        "trials": trials(plan).to_dict("records"),
        "file": str(study),
        "orderings": list(dict.fromkeys(row.ordering for row in plan.rows)),
        "missing": [_missing(row) for row in missing_results(plan)],
        "outdated": list(plan.outdated().values()),
    }
    return table


def _missing(row: dict[str, str]) -> str:
    choices = f"{row['method']}, {row['merge']}, seed {row['seed']}"
    return f"{row['ordering']} at {row['asked']} ({choices}): {row['why']}"


def plan_of(table: pd.DataFrame) -> Plan:
    """The plan that these results are of."""
    return plan_study(load_study(table.attrs["file"]), runs=table.attrs["runs"])


def missing_results(plan: Plan) -> list[dict[str, str]]:
    """The results that are not there: ordering, asked, method, pattern, merge, seed and why."""
    words = compare.sparsity_words(row.asked for row in plan.rows)
    found = []
    for row in plan.rows:
        if not run_folder.is_finished(row.evaluation):
            told = {
                name: str(getattr(row, name)) for name in ("ordering", "method", "pattern", "merge", "seed")
            }
            step = _cause(plan, plan.steps[Path(row.evaluation).name])
            found.append({**told, "asked": words[round(row.asked, 10)], "why": _why(step)})
    return found


def _cause(plan: Plan, step: PlannedStep) -> PlannedStep:
    """The step that an unfinished one waits for: the first of those behind it that failed, or is to do."""
    for name in step.parents:
        parent = plan.steps[name]
        if not run_folder.is_finished(parent.folder):
            return _cause(plan, parent)
    return step


def _why(step: PlannedStep) -> str:
    state = run_state(step.folder)
    if state != "failed":
        return f"{step.name} {_STATES[state]}"
    failure = read_failure(step.folder)
    place = f" in cell {failure.cell}" if failure.cell else ""
    return f"{step.name} has failed{place}: {failure.cause}"


_STATES = {"to do": "has not begun", "running": "is at work", "queued": "waits"}


def ordering_names(table: pd.DataFrame) -> list[str]:
    """All orderings of the study, finished or not: they decide which colour and shape each has."""
    return list(table.attrs["orderings"])


def final_states(table: pd.DataFrame) -> pd.DataFrame:
    """The results at the sparsities that orderings end at (`study.finished.final_states`)."""
    return ends_of(table, table.attrs["study"]["sparsities"])


def entry_table(table: pd.DataFrame, **more: Any) -> pd.DataFrame:
    """`compare.entries` of these results, with a column a task: its mean (of a perplexity: geometric)."""
    means = {
        task: compare.geometric_mean if is_perplexity(table, task) else "mean" for task in task_names(table)
    }
    bare = _bare(table)
    if more:
        return compare.entries(bare, **means, **more)
    return pd.DataFrame(_once("entries", bare, table, lambda: compare.entries(bare, **means))).copy()


def _bare(table: pd.DataFrame) -> pd.DataFrame:
    """The table without its notes, which pandas copies deeply in each of the many steps of a comparison."""
    bare = table.copy()
    bare.attrs = {}
    return bare


def task_names(table: pd.DataFrame) -> list[str]:
    """The tasks that the table has a result of."""
    names = table.attrs["study"]["evaluate"].get("tasks", ["facts", "reading"])
    return [name for name in names if name in table]


def task_record(run: str, task: str) -> dict[str, Any]:
    """What an evaluation found of a task: metric, value, low, high, n, chance. Empty: it did not ask it."""
    return run_folder.read_record(run)["results"]["tasks"].get(task, {})


def is_perplexity(table: pd.DataFrame, task: str) -> bool:
    """Whether the task's metric is a perplexity, of which lower is better, and no share of right answers."""
    return "perplexity" in task_record(table["run"].iloc[0], task).get("metric", "")


def pair_table(table: pd.DataFrame) -> pd.DataFrame:
    """`compare.compare_orderings` on the losses that the evaluation runs keep, checked by their seals."""
    ends = _bare(final_states(table))

    def compared() -> pd.DataFrame:
        return compare.compare_orderings(ends, block_losses(ends), margin=margin(table), looks=looks(table))

    return pd.DataFrame(_once("pairs", ends, table, compared)).copy()


def best_sets(table: pd.DataFrame) -> list[compare.BestSet]:
    """The answer: by sparsity, and by perplexity and task, the entries that may be the best."""
    ends = _bare(final_states(table))

    def found() -> list[compare.BestSet]:
        return compare.best_sets(
            ends, block_losses(ends), answers(ends), margin=margin(table), looks=looks(table)
        )

    return list(_once("sets", ends, table, found))


def _once(what: str, ends: pd.DataFrame, table: pd.DataFrame, make: Callable[[], Any]) -> Any:
    """What was computed of these results before; tables, charts and sentences ask for the same."""
    rows = (tuple(ends[name]) for name in ("run", "ordering", "asked"))
    asked = (what, *rows, tuple(ends.columns), margin(table), looks(table))
    if asked not in _KNOWN:
        while len(_KNOWN) > 7:
            _KNOWN.pop(next(iter(_KNOWN)))
        _KNOWN[asked] = make()
    return _KNOWN[asked]


_KNOWN: dict[tuple[Any, ...], Any] = {}  # of the last studies


def looks(table: pd.DataFrame) -> Looks | None:
    """When the results were looked at, where seeds were spent one look after the other."""
    study = table.attrs["study"]
    return Looks(len(study["seeds"]), study["most_seeds"]) if study.get("most_seeds") else None


def margin(table: pd.DataFrame) -> float | None:
    """Within which share a difference does not matter to whoever wrote the study; None: not said."""
    return table.attrs["study"].get("equivalent_within")


def task_pairs(table: pd.DataFrame) -> pd.DataFrame:
    """`compare.compare_tasks` on the answers that runs keep; empty where no task counts right answers."""
    ends = _bare(final_states(table))
    return compare.compare_tasks(ends, answers(ends), margin=margin(table), looks=looks(table))

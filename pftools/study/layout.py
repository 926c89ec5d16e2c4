"""Where a chart draws the models of a plan: a tree that grows to the right."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pftools import run_folder
from pftools.study.plan import Plan, StepState, run_state

if TYPE_CHECKING:
    import pandas as pd


def plan_layout(plan: Plan) -> pd.DataFrame:
    """Where `figures.plan_chart` draws every model of a plan, as a tree that grows to the right.

    A model is one column to the right of the model it starts from, and on its line or, where another child
    has taken that, on the next free one.

    Returns:
        A row a model: key, parent, depth, lane, kind (base, P or F), label, state, evaluated.
    """
    import pandas as pd

    models = _models(plan)
    evaluated = {Path(row.model).name for row in plan.rows}
    children: dict[str, list[str]] = {}
    for name, model in models.items():
        children.setdefault(model["parent"], []).append(name)
    rows, branches, lane = [], [(_BASE, 0, 0)], 0
    while branches:  # depth first, the first child on its parent's line
        name, depth, level = branches.pop()
        parent = models[name]["parent"]
        if parent and name != children[parent][0]:
            lane = level = lane + 1
        shown = (Path(plan.study.model).name if name == _BASE else name) in evaluated
        rows.append({"key": name, **models[name], "depth": depth, "lane": level, "evaluated": shown})
        branches += [(child, depth + 1, level) for child in reversed(children.get(name, []))]
    return pd.DataFrame(rows)


_BASE = "base"  # the key of the base model in a layout


def _models(plan: Plan) -> dict[str, dict[str, str]]:
    """{key: parent, kind, label and state} of the base model and of every model that the plan makes."""
    models = {_BASE: {"parent": "", "kind": _BASE, "label": _BASE, "state": _base_state(plan)}}
    outdated = plan.outdated()
    for name, step in plan.steps.items():
        if step.parameters.step not in ("prune", "finetune"):
            continue
        parent = Path(step.parameters.model).name
        state = "to do" if name in outdated else run_state(step.folder)
        models[name] = {
            "parent": parent if parent in plan.steps else _BASE,
            "kind": step.parameters.step[0].upper(),
            "label": step.label.partition(",")[0],
            "state": state if state in ("finished", "failed") else "to do",
        }
    return models


def _base_state(plan: Plan) -> StepState:
    """No step makes the base model: it counts as finished once a step that starts from it is."""
    used = [step for step in plan.steps.values() if step.parameters.model == plan.study.model]
    return "finished" if any(run_folder.is_finished(step.folder) for step in used) else "to do"

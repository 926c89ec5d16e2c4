"""A whole study: read its file, plan its steps, run them, read their results.

    plan = study.plan_study(study.load_study("data/studies/quick.yaml"))
    failures = study.run_study(plan)
    table = study.results(plan)

words        the words of a study: the orderings, and what they have in common
file         a study file, read
yaml_file    YAML with the line of everything in it
plan         every step that a study needs, once
trainings    the steps of one training, added to a plan
stages       `plan_study`: trials, first trainings, more of them; as the finished runs tell
tuning       which learning rate an ordering gets
seeds        which orderings get more trainings
sensitivity  which differences the study will be able to see
costs        what it costs, in sentences; memory and disk
durations    how long steps take
checks       what can be known before the first step
finished     the results so far, a row each
layout       where a chart draws the models
timing       how fast this machine is with a model

`run_study` is in `pftools.execute`, a floor above. The names below are loaded at first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pftools.execute.executors import run_study
    from pftools.execute.steps import Failure
    from pftools.study.file import load_study
    from pftools.study.finished import results
    from pftools.study.plan import Plan, PlannedRow, PlannedStep, PlannedTrial, Variant, run_state
    from pftools.study.stages import grow, plan_study
    from pftools.study.tuning import trials
    from pftools.study.words import Study

__all__ = [
    "Failure",
    "Plan",
    "PlannedRow",
    "PlannedStep",
    "PlannedTrial",
    "Study",
    "Variant",
    "grow",
    "load_study",
    "plan_study",
    "results",
    "run_state",
    "run_study",
    "trials",
]
_HOMES = {
    "Failure": "execute.steps",
    "Plan": "study.plan",
    "PlannedRow": "study.plan",
    "PlannedStep": "study.plan",
    "PlannedTrial": "study.plan",
    "Study": "study.words",
    "Variant": "study.plan",
    "grow": "study.stages",
    "load_study": "study.file",
    "plan_study": "study.stages",
    "results": "study.finished",
    "run_state": "study.plan",
    "run_study": "execute.executors",
    "trials": "study.tuning",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(f"pftools.{_HOMES[name]}"), name)
    return globals()[name]

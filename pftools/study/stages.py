"""Plan a study in stages: trials, then the first trainings, then more of those that may still be the best.

What is planned is a function of the study file and of the finished runs, and of nothing that a driver
remembers: whoever plans, on this machine or in a job of a cluster, and however often, the plan is the same.
Planning loads no torch, no model, and asks no network; results are read only where a stage depends on them.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from pftools.errors import PftoolsError
from pftools.orderings import parse_ordering
from pftools.study import seeds, tuning
from pftools.study.plan import Plan, Variant, variants
from pftools.study.trainings import add_training
from pftools.study.words import Study


def plan_study(study: Study, *, runs: str | Path = "runs") -> Plan:
    """All steps that a study needs, as far as its finished runs tell.

    Args:
        study: what `load_study` read.
        runs: the folder of run folders; it need not be there yet.

    Raises:
        PftoolsError: ``runs`` is a file, or lies in one.
    """
    plan = Plan(study, str(_folder(runs)))
    if study.tune is not None:
        _add_trials(plan)
    known = [variant for variant in variants(study) if not _is_tuned(study, variant) or variant in plan.rates]
    for seed in study.seeds:
        _add_seed(plan, known, seed)
    if study.looks is not None:
        _add_looks(plan, known)
    plan.rows = list(dict.fromkeys(plan.rows))
    return plan


def grow(plan: Plan) -> bool:
    """Plan again, into the same plan, what its finished steps have told.

    Returns:
        Whether it has a step that is not finished.
    """
    again = plan_study(plan.study, runs=plan.runs)
    for part in fields(plan):
        setattr(plan, part.name, getattr(again, part.name))
    return bool(plan.missing())


def _folder(runs: str | Path) -> Path:
    path = Path(runs).expanduser()
    blocking = next((part for part in (path, *path.parents) if part.exists()), path)
    if blocking.is_file():
        raise PftoolsError(f"--runs is {path}, and {blocking} is a file: give a folder.")
    return path


def _is_tuned(study: Study, variant: Variant) -> bool:
    return study.tune is not None and parse_ordering(variant.ordering).n_finetunes > 0


def _add_trials(plan: Plan) -> None:
    tune = plan.study.tune
    assert tune is not None
    for variant in variants(plan.study):
        if not _is_tuned(plan.study, variant):
            continue
        rate = tuning.add_trials(plan, variant, tune)
        if rate is None:
            many = len(tune.learning_rate) * tune.seeds
            plan.open.append(f"the learning rate of {variant} is chosen by its {many} trials")
        else:
            plan.rates[variant] = rate


def _add_seed(plan: Plan, trained: list[Variant], seed: int) -> None:
    stage = seeds.stage_name(plan.study, seed)
    for variant in trained:
        add_training(plan, variant, seed, learning_rate=plan.rates.get(variant), stage=stage)


def _add_looks(plan: Plan, known: list[Variant]) -> None:
    """Add the seeds of later looks, as far as the earlier ones have been taken."""
    looks, every = plan.study.looks, plan.study.all_seeds()
    assert looks is not None
    trained = dict.fromkeys(known, looks.start)
    while not plan.open and not plan.missing():
        wanted = {one: many for one, many in seeds.wanted_seeds(plan).items() if many > trained[one]}
        if not wanted:
            return
        for place in range(looks.start, max(wanted.values())):
            more = [one for one in known if trained[one] <= place < wanted.get(one, 0)]
            _add_seed(plan, more, every[place])
        trained |= wanted
    now = max(trained.values(), default=looks.start)
    if now < looks.most:
        plan.open.append(
            f"which orderings get more than {now} seeds, up to {looks.most}, is told by those {now}"
        )

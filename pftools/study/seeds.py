"""Seeds where doubt remains: which orderings get more trainings, as the finished ones say.

The looks and their levels are fixed in the study file; `inference.sequential` takes them. Here the results of
a plan are put to it, sparsity by sparsity, by perplexity.
"""

from __future__ import annotations

from dataclasses import replace

from pftools import run_folder
from pftools.study.plan import Plan, Variant
from pftools.study.words import Study


def wanted_seeds(plan: Plan) -> dict[Variant, int]:
    """{variant: how many seeds the looks so far ask for}, of those that get more than the first look's.

    An ordering counts at every sparsity that it reports at; so one that passes through a sparsity where it
    may still be best is trained again. Where there is nothing pruned to compare, orderings at sparsity 0 are
    compared; otherwise they stand beside the question, and have the first look's seeds.

    Args:
        plan: with the rows of all looks so far.
    """
    from pftools import compare
    from pftools.study.finished import block_losses, final_states, results

    looks = plan.study.looks
    assert looks is not None
    table = results(_whole(plan))
    if not len(table):
        return {}
    ends = final_states(table, plan.study.sparsities)
    decisions = compare.decisions(ends, block_losses(ends), looks=looks, margin=plan.study.equivalent_within)
    pruned = {asked: found for asked, found in decisions.items() if asked > 0}
    wanted: dict[Variant, int] = {}
    variants: dict[str, list[Variant]] = {}
    for row in plan.rows:
        variants.setdefault(row.evaluation, []).append(row.variant)
    for found in (pruned or decisions).values():
        for label in found.decision.members if found.decision.next_seeds else ():
            for variant in {one for run in found.runs[label] for one in variants[run]}:
                wanted[variant] = max(wanted.get(variant, 0), found.decision.next_seeds or 0)
    return wanted


def _whole(plan: Plan) -> Plan:
    """The plan with those rows only whose results can be read: a damaged one is made again."""
    return replace(plan, rows=[row for row in plan.rows if run_folder.is_whole(row.evaluation)])


def stage_name(study: Study, seed: int) -> str:
    """What a training with this seed is planned for: "3 seeds" of the first look, "5 seeds", ..."""
    looks = study.looks
    if looks is None:
        return "results" if study.tune else ""
    place = study.all_seeds().index(seed)
    return f"{next(seeds for seeds in looks.schedule if place < seeds)} seeds"

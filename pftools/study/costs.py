"""What a plan costs, in sentences; memory and disk from the model's shape."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pftools import needs, settings
from pftools.files import as_bytes
from pftools.pretrained.model_files import (
    Shapes,
    adapted_matrices,
    count,
    llama_shapes,
    matrices,
    model_folder,
    read_config,
    weight_shapes,
)
from pftools.study.durations import estimate_seconds, past_seconds, seconds_of
from pftools.study.plan import Plan, PlannedStep
from pftools.study.words import Study


def summary(plan: Plan) -> list[str]:
    """What a plan costs, in sentences: steps with and without sharing, disk, time where past runs tell it."""
    finished = len(plan.steps) - len(plan.missing())
    lines = [
        f"{len(plan.rows)} results from {len(plan.steps)} steps; a plan without sharing would take "
        f"{plan.unshared}.",
        f"{finished} of the steps are finished, {len(plan.steps) - finished} are to do.",
        *(f"Not planned yet: {what}." for what in plan.open),
    ]
    disk = estimate_disk(plan)
    if disk:
        lines.append(
            f"Disk: about {as_bytes(disk['deltas'])} as deltas; full copies would be "
            f"{as_bytes(disk['copies'])}."
        )
    lines += says_needs(plan, needs.machine(plan.runs))
    seconds, unknown = estimate_seconds(plan)
    if seconds:
        untold = f", without {', '.join(sorted(unknown))}, of which there is none yet" if unknown else ""
        lines.append(
            f"Time: about {seconds / 60:.1f} minutes, one step after the other, as past runs took{untold}."
        )
    return lines


def says_needs(plan: Plan, here: needs.Machine) -> list[str]:
    """What the missing steps of each kind need at most, beside what is here, in sentences; with what would
    help, where it is too little."""
    largest: dict[str, tuple[int, int]] = {}
    short: dict[str, str] = {}
    for step, facts in with_facts(plan):
        placement = needs.placement_of(step, facts, here)
        needed = needs.on(here, step, facts, placement)
        if needed.memory + needed.device > sum(largest.get(step.step, (0, 0))):
            largest[step.step] = (needed.memory, needed.device)
            short[step.step] = needs.shortage(step, facts, here)
    if not largest:
        return []
    told = [
        f"{kind} {as_bytes(memory)}" + (f" and {as_bytes(device)} of GPU memory" if device else "")
        for kind, (memory, device) in sorted(
            largest.items(), key=lambda item: list(settings.STEPS).index(item[0])
        )
    ]
    gpu = f" and {as_bytes(min(here.gpus))} of GPU memory" if here.gpus else ""
    lines = [f"Memory: {', '.join(told)}; here are {as_bytes(here.memory)}{gpu}."]
    return lines + [f"This may not fit: {sentence}" for sentence in short.values() if sentence]


def on_paper(plan: Plan, device: needs.Device) -> list[dict[str, Any]]:
    """What the missing steps of a plan need and take on a device that is not here, by its datasheet.

    Returns:
        A row a kind of step: step, steps (how many), placement, memory, gpu, scratch (bytes at most), seconds
        (of one), hours (of all), note (what does not fit, and what the step does about it).
    """
    rows: dict[str, dict[str, Any]] = {}
    for asked, facts in with_facts(plan):
        placement = needs.placement_of(asked, facts, device.machine)
        step = needs.as_it_goes_on(asked, facts, device.machine, placement)
        needed = needs.on(device.machine, step, facts, placement)
        seconds = needs.seconds_on(device, step, facts, placement)
        new = {"step": step.step, "steps": 0, "memory": 0, "gpu": 0, "scratch": 0, "hours": 0.0}
        row = rows.setdefault(step.step, new)
        row |= {
            "steps": row["steps"] + 1,
            "placement": placement,
            "memory": max(row["memory"], needed.memory),
            "gpu": max(row["gpu"], needed.device),
            "scratch": max(row["scratch"], needed.scratch),
            "note": _note(asked, step, facts, device),
            "hours": row["hours"] + seconds / 3600,
        }
        row["seconds"] = 3600 * row["hours"] / row["steps"]
    return [rows[kind] for kind in settings.STEPS if kind in rows]


def _note(asked: settings.Step, step: settings.Step, facts: needs.Facts, device: needs.Device) -> str:
    """What does not fit as it was asked, and what the step does about it by itself; empty: it fits."""
    short = needs.shortage(asked, facts, device.machine)
    changed = {name: value for name, value in step.model_dump().items() if value != getattr(asked, name)}
    if not changed:
        return short
    words = " and ".join(f"{name} {value}" for name, value in changed.items())
    return f"{short} When memory runs out, it goes on with {words} by itself: its line is of that."


def paper_lines(plan: Plan, device: needs.Device) -> list[str]:
    """`on_paper` as a Markdown table, with what would help and the sessions that it takes, in sentences."""
    rows, hours = on_paper(plan, device), 0.0
    lines = [
        "| step | steps | placement | GPU memory | memory | scratch | minutes a step | hours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        hours += row["hours"]
        sizes = " | ".join(f"{row[name] / 1e9:.1f} GB" for name in ("gpu", "memory", "scratch"))
        lines.append(
            f"| {row['step']} | {row['steps']} | {row['placement']} | {sizes} | {row['seconds'] / 60:.0f} "
            f"| {row['hours']:,.1f} |"
        )
    sessions = math.ceil(hours / device.session_hours)
    many = f"{sessions:,} sessions" if sessions > 1 else "one session"
    lines += ["", f"In all {hours:,.1f} hours: {many} of {device.session_hours:g} hours."]
    lines += [f"{row['note'][:1].upper()}{row['note'][1:]}" for row in rows if row["note"]]
    return lines


def with_facts(plan: Plan) -> Iterator[tuple[settings.Step, needs.Facts]]:
    """The parameters of every missing step, and the facts of the model that it starts from."""
    facts = needs.facts_of(plan.study.model, plan.study.shape)
    if facts is not None:
        for step in plan.missing():
            yield with_blocks(plan, step), _at(plan, step, facts)


def with_blocks(plan: Plan, step: PlannedStep) -> settings.Step:
    """A step's parameters; those of a prune step with the number and length of its calibration blocks."""
    blocks: Any = plan.steps.get(Path(getattr(step.parameters, "calibration", "")).name)
    if blocks is None:
        return step.parameters
    read = {name: getattr(blocks.parameters, name) for name in ("n_blocks", "block_length")}
    return step.parameters.model_copy(update=read)


def _at(plan: Plan, step: PlannedStep, facts: needs.Facts) -> needs.Facts:
    """The facts of the base model, for a step that starts from it or from what another makes of it."""
    return replace(facts, is_run=Path(step.parameters.model).name in plan.steps)


def gpus_of(plan: Plan, here: needs.Machine) -> dict[str, tuple[int, int]]:
    """{missing step: (GPUs that it needs, bytes on each)}; 0 bytes: not known, so it takes all of one."""
    facts = needs.facts_of(plan.study.model, plan.study.shape)
    if facts is None:
        return {step.name: (1, 0) for step in plan.missing()}
    return {
        step.name: needs.gpus_for(with_blocks(plan, step), _at(plan, step, facts), here)
        for step in plan.missing()
    }


def estimate_disk(plan: Plan) -> dict[str, int] | None:
    """Bytes of all checkpoints, as `deltas` and as full 16-bit `copies`; None where no shapes are at hand.

    A mask is one bit a weight. An adapter has rank x (inputs + outputs) numbers in fp32 for each weight that
    it adapts.
    """
    shapes = shapes_of(plan.study)
    if not shapes:
        return None
    weights, total = count(matrices(shapes)), count(shapes)
    deltas = copies = 0
    for step in plan.steps.values():
        parameters = step.parameters
        if isinstance(parameters, settings.Prune):
            changed = parameters.method in settings.UPDATING_METHODS or parameters.reconstruct_steps
            deltas += weights // 8 + (2 * weights if changed else 0)
            copies += 2 * total
        elif isinstance(parameters, settings.Finetune):
            adapted = adapted_matrices(shapes, parameters.targets)
            deltas += 4 * parameters.rank * sum(sum(shape) for shape in adapted.values())
            copies += 2 * total
    return {"deltas": deltas, "copies": copies}


def shapes_of(study: Study) -> Shapes:
    """{weight: shape} of a study's model, from its files or its `shape`; empty where neither is there."""
    folder = model_folder(study.model)
    shapes = weight_shapes(folder) if folder else {}
    if shapes:
        return shapes
    config = study.shape or read_config(study.model)
    return llama_shapes(config) if all(config.get(name) for name in settings.SHAPE) else {}


@dataclass(frozen=True)
class JobEstimate:
    """What a cluster is asked for: memory in bytes; minutes, 0 where no earlier run tells; whether the model
    is spread over several GPUs."""

    memory: int
    minutes: float
    spread: bool


def job_estimates(plan: Plan) -> dict[str, JobEstimate]:
    """{missing step: what its job needs}, on a node that nothing is known of; empty where no shapes are at
    hand."""
    facts = needs.facts_of(plan.study.model, plan.study.shape)
    if facts is None:
        return {}
    past = past_seconds(Path(plan.runs))
    found = {}
    for step in plan.missing():
        parameters = with_blocks(plan, step)
        placement = "one" if parameters.placement == "auto" else parameters.placement
        kind: needs.DeviceKind = "cuda" if parameters.device.startswith("cuda") else "cpu"
        needed = needs.needs_of(parameters, _at(plan, step, facts), placement=placement, device_kind=kind)
        seconds = seconds_of(step, past, plan.study.model) or 0
        found[step.name] = JobEstimate(needed.memory, seconds / 60, placement == "spread")
    return found

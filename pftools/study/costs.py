"""What a plan costs: memory and disk from the model's shape, time from what earlier runs took."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pftools import needs, run_folder, settings
from pftools.errors import PftoolsError
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
    return f"{short} When memory runs out it goes on by itself with {words}, of which its line tells."


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
    past = _past_seconds(Path(plan.runs))
    found = {}
    for step in plan.missing():
        parameters = with_blocks(plan, step)
        placement = "one" if parameters.placement == "auto" else parameters.placement
        kind: needs.DeviceKind = "cuda" if parameters.device.startswith("cuda") else "cpu"
        needed = needs.needs_of(parameters, _at(plan, step, facts), placement=placement, device_kind=kind)
        seconds = _seconds_of(step, past, plan.study.model) or 0
        found[step.name] = JobEstimate(needed.memory, seconds / 60, placement == "spread")
    return found


def estimate_seconds(plan: Plan) -> tuple[float, set[str]]:
    """Seconds of the missing steps, one after the other, and the kinds of step that no earlier run tells of.

    A step is taken to last as long as the finished ones of its kind on the same base model did on average:
    those with the same parameters, where there are such; what hardly changes the time (parents, seed,
    sparsity) does not count. Fine-tuning is counted by the token.
    """
    past = _past_seconds(Path(plan.runs))
    total, unknown = 0.0, set()
    for step in plan.missing():
        seconds = _seconds_of(step, past, plan.study.model)
        if seconds is None:
            unknown.add(step.parameters.step)
        else:
            total += seconds
    return total, unknown


def _seconds_of(step: PlannedStep, past: dict[tuple[str, ...], list[float]], base: str) -> float | None:
    """Seconds of a step as `_past_seconds` tells them; None: there is no such run."""
    parameters = step.parameters.model_dump(mode="json")
    kind, alike, work = _likeness(step.parameters.step, parameters, base)
    seconds = past.get(alike) or past.get(kind)
    return work * sum(seconds) / len(seconds) if seconds else None


def first_times(plan: Plan) -> str:
    """A sentence about the time of a plan without past runs, by some seconds' timing of the model here."""
    config = plan.study.shape or read_config(plan.study.model)
    if not config:
        return f"Time: not known yet, as no file of {plan.study.model!r} is here."
    try:
        seconds = estimate_first_seconds(plan, **_speed(plan.study, config))
    except PftoolsError as error:
        return f"Time: not known yet, as the model could not be timed here ({error})."
    return (
        f"Time: very roughly {max(1, round(seconds / 60))} minutes, one step after the other, by some "
        "seconds' timing of a layer of the model, as busy as this machine is now; the next plan tells it "
        "from runs."
    )


def _speed(study: Study, config: dict[str, Any]) -> dict[str, float]:
    """`timing.Speed` of the study's model here, as JSON."""
    device = study.parameters(settings.Evaluate).device
    asked = json.dumps({"config": config, "dtype": study.dtype, "device": device})
    command = [sys.executable, "-m", "pftools.study.timing"]
    done = subprocess.run(command, input=asked, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise PftoolsError(last.rpartition("PftoolsError: ")[2].strip().rstrip("."))
    speed: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return speed


def estimate_first_seconds(plan: Plan, seconds_a_token: float, busy: float = 1.0) -> float:
    """Seconds of the missing steps by the tokens that they read.

    Args:
        plan: the plan.
        seconds_a_token: of a forward pass, as busy as the machine is now.
        busy: how many times as long as on a free machine work takes now.
    """
    return sum(
        _STEP_SECONDS * busy + seconds_a_token * _forwards(step.parameters, plan) for step in plan.missing()
    )


_STEP_SECONDS = 12  # a process, a kernel, libraries, and a small model read from the disk: 12 to 16 measured
_TRAINING = 4  # forwards that a token costs that is trained on: 3.3 measured in fp32, 4.7 in bf16
_QUESTION_TOKENS = 40  # with its answers; what questions share is read once
_ALL_QUESTIONS, _ALL_TOKENS = 5000, 100_000
_SAMPLED_BLOCKS = 8  # whose activations 02_prune shows


def _forwards(parameters: settings.Step, plan: Plan) -> float:
    """Tokens that a step reads, counted by what they cost in forward passes."""
    if isinstance(parameters, settings.Calibrate):
        return parameters.n_blocks * parameters.block_length
    if isinstance(parameters, settings.Prune):
        held_out = 2 * parameters.held_out_blocks * parameters.block_length
        return _calibration_tokens(parameters, plan) + held_out
    if isinstance(parameters, settings.Finetune):
        held_out = 2 * parameters.held_out_blocks * parameters.block_length
        return _TRAINING * (parameters.tokens or 0) + held_out
    if isinstance(parameters, settings.Evaluate):
        questions = len(parameters.tasks) * (parameters.limit or _ALL_QUESTIONS)
        text = (parameters.n_blocks or 0) * parameters.block_length or _ALL_TOKENS
        return text + questions * _QUESTION_TOKENS
    return 0


def _calibration_tokens(parameters: settings.Prune, plan: Plan) -> int:
    """What pruning reads of the calibration's blocks, or of its own: each twice, and a sample."""
    step = plan.steps.get(Path(parameters.calibration).name)
    source = step.parameters if step else parameters
    assert isinstance(source, settings.Calibrate | settings.Prune)
    sampled = 0 if parameters.inputs == "dense" else min(_SAMPLED_BLOCKS, source.n_blocks)
    return (2 * source.n_blocks + sampled) * source.block_length


def _past_seconds(root: Path) -> dict[tuple[str, ...], list[float]]:
    """Seconds of the finished runs in a folder, a unit of work each, by how much they are alike."""
    records = {}
    for path in root.glob("*/run.json"):
        with suppress(PftoolsError):  # a damaged record is named when it is used; an estimate does without it
            records[path.parent.name] = run_folder.read_record(path.parent)
    past: dict[tuple[str, ...], list[float]] = {}
    for record in records.values():
        base = record["parameters"]["model"]
        while (parent := records.get(Path(base).name)) is not None:
            base = parent["parameters"]["model"]
        kind, alike, work = _likeness(record["step"], record["parameters"], base)
        for likeness in (kind, alike):
            past.setdefault(likeness, []).append(record["seconds"] / work)
    return past


def _likeness(
    step: str, parameters: dict[str, Any], base: str
) -> tuple[tuple[str, ...], tuple[str, ...], float]:
    """(kind and base model; that and all parameters that decide how long it takes; how much work it is)."""
    ignored = {*settings.STEPS[step].parents, "seed", "sparsity", "tokens"}
    telling = {
        name: parameters.get(name) for name in settings.STEPS[step].key_fields() if name not in ignored
    }
    kind = (step, base)
    return kind, (*kind, json.dumps(telling, sort_keys=True)), parameters.get("tokens") or 1

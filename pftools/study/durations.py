"""How long the steps of a plan take: as earlier runs took, else by some seconds' timing of the model here."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from pftools import run_folder, settings
from pftools.errors import PftoolsError
from pftools.pretrained.model_files import read_config
from pftools.study.plan import Plan, PlannedStep
from pftools.study.words import Study


def estimate_seconds(plan: Plan) -> tuple[float, set[str]]:
    """Seconds of the missing steps, one after the other, and the kinds of step that no earlier run tells of.

    A step is taken to last as long as the finished ones of its kind on the same base model did on average:
    those with the same parameters, where there are such; what hardly changes the time (parents, seed,
    sparsity) does not count. Fine-tuning is counted by the token.
    """
    past = past_seconds(Path(plan.runs))
    total, unknown = 0.0, set()
    for step in plan.missing():
        seconds = seconds_of(step, past, plan.study.model)
        if seconds is None:
            unknown.add(step.parameters.step)
        else:
            total += seconds
    return total, unknown


def seconds_of(step: PlannedStep, past: dict[tuple[str, ...], list[float]], base: str) -> float | None:
    """Seconds of a step as `past_seconds` tells them; None: there is no such run."""
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


def past_seconds(root: Path) -> dict[tuple[str, ...], list[float]]:
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

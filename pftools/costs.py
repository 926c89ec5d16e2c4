"""What a plan costs: disk from the model's shape, time from what earlier runs took."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from pftools import run_folder, settings
from pftools.base_models import cache_folder
from pftools.errors import PftoolsError
from pftools.files import as_bytes
from pftools.plan import Plan

_SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def summary(plan: Plan) -> list[str]:
    """What a plan costs, in sentences: steps with and without sharing, disk, time where past runs tell it."""
    finished = len(plan.steps) - len(plan.missing())
    lines = [
        f"{len(plan.rows)} results from {len(plan.steps)} steps; a plan without sharing would take "
        f"{plan.unshared}.",
        f"{finished} of the steps are finished, {len(plan.steps) - finished} are to do.",
    ]
    disk = estimate_disk(plan)
    if disk:
        lines.append(
            f"Disk: about {as_bytes(disk['deltas'])} as deltas; full copies would be "
            f"{as_bytes(disk['copies'])}."
        )
    seconds, unknown = estimate_seconds(plan)
    if seconds:
        untold = f", without {', '.join(sorted(unknown))}, of which there is none yet" if unknown else ""
        lines.append(
            f"Time: about {seconds / 60:.1f} minutes, one step after the other, as past runs took{untold}."
        )
    return lines


def estimate_disk(plan: Plan) -> dict[str, int] | None:
    """Bytes of all checkpoints as `deltas`, and as full 16-bit `copies`; None where the shape is not at hand.

    A mask is one bit a weight. An adapter has rank x (inputs + outputs) numbers in fp32 for each weight that
    it adapts.
    """
    shape = plan.study.shape or _local_shape(plan.study.model)
    if not shape:
        return None
    matrices = _linear_shapes(shape)
    linear = shape["num_hidden_layers"] * sum(rows * columns for rows, columns in matrices.values())
    embeddings = 1 if shape.get("tie_word_embeddings") else 2
    total = linear + embeddings * shape["vocab_size"] * shape["hidden_size"]
    deltas = copies = 0
    for step in plan.steps.values():
        parameters = step.parameters
        if isinstance(parameters, settings.Prune):
            changed = parameters.method in settings.UPDATING_METHODS or parameters.reconstruct_steps
            deltas += linear // 8 + (2 * linear if changed else 0)
            copies += 2 * total
        elif isinstance(parameters, settings.Finetune):
            adapted = [matrices[name] for name in _adapted(parameters.targets)]
            deltas += 4 * parameters.rank * shape["num_hidden_layers"] * sum(map(sum, adapted))
            copies += 2 * total
    return {"deltas": deltas, "copies": copies}


def _linear_shapes(shape: dict[str, int]) -> dict[str, tuple[int, int]]:
    """{linear module of a Llama-like layer: (outputs, inputs)}."""
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    heads = shape["num_attention_heads"]
    head = shape.get("head_dim") or width // heads
    kv = shape.get("num_key_value_heads", heads) * head
    return {
        "q_proj": (heads * head, width),
        "k_proj": (kv, width),
        "v_proj": (kv, width),
        "o_proj": (width, heads * head),
        "gate_proj": (inner, width),
        "up_proj": (inner, width),
        "down_proj": (width, inner),
    }


def _adapted(targets: str) -> list[str]:
    named = {
        "all-linear": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "published": ["q_proj", "v_proj"],
    }
    return named.get(targets, ["q_proj", "v_proj"])


def _local_shape(model: str) -> dict[str, int]:
    folder = cache_folder() / "models" / model if model == settings.EMBEDDED_MODEL else Path(model)
    path = folder / "config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    return config if all(name in config for name in _SHAPE) else {}


def estimate_seconds(plan: Plan) -> tuple[float, set[str]]:
    """Seconds of the missing steps, one after the other, and the kinds of step that no earlier run tells of.

    A step is taken to last as long as the finished ones of its kind on the same base model did on average:
    those with the same parameters, where there are such; what hardly changes the time (parents, seed,
    sparsity) does not count. Fine-tuning is counted by the token.
    """
    past = _past_seconds(Path(plan.runs))
    total, unknown = 0.0, set()
    for step in plan.missing():
        parameters = step.parameters.model_dump(mode="json")
        kind, alike, work = _likeness(step.parameters.step, parameters, plan.study.model)
        seconds = past.get(alike) or past.get(kind)
        if seconds:
            total += work * sum(seconds) / len(seconds)
        else:
            unknown.add(kind[0])
    return total, unknown


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

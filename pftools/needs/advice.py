"""Where a step fits, and what would make it fit: a sentence before the start, not an error in the middle."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from pftools import settings
from pftools.errors import PftoolsError
from pftools.files import as_bytes
from pftools.needs.estimate import DeviceKind, Needs, blocks_of, needs_of, number_bytes
from pftools.needs.facts import Facts, facts_of
from pftools.needs.resources import Machine, device_kind, give_back_freed, machine
from pftools.pretrained.model_files import HUB_ID, count
from pftools.settings import PLACEMENTS, Placement

# Estimates are within a fifth of what is measured, and other programs want some memory, too.
ROOM = 0.9
_SURELY = 1.25
_BY_ITSELF = {"batch_size": 1, "gradient_checkpointing": True}
_SHORTEST = 128  # tokens of a block, below which halving it is no advice


@dataclass(frozen=True)
class _Case:
    """A step with its settings, somewhere."""

    parameters: Any
    facts: Facts
    placement: Placement
    kind: DeviceKind
    found: Machine

    def needs(self) -> Needs:
        gpus = max(1, len(self.found.gpus)) if self.placement == "spread" else 1
        return needs_of(
            self.parameters,
            self.facts,
            placement=self.placement,
            device_kind=self.kind,
            gpus=gpus,
            resident=self.resident(),
        )

    def resident(self) -> int:
        """How many layers of a streamed model can stay on the GPU: of an evaluation, which reads all of them
        again and again; the other steps open a layer a few times."""
        streams = self.placement == "stream" and self.kind == "cuda" and self.found.gpus
        if not streams or not isinstance(self.parameters, settings.Evaluate):
            return 0
        bare = needs_of(self.parameters, self.facts, placement="stream", device_kind="cuda")
        spare = ROOM * min(self.found.gpus) - bare.device
        a_layer = number_bytes(self.parameters, self.facts, "cuda") * count(self.facts.layer)
        return int(min(max(spare // a_layer, 0), self.facts.layers))

    def compared(self) -> list[tuple[str, int, int]]:
        """(what, bytes needed, bytes there)"""
        needed, gpus = self.needs(), self.found.gpus
        gpu = [("GPU memory", needed.device, min(gpus))] if needed.device and gpus else []
        scratch = [("scratch", needed.scratch, self.found.scratch)] if needed.scratch else []
        memory = ("memory", needed.memory, self.found.memory)
        return [memory, *gpu, ("disk", needed.disk, self.found.disk), *scratch]

    def lacking(self) -> list[tuple[str, int, int]]:
        """`compared`, of what there is too little of."""
        return [each for each in self.compared() if each[1] > _usable(each[0], each[2])]

    def missing(self) -> int:
        """Bytes that are missing, of all kinds together; 0: it fits."""
        return sum(int(wanted - _usable(what, there)) for what, wanted, there in self.lacking())

    def at_least(self) -> _Case:
        """The case with what a step changes by itself when memory runs out."""
        known = type(self.parameters).model_fields
        own = {name: value for name, value in _BY_ITSELF.items() if name in known}
        return replace(self, parameters=self.parameters.model_copy(update=own))

    def is_hopeless(self) -> bool:
        """Whether more is needed than is there when nothing else runs, by more than an estimate is wrong."""
        there = {"memory": self.found.total}
        return any(wanted > _SURELY * there.get(what, free) for what, wanted, free in self.lacking())

    def changed(self, change: dict[str, Any]) -> _Case:
        parameters = self.parameters.model_copy(update=change)
        placement = placement_of(parameters, self.facts, self.found)
        return replace(self, parameters=parameters, placement=placement)


def _case(parameters: Any, facts: Facts, placement: Placement, found: Machine) -> _Case:
    """A step on the device of a machine that its parameters name."""
    return _Case(parameters, facts, placement, device_kind(parameters.device, found), found)


def fitting(parameters: settings.Step, facts: Facts, found: Machine) -> Placement:
    """The fastest placement that fits; where none does, the one that lacks least."""
    kind = device_kind(parameters.device, found)
    return min(
        _possible(parameters, facts, kind, found),
        key=lambda placement: _Case(parameters, facts, placement, kind, found).missing(),
    )


def placement_of(parameters: settings.Step, facts: Facts, found: Machine) -> Placement:
    """Where a step is placed: as its parameter says, of which `auto` is what `fitting` chooses."""
    return fitting(parameters, facts, found) if parameters.placement == "auto" else parameters.placement


def gpus_for(parameters: settings.Step, facts: Facts, found: Machine) -> tuple[int, int]:
    """(GPUs, bytes on each) of a step on a machine; (0, 0) where it computes on a CPU.

    A model is spread over as few GPUs as it fits on.
    """
    kind, placement = device_kind(parameters.device, found), placement_of(parameters, facts, found)
    if kind == "cpu":
        return 0, 0
    fewest = 2 if placement == "spread" else 1
    for gpus in range(fewest, max(fewest, len(found.gpus)) + 1):
        part = replace(found, gpus=found.gpus[:gpus])
        case = _Case(parameters, facts, placement, kind, part)
        if placement != "spread" or not case.lacking():
            break
    return gpus, case.needs().device


def on(found: Machine, parameters: settings.Step, facts: Facts, placement: Placement) -> Needs:
    """What a step needs on a machine."""
    return _case(parameters, facts, placement, found).needs()


def before(parameters: settings.Step) -> list[str]:
    """For the head of a notebook: what its step needs beside what is here, and what to do if that is little.

    Where it is little, this process keeps no memory that it has freed.

    Raises:
        PftoolsError: it cannot fit, whatever the step does by itself when memory runs out.
    """
    facts = _facts_to_load(parameters.model)
    if facts is None:
        return []
    found = machine(str(getattr(parameters, "runs", "runs")))
    placement = placement_of(parameters, facts, found)
    case = _case(parameters, facts, placement, found)
    too_little = shortage(parameters, facts, found, placement)
    if too_little and case.at_least().is_hopeless():
        raise PftoolsError(too_little)
    if too_little or placement == "stream":
        give_back_freed()
    stay = case.resident()
    return [
        f"needs about {_beside(case.compared())}",
        *([f"{stay} of {facts.layers} layers stay on the GPU, the others are streamed"] if stay else []),
        *([f"this may not fit: {too_little}"] if too_little else []),
    ]


def _facts_to_load(model: str) -> Facts | None:
    """`facts_of` a model that is about to be loaded: of one on the hub its config.json is fetched first."""
    if (facts := facts_of(model)) is None and re.fullmatch(HUB_ID, model):
        with suppress(Exception):  # whoever loads the model says what is wrong
            from huggingface_hub import hf_hub_download

            hf_hub_download(model, "config.json", etag_timeout=5)
            facts = facts_of(model)
    return facts


def resolve(parameters: settings.Step) -> tuple[Placement, int]:
    """(`placement_of`, layers of a streamed model that stay on the GPU), on this machine; `auto` is `one`
    where nothing can be known of the model."""
    asked = parameters.placement
    facts = _facts_to_load(parameters.model) if asked in ("auto", "stream") else None
    if facts is None:
        return ("one" if asked == "auto" else asked), 0
    found = machine(parameters.runs)
    placement = placement_of(parameters, facts, found)
    return placement, resident_layers(parameters, facts, found, placement)


def resident_layers(parameters: settings.Step, facts: Facts, found: Machine, placement: Placement) -> int:
    """How many layers of a streamed model stay on the GPU of a machine."""
    return _case(parameters, facts, placement, found).resident()


def as_it_goes_on(
    parameters: settings.Step, facts: Facts, found: Machine, placement: Placement
) -> settings.Step:
    """The settings that a step comes to when memory runs out: the largest batch that fits, and gradient
    checkpointing last; its own, where it fits, or nothing helps."""
    case = _case(parameters, facts, placement, found)
    known = type(parameters).model_fields
    changes = [{}, *({"batch_size": rows} for rows in (8, 4, 2, 1) if "batch_size" in known)]
    if "gradient_checkpointing" in known:
        changes.append(_BY_ITSELF)
    steps = (parameters.model_copy(update=change) for change in changes)
    return next((step for step in steps if not replace(case, parameters=step).lacking()), parameters)


def shortage(
    parameters: settings.Step, facts: Facts, found: Machine, placement: Placement | None = None
) -> str:
    """Why a step will not fit, and what would make it fit, by how much; empty: it fits.

    Args:
        placement: in place of the one that the parameters ask for.
    """
    if placement is not None:
        parameters = parameters.model_copy(update={"placement": placement})
    placement = placement_of(parameters, facts, found)
    case = _case(parameters, facts, placement, found)
    lacking = case.lacking()
    if not lacking:
        return ""
    return f"the {parameters.step} step needs about {_beside(lacking)}: {_remedy(case)}."


def _beside(compared: list[tuple[str, int, int]]) -> str:
    parts = [f"{as_bytes(wanted)} of {what} ({as_bytes(there)} here)" for what, wanted, there in compared]
    return ", ".join(parts)


def _usable(what: str, there: int) -> float:
    return there if what in ("disk", "scratch") else ROOM * there


def _remedy(case: _Case) -> str:
    """Single changes that make it fit; else those that help most, and whether all together do."""
    helpful = []
    for change in _changes(case):
        saved = case.missing() - case.changed(change).missing()
        if saved > 0.01 * case.missing():
            helpful.append((saved, change))
    helpful.sort(key=lambda pair: -pair[0])
    fits = [_words(change) for _, change in helpful if not case.changed(change).lacking()]
    if fits:
        return f"{' or '.join(fits[:3])} would make it fit"
    if not helpful:
        return "it takes a larger machine, or a smaller model"
    saves = [f"{_words(change)} saves {as_bytes(saved)}" for saved, change in helpful]
    joint = case
    for _, change in helpful:
        joint = joint.changed(change)
        if not joint.lacking():
            break
    verdict = "together they do not suffice" if joint.lacking() else "together they make it fit"
    return f"{', '.join(saves)}; {verdict}"


def _possible(parameters: Any, facts: Facts, kind: DeviceKind, found: Machine) -> tuple[Placement, ...]:
    """Placements that a step can have: a GPU does not train on a plain base that it would have to stream."""
    left_out = set() if facts.streams else {"stream"}
    if kind != "cuda" or len(found.gpus) < 2:
        left_out.add("spread")
    if kind == "cuda" and getattr(parameters, "base", "") == "plain":
        left_out.add("stream")
    return tuple(placement for placement in PLACEMENTS if placement not in left_out)


def _words(change: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {str(value).lower() if value is True else value}" for name, value in change.items()
    )


def _changes(case: _Case) -> Iterator[dict[str, Any]]:
    """Settings that take less memory, of those that the step has."""
    parameters = case.parameters
    known = type(parameters).model_fields
    others = _possible(parameters, case.facts, case.kind, case.found)
    yield from ({"placement": other} for other in others if other != case.placement)
    if getattr(parameters, "base", "nf4") != "nf4":
        yield {"base": "nf4"}
    if not getattr(parameters, "gradient_checkpointing", True):
        yield {"gradient_checkpointing": True}
    if getattr(parameters, "show_dense_cost", False):
        yield {"show_dense_cost": False}
    if parameters.dtype == "float32":
        yield {"dtype": "bfloat16"}
    if "batch_size" in known and parameters.batch_size != 1:
        yield {"batch_size": 1}
    if "block_length" in known and not getattr(parameters, "calibration", ""):
        n_blocks, length = blocks_of(parameters)
        if length >= 2 * _SHORTEST:
            yield {"block_length": length // 2}
        if parameters.step in ("calibrate", "prune") and n_blocks > 1:
            yield {"n_blocks": n_blocks // 2}

"""How long a step takes on a device that is not here, by its datasheet.

Sure are the operations and the bytes: they follow from shapes. Guessed is the share of the datasheet's peak
that is reached, the speed of a disk, and how many tokens a question has. A figure is good to a factor of two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pftools import settings
from pftools.needs.advice import on
from pftools.needs.estimate import blocks_of, number_bytes, task_of
from pftools.needs.facts import Facts
from pftools.needs.resources import Machine
from pftools.settings import Placement

_TOKENS_A_FORWARD, _QUESTION_TOKENS = 4096, 16_384
_LENGTHS = 40  # different lengths of questions that a reply follows, which are read one length at a time
_TOKENS_A_LINE = 109  # real tokens of a padded row of WikiText-2: benchmarks/finetune.py
_START_SECONDS = 20  # a process, a kernel, imports


@dataclass(frozen=True)
class Device:
    """A device by its datasheet: operations and bytes a second.

    Attributes:
        name: in words.
        half, single: operations of its matrix units in 16 bit, and in float32.
        share: of these that are reached (a guess).
        bandwidth: of its own memory.
        bus: from the machine's pageable memory to it (a guess, of a datasheet's 16).
        disk: of the machine's disk (a guess).
        machine: what it has.
        session_hours: how long one may use it at a time (a guess).
    """

    name: str
    half: float
    single: float
    share: float
    bandwidth: float
    bus: float
    disk: float
    machine: Machine
    session_hours: float


_GB = 10**9
# NVIDIA's datasheet of the T4, and what Colab gives with it; nine tenths of both memories are for a step.
DEVICES = {
    "t4": Device(
        name="a T4 on Colab",
        half=65e12,
        single=8.1e12,
        share=0.35,
        bandwidth=320e9,
        bus=4e9,
        disk=200e6,
        machine=Machine(
            memory=round(11.2 * _GB),
            total=round(12.7 * _GB),
            gpus=(round(15.6 * _GB),),
            disk=15 * _GB,
            scratch=70 * _GB,
        ),
        session_hours=3,
    )
}


@dataclass(frozen=True)
class _Reading:
    """Forwards of a step.

    Attributes:
        forwards: how many.
        tokens: that each reads.
        length: of a row.
        passes: products of the weights, in forwards: a backward pass to the inputs is one more.
        streamed: whether the weights come from the file of a streamed model.
    """

    forwards: float
    tokens: float
    length: float
    passes: float = 1
    streamed: bool = True


def seconds_on(device: Device, parameters: settings.Step, facts: Facts, placement: Placement) -> float:
    """Seconds of a step on a device.

    A streamed model is read from disk where the machine's memory cannot hold its file beside the step. Its
    layers are copied to the device before they compute, not meanwhile.
    """
    d, streams = number_bytes(parameters, facts, "cuda"), placement == "stream"
    linear, stored = d * facts.linear, facts.stored * facts.total
    needed = on(device.machine, parameters, facts, placement)
    in_file = needed.scratch
    speed = device.bus if in_file + needed.memory < device.machine.memory else min(device.bus, device.disk)
    a_look = (linear - in_file) / device.bandwidth + in_file / speed
    seconds = _START_SECONDS + stored / device.disk + in_file / device.disk + stored / device.bus
    seconds += _LOOKS[parameters.step] * a_look
    for reading in _readings(parameters):
        flops = 2 * facts.total + 2 * facts.layers * reading.length * facts.queries
        peak = device.share * (device.half if d == 2 else device.single)
        compute = reading.passes * reading.tokens * flops / peak
        reads = d * facts.total / device.bandwidth
        waits = in_file / speed if streams and reading.streamed else 0
        seconds += reading.forwards * (max(compute, reads) + waits)
    if parameters.step in ("prune", "analyse"):
        seconds += facts.linear * _SCORING
    return seconds


_SCORING = 2e-9  # seconds a weight: to score, sort and pack it, or to add up its moments (a guess)
# How often a step looks at all weights: a digest, zeros before and after, deltas that are replayed or merged.
_LOOKS = {"calibrate": 2, "prune": 8, "finetune": 9, "evaluate": 3, "analyse": 6}


def _readings(parameters: Any) -> Iterator[_Reading]:
    match parameters.step:
        case "calibrate":
            yield _layers(*blocks_of(parameters), passes=1)
        case "prune":
            yield _layers(*blocks_of(parameters), passes=2)
            yield from 2 * [
                _blocks(parameters.held_out_blocks, blocks_of(parameters)[1], parameters.batch_size)
            ]
        case "finetune":
            yield _training(parameters)
            yield from 2 * [
                _blocks(parameters.held_out_blocks, parameters.block_length, parameters.batch_size)
            ]
        case "evaluate":
            yield _blocks(*blocks_of(parameters), parameters.batch_size)
            for name in parameters.tasks:
                yield from _questions(parameters, name)


def _layers(n_blocks: int, length: int, passes: int) -> _Reading:
    """A walk through the layers: each is opened once, for all blocks."""
    return _Reading(1, n_blocks * length, length, passes)


def _blocks(n_blocks: int, length: int, batch_size: int | None) -> _Reading:
    rows = min(n_blocks, batch_size or max(1, _TOKENS_A_FORWARD // length)) or 1
    return _Reading(math.ceil(n_blocks / rows), rows * length, length)


def _training(parameters: settings.Finetune) -> _Reading:
    """Forward and backward to the inputs, and once more forward where activations are not kept. Padded rows
    count with their padding."""
    tokens = parameters.tokens or 49_152
    if not parameters.packing:
        tokens = round(tokens / _TOKENS_A_LINE * parameters.block_length)
    forwards = max(1, tokens // _TOKENS_A_FORWARD)
    passes = 3 if parameters.gradient_checkpointing else 2
    plain = parameters.base == "plain"  # a quantized one stays on the device
    return _Reading(forwards, tokens / forwards, parameters.block_length, passes, streamed=plain)


def _questions(parameters: settings.Evaluate, name: str) -> Iterator[_Reading]:
    """A task's shared examples, its questions, and the new tokens of its replies."""
    task = task_of(name)
    questions = min(task.questions, parameters.limit or task.questions)
    if task.examples:
        yield _Reading(task.groups, task.examples, task.examples)
    if not task.new:
        rows = min(questions, parameters.batch_size or max(1, _QUESTION_TOKENS // task.question))
        yield _Reading(math.ceil(questions / rows), rows * task.question, task.examples)
        return
    batches = max(
        task.groups, min(questions, task.groups * min(_LENGTHS, math.ceil(questions / task.groups)))
    )
    if parameters.batch_size:
        batches = max(batches, math.ceil(questions / parameters.batch_size))
    yield _Reading(batches, questions / batches * task.question, task.examples)
    yield _Reading(batches * (task.new - 1), questions / batches, task.examples)

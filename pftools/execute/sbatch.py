"""What sbatch is asked for: the options that were given, and memory and time where they were not."""

from __future__ import annotations

import math
import re
from typing import Any

from pftools.errors import PftoolsError
from pftools.needs import ROOM
from pftools.study import costs

# A step's time limit, where earlier runs tell how long it takes: other nodes may be slower.
_LEAST_MINUTES, _TIMES_AS_LONG = 30, 3
_MEMORY_OPTIONS = {"mem", "mem-per-cpu", "mem-per-gpu"}
_GPU_OPTIONS = re.compile(r"(?P<before>(?:gpu:)?(?:[\w-]+:)?)(?P<count>\d+)")


def asked_for(estimate: costs.JobEstimate | None, options: dict[str, str]) -> dict[str, str]:
    """sbatch's options for one step: those that were given, and memory and time where they were not.

    The GPUs that were asked for are the most that a step may have: only one that is spread has more than one.

    Args:
        estimate: of the step; None: nothing is known of it.
        options: as they were given.
    """
    found = dict(options)
    if estimate is None:
        return found
    if not {name.replace("_", "-") for name in options} & _MEMORY_OPTIONS:
        found["mem"] = f"{math.ceil(estimate.memory / 10**9 / ROOM) + 1}G"
    if "time" not in options and estimate.minutes:
        found["time"] = str(max(_LEAST_MINUTES, math.ceil(_TIMES_AS_LONG * estimate.minutes)))
    for name in ("gres", "gpus", "gpus-per-node"):
        told = _GPU_OPTIONS.fullmatch(options.get(name, ""))
        if told and not estimate.spread:
            found[name] = f"{told['before']}{min(1, int(told['count']))}"
    return found


class NoSuchMemory(PftoolsError):
    """No node of the partition has as much memory as was asked for, or says how much it has."""


def sort_options(options: dict[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """sbatch's options: those that submitit converts, and the rest as they are."""
    known: dict[str, Any] = {}
    other = {}
    for name, value in options.items():
        if name == "time":
            known["time"] = minutes(value)
        elif name == "setup":  # a line of shell before the step, such as `module load cuda`
            known["setup"] = [value]
        else:
            other[name.replace("_", "-")] = value
    return known, other


def minutes(text: str) -> int:
    """A time limit as sbatch takes it, in whole minutes: MIN, MIN:SEC, H:MIN:SEC, D-H, D-H:MIN, D-H:MIN:SEC.

    >>> minutes("90"), minutes("2:00:00"), minutes("1-12")
    (90, 120, 2160)
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if not found:
        raise PftoolsError(
            f"the time {text!r} is not one of SLURM's: give minutes, or HOURS:MINUTES:SECONDS, or DAYS-HOURS."
        )
    days, *parts = found.groups()
    first, second, third = (int(part or 0) for part in parts)
    if days is not None:
        seconds = ((int(days) * 24 + first) * 60 + second) * 60 + third
    elif parts[2] is not None:
        seconds = (first * 60 + second) * 60 + third
    else:
        seconds = first * 60 + second
    return max(1, -(-seconds // 60))

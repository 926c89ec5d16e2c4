"""What a step needs of memory, GPU memory and disk, told from settings and shapes before it starts.

facts = needs.facts_of("smollm2-135m")
needs.needs_of(settings.Prune(), facts, placement="one", device_kind="cpu")
needs.fitting(settings.Prune(), facts, needs.machine("runs"))

No weight is read and no torch is loaded. `benchmarks/needs.py` holds the estimates beside measured peaks.
"""

from pftools.needs.advice import (
    ROOM,
    as_it_goes_on,
    before,
    fitting,
    gpus_for,
    on,
    placement_of,
    resident_layers,
    resolve,
    shortage,
)
from pftools.needs.datasheet import DEVICES, Device, seconds_on
from pftools.needs.estimate import CUDA_DEVICE, DeviceKind, Needs, needs_of
from pftools.needs.facts import Facts, facts_of, facts_of_shapes
from pftools.needs.resources import Machine, device_kind, machine
from pftools.settings import PLACEMENTS, Placement

__all__ = [
    "CUDA_DEVICE",
    "DEVICES",
    "PLACEMENTS",
    "ROOM",
    "Device",
    "DeviceKind",
    "Facts",
    "Machine",
    "Needs",
    "Placement",
    "as_it_goes_on",
    "before",
    "device_kind",
    "facts_of",
    "facts_of_shapes",
    "fitting",
    "gpus_for",
    "machine",
    "needs_of",
    "on",
    "placement_of",
    "resident_layers",
    "resolve",
    "seconds_on",
    "shortage",
]

"""What this process may use: memory, GPU memory, disk."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pftools.pretrained.base_models import cache_folder

# mallopt's number for the size in bytes from which memory is given back when it is freed.
_MMAP_THRESHOLD, _FROM = -3, 2**20
MEMORY = "PFTOOLS_MEMORY"  # the environment variable that says how many bytes pftools may use


@dataclass(frozen=True)
class Machine:
    """Bytes.

    Attributes:
        memory: that this process may use now, with what it already holds.
        total: that it could use if it were alone.
        gpus: free on each GPU that is visible.
        disk: free where runs are written.
        scratch: free in the user's cache.
    """

    memory: int
    total: int
    gpus: tuple[int, ...]
    disk: int
    scratch: int


def machine(runs: str | Path = "runs") -> Machine:
    """What this machine has for a step whose run is written into ``runs``, which need not be there yet."""
    import psutil

    physical, held = psutil.virtual_memory(), psutil.Process().memory_info().rss
    limits = [(physical.total, physical.available), *_limits()]
    promised = list(_promised())
    return Machine(
        memory=min([free + held for _, free in limits] + promised),
        total=min([total for total, _ in limits] + promised),
        gpus=_with_own(_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))),
        disk=_free(Path(runs)),
        scratch=_free(cache_folder()),
    )


def _with_own(gpus: tuple[int, ...]) -> tuple[int, ...]:
    """Free bytes of GPUs, with what this process holds of them already."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return gpus
    return tuple(free + torch.cuda.memory_reserved(number) for number, free in enumerate(gpus))


def _free(folder: Path) -> int:
    place = folder.expanduser().absolute()
    return shutil.disk_usage(next(part for part in (place, *place.parents) if part.exists())).free


def give_back_freed() -> None:
    """Let what is freed go back to the system at once.

    glibc keeps it to use it again: in a training up to half of what all tensors take. That is faster, by a
    fifth of the time on a CPU, and so only given up where memory is short.
    """
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _FROM)


def device_kind(device: str, found: Machine) -> Literal["cpu", "cuda"]:
    """Where a step computes: ``device`` is its parameter, of which `auto` is a GPU where there is one."""
    return "cuda" if device.startswith("cuda") or (device == "auto" and found.gpus) else "cpu"


def _limits() -> Iterator[tuple[int, int]]:
    """(limit, what is left of it) of the memory of every control group that this process is in."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                root, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                root = Path("/sys/fs/cgroup/memory")
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            else:
                continue
            here = root / path.strip("/")
            for folder in (here, *here.parents):
                if folder == root.parent:
                    break
                if (found := _limit(folder, *names)) is not None:
                    yield found


def _limit(folder: Path, most: str, used: str, cached: str) -> tuple[int, int] | None:
    """(limit, what is left); None: the group has no limit. Pages of files give way, and count as left."""
    try:
        limit = int((folder / most).read_text())
        usage = int((folder / used).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # not there, or "max"
        return None
    return limit, max(0, limit - usage + int(statistics.get(cached, 0)))


def _promised() -> Iterator[int]:
    """Bytes that somebody has set: a person, or SLURM for a job."""
    with suppress(KeyError, ValueError):
        yield int(float(os.environ[MEMORY]))
    with suppress(KeyError, ValueError):
        yield int(os.environ["SLURM_MEM_PER_NODE"]) * 2**20
    with suppress(KeyError, ValueError):
        yield int(os.environ["SLURM_MEM_PER_CPU"]) * int(os.environ["SLURM_CPUS_ON_NODE"]) * 2**20


def _gpus(visible: str | None) -> tuple[int, ...]:
    """Free bytes of the visible GPUs, as nvidia-smi tells them; empty where there is none."""
    if shutil.which("nvidia-smi") is None or visible == "":
        return ()
    command = ["nvidia-smi", "--query-gpu=index,uuid,memory.free", "--format=csv,noheader,nounits"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    free = {}
    for line in asked.splitlines():
        with suppress(ValueError):
            index, uuid, mebibytes = (part.strip() for part in line.split(","))
            free[index] = free[uuid] = int(mebibytes) * 2**20
    names = visible.split(",") if visible else [name for name in free if name.isdigit()]
    return tuple(free[name.strip()] for name in names if name.strip() in free)

"""What every benchmark shares: a clock, the circumstances, and results as JSON that a reader can check.

A benchmark measures a claim beside the naive way of doing the same, within one process, in turns: only
ratios of such times mean anything on a machine that others use too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "lm_eval")


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with what all benchmarks take: ``--device`` and ``--store``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--store", action="store_true", help="keep the result in benchmarks/results")
    return parser


def seconds(work: Callable[[], Any], device: str = "cpu") -> float:
    """Wall time of one call, with the device's queue empty before and after."""
    _wait(device)
    started = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - started


def in_turns(
    contestants: dict[str, Callable[[], Any]], *, rounds: int = 3, device: str = "cpu"
) -> dict[str, float]:
    """The median wall time of each contestant. They run in turns: a slow minute slows them all."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name, work in contestants.items():
            times[name].append(seconds(work, device))
            print(f"  round {number + 1}: {name}: {times[name][-1]:.2f} s", flush=True)
    return {name: median(values) for name, values in times.items()}


def report(
    claim: str, measured: dict[str, Any], *, script: str, device: str, store: bool, settings: dict[str, Any]
) -> None:
    """Print a result; with ``store``, keep it in `results/<script>-<device>.json`, one entry a claim."""
    print(f"{claim}\n{json.dumps(measured, indent=1)}", flush=True)
    if not store:
        return
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{Path(script).stem}-{device}.json"
    entries = json.loads(path.read_text()) if path.exists() else {}
    entries[claim] = {"measured": measured, "settings": settings, **circumstances(device)}
    path.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n")


def stored(claim: str, *, script: str, device: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What an earlier call of `report` kept of a claim with the same settings; empty otherwise."""
    path = RESULTS / f"{Path(script).stem}-{device}.json"
    entry = json.loads(path.read_text()).get(claim, {}) if path.exists() else {}
    return entry["measured"] if entry.get("settings") == settings else {}


def circumstances(device: str) -> dict[str, Any]:
    """The device, the versions and the day."""
    import torch

    name = torch.cuda.get_device_name() if device.startswith("cuda") else _processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in _PACKAGES},
        },
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores"


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()

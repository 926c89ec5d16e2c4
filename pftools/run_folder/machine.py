"""What a result was computed with: versions, machine, memory."""

from __future__ import annotations

import os
import platform
import sys
import time
from importlib import metadata
from typing import Any

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "lm_eval", "accelerate", "pftools")


def circumstances() -> dict[str, Any]:
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes, Linux in KiB
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    torch = sys.modules.get("torch")  # a step that needs no torch does not load it for this
    gpu = torch.cuda if torch and torch.cuda.is_available() else None
    return {
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        **({"peak_gpu_bytes": gpu.max_memory_allocated()} if gpu else {}),
        "machine": _machine(gpu.get_device_name() if gpu else None),
        "versions": versions,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _machine(gpu: str | None) -> dict[str, Any]:
    return {
        "platform": f"{platform.system()} {platform.release()}",
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "gpu": gpu,
    }

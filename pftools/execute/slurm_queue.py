"""What SLURM's queue says: which jobs make which runs."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from pftools.errors import PftoolsError


@dataclass(frozen=True)
class Job:
    """A job in the queue: its id, its state (PENDING, RUNNING, ...) and why it waits, in SLURM's words."""

    id: str
    state: str
    reason: str


def queue(root: Path) -> dict[str, Job]:
    """The jobs of this user that make runs in the folder ``root``: {run: job}.

    Raises:
        PftoolsError: there is no SLURM here, or its controller cannot be reached.
    """
    if shutil.which("squeue") is None:
        raise PftoolsError(
            "there is no squeue on this machine: run with --executor local, or from a login node of the "
            "cluster."
        )
    command = ["squeue", "--me", "--noheader", "--states=all", "--format=%i|%T|%r|%j"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        raise PftoolsError("SLURM's controller did not answer within a minute: try again later.") from None
    if asked.returncode != 0:
        raise PftoolsError(f"SLURM's queue cannot be read: {asked.stderr.strip() or 'squeue failed'}.")
    found = {}
    mark = _mark(root)
    for line in asked.stdout.splitlines():
        number, state, reason, name = line.split("|", 3)
        run, _, of = name.rpartition("@")
        if of == mark and state in _ALIVE:
            found[run] = Job(number, state, reason)
    return found


# States of a job that works or will. A job that is queued again passes through COMPLETING, so that is not the
# end of it.
_ALIVE = {
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "COMPLETING",
    "SUSPENDED",
    "REQUEUED",
    "REQUEUE_HOLD",
    "REQUEUE_FED",
    "SPECIAL_EXIT",
    "SIGNALING",
    "STAGE_OUT",
    "RESIZING",
    "STOPPED",
}


def job_name(folder: Path) -> str:
    """The name of the job that makes the run in ``folder``."""
    return f"{folder.name}@{_mark(folder.parent)}"


def _mark(root: Path) -> str:
    """Tells the same run in two folders of runs apart."""
    return hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:8]

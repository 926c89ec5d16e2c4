"""Run folders: where a step's results live, how a run gets its name, and when it counts as finished.

A run is `runs/<step>-<key>/`. The key is a hash of what decides the result: the step, its parameters, the
keys of the runs it starts from, the code of its notebook, and the recipe version of pftools. Two studies that
share a step so share its run.

    runs/<step>-<key>/                   a finished run: run.json, its outputs, notebook.ipynb
    runs/.work/<step>-<key>.<random>/    an attempt: one execution of the step, under way, failed or cut short
    runs/.locks/<step>-<key>             locked by the process that makes the run
    runs/.logs/<step>-<key>.log          what the process of the step printed
    runs/.replaced/<step>-<key>.<random>/  a run from inputs that have changed since

An attempt works in a folder of its own and becomes the run by one rename, so a folder with `run.json` is
finished and whole. A process that was given up writes where nobody looks. Nothing relies on the clock: dates
are for people to read.
"""

from pftools.run_folder.attempt import (
    FAILURE,
    NOTEBOOK,
    attempting,
    attempts,
    failure_of,
    give_up,
    is_locked,
    log_path,
    owner,
    publish,
    remove,
    sweep,
    unneeded,
    was_interrupted,
    without_locks,
)
from pftools.run_folder.record import (
    KEY_LENGTH,
    changed_input,
    damage,
    folder_of,
    is_finished,
    is_reference,
    is_whole,
    notebook_of,
    outputs_digest,
    read_record,
    run_key,
    verify,
)
from pftools.run_folder.run import ATTEMPT, Run, start

__all__ = [
    "ATTEMPT",
    "FAILURE",
    "KEY_LENGTH",
    "NOTEBOOK",
    "Run",
    "attempting",
    "attempts",
    "changed_input",
    "damage",
    "failure_of",
    "folder_of",
    "give_up",
    "is_finished",
    "is_locked",
    "is_reference",
    "is_whole",
    "log_path",
    "notebook_of",
    "outputs_digest",
    "owner",
    "publish",
    "read_record",
    "remove",
    "run_key",
    "start",
    "sweep",
    "unneeded",
    "verify",
    "was_interrupted",
    "without_locks",
]

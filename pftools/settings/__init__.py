"""The parameters of every step: their defaults, what they mean, and what is refused.

A notebook's `parameters` cell repeats the names and defaults of one class here (a test keeps the two in
step). `notebook.read` takes what the notebook was given and checks it. Fields made by `local` say where and
how fast a step runs, never what it computes: they are not part of a run's key.

steps    a class for each notebook
words    what formats, placements, merges, methods and patterns are called
checked  values as they were meant, and `check`, which refuses the others in one sentence
"""

from pftools.settings.checked import HUB_TOKEN, Parameters, check
from pftools.settings.steps import (
    STEPS,
    Analyse,
    Calibrate,
    Compare,
    Evaluate,
    Finetune,
    PlanStudy,
    Prune,
    Step,
)
from pftools.settings.words import (
    A_PATH,
    EMBEDDED_MODEL,
    PLACEMENTS,
    SHAPE,
    TARGETS,
    UPDATING_METHODS,
    DtypeName,
    Merge,
    Placement,
    PlacementName,
    parse_nm,
    pattern_sparsity,
)

__all__ = [
    "A_PATH",
    "Analyse",
    "Calibrate",
    "Compare",
    "DtypeName",
    "EMBEDDED_MODEL",
    "Evaluate",
    "Finetune",
    "HUB_TOKEN",
    "Merge",
    "PLACEMENTS",
    "Parameters",
    "Placement",
    "PlacementName",
    "PlanStudy",
    "Prune",
    "SHAPE",
    "STEPS",
    "Step",
    "TARGETS",
    "UPDATING_METHODS",
    "check",
    "parse_nm",
    "pattern_sparsity",
]

"""Post-training pruning: which weights go, decided layer by layer from a few calibration blocks.

    criteria     how much a weight matters: magnitude, Wanda, RIA, ...; one small function each
    patterns     from scores to masks: unstructured, N:M
    inputs       what a layer is called with, and how large its inputs are
    walk         the walk through the layers: `prune_model`
    result       masks and the table of what was done
"""

from pftools.prune.criteria import METHODS
from pftools.prune.inputs import ActivationStatistics, measure_activations
from pftools.prune.result import PruneResult, score_histogram
from pftools.prune.walk import prune_model

__all__ = [
    "METHODS",
    "ActivationStatistics",
    "PruneResult",
    "measure_activations",
    "prune_model",
    "score_histogram",
]

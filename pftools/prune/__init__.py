"""Post-training pruning: which weights go, decided layer by layer from a few calibration blocks.

patterns      from scores to masks: unstructured, N:M, Wanda's variant
sparsegpt     the weight update: kept weights make up for those that go
allocation    how sparse each layer becomes: uniform, OWL
calls         what layers are called with
check         that replaying these calls is what the model does
inputs        how large the inputs of a layer's matrices are
statistics    these sizes for a whole unpruned model, kept in a file
request       what is asked, and what is refused
layer         one layer whose inputs are known
reconstruct   local recovery of a pruned layer
source        where a model's weights are while it is walked
walk          the walk through the layers: `prune_model`
checkpoint    the same walk over a model on disk, a layer at a time: `prune_checkpoint`
levers        what to lower when memory runs out
result        masks and the table of what was done

How much a weight matters is told by `pftools.criteria`: magnitude, Wanda, RIA, SparseGPT, one small function
each.
"""

from pftools.criteria import METHODS
from pftools.prune.checkpoint import prune_checkpoint
from pftools.prune.request import request_of
from pftools.prune.result import PruneResult, mask_of, score_histogram, score_steps
from pftools.prune.statistics import ActivationStatistics
from pftools.prune.walk import measure_activations, prune_model

__all__ = [
    "METHODS",
    "ActivationStatistics",
    "PruneResult",
    "mask_of",
    "measure_activations",
    "prune_checkpoint",
    "prune_model",
    "request_of",
    "score_histogram",
    "score_steps",
]

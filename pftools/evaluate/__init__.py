"""What a model is worth: perplexity with the loss of every block, and tasks with the outcome of every question.

perplexity     as the pruning papers compute it
prefix_cache   `PrefixCachedLM`: lm-eval's HFLM, with shared prompt beginnings read once
tasks          `evaluate_tasks`: lm-eval tasks, embedded or by name, and the level of guessing
"""

from pftools.evaluate.perplexity import PerplexityResult, perplexity
from pftools.evaluate.prefix_cache import PrefixCachedLM
from pftools.evaluate.tasks import TaskResults, evaluate_tasks, scores_as_json

__all__ = [
    "PerplexityResult",
    "PrefixCachedLM",
    "TaskResults",
    "evaluate_tasks",
    "perplexity",
    "scores_as_json",
]

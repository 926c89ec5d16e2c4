"""What a model is worth: perplexity with the loss of every block, and tasks with the outcome of every
question.

block_perplexity  `perplexity`, as the pruning papers compute it
held_out          a text that tells at once what a step did to the model
prefix_cache      `PrefixCachedLM`: lm-eval's HFLM, with shared prompt beginnings read once
tasks             `evaluate_tasks`: lm-eval tasks, embedded or by name, and the level of guessing
lm_eval_files     results as lm-eval's own output folder
task_names        which tasks there are, and whether one can be judged; without torch

The names below are loaded at first use, so that a plan can check task names without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pftools.evaluate.block_perplexity import (
        PerplexityResult,
        first_token,
        first_token_in_words,
        perplexity,
    )
    from pftools.evaluate.held_out import HeldOut, held_out_text
    from pftools.evaluate.lm_eval_files import export_results, read_samples, write_samples
    from pftools.evaluate.prefix_cache import PrefixCachedLM
    from pftools.evaluate.tasks import TaskResults, evaluate_tasks, scores_as_json, tasks_of

__all__ = [
    "HeldOut",
    "PerplexityResult",
    "PrefixCachedLM",
    "TaskResults",
    "evaluate_tasks",
    "export_results",
    "first_token",
    "first_token_in_words",
    "held_out_text",
    "perplexity",
    "read_samples",
    "scores_as_json",
    "tasks_of",
    "write_samples",
]
_MODULES = {
    "PerplexityResult": "block_perplexity",
    "perplexity": "block_perplexity",
    "first_token": "block_perplexity",
    "first_token_in_words": "block_perplexity",
    "export_results": "lm_eval_files",
    "read_samples": "lm_eval_files",
    "write_samples": "lm_eval_files",
    "HeldOut": "held_out",
    "held_out_text": "held_out",
    "PrefixCachedLM": "prefix_cache",
    "TaskResults": "tasks",
    "evaluate_tasks": "tasks",
    "scores_as_json": "tasks",
    "tasks_of": "tasks",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return globals()[name]

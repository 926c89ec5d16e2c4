"""Which differences between orderings are real: paired statistics on the same blocks and the same questions.

Two results are compared only at equal measured sparsity. Perplexities are compared block by block, accuracies
question by question, and p-values are corrected for the number of comparisons (Holm). With several seeds,
trainings and text are both samples, and verdicts are about orderings; with one, they are about two models.
What cannot be told apart is called so, with the difference that would have been seen. The answer of a study
is the set of entries that may be the best.

paired    two results: estimate, interval and p-value; what a number of blocks or questions can show
entries   the distinct results of a study, each once; which is best at which sparsity
pairs     every pair of entries at equal sparsity, by perplexity and by task
verdicts  the pairs in sentences
sets      which entries may be the best of a sparsity, by perplexity and by task

other_results  right and wrong answers that other programs wrote
other_losses   block losses of other programs, and those that come with pftools
"""

from pftools.compare.entries import (
    SPARSITY_TOLERANCE,
    best_entry,
    entries,
    geometric_mean,
    is_collapsed,
    sparsity_words,
)
from pftools.compare.paired import (
    ALPHA,
    Comparison,
    chance_interval,
    compare_accuracy,
    compare_perplexity,
    holm,
    smallest_visible_difference,
    smallest_visible_ratio,
)
from pftools.compare.pairs import compare_orderings, compare_tasks
from pftools.compare.sets import PERPLEXITY, BestSet, Spent, best_sets, decisions, set_in_words
from pftools.compare.verdicts import (
    p_in_words,
    perplexity_in_words,
    perplexity_verdict,
    ratio_in_words,
)

__all__ = [
    "ALPHA",
    "BestSet",
    "Comparison",
    "PERPLEXITY",
    "SPARSITY_TOLERANCE",
    "Spent",
    "best_entry",
    "best_sets",
    "chance_interval",
    "compare_accuracy",
    "compare_orderings",
    "compare_perplexity",
    "compare_tasks",
    "decisions",
    "entries",
    "geometric_mean",
    "holm",
    "is_collapsed",
    "p_in_words",
    "perplexity_in_words",
    "perplexity_verdict",
    "ratio_in_words",
    "set_in_words",
    "smallest_visible_difference",
    "smallest_visible_ratio",
    "sparsity_words",
]

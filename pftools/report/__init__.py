"""The report of a study: what `06_compare_orderings` shows, and the page that it becomes.

results    the finished results of a study, its entries, its pairs
published  the published numbers, for hollow marks
lineage    the runs behind a result, and what they took
answers    the headline and the verdicts, in Markdown
tuning     how learning rates were chosen
matrix     the verdicts as a matrix
tables     orderings, guessing, pairs by task, costs, steps
charts     perplexity, tasks, pairs, sparsity, costs
inside     which weights were pruned, what changed where
settings   what decided the numbers
live       charts made ready for a page
templates  the sheet that pages are written on
notebooks  executed notebooks as pages
page       the notebook as a page, with those of all steps beside it
"""

from pftools.report.answers import headline, told_apart, verdict_list
from pftools.report.charts import (
    cost_chart,
    perplexity_chart,
    perplexity_subtitle,
    published_chart,
    quality_chart,
    ratio_chart,
    sparsity_chart,
    task_charts,
)
from pftools.report.inside import layer_chart, layer_values, layers_of, overlap_matrix, weight_charts
from pftools.report.lineage import entry_costs
from pftools.report.matrix import verdict_matrix
from pftools.report.page import render
from pftools.report.published import lost_zeros, published_numbers
from pftools.report.results import (
    best_sets,
    entry_table,
    final_states,
    ordering_names,
    pair_table,
    study_results,
    task_names,
    task_pairs,
)
from pftools.report.settings import circumstances, settings_table
from pftools.report.tables import (
    cost_table,
    guessing_table,
    missing_table,
    result_table,
    step_table,
    training_table,
    visible_differences,
)
from pftools.report.tuning import tuning_chart, tuning_words

__all__ = [
    "best_sets",
    "circumstances",
    "cost_chart",
    "cost_table",
    "entry_costs",
    "entry_table",
    "final_states",
    "guessing_table",
    "headline",
    "layer_chart",
    "layer_values",
    "layers_of",
    "lost_zeros",
    "missing_table",
    "ordering_names",
    "overlap_matrix",
    "pair_table",
    "perplexity_chart",
    "perplexity_subtitle",
    "published_chart",
    "published_numbers",
    "quality_chart",
    "ratio_chart",
    "render",
    "result_table",
    "settings_table",
    "sparsity_chart",
    "step_table",
    "study_results",
    "task_charts",
    "task_names",
    "task_pairs",
    "told_apart",
    "tuning_chart",
    "tuning_words",
    "training_table",
    "verdict_list",
    "verdict_matrix",
    "visible_differences",
    "weight_charts",
]

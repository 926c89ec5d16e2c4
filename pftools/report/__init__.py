"""The report of a study: what `06_compare_orderings` shows, and the page that it becomes.

results    the finished results of a study, its entries, its pairs
answers    the headline and the verdicts, in Markdown
tables     orderings, guessing, pairs by task
charts     perplexity, tasks, pairs, sparsity
tuning     how learning rates were chosen
settings   what decided the numbers
page       the notebook as one HTML file
"""

from pftools.report.answers import headline, told_apart, verdict_list
from pftools.report.charts import (
    perplexity_chart,
    perplexity_subtitle,
    ratio_chart,
    sparsity_chart,
    task_charts,
)
from pftools.report.page import render
from pftools.report.results import (
    best_sets,
    entry_table,
    final_states,
    pair_table,
    study_results,
    task_names,
    task_pairs,
)
from pftools.report.settings import circumstances, settings_table
from pftools.report.tables import guessing_table, result_table, visible_differences
from pftools.report.tuning import tuning_chart, tuning_words

__all__ = [
    "best_sets",
    "circumstances",
    "entry_table",
    "final_states",
    "guessing_table",
    "headline",
    "pair_table",
    "perplexity_chart",
    "perplexity_subtitle",
    "ratio_chart",
    "render",
    "result_table",
    "settings_table",
    "sparsity_chart",
    "study_results",
    "task_charts",
    "task_names",
    "task_pairs",
    "told_apart",
    "tuning_chart",
    "tuning_words",
    "verdict_list",
    "visible_differences",
]

"""Every chart of the notebooks, the report and the README: tidy DataFrame in, altair chart out.

A chart is shown live where there is a script for it (JupyterLab, a report) and as SVG everywhere else,
with no network. One theme; an ordering has the same colour and shape in every chart.

theme       colours, scales, charts as files
labels      names at the ends of lines
layers      what is drawn layer by layer
training    the loss and the learning rate of a training
evaluation  one model's losses and accuracies
orderings   orderings beside each other
plans       an ordering as stairs, a plan as a tree
"""

from pftools.figures.evaluation import block_losses, task_scores
from pftools.figures.layers import (
    adapter_matrices,
    heat_map,
    lines_by_layer,
    output_error,
    score_histogram,
    score_slider,
    sparsity_by_layer,
)
from pftools.figures.orderings import (
    asked_and_measured,
    metric_chart,
    orderings_by_layer,
    pair_ratios,
    published_metric,
    quality_and_cost,
)
from pftools.figures.plans import ordering_chart, plan_chart
from pftools.figures.theme import (
    DARK,
    LIVE,
    ORDERING_COLOURS,
    as_svg,
    colours_of,
    drawn_on_both_grounds,
    light_or_dark,
    looks_of,
    save,
)
from pftools.figures.training import learning_rate_curve, loss_curve, tuning_curves

__all__ = [
    "DARK",
    "LIVE",
    "ORDERING_COLOURS",
    "adapter_matrices",
    "as_svg",
    "asked_and_measured",
    "block_losses",
    "colours_of",
    "drawn_on_both_grounds",
    "heat_map",
    "learning_rate_curve",
    "light_or_dark",
    "lines_by_layer",
    "looks_of",
    "loss_curve",
    "metric_chart",
    "ordering_chart",
    "output_error",
    "orderings_by_layer",
    "pair_ratios",
    "plan_chart",
    "published_metric",
    "quality_and_cost",
    "save",
    "score_histogram",
    "score_slider",
    "sparsity_by_layer",
    "task_scores",
    "tuning_curves",
]

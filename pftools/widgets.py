"""What moves in a notebook: the live loss of a training, and an explorer of orderings to steer by hand."""

from __future__ import annotations

import time
from html import escape
from typing import Any

import ipywidgets
import pandas as pd
from transformers import TrainerCallback

from pftools.errors import PftoolsError
from pftools.orderings import PUBLISHED, parse_ordering


class LiveLoss(TrainerCallback):
    """Draws the loss curve anew while a training runs, at most once a second, in one place under the cell.

    Give it to `finetune.finetune_model(callbacks=[LiveLoss()])`. Outside a notebook it does nothing.
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, float]] = []
        self._shown: Any = None
        self._drawn = 0.0

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        from IPython import get_ipython
        from IPython.display import display

        if get_ipython() is None or not logs or "loss" not in logs:
            return
        self._rows.append({"tokens": state.num_input_tokens_seen, "loss": float(logs["loss"])})
        if len(self._rows) < 2 or time.monotonic() - self._drawn < 1:
            return
        from pftools import figures

        self._drawn = time.monotonic()
        chart = figures.loss_curve(
            pd.DataFrame(self._rows), title=f"Training loss, step {state.global_step} of {state.max_steps}"
        )
        chart = chart.properties(height=180)
        if self._shown is None:
            self._shown = display(chart, display_id=True)
        else:
            self._shown.update(chart)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._shown is not None:
            from IPython.display import HTML

            self._shown.update(HTML(""))  # the finished curve follows in a cell of its own


def ordering_explorer(ordering: str = "iter_pf", sparsity: float = 0.5) -> ipywidgets.VBox:
    """A box to type an ordering into, a slider for the sparsity, and the steps that they stand for.

    Without a live kernel (in a rendered notebook) the first picture stays.
    """
    from IPython.display import SVG, display

    word = ipywidgets.Combobox(
        value=ordering,
        options=list(PUBLISHED),
        ensure_option=False,
        description="ordering",
        continuous_update=True,
    )
    target = ipywidgets.FloatSlider(
        value=sparsity, min=0, max=0.9, step=0.05, description="sparsity", readout_format=".0%"
    )
    schedule = ipywidgets.ToggleButtons(options=["linear", "cubic"], description="schedule")
    drawn, said = ipywidgets.Output(), ipywidgets.HTML()

    def draw(_: Any = None) -> None:
        try:
            steps = parse_ordering(word.value).steps(target.value, schedule=schedule.value)
        except PftoolsError as error:
            said.value = f"<span style='color:#b3541e'>{escape(str(error))}</span>"
            return
        said.value = f"<code>{' '.join(step.kind for step in steps) or 'no step: the model as it is'}</code>"
        drawn.clear_output(wait=True)
        with drawn:
            display(SVG(_stairs(steps)))

    for control in (word, target, schedule):
        control.observe(draw, "value")
    draw()
    return ipywidgets.VBox([word, target, schedule, said, drawn])


def _stairs(steps: tuple[Any, ...]) -> str:
    from pftools import figures

    return figures.as_svg(figures.ordering_chart(steps))

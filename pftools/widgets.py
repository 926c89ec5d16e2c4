"""What moves in a notebook: the live loss of a training, and an explorer of orderings to steer by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd
from transformers import TrainerCallback

if TYPE_CHECKING:
    pass


class LiveLoss(TrainerCallback):
    """Draws the loss curve anew at every logged step, in one place under the cell.

    Give it to `finetune.finetune_model(callbacks=[LiveLoss()])`. Outside a notebook it does nothing.
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, float]] = []
        self._shown: Any = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        from IPython import get_ipython
        from IPython.display import display

        if get_ipython() is None or not logs or "loss" not in logs:
            return
        self._rows.append({"tokens": state.global_step, "loss": float(logs["loss"])})
        if len(self._rows) < 2:
            return
        from pftools import figures

        chart = figures.loss_curve(pd.DataFrame(self._rows), title=f"Training loss, step {state.global_step} of {state.max_steps}")
        chart = chart.properties(height=180)
        if self._shown is None:
            self._shown = display(chart, display_id=True)
        else:
            self._shown.update(chart)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._shown is not None:
            from IPython.display import HTML

            self._shown.update(HTML(""))  # the finished curve follows in a cell of its own

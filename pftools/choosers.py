"""Widgets that are pictures where there is no kernel; one to choose rows of a table with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets
import pandas as pd

_ROWS = 6  # of a list that are seen without scrolling


class Pictured(ipywidgets.VBox):
    """Widgets beside each other, which a rendered notebook shows as they were, without a kernel."""

    def still(self) -> dict[str, Any]:
        """What is seen instead of the controls, by media type."""
        raise NotImplementedError

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        return {**super()._repr_mimebundle_(**options), **self.still()}


class Chooser(Pictured):
    """A control for each column to choose by, and the chart of the rows that are chosen.

    Args:
        table: the rows. A column with one value only gets no control.
        by: the columns. Of whole numbers without a gap, such as layers, a stretch is chosen; else any values.
        draw: makes a chart of the chosen rows; with ``values`` it is given one of them, too.
        values: columns of which one is drawn.

    Attributes:
        fields: {column: control}; with ``values``, also `value`.
        chart: what is drawn; None where there is nothing to draw.
    """

    def __init__(
        self,
        table: pd.DataFrame,
        *,
        by: Sequence[str],
        draw: Callable[..., Any],
        values: Sequence[str] = (),
    ) -> None:
        self._table, self._draw = table, draw
        self.fields: dict[str, Any] = {
            name: _control(name, table[name]) for name in by if table[name].nunique() > 1
        }
        if values:
            self.fields["value"] = ipywidgets.Dropdown(options=list(values), description="value")
        self.said, self._drawn = ipywidgets.HTML(), ipywidgets.Output()
        self.chart: Any = None
        for field in self.fields.values():
            field.observe(self._show, "value")
        super().__init__([ipywidgets.HBox(list(self.fields.values())), self.said, self._drawn])
        self._show()

    def rows(self) -> pd.DataFrame:
        """The rows that are chosen."""
        kept = pd.Series(True, index=self._table.index)
        for name, field in self.fields.items():
            if isinstance(field, ipywidgets.IntRangeSlider):
                kept &= self._table[name].between(*field.value)
            elif name != "value":
                kept &= self._table[name].isin(field.value)
        return self._table[kept]

    def _show(self, _: Any = None) -> None:
        from IPython.display import display

        rows = self.rows()
        value = [self.fields["value"].value] if "value" in self.fields else []
        self.chart = self._draw(rows, *value) if len(rows) else None
        told = f"{len(rows):,} of {len(self._table):,} rows"
        self.said.value = told if self.chart is not None else f"{told}: nothing to draw."
        self._drawn.clear_output(wait=True)
        with self._drawn:
            display(self.chart or "")

    def still(self) -> dict[str, Any]:
        """The chart."""
        return {} if self.chart is None else dict(self.chart._repr_mimebundle_()[0])


def _control(name: str, values: pd.Series) -> Any:
    found = sorted(values.unique().tolist()) if values.dtype.kind in "if" else values.unique().tolist()
    if values.dtype.kind == "i" and len(found) > 2 and found == list(range(found[0], found[-1] + 1)):
        return ipywidgets.IntRangeSlider(
            value=(found[0], found[-1]),
            min=found[0],
            max=found[-1],
            description=name,
            continuous_update=False,
        )
    return ipywidgets.SelectMultiple(
        options=found, value=tuple(found), rows=min(len(found), _ROWS), description=name
    )

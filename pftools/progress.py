"""How far a plan is: a bar in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(total: int, done: int, visible: bool) -> Iterator[Callable[..., None]]:
    """A bar of steps; yields `show(labels at work, advance=0)`."""
    if not visible:
        yield lambda labels, advance=0: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("steps"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns) as bars:
        task = bars.add_task("", total=total, completed=done)

        def show(labels: list[str], advance: int = 0) -> None:
            bars.update(task, advance=advance, description=" · ".join(labels))

        yield show

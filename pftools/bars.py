"""Progress bars inside of a step: in a notebook they are drawn, in batch their last state is kept in a file.

The process of the step reads that file, and writes what it says into the step's log. In a notebook that is
open, what is slow and has no bar, such as the reading of a model, is told by a clock (`watch_cells`).
"""

from __future__ import annotations

import contextvars
import os
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

from pftools import run_folder

LATEST = "progress.txt"  # the file in the folder of an attempt
_QUIET = 5.0  # seconds without a sign of life after which a cell gives one, again and again
_ended = threading.Event()  # of the cell that is executed
_drawn: weakref.WeakSet[Any] = weakref.WeakSet()  # bars that may be under way


def progress_bar(iterable: Any = None, **options: Any) -> Any:
    """A progress bar with the options of tqdm."""
    if attempt := os.environ.get(run_folder.ATTEMPT):
        from tqdm.std import tqdm as lines

        return lines(
            iterable,
            **{"file": _Latest(Path(attempt) / LATEST), "mininterval": 1.0, "ncols": 90, "ascii": " #"}
            | options,
        )
    from tqdm.auto import tqdm

    bar = tqdm(iterable, **options)
    _drawn.add(bar)
    return bar


class _Latest:
    """A file that holds only what was written to it last."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, text: str) -> None:
        if text.strip():
            with suppress(OSError):  # the attempt may have been taken over, or the disk be full
                self._path.write_text(text.strip() + "\n")

    def flush(self) -> None:
        pass


def latest(attempt: Path) -> str:
    """What the bar of an attempt says; empty where none was drawn yet."""
    try:
        return (attempt / LATEST).read_text().strip()
    except OSError:
        return ""


def watch_cells() -> None:
    """From the next cell on, let each cell of an open notebook show every few seconds that it is at work.

    Bars that are under way are drawn anew, so that their clocks move; where there is none, a line tells how
    long the cell has been at work.
    """
    from IPython import get_ipython

    shell = get_ipython()
    if shell is None or os.environ.get(run_folder.ATTEMPT):
        return
    shell.events.register("pre_run_cell", _before_a_cell)  # once, however often it is asked
    shell.events.register("post_run_cell", _after_a_cell)


def _before_a_cell(info: Any) -> None:
    global _ended
    _ended.set()
    _ended = threading.Event()
    # With the context of this cell, which says where output goes.
    beat = threading.Thread(target=contextvars.copy_context().run, args=(_beat, _ended), daemon=True)
    beat.start()


def _after_a_cell(result: Any) -> None:
    _ended.set()


def _beat(ended: threading.Event) -> None:
    """Signs of life until the cell has ended."""
    from IPython.display import display

    began, line = time.monotonic(), None
    while not ended.wait(_QUIET):
        bars = [bar for bar in list(_drawn) if not bar.disable]
        for bar in bars:
            bar.refresh()
        text = {"text/plain": f"at work for {time.monotonic() - began:.0f} s"}
        if line is not None:
            line.update(text, raw=True)
        elif not bars:
            line = display(text, raw=True, display_id=True)
    if line is not None:
        line.update({"text/plain": f"took {time.monotonic() - began:.0f} s"}, raw=True)

"""Progress bars inside of a step: in a notebook they are drawn, in batch their last state is kept in a file.

The process of the step reads that file, and writes what it says into the step's log.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from pftools import run_folder

LATEST = "progress.txt"  # the file in the folder of an attempt


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

    return tqdm(iterable, **options)


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

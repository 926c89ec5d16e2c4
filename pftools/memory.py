"""When memory runs out: the work goes on in smaller pieces, and the run tells which."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from pftools.errors import PftoolsError

if TYPE_CHECKING:
    import torch

_SIGNS = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_relieved: dict[str, int | None] = {}
Answer = TypeVar("Answer")


class OutOfMemory(PftoolsError):
    """Memory ran out; the sentence says what to lower.

    harmless: whether nothing was changed yet, so that the work may begin again with smaller batches.
    """

    harmless = False


def ran_out(error: BaseException) -> bool:
    """Whether an error is that of an allocator, of a GPU or of the CPU."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError, OutOfMemory)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def forget(error: BaseException) -> None:
    """Let go of what a failed attempt still holds: the tensors in the frames of its traceback."""
    import torch

    error.__traceback__ = error.__context__ = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def smaller(error: OutOfMemory, batch_size: int, *, of: str) -> int:
    """Half of a batch size, for work that begins again.

    Args:
        of: what is read in batches, for the record.

    Raises:
        OutOfMemory: ``error``, where it cannot begin again.
    """
    if not error.harmless or batch_size == 1:
        raise error
    forget(error)
    relieve(of, batch_size // 2)
    return batch_size // 2


def relieve(what: str, rows: int | None = None) -> None:
    """Say what was made smaller, and remember the smallest for the record of the run.

    Args:
        rows: how many of ``what`` are read at a time; None: ``what`` is the whole sentence.
    """
    before = _relieved.get(what)
    if what not in _relieved or (rows is not None and before is not None and rows < before):
        _relieved[what] = rows
        logging.getLogger(__name__).warning("memory ran out: %s", _in_words(what, rows))


def _in_words(what: str, rows: int | None) -> str:
    return what if rows is None else f"{what} were read {rows} at a time"


def relieved() -> list[str]:
    """What was made smaller since this was asked last."""
    found = [_in_words(what, rows) for what, rows in _relieved.items()]
    _relieved.clear()
    return found


def in_halves(
    work: Callable[[Any], list[Answer]], batch: Sequence[Any] | torch.Tensor, *, of: str
) -> list[Answer]:
    """``work`` on a batch; where memory runs out, on its halves, one after the other.

    Later batches of the same kind begin with what fitted.

    Args:
        work: gives one answer a row.
        batch: a list, or a tensor whose first dimension is rows.
        of: what the rows are read for, for the record.

    Raises:
        OutOfMemory: a single row does not fit.
    """
    most = _relieved.get(of) or len(batch)
    if most < len(batch):
        parts = (batch[start : start + most] for start in range(0, len(batch), most))
        return [answer for part in parts for answer in in_halves(work, part, of=of)]
    try:
        return work(batch)
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        forget(error)
    middle = len(batch) // 2
    if not middle:
        raise OutOfMemory(
            f"one row of {of} does not fit the device's memory: use a shorter one, a smaller model, "
            "placement 'stream', or device 'cpu'."
        )
    relieve(of, middle)
    return in_halves(work, batch[:middle], of=of) + in_halves(work, batch[middle:], of=of)

"""`Reader`: rows of tokens through a model, in batches that fit, after a beginning that is read once.

Nothing is taken for granted about the model. Before rows are read after a shared beginning, padded beside
longer ones, or in one batch, a few of them are compared with plain forwards of one row. Where they differ,
rows are read in the next surer way, and the reader says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from pftools.causal import check_causal, reading
from pftools.errors import PftoolsError
from pftools.evaluate.beginnings import Group, Row
from pftools.evaluate.forwards import Beginning, Forwards, alike_up_to, tolerance
from pftools.memory import OutOfMemory, in_halves, ran_out

# What bounds the memory of a forward: tokens read, bytes of keys and values (beginning + rest, over all
# rows), and logits kept. Fixed numbers, not what happens to be free: another batch would round differently.
_TOKENS_A_FORWARD = {"cpu": 4096, "cuda": 16_384}
_CACHE_BYTES = {"cpu": 2_000_000_000, "cuda": 4_000_000_000}
_LOGITS_BUDGET = 100_000_000
# Rows about which nothing is taken for granted: read from their first token, and without padding.
PLAIN = Beginning(pads=False)
# Rows whose replies are written without a cache, too: every new token reads all anew.
UNCACHED = Beginning(pads=False, caches=False)
# Rows of a group that are compared with plain forwards.
_COMPARED = 4
Answer = TypeVar("Answer")
Check = Callable[[Beginning, Group], float]


class _Differs(Exception):
    """Rows cannot be read after a shared beginning, or with padding; its message says why."""


class Reader:
    """Reads rows of tokens through a model.

    Args:
        rows_a_forward: rows a batch; None: as many as fit a bound on tokens, cached keys and logits.

    Attributes:
        tokens_read: prompt tokens that were read, checks included.
        shares: whether any beginning was shared.
        plain_because: why rows were read on their own, as a half-sentence; empty where that was not needed.
    """

    def __init__(
        self, model: PreTrainedModel, device: torch.device, rows_a_forward: int | None = None
    ) -> None:
        self.forwards = Forwards(model)
        self.device = device
        self.rows_a_forward = rows_a_forward
        self.tokens_read = 0
        self.shares = False
        self.plain_because = ""
        self._model = model
        self._config = model.config.get_text_config()
        self._dtype = model.dtype
        self._alike_up_to = alike_up_to(model.config)
        self._is_causal, self._only_plain, self._caches = False, False, True
        self._checked: dict[tuple[object, ...], int] = {}

    def beginning(self, group: Group, differs: Check, kind: str, new: int = 0) -> Beginning:
        """The beginning of a group, read; `PLAIN` or `UNCACHED` where its rows have to be read one by one.

        Groups come with the longest rows first, so that the check of the first one stands for the others.

        Args:
            differs: how far a row of the group, read after a beginning, is from a plain forward.
            kind: what ``differs`` checks, "likelihood" or "generation".
            new: tokens that may follow a row.

        Raises:
            PftoolsError: a row does not fit the memory, or the model's `generate` does not follow its
            forward.
        """
        self._check_model(group)
        writes, longest = kind == "generation", len(group.longest.tokens)
        if self._alike_up_to is not None and longest + new > self._alike_up_to:
            self._say(f"rows are longer than the original context of {self._alike_up_to} tokens")
            return UNCACHED if writes else PLAIN
        try:
            found = self._shared(group, differs, kind)
            return found or self._plain(group, differs, kind)
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            raise OutOfMemory(
                f"one prompt of {len(group.longest.tokens)} tokens does not fit the device's memory: use a "
                "smaller model, placement 'stream', or device 'cpu'."
            ) from None

    def _check_model(self, group: Group) -> None:
        if not self._is_causal:
            check_causal(self._model, torch.tensor(group.longest.tokens))
            self._is_causal = True

    def _shared(self, group: Group, differs: Check, kind: str) -> Beginning | None:
        """The beginning of a group, checked; None where it has none, or cannot be read after it."""
        pads = kind == "likelihood" and len({len(row.tokens) for row in group.rows}) > 1
        if self._only_plain or not (group.shared or pads):
            return None
        try:
            beginning = self._read(group)
            self._check(beginning, group, differs, kind)
        except _Differs as fault:
            self._only_plain = True
            self._say(str(fault))
            return None
        self.shares = self.shares or group.shared > 0
        return beginning

    def _plain(self, group: Group, differs: Check, kind: str) -> Beginning:
        """How rows are read from their first token: equally long ones in a batch, or one by one; replies with
        the model's cache, or without one."""
        found = PLAIN if kind == "likelihood" or self._caches else UNCACHED
        try:
            self._check(found, group, differs, kind)
            return found
        except _Differs as fault:
            self._say(str(fault))
            if kind == "generation" and found.caches:
                self._caches = False
            elif self.rows_a_forward != 1:
                self.rows_a_forward = 1
            else:
                raise PftoolsError(
                    f"this model's own generate does not follow its forward ({fault}): "
                    "choose tasks that it answers by choices."
                ) from None
        return self._plain(group, differs, kind)

    def _read(self, group: Group) -> Beginning:
        if not group.shared:
            return Beginning()
        self.tokens_read += group.shared
        beginning = self.forwards.read(group.rows[0].tokens[: group.shared], self.device)
        if beginning.cache is None:
            raise _Differs("the model returns no cache to go on from")
        return beginning

    def _check(self, beginning: Beginning, group: Group, differs: Check, kind: str) -> None:
        """Compare a few rows with plain forwards, unless rows of this length were before."""
        longest = len(group.longest.tokens)
        batches = self.batches(beginning, self.compared(beginning, group), None)
        together = max(map(len, batches)) > 1
        case = (kind, beginning.length > 0, beginning.pads, beginning.caches, together)
        if self._checked.get(case, 0) >= longest:
            return
        try:
            off = differs(beginning, group)
        except PftoolsError:
            raise
        except Exception as error:  # a model may do anything with a cache that it does not expect
            if ran_out(error):
                raise
            cause = (str(error).splitlines() or [""])[0]
            what = "go on from its cache" if beginning.caches else "write a reply"
            raise _Differs(f"the model does not {what}: {type(error).__name__}, {cause}") from None
        if off > tolerance(self._dtype):
            place = "beside longer rows" if beginning.pads else "in a batch"
            place = "with new tokens" if kind == "generation" else place
            place = "after a shared beginning" if beginning.length else place
            raise _Differs(f"{place}, a row differs from a plain forward by {off:.2g} of its spread")
        self._checked[case] = longest

    def _say(self, reason: str) -> None:
        if not self.plain_because:
            self.plain_because = reason
            logging.getLogger(__name__).warning("questions are read one by one: %s", reason)

    def compared(self, beginning: Beginning, group: Group) -> list[Row]:
        """A few rows that stand for a group.

        Where rows are padded to one length, short and long ones; else equally long ones, which are read in
        one batch, and the longest.
        """
        rows = sorted(group.rows, key=lambda row: -len(row.tokens))
        if beginning.pads:
            last = len(rows) - 1
            places = {round(place * last / max(1, _COMPARED - 1)) for place in range(_COMPARED)}
            return [rows[place] for place in sorted(places)]
        lengths = [len(row.tokens) for row in rows]
        often = max(lengths, key=lengths.count)
        found = [row for row in rows if len(row.tokens) == often][: _COMPARED - 1]
        return found if rows[0] in found else [rows[0], *found]

    def batches(
        self, beginning: Beginning, rows: list[Row], override_bs: int | None, new: int | None = None
    ) -> Iterator[list[Row]]:
        """Batches, the longest rows first.

        Rows are equally long where a reply follows or padding is not safe.
        """
        rows = sorted(rows, key=lambda row: -len(row.tokens))
        while rows:
            longest = len(rows[0].tokens)
            size = 1 if self.rows_a_forward == 1 else override_bs or self.rows_a_forward
            if not size:
                cached = beginning.length + (new or 0)
                size = self.rows_that_fit(longest - beginning.length, cached, rows[0].needed)
            if not beginning.pads or new is not None:
                size = min(size, sum(len(row.tokens) == longest for row in rows[:size]))
            yield rows[:size]
            rows = rows[size:]

    def rows_that_fit(self, rest: int, cached: int, needed: int) -> int:
        """Rows a forward, by tokens read, cached bytes and logits kept."""
        device = "cuda" if self.device.type == "cuda" else "cpu"
        read = _TOKENS_A_FORWARD[device] // rest
        kept = _CACHE_BYTES[device] // (self.bytes_a_token() * (cached + rest)) if cached else read
        vocabulary = self._setting("vocab_size", 32_000)
        return max(1, min(read, kept, _LOGITS_BUDGET // (needed * vocabulary)))

    def bytes_a_token(self) -> int:
        """Of its keys and values, in all layers; by a common layout where the configuration does not say."""
        heads = self._setting("num_attention_heads", 32)
        width = self._setting("head_dim", 0) or self._setting("hidden_size", 4096) // heads
        kept = self._setting("num_key_value_heads", 0) or heads
        return 2 * self._setting("num_hidden_layers", 32) * kept * width * self._dtype.itemsize

    def _setting(self, name: str, default: int) -> int:
        """A number of the model's configuration; ``default`` where it has none, or another for each layer."""
        try:
            value = getattr(self._config, name, None)
        except Exception:  # transformers refuses to name one number where layers differ
            return default
        return value if isinstance(value, int) else default

    def halving(
        self, work: Callable[[Beginning, list[Row]], list[Answer]], beginning: Beginning, batch: list[Row]
    ) -> list[Answer]:
        """``work`` on a batch; where the memory is too small for it, on its halves."""
        return in_halves(partial(work, beginning), batch, of="prompts")

    def last_logits(self, beginning: Beginning, batch: list[Row]) -> list[torch.Tensor]:
        """The logits that each row is asked for, float32 (row.needed, vocabulary)."""
        rests = [row.tokens[beginning.length :] for row in batch]
        width = max(map(len, rests))
        # Padding on the right: causal attention never looks at it, so no mask and no positions are needed.
        inputs = torch.tensor([rest + (0,) * (width - len(rest)) for rest in rests], device=self.device)
        # The head is applied at every position that any row of the batch asks for.
        ends = [(len(rest) - row.needed, len(rest)) for rest, row in zip(rests, batch)]
        wanted = sorted({position for start, stop in ends for position in range(start, stop)})
        column = {position: index for index, position in enumerate(wanted)}
        logits = self._forward(inputs, beginning, keep=torch.tensor(wanted, device=self.device))
        firsts = [column[start] for start, _ in ends]
        return [own[first : first + row.needed].float() for own, first, row in zip(logits, firsts, batch)]

    def _forward(self, inputs: torch.Tensor, beginning: Beginning, *, keep: torch.Tensor) -> torch.Tensor:
        self.tokens_read += inputs.numel()
        if beginning.cache is not None or beginning.pads:
            return self.forwards.logits(inputs, beginning.cache_for(len(inputs)), keep=keep)
        with reading(self._model, inputs.shape[1]):
            return self.forwards.logits(inputs, keep=keep)

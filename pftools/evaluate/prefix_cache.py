"""lm-eval's HFLM, with prompt beginnings that many questions share read once.

A few-shot question is some 700 tokens of examples and 70 of its own; HFLM reads all of it for every question. Here requests are sorted
by their tokens, runs with a long common beginning are found, that beginning is read once into the key/value cache, and only
the rests are read, in batches. Choices that are one token long are scored from one forward. The head, which is as wide as the
vocabulary, is applied only where a continuation stands. Greedy generation goes the same way.

The numbers are HFLM's: same tokens, same truncation, same sums; only rounding differs.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from tqdm.auto import tqdm
from transformers import DynamicCache

from pftools.errors import PftoolsError

# Reading a beginning on its own is one more forward, of a batch of one. It has to save at least this many tokens.
_WORTH_TOKENS = 512
# What bounds the memory of a forward: tokens read, bytes of keys and values (beginning + rest, over all rows), and logits kept. Fixed
# numbers, not what happens to be free: another batch would round differently.
_TOKENS_A_FORWARD = {"cpu": 4096, "cuda": 16_384}
_CACHE_BYTES = {"cpu": 2_000_000_000, "cuda": 4_000_000_000}
_LOGITS_BUDGET = 100_000_000
_STRINGS_A_BATCH = 512  # texts that the tokenizer is given at a time


@dataclass
class _Row:
    """One sequence to read, and the requests that are answered from it: (request's place, continuation tokens)."""

    tokens: tuple[int, ...]
    requests: list[tuple[int, list[int]]]

    @property
    def needed(self) -> int:
        """How many of the last positions have a logit that is asked for."""
        return max(len(continuation) for _, continuation in self.requests)


@dataclass
class _Prefix:
    """A beginning that has been read: its length, and a pair (keys, values) a layer, each (1, heads, tokens, head width)."""

    length: int = 0
    layers: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def cache(self, rows: int) -> DynamicCache:
        """The beginning as the past of a batch of so many rows."""
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self.layers):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
        return cache


class PrefixCachedLM(HFLM):
    """An lm-eval language model over a loaded transformers model: `PrefixCachedLM(pretrained=model, tokenizer=tokenizer)`.

    Give it to `lm_eval.simple_evaluate`. Generation that is not greedy is HFLM's own.

    Args:
        batch_size: rows a forward; "auto" (default): as many as fit a bound on tokens, cached keys and logits. A forward that runs
            out of memory is tried again in halves.
        progress: show progress bars.

    Attributes:
        tokens_asked: tokens that HFLM would have read. tokens_read: tokens that were read. truncated: prompts longer than the
            model's context, cut at their beginning.
    """

    def __init__(
        self, *args: Any, batch_size: int | str = "auto", progress: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(*args, batch_size=1 if batch_size == "auto" else batch_size, **kwargs)
        self.rows_a_forward = None if batch_size == "auto" else int(batch_size)
        self.progress = progress
        self.tokens_asked = self.tokens_read = self.truncated = 0
        # transformers renames the argument within version 5.
        names = inspect.signature(inspect.unwrap(type(self.model).forward)).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"
        self._keeps_some_logits = "logits_to_keep" in names

    # -----------------------------------------------------------------------------------------------------------------
    # Likelihoods

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As HFLM's; every text is given to the tokenizer once, in batches."""
        pairs = [request.args for request in requests]
        moved = [_move_spaces(context, continuation) for context, continuation in pairs]
        distinct = list(dict.fromkeys(context for context, _ in moved if context))
        contexts = dict(zip(distinct, self._encode(distinct)))
        wholes = self._encode([context + continuation for context, continuation in moved if context])
        tokenized = []
        for pair, (context, continuation) in zip(pairs, moved):
            if context:
                tokenized.append((pair, contexts[context], next(wholes)[len(contexts[context]) :]))
            else:
                tokens = self.tok_encode(continuation, add_special_tokens=False)
                begins = bool(tokens) and tokens[0] == self.prefix_token_id
                tokenized.append(
                    (pair, tokens[:1], tokens[1:]) if begins else (pair, [self.prefix_token_id], tokens)
                )
        return self._loglikelihood_tokens(tokenized, disable_tqdm=disable_tqdm)

    def _encode(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """The tokens of each text, as `tok_encode` gives them one by one."""
        bos = self.tokenizer.decode(self.prefix_token_id)
        plain = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
        for start in range(0, len(texts), _STRINGS_A_BATCH):
            batch = texts[start : start + _STRINGS_A_BATCH]
            begun = [has_bos_prefix(text, bos) for text in batch]
            encoded = {}
            for kind, options in ((False, plain), (True, {"add_special_tokens": False})):
                own = [text for text, has_bos in zip(batch, begun) if has_bos == kind]
                if own:
                    encoded[kind] = iter(
                        self.tokenizer(own, return_attention_mask=False, verbose=False, **options)[
                            "input_ids"
                        ]
                    )
            yield from (next(encoded[kind]) for kind in begun)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """As HFLM's: every text in disjoint windows of the model's context."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        owners, windows = [], []
        for place, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                owners.append(place)
                windows.append((None, *make_disjoint_window(window)))
        totals = [0.0] * len(requests)
        for place, (likelihood, _) in zip(
            owners, self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        ):
            totals[place] += likelihood
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool] | None] = [None] * len(requests)
        groups = _groups(self._rows(requests))
        with self._reading("log-likelihoods", len(requests), disable_tqdm) as bar:
            for length, rows in groups:
                prefix = self._read_prefix(rows[0].tokens[:length])
                for batch in self._batches(prefix, rows, override_bs):
                    for place, answer in self._halving(self._score, prefix, batch):
                        answers[place] = answer
                        if requests[place][0] is not None:  # rolling likelihoods have no key of their own
                            self.cache_hook.add_partial("loglikelihood", requests[place][0], answer)
                        bar.update()
        return answers

    def _rows(self, requests: Sequence[tuple[Any, list[int], list[int]]]) -> list[_Row]:
        """The distinct sequences to read, sorted by their tokens, so that common beginnings stand together."""
        by_tokens: dict[tuple[int, ...], _Row] = {}
        cut = set()
        for place, (_, context, continuation) in enumerate(requests):
            if not context or not continuation:
                raise PftoolsError(
                    "a request has an empty context or continuation: the task's doc_to_text or doc_to_choice is empty."
                )
            whole = context + continuation
            tokens = tuple(whole[-(self.max_length + 1) :][:-1])
            if len(whole) > self.max_length + 1:
                cut.add(tuple(context))
            if tokens not in by_tokens:
                self.tokens_asked += len(tokens)
            by_tokens.setdefault(tokens, _Row(tokens, [])).requests.append((place, continuation))
        self.truncated += len(cut)
        return [by_tokens[tokens] for tokens in sorted(by_tokens)]

    def _score(self, prefix: _Prefix, batch: list[_Row]) -> list[tuple[int, tuple[float, bool]]]:
        """(request's place, (log-likelihood, whether greedy)) of every request of a batch."""
        rests = [row.tokens[prefix.length :] for row in batch]
        width = max(map(len, rests))
        # Padding on the right: causal attention never looks at it, so neither a mask nor positions are needed.
        inputs = torch.tensor([rest + (0,) * (width - len(rest)) for rest in rests], device=self.device)
        # The head is applied at every position that any row of the batch asks for.
        wanted = sorted(
            {len(rest) - back for rest, row in zip(rests, batch) for back in range(1, row.needed + 1)}
        )
        column = {position: index for index, position in enumerate(wanted)}
        logits = self._forward(
            inputs,
            prefix.cache(len(batch)) if prefix.length else None,
            keep=torch.tensor(wanted, device=self.device),
        )
        self.tokens_read += inputs.numel()
        scored = []
        for index, (rest, row) in enumerate(zip(rests, batch)):
            first = column[len(rest) - row.needed]
            own = logits[index, first : first + row.needed].float()
            best, normal = own.argmax(dim=-1), own.logsumexp(dim=-1)
            for place, continuation in row.requests:
                tokens = torch.tensor(continuation, device=self.device)
                last = slice(row.needed - len(continuation), row.needed)
                likelihood = (own[last].gather(1, tokens[:, None])[:, 0] - normal[last]).sum()
                scored.append((place, torch.stack([likelihood, (best[last] == tokens).all().float()])))
        values = torch.stack([value for _, value in scored]).tolist()  # one wait for the device
        _refuse_nan(value for value, _ in values)
        return [(place, (value, bool(greedy))) for (place, _), (value, greedy) in zip(scored, values)]

    # -----------------------------------------------------------------------------------------------------------------
    # Generation

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """As HFLM's. Greedy requests share beginnings; others are HFLM's own."""
        replies: list[str | None] = [None] * len(requests)
        kinds: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            kinds.setdefault(repr(sorted(request.args[1].items())), []).append(place)
        for places in kinds.values():
            chosen = [requests[place] for place in places]
            options = normalize_gen_kwargs(chosen[0].args[1], self.max_gen_toks)
            until = handle_stop_sequences(
                options.pop("until", None), eos=self.tok_decode(self.eot_token_id, skip_special_tokens=False)
            )
            most = options.pop("max_gen_toks")
            greedy = not (
                options.pop("do_sample", False)
                or options.pop("temperature", 0.0)
                or options
                or self.think_end_token
            )
            if greedy:
                found = self._generate_greedily(
                    [request.args[0] for request in chosen], until, most, disable_tqdm
                )
            else:
                found = super().generate_until(chosen, disable_tqdm=disable_tqdm)
            for place, request, reply in zip(places, chosen, found):
                replies[place] = reply
                if greedy:
                    self.cache_hook.add_partial("generate_until", request.args, reply)
        return replies

    def _generate_greedily(
        self, contexts: list[str], until: list[str], most: int, disable_tqdm: bool
    ) -> list[str]:
        room = self.max_length - most
        if room < 1:
            raise PftoolsError(
                f"the task asks for {most} new tokens and the model's context is {self.max_length}: none is left for the question."
            )
        by_tokens: dict[tuple[int, ...], _Row] = {}
        for place, whole in enumerate(self._encode(contexts)):
            self.truncated += len(whole) > room
            tokens = tuple(whole[-room:])
            by_tokens.setdefault(tokens, _Row(tokens, [])).requests.append(
                (place, [0])
            )  # one logit, the last
        self.tokens_asked += sum(map(len, by_tokens))
        replies = [""] * len(contexts)
        with self._reading("answers", len(contexts), disable_tqdm) as bar:
            for length, rows in _groups([by_tokens[tokens] for tokens in sorted(by_tokens)]):
                prefix = self._read_prefix(rows[0].tokens[:length])
                for batch in self._batches(prefix, rows, None, new=most):
                    found = self._halving(
                        lambda prefix, batch: self._continue(prefix, batch, until, most), prefix, batch
                    )
                    for row, reply in found:
                        for place, _ in row.requests:
                            replies[place] = reply
                            bar.update()
        return replies

    def _continue(
        self, prefix: _Prefix, batch: list[_Row], until: list[str], most: int
    ) -> list[tuple[_Row, str]]:
        """The greedy reply of every row. Rows that have stopped leave the batch."""
        rests = [row.tokens[prefix.length :] for row in batch]
        width = max(map(len, rests))
        # Padding between the beginning and the rest: the ends stand in one column, where the new tokens follow.
        inputs = torch.tensor([(0,) * (width - len(rest)) + rest for rest in rests], device=self.device)
        mask = torch.tensor(
            [[1] * prefix.length + [0] * (width - len(rest)) + [1] * len(rest) for rest in rests],
            device=self.device,
        )
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, prefix.length :]
        cache = prefix.cache(len(batch))
        written: list[list[int]] = [[] for _ in batch]
        alive, ends = list(range(len(batch))), self._end_tokens()
        for _ in range(most):
            logits = self._forward(inputs, cache, keep=1, attention_mask=mask, position_ids=positions)[:, -1]
            self.tokens_read += inputs.numel()
            _refuse_nan(logits.amax(dim=-1).tolist())
            chosen = logits.argmax(dim=-1).tolist()
            kept = []
            for place, (row, token) in enumerate(zip(alive, chosen)):
                written[row].append(token)
                if token not in ends and not self._has_stopped(written[row], until):
                    kept.append(place)
            if not kept:
                break
            if len(kept) < len(alive):
                index = torch.tensor(kept, device=self.device)
                cache.batch_select_indices(index)
                mask, positions = mask[index], positions[index]
            alive = [alive[place] for place in kept]
            inputs = torch.tensor([[chosen[place]] for place in kept], device=self.device)
            mask = torch.cat([mask, mask.new_ones(len(kept), 1)], dim=1)
            positions = positions[:, -1:] + 1
        replies = [postprocess_generated_text(self.tok_decode(tokens), until, None) for tokens in written]
        return list(zip(batch, replies))

    def _has_stopped(self, tokens: list[int], until: list[str]) -> bool:
        text = self.tok_decode(tokens, skip_special_tokens=False)
        return any(stop and stop in text for stop in until)

    def _end_tokens(self) -> set[int]:
        """What ends a reply, as `generate` has it: the tokenizer's end, and those of the model's own generation settings."""
        more = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        return {self.eot_token_id, *(more if isinstance(more, list) else [more])} - {None}

    # -----------------------------------------------------------------------------------------------------------------
    # Forwards and batches

    @contextmanager
    def _reading(self, what: str, total: int, silent: bool) -> Iterator[tqdm]:
        """The model in evaluation, without gradients, under a progress bar; afterwards as it was."""
        training = self.model.training
        self.model.eval()
        try:
            with (
                torch.inference_mode(),
                tqdm(total=total, desc=what, unit="request", disable=silent or not self.progress) as bar,
            ):
                yield bar
        finally:
            self.model.train(training)

    def _read_prefix(self, tokens: tuple[int, ...]) -> _Prefix:
        if not tokens:
            return _Prefix()
        cache = DynamicCache()
        try:
            self._forward(torch.tensor([tokens], device=self.device), cache, keep=1)
        except torch.OutOfMemoryError:
            raise _too_long(tokens) from None
        self.tokens_read += len(tokens)
        return _Prefix(len(tokens), [(layer.keys, layer.values) for layer in cache.layers])

    def _forward(
        self, inputs: torch.Tensor, cache: DynamicCache | None, *, keep: int | torch.Tensor, **options: Any
    ) -> torch.Tensor:
        """Logits (rows, positions kept, vocabulary) at the last ``keep`` positions, or at those that it lists."""
        if cache is not None:
            options[self._cache_name] = cache
        if self._keeps_some_logits:
            options["logits_to_keep"] = keep
        logits = self.model(input_ids=inputs, use_cache=cache is not None, **options).logits
        if self._keeps_some_logits:
            return logits
        return logits[:, -keep:] if isinstance(keep, int) else logits[:, keep]

    def _batches(
        self, prefix: _Prefix, rows: list[_Row], override_bs: int | None, new: int = 0
    ) -> Iterator[list[_Row]]:
        """Even batches, the largest first."""
        rows = sorted(rows, key=lambda row: -len(row.tokens))
        while rows:
            size = (
                override_bs
                or self.rows_a_forward
                or self._rows_that_fit(
                    len(rows[0].tokens) - prefix.length, prefix.length + new, rows[0].needed
                )
            )
            yield rows[:size]
            rows = rows[size:]

    def _rows_that_fit(self, rest: int, cached: int, needed: int) -> int:
        device = "cuda" if self.device.type == "cuda" else "cpu"
        read = _TOKENS_A_FORWARD[device] // rest
        kept = _CACHE_BYTES[device] // (self._bytes_a_token() * (cached + rest)) if cached else read
        return max(
            1, min(read, kept, _LOGITS_BUDGET // (needed * getattr(self.config, "vocab_size", 32_000)))
        )

    def _bytes_a_token(self) -> int:
        """Of its keys and values, in all layers."""
        config = self.config
        heads = getattr(config, "num_attention_heads", 32)
        width = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 4096) // heads
        kept = getattr(config, "num_key_value_heads", None) or heads
        return 2 * getattr(config, "num_hidden_layers", 32) * kept * width * self.model.dtype.itemsize

    def _halving(self, work: Any, prefix: _Prefix, batch: list[_Row]) -> list[Any]:
        """``work`` on a batch; where the device's memory is too small for it, on its halves."""
        try:
            return work(prefix, batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise _too_long(batch[0].tokens) from None
        middle = len(batch) // 2
        return self._halving(work, prefix, batch[:middle]) + self._halving(work, prefix, batch[middle:])


def _too_long(tokens: tuple[int, ...]) -> PftoolsError:
    return PftoolsError(
        f"one prompt of {len(tokens)} tokens does not fit the device's memory: use a smaller model, or device 'cpu'."
    )


def _refuse_nan(values: Any) -> None:
    if any(value != value for value in values):
        raise PftoolsError(
            "the model returned NaN on a question: it is broken, or float16 overflows; try dtype float32."
        )


def _move_spaces(context: str, continuation: str) -> tuple[str, str]:
    """Spaces at the end of a context belong to the continuation's first token (as lm-eval has it)."""
    stripped = context.rstrip()
    return stripped, context[len(stripped) :] + continuation


def _groups(rows: list[_Row]) -> list[tuple[int, list[_Row]]]:
    """Sorted rows, cut into groups (common beginning in tokens, its rows) that save the most reading.

    The common beginnings of sorted sequences form a tree: every stretch of rows has one, and shorter stretches have longer ones. Each
    node saves its beginning for all rows but one; a node is taken whole if that saves more than its best parts together.
    Rows that no group is worth reading for stand together in a group without a beginning.
    """
    common = [_common(one.tokens, other.tokens) for one, other in zip(rows, rows[1:])]
    # The beginning must leave every row the positions whose logits are asked for.
    limit = [len(row.tokens) - row.needed for row in rows]
    chosen = _best_stretches(common, limit)
    taken = [False] * len(rows)
    groups = []
    for start, stop, prefix in chosen:
        groups.append((prefix, rows[start:stop]))
        taken[start:stop] = [True] * (stop - start)
    alone = [row for row, used in zip(rows, taken) if not used]
    return groups + ([(0, alone)] if alone else [])


def _best_stretches(common: list[int], limit: list[int]) -> list[tuple[int, int, int]]:
    """Disjoint (start, stop, prefix) with the largest total saving; a walk over the tree of common beginnings, bottom-up."""

    def close(
        start: int, stop: int, depth: int, parts: list[tuple[int, list]]
    ) -> tuple[int, list[tuple[int, int, int]]]:
        prefix = min(depth, *limit[start:stop])
        whole = prefix * (stop - start - 1) - _WORTH_TOKENS
        below = sum(saving for saving, _ in parts)
        if whole > max(below, 0):
            return whole, [(start, stop, prefix)]
        return below, [stretch for _, found in parts for stretch in found]

    # Open nodes, outermost first: [depth, first row, best of the finished nodes inside].
    stack: list[list[Any]] = [[0, 0, []]]
    for row, depth in enumerate([*common, 0], start=1):
        start, finished = row - 1, None
        while stack[-1][0] > depth:
            top_depth, start, parts = stack.pop()
            finished = close(start, row, top_depth, parts + ([finished] if finished else []))
        if stack[-1][0] < depth:
            stack.append([depth, start, [finished] if finished else []])
        elif finished:
            stack[-1][2].append(finished)
    return [stretch for _, found in stack[0][2] for stretch in found]


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """How many tokens two sequences begin with in common."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # slices compare fast, so the place of the first difference is halved in on
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low

"""lm-eval's HFLM, with prompt beginnings that many questions share read once.

A few-shot question is some 700 tokens of examples and 70 of its own; HFLM reads all of it for every question. Here requests are sorted
by their tokens, runs with a long common beginning are found, that beginning is read once into the key/value cache, and only
the rests are read, in batches. Choices that are one token long are scored from one forward. The head, which is as wide as the
vocabulary, is applied only where a continuation stands.

The numbers are HFLM's: same tokens, same truncation, same sums; only rounding differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import DynamicCache

from pftools.errors import PftoolsError

# Reading a beginning on its own is one more forward, of a batch of one. It has to save at least this many tokens.
_WORTH_TOKENS = 512
_TOKENS_A_FORWARD = 4096
_CACHED_TOKENS = 64_000  # key/value entries of an expanded batch: beginning + rest, over all its rows


@dataclass
class _Row:
    """One sequence to read, and the requests that are answered from it: (request's place, continuation tokens)."""

    tokens: tuple[int, ...]
    requests: list[tuple[int, list[int]]]

    @property
    def needed(self) -> int:
        """How many of the last positions have a logit that is asked for."""
        return max(len(continuation) for _, continuation in self.requests)


class PrefixCachedLM(HFLM):
    """An lm-eval language model over a loaded transformers model: `PrefixCachedLM(pretrained=model, tokenizer=tokenizer)`.

    Give it to `lm_eval.simple_evaluate`. Generation and rolling likelihoods are HFLM's own.

    Attributes:
        tokens_asked: tokens that HFLM would have read. tokens_read: tokens that were read. truncated: prompts longer than the
            model's context, cut at their beginning.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tokens_asked = self.tokens_read = self.truncated = 0

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool] | None] = [None] * len(requests)
        rows = self._rows(requests)
        was_training = self.model.training
        self.model.eval()
        with torch.inference_mode(), tqdm(total=len(requests), desc="log-likelihoods", unit="request", disable=disable_tqdm) as bar:
            for prefix, group in _groups(rows):
                for place, answer in self._score(prefix, group, override_bs):
                    answers[place] = answer
                    key = requests[place][0]
                    if key is not None:  # rolling likelihoods have no key of their own
                        self.cache_hook.add_partial("loglikelihood", key, answer)
                    bar.update(1)
        self.model.train(was_training)
        return answers

    def _rows(self, requests: Sequence[tuple[Any, list[int], list[int]]]) -> list[_Row]:
        """The distinct sequences to read, sorted by their tokens, so that common beginnings stand together."""
        by_tokens: dict[tuple[int, ...], _Row] = {}
        for place, (_, context, continuation) in enumerate(requests):
            if not context or not continuation:
                raise PftoolsError("a request has an empty context or continuation: the task's doc_to_text or doc_to_choice is empty.")
            whole = context + continuation
            self.truncated += len(whole) > self.max_length + 1
            tokens = tuple(whole[-(self.max_length + 1) :][:-1])
            self.tokens_asked += len(tokens)
            by_tokens.setdefault(tokens, _Row(tokens, [])).requests.append((place, continuation))
        return [by_tokens[tokens] for tokens in sorted(by_tokens)]

    def _score(self, prefix: int, rows: list[_Row], override_bs: int | None) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Answers of rows that share their first ``prefix`` tokens (none: 0)."""
        shared = self._read_prefix(rows[0].tokens[:prefix]) if prefix else None
        rows = sorted(rows, key=lambda row: -len(row.tokens))  # even batches; the largest first
        while rows:
            size = self._batch_rows(prefix, len(rows[0].tokens) - prefix, override_bs)
            batch, rows = rows[:size], rows[size:]
            yield from self._score_batch(prefix, shared, batch)

    def _batch_rows(self, prefix: int, rest: int, override_bs: int | None) -> int:
        wanted = override_bs or self.batch_size
        if isinstance(wanted, int) and wanted > 1 and not prefix:
            return wanted
        rows = min(_TOKENS_A_FORWARD // rest, _CACHED_TOKENS // (prefix + rest))
        return max(rows, wanted if isinstance(wanted, int) else 1, 1) if not prefix else max(rows, 1)

    def _read_prefix(self, tokens: tuple[int, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of a beginning, a pair a layer, each (1, heads, tokens, head width)."""
        cache = DynamicCache()
        self.model(input_ids=torch.tensor([tokens], device=self.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.tokens_read += len(tokens)
        return [(layer.keys, layer.values) for layer in cache.layers]

    def _score_batch(
        self, prefix: int, shared: list[tuple[torch.Tensor, torch.Tensor]] | None, batch: list[_Row]
    ) -> Iterator[tuple[int, tuple[float, bool]]]:
        rests = [row.tokens[prefix:] for row in batch]
        width = max(map(len, rests))
        # Padding on the right: causal attention never looks at it, so neither a mask nor positions are needed.
        inputs = torch.tensor([rest + (0,) * (width - len(rest)) for rest in rests], device=self.device)
        # The head is applied at every position that any row of the batch asks for.
        wanted = sorted({len(rest) - back for rest, row in zip(rests, batch) for back in range(1, row.needed + 1)})
        column = {position: index for index, position in enumerate(wanted)}
        options: dict[str, Any] = {"use_cache": False}
        if shared is not None:
            cache = DynamicCache()
            for layer, (keys, values) in enumerate(shared):
                cache.update(keys.expand(len(batch), -1, -1, -1), values.expand(len(batch), -1, -1, -1), layer)
            options = {"use_cache": True, "past_key_values": cache}
        logits = self.model(input_ids=inputs, logits_to_keep=torch.tensor(wanted, device=self.device), **options).logits
        self.tokens_read += inputs.numel()
        for index, (rest, row) in enumerate(zip(rests, batch)):
            columns = [column[position] for position in range(len(rest) - row.needed, len(rest))]
            scores = F.log_softmax(logits[index, columns], dim=-1, dtype=self.softmax_dtype or torch.float32)
            if torch.isnan(scores).any():
                raise PftoolsError("the model returned NaN on a question: it is broken, or float16 overflows; try dtype float32.")
            best = scores.argmax(dim=-1)
            for place, continuation in row.requests:
                tokens = torch.tensor(continuation, device=self.device)
                own = scores[-len(continuation) :]
                total = own.gather(1, tokens[:, None]).sum()
                yield place, (float(total), bool((best[-len(continuation) :] == tokens).all()))


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

    def close(start: int, stop: int, depth: int, parts: list[tuple[int, list]]) -> tuple[int, list[tuple[int, int, int]]]:
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

"""`PrefixCachedLM`: lm-eval's HFLM, with prompt beginnings that many questions share read once.

A few-shot question is some 700 tokens of examples and 70 of its own; HFLM reads all of it for every question.
Here a beginning that is worth it (`beginnings`) is read once into the model's own cache (`forwards`), and
only the rests are read, in batches. Choices that are one token long are scored from one forward. The head,
which is as wide as the vocabulary, is applied only where a continuation stands. Greedy replies are the
model's own `generate`, on that cache.

The numbers are HFLM's: same tokens, same truncation, same sums; only rounding differs. Before a beginning is
shared, a few rows are compared with plain forwards. Where they differ, rows are read from their first token,
without padding; and one by one where even a batch changes what is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.models.utils_hf import stop_sequences_criteria
from transformers import LogitsProcessorList

from pftools.bars import progress_bar
from pftools.errors import PftoolsError
from pftools.evaluate.beginnings import Group, Row, group_rows
from pftools.evaluate.forwards import Beginning, difference
from pftools.evaluate.reader import PLAIN, Reader

_STRINGS_A_BATCH = 512  # texts that the tokenizer is given at a time
# What is compared of a row with a plain forward: its last positions, and so many new tokens.
_POSITIONS, _NEW = 64, 8


class PrefixCachedLM(HFLM):
    """An lm-eval language model over a loaded transformers model.

    `PrefixCachedLM(pretrained=model, tokenizer=tokenizer)` is given to `lm_eval.simple_evaluate`. Generation
    that is not greedy is HFLM's own.

    Args:
        batch_size: rows a forward; "auto" (default): as many as fit a bound on tokens, cached keys and
            logits. A forward that runs out of memory is tried again in halves.
        progress: show progress bars.

    Attributes:
        tokens_asked: prompt tokens that HFLM would have read.
        truncated: prompts longer than the model's context, cut at their beginning.
        reader: counts the tokens that were read, and knows why beginnings were not shared.
    """

    def __init__(
        self, *args: Any, batch_size: int | str = "auto", progress: bool = True, **kwargs: Any
    ) -> None:
        kwargs.setdefault("backend", "causal")  # HFLM takes some multimodal models for encoder-decoders
        super().__init__(*args, batch_size=1 if batch_size == "auto" else batch_size, **kwargs)
        self.progress = progress
        self.reader = Reader(self.model, self.device, None if batch_size == "auto" else int(batch_size))
        self.tokens_asked = self.truncated = 0
        _refuse_endings(self.tokenizer)

    @property
    def tokens_read(self) -> int:
        """Prompt tokens that were read, those of checks included."""
        return self.reader.tokens_read

    def shared_beginnings(self) -> dict[str, str]:
        """For a run's record: {"shared_beginnings": "shared" or "plain", "reason": why not}."""
        if self.reader.shares:
            return {"shared_beginnings": "shared", "reason": self.reader.plain_because}
        reason = self.reader.plain_because or "no beginning is long and common enough to be worth it"
        return {"shared_beginnings": "plain", "reason": reason}

    # ------------------------------------------------------------------------------------------------------
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
        answers: dict[int, tuple[float, bool]] = {}
        groups = group_rows(self._rows(requests))
        with self._reading("log-likelihoods", len(requests), disable_tqdm) as bar:
            for group in sorted(groups, key=lambda group: -len(group.longest.tokens)):
                beginning = self.reader.beginning(group, self._scoring_differs, "likelihood")
                for batch in self.reader.batches(beginning, group.rows, override_bs):
                    for place, answer in self.reader.halving(self._score, beginning, batch):
                        answers[place] = answer
                        if requests[place][0] is not None:  # rolling likelihoods have no key of their own
                            self.cache_hook.add_partial("loglikelihood", requests[place][0], answer)
                        bar.update()
        return [answers[place] for place in range(len(requests))]

    def _rows(self, requests: Sequence[tuple[Any, list[int], list[int]]]) -> list[Row]:
        """The distinct sequences to read.

        Requests with the same one, such as choices of one token, share it.
        """
        by_tokens: dict[tuple[int, ...], Row] = {}
        cut = set()
        for place, (_, context, continuation) in enumerate(requests):
            if not context or not continuation:
                raise PftoolsError(
                    "a request has an empty context or continuation: the task's doc_to_text or doc_to_choice "
                    "is empty."
                )
            if len(continuation) > self.max_length:
                raise PftoolsError(
                    f"an answer of {len(continuation)} tokens is longer than the model's context of "
                    f"{self.max_length}: use a model with a longer context."
                )
            whole = context + continuation
            tokens = tuple(whole[-(self.max_length + 1) :][:-1])
            if len(whole) > self.max_length + 1:
                cut.add(tuple(context))
            if tokens not in by_tokens:
                self.tokens_asked += len(tokens)
            by_tokens.setdefault(tokens, Row(tokens, [])).requests.append((place, continuation))
        self.truncated += len(cut)
        return list(by_tokens.values())

    def _score(self, beginning: Beginning, batch: list[Row]) -> list[tuple[int, tuple[float, bool]]]:
        """(request's place, (log-likelihood, whether greedy)) of every request of a batch."""
        scored = []
        for row, logits in zip(batch, self.reader.last_logits(beginning, batch)):
            best, normal = logits.argmax(dim=-1), logits.logsumexp(dim=-1)
            for place, continuation in row.requests:
                tokens = torch.tensor(continuation, device=self.device)
                last = slice(row.needed - len(continuation), row.needed)
                likelihood = (logits[last].gather(1, tokens[:, None])[:, 0] - normal[last]).sum()
                scored.append((place, torch.stack([likelihood, (best[last] == tokens).all().float()])))
        values = torch.stack([value for _, value in scored]).tolist()  # one wait for the device
        if any(value != value for value, _ in values):
            raise _not_a_number()
        return [(place, (value, bool(greedy))) for (place, _), (value, greedy) in zip(scored, values)]

    def _scoring_differs(self, beginning: Beginning, group: Group) -> float:
        """How far a few rows of a group are from plain forwards, at all of their last positions."""
        off = 0.0
        rows = [
            Row(row.tokens, [(0, [0] * min(_POSITIONS, len(row.tokens) - beginning.length))])
            for row in self.reader.compared(beginning, group)
        ]
        for batch in self.reader.batches(beginning, rows, None):
            if beginning == PLAIN and len(batch) == 1:
                continue  # that is the plain forward
            together = self.reader.halving(self.reader.last_logits, beginning, batch)
            apart = [self.reader.last_logits(PLAIN, [row])[0] for row in batch]
            off = max(off, *(difference(one, other) for one, other in zip(together, apart)))
        return off

    # ------------------------------------------------------------------------------------------------------
    # Generation

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """As HFLM's. Greedy requests share beginnings; others are HFLM's own."""
        replies: dict[int, str] = {}
        kinds: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            kinds.setdefault(repr(sorted(request.args[1].items())), []).append(place)
        for places in kinds.values():
            chosen = [requests[place] for place in places]
            options = normalize_gen_kwargs(chosen[0].args[1], self.max_gen_toks)
            until, most = options.pop("until", None), options.pop("max_gen_toks")
            sampled = options.pop("do_sample", False) or options.pop("temperature", 0.0)
            if sampled or options or self.think_end_token:
                found = super().generate_until(chosen, disable_tqdm=disable_tqdm)
            else:
                until = handle_stop_sequences(
                    until, eos=self.tok_decode(self.eot_token_id, skip_special_tokens=False)
                )
                found = self._generate_greedily(
                    [request.args[0] for request in chosen], until, most, disable_tqdm
                )
                for request, reply in zip(chosen, found):
                    self.cache_hook.add_partial("generate_until", request.args, reply)
            replies |= dict(zip(places, found))
        return [replies[place] for place in range(len(requests))]

    def _generate_greedily(
        self, contexts: list[str], until: list[str], most: int, disable_tqdm: bool
    ) -> list[str]:
        room = self.max_length - most
        if room < 1:
            raise PftoolsError(
                f"the task asks for {most} new tokens and the model's context is {self.max_length}: "
                "none is left for the question."
            )
        by_tokens: dict[tuple[int, ...], Row] = {}
        for place, whole in enumerate(self._encode(contexts)):
            self.truncated += len(whole) > room
            row = by_tokens.setdefault(tuple(whole[-room:]), Row(tuple(whole[-room:]), []))
            row.requests.append((place, [0]))  # one logit, the last
        self.tokens_asked += sum(map(len, by_tokens))
        replies: dict[int, str] = {}

        def reply(beginning: Beginning, batch: list[Row]) -> list[str]:
            return self._reply(beginning, batch, until, most)

        def differs(beginning: Beginning, group: Group) -> float:
            return self._generation_differs(beginning, group, most)

        with self._reading("answers", len(contexts), disable_tqdm) as bar:
            groups = group_rows(list(by_tokens.values()))
            for group in sorted(groups, key=lambda group: -len(group.longest.tokens)):
                beginning = self.reader.beginning(group, differs, "generation", new=most)
                for batch in self.reader.batches(beginning, group.rows, None, new=most):
                    for row, text in zip(batch, self.reader.halving(reply, beginning, batch)):
                        replies |= {place: text for place, _ in row.requests}
                        bar.update(len(row.requests))
        return [replies[place] for place in range(len(contexts))]

    def _reply(self, beginning: Beginning, batch: list[Row], until: list[str], most: int) -> list[str]:
        """The greedy replies to rows that are equally long."""
        length = len(batch[0].tokens)
        written = self._generate(beginning, batch, until, most)[:, length:].tolist()
        return [postprocess_generated_text(self.tok_decode(tokens), until, None) for tokens in written]

    def _generate(
        self, beginning: Beginning, batch: list[Row], until: list[str], most: int, **options: Any
    ) -> Any:
        """The model's own `generate`. No row is padded, so that positions and cache slots are true."""
        inputs = torch.tensor([row.tokens for row in batch], device=self.device)
        rows, length = inputs.shape
        self.reader.tokens_read += rows * (length - beginning.length)
        cache = beginning.cache_for(rows)
        if cache is not None and self.reader.forwards.cache_name:
            options[self.reader.forwards.cache_name] = cache
        return self.model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_length=length + most,
            do_sample=False,
            use_cache=beginning.caches,
            pad_token_id=self.tokenizer.pad_token_id,
            stopping_criteria=stop_sequences_criteria(self.tokenizer, until, length, rows),
            logits_processor=LogitsProcessorList([_refuse_nan]),
            **options,
        )

    def _generation_differs(self, beginning: Beginning, group: Group, most: int) -> float:
        """How far the logits of a few new tokens after a few rows of a group are from plain forwards."""
        rows, new = self.reader.compared(beginning, group), min(most, _NEW if beginning.caches else 2)
        options = {"min_new_tokens": new, "output_logits": True, "return_dict_in_generate": True}
        off = 0.0
        for batch in self.reader.batches(beginning, rows, None, new=new):
            written = self._generate(beginning, batch, [], new, **options)
            for tokens, own in zip(written.sequences.tolist(), torch.stack(written.logits, dim=1)):
                off = max(off, difference(own, self._plain_logits(tokens[:-1], new, beginning.caches)))
        return off

    def _plain_logits(self, tokens: list[int], last: int, at_once: bool) -> torch.Tensor:
        """Logits at the last positions, (last, vocabulary).

        At once, or by a forward for each of them: in some models what follows a token changes how it is read.
        """
        if at_once:
            return self.reader.last_logits(PLAIN, [Row(tuple(tokens), [(0, [0] * last)])])[0]
        ends = range(len(tokens) - last + 1, len(tokens) + 1)
        rows = [Row(tuple(tokens[:end]), [(0, [0])]) for end in ends]
        return torch.cat([self.reader.last_logits(PLAIN, [row])[0] for row in rows])

    # ------------------------------------------------------------------------------------------------------
    # Forwards and batches

    @contextmanager
    def _reading(self, what: str, total: int, silent: bool) -> Iterator[Any]:
        """The model in evaluation, without gradients, under a progress bar; afterwards as it was."""
        training = self.model.training
        self.model.eval()
        try:
            with (
                torch.inference_mode(),
                progress_bar(
                    total=total, desc=what, unit="request", disable=silent or not self.progress
                ) as bar,
            ):
                yield bar
        finally:
            self.model.train(training)


def _refuse_endings(tokenizer: Any) -> None:
    """Refuse a tokenizer that ends every text with a special token: it would stand before an answer."""
    tokens = tokenizer("a")["input_ids"]
    if len(tokens) > 1 and tokens[-1] in tokenizer.all_special_ids:
        raise PftoolsError(
            f"the tokenizer ends every text with {tokenizer.decode(tokens[-1:])!r}, which would stand "
            "between a question and its answer: set add_eos_token to false in its tokenizer_config.json."
        )


def _not_a_number() -> PftoolsError:
    return PftoolsError(
        "the model returned NaN on a question: it is broken, or float16 overflows; try dtype float32."
    )


def _refuse_nan(tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """A logits processor that stops where a model breaks."""
    if torch.isnan(logits).any():
        raise _not_a_number()
    return logits


def _move_spaces(context: str, continuation: str) -> tuple[str, str]:
    """Spaces at the end of a context belong to the continuation's first token (as lm-eval has it)."""
    stripped = context.rstrip()
    return stripped, context[len(stripped) :] + continuation

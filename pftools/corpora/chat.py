"""Conversations as training text: read from rows, written by the model's own chat template.

A row is a conversation when it has one of these sets of columns:

- `messages`: a list of {"role", "content"}, with what else the template reads (`tool_calls`); in a table,
  the same list as JSON.
- `prompt` and `completion`.
- `instruction` and `output` (or `response`), with an optional `input` that follows the instruction.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pftools.errors import PftoolsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
_ANSWERS = {"completion": "prompt", "output": "instruction", "response": "instruction"}  # {answer: question}


class Conversation(str):
    """A document of a corpus that is a conversation: its messages as JSON."""

    @property
    def messages(self) -> list[Message]:
        return list(json.loads(self))


def are_conversations(rows: list[dict[str, Any]]) -> bool:
    """Whether rows hold conversations; a column `text` makes them plain documents."""
    columns = set(rows[0]) if rows else set()
    pairs = any({answer, question} <= columns for answer, question in _ANSWERS.items())
    return "text" not in columns and ("messages" in columns or pairs)


def conversations_of(rows: list[dict[str, Any]], place: str) -> list[Conversation]:
    """The conversation of every row.

    Raises:
        PftoolsError: a row without messages, or without an answer, or a message without a role or text.
    """
    return [_conversation(row, f"{place}, row {number}") for number, row in enumerate(rows, 1)]


def _conversation(row: dict[str, Any], place: str) -> Conversation:
    messages = _messages(row, place) if "messages" in row else _pair(row, place)
    messages = [_message(found, f"{place}, message {number}") for number, found in enumerate(messages, 1)]
    if not any(message["role"] == "assistant" for message in messages):
        raise PftoolsError(
            f"{place} has no message of the role 'assistant', so there is nothing to learn from: remove the "
            "row."
        )
    return Conversation(json.dumps(messages))


def _message(found: Any, place: str) -> Message:
    """A message with all that it says; of a table, what other rows have and this one lacks is left out."""
    message = (
        {key: value for key, value in found.items() if value is not None} if isinstance(found, dict) else {}
    )
    if message.get("tool_calls"):
        message.setdefault("content", "")
    if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
        raise PftoolsError(
            f'{place}, is no message: it should be {{"role": "user", "content": "..."}}, with text in both.'
        )
    if message["role"] == "assistant" and not message["content"].strip() and not message.get("tool_calls"):
        raise PftoolsError(f"{place}, is an empty answer, of which nothing can be learnt: remove the row.")
    return message


def _messages(row: dict[str, Any], place: str) -> list[Any]:
    found = row["messages"]
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except ValueError:
            raise PftoolsError(f"{place} has messages that are not JSON: give a list of messages.") from None
    if not isinstance(found, list) or not found:
        raise PftoolsError(f"{place} has no messages: give a list of at least a question and an answer.")
    return found


def _pair(row: dict[str, Any], place: str) -> list[Any]:
    answer = next((name for name in _ANSWERS if name in row and _ANSWERS[name] in row), None)
    if answer is None:
        raise PftoolsError(f"{place} has neither messages nor an instruction with its output.")
    question, more = row[_ANSWERS[answer]], row.get("input") or ""
    content = f"{question}\n\n{more}" if more and _ANSWERS[answer] == "instruction" else question
    return [{"role": "user", "content": content}, {"role": "assistant", "content": row[answer]}]


def tokens_of(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> tuple[list[int], list[bool]]:
    """The tokens of a conversation by the model's chat template, and which of them are answers.

    An answer is what the template adds to its own prompt for one, up to the next message: the text and the
    end of the turn, without the header that says whose turn it is. A token is part of an answer when one of
    its letters is, as in transformers' own mask.

    Raises:
        PftoolsError: the model has no chat template, or one that refuses the conversation or does not show
            where its answers are.
    """
    need_template(tokenizer, and_="the corpus holds conversations", otherwise="rows with a column 'text'")
    if not tokenizer.is_fast:
        raise PftoolsError(
            f"{type(tokenizer).__name__} does not say which letters a token stands for, so answers cannot "
            "be told from questions: give a model with a fast tokenizer (tokenizer.json)."
        )
    messages = conversation.messages
    text = _applied(tokenizer, messages)
    answers = [
        _span(tokenizer, messages, place, text)
        for place, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    is_answer = [any(start < b and end > a for a, b in answers) for start, end in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), is_answer


def need_template(tokenizer: PreTrainedTokenizerBase, *, and_: str = "", otherwise: str) -> None:
    """Refuse a model without a chat template.

    Args:
        and_: why it needs one, where nobody has asked for it.
        otherwise: what to give instead of another model.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise PftoolsError(
            f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template"
            f"{and_ and f', and {and_}'}: give a model with one (an instruct model), or {otherwise}."
        )


_MARK = "\ue000an answer\ue001"  # stands in for an answer; letters that no text has


def _span(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], place: int, text: str
) -> tuple[int, int]:
    """Where the answer at a place of a conversation begins and ends in its text.

    Most templates write the messages one after the other, so an answer lies between the prompt for it and
    the conversation up to it. Some change what they wrote when another message follows (they drop what a
    model was thinking), or have no prompt: there the answer is where a mark in its place would stand.
    """
    until = _applied(tokenizer, messages[: place + 1])
    asked = _applied(tokenizer, messages[:place]) if place else ""
    prompt = _applied(tokenizer, messages[:place], add_generation_prompt=True) if place else ""
    if prompt != asked and until.startswith(prompt) and text.startswith(until):
        return len(prompt), len(until)
    marked = [*messages[:place], {**messages[place], "content": _MARK}, *messages[place + 1 :]]
    before, mark, after = _applied(tokenizer, marked).partition(_MARK)
    end_of_turn = _applied(tokenizer, marked[: place + 1]).partition(_MARK)[2]
    begin = len(prompt) if prompt != asked and text.startswith(prompt) else len(before)
    end = len(text) - len(after)
    if not (mark and begin <= end and text.startswith(before[:begin]) and text.endswith(after)):
        raise PftoolsError(
            f"the model's chat template does not show where message {place + 1} of {len(messages)} is in "
            f"{_shown(messages)}, so its answer cannot be told from the rest: give conversations of one "
            "question and one answer each, or a model with another template."
        )
    return begin, end + (len(end_of_turn) if after.startswith(end_of_turn) else 0)


def _applied(tokenizer: PreTrainedTokenizerBase, messages: list[Message], **options: Any) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:  # a template is foreign code, and says itself what it does not take
        cause = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise PftoolsError(
            f"the model's chat template refuses a conversation: {cause}, in {_shown(messages)}: change or "
            "remove the row, or give a model whose template takes it."
        ) from None


def _shown(messages: list[Message]) -> str:
    """A conversation in a few words, for a message."""
    roles = ", ".join(message["role"] for message in messages[:4])
    more = ", ..." if len(messages) > 4 else ""
    return f"the one that begins {messages[0]['content'][:40]!r} ({roles}{more})"

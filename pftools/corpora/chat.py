"""Conversations as training text: read from rows, written by the model's own chat template.

A row is a conversation when it has one of these sets of columns:

- `messages`: a list of {"role", "content"}; in a table, the same list as JSON.
- `prompt` and `completion`.
- `instruction` and `output` (or `response`), with an optional `input` that follows the instruction.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pftools.errors import PftoolsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
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
    for number, message in enumerate(messages, 1):
        known = isinstance(message, dict) and isinstance(message.get("role"), str)
        if not known or not isinstance(message.get("content"), str):
            raise PftoolsError(
                f"{place}, message {number}, is no message: it should be "
                '{"role": "user", "content": "..."}, with text in both.'
            )
    if not any(message["role"] == "assistant" for message in messages):
        raise PftoolsError(f"{place} has no message of the role 'assistant': there is nothing to learn from.")
    return Conversation(json.dumps([{name: m[name] for name in ("role", "content")} for m in messages]))


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

    An answer is what the template adds to the conversation before it, up to the next message: the text and
    the end of the turn, without the header that says whose turn it is. A token is part of an answer when it
    begins inside it.

    Raises:
        PftoolsError: the model has no chat template, or one that writes earlier turns differently when
            another follows.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise PftoolsError(
            f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template, and the corpus "
            "holds conversations: give a model with one (an instruct model), or rows with a column 'text'."
        )
    if not tokenizer.is_fast:
        raise PftoolsError(
            f"{type(tokenizer).__name__} does not say which letters a token stands for, so answers cannot "
            "be told from questions: give a model with a fast tokenizer (tokenizer.json)."
        )
    text, answers = _text_and_answers(tokenizer, conversation.messages)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    begins = [start for start, _ in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), [any(a <= start < b for a, b in answers) for start in begins]


def _text_and_answers(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message]
) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as the template writes it, and where its answers begin and end."""
    text = _applied(tokenizer, messages)
    answers = []
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _applied(tokenizer, messages[:place], add_generation_prompt=True)
            until = _applied(tokenizer, messages[: place + 1])
            if not (text.startswith(until) and until.startswith(before)):
                raise PftoolsError(
                    "the model's chat template writes a turn differently when another follows it, so answers "
                    f"cannot be told from the rest (message {place + 1} of {len(messages)}): give "
                    "conversations of one question and one answer each."
                )
            answers.append((len(before), len(until)))
    return text, answers


def _applied(tokenizer: PreTrainedTokenizerBase, messages: list[Message], **options: Any) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except TemplateError as error:
        raise PftoolsError(f"the model's chat template refuses a conversation: {error}.") from None

"""Conversations: written by the model's own chat template, and learnt from their answers alone."""

from __future__ import annotations

import csv
import itertools
import json

import pytest
import torch

from pftools import corpora, settings
from pftools.corpora.chat import Conversation, conversations_of, tokens_of
from pftools.errors import PftoolsError
from pftools.finetune import Rows, chat_rows, finetune_model, training_rows
from pftools.finetune.rows import IGNORED
from tests.tiny import tiny_llama, tiny_tokenizer

_MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>\n"
    "{% generation %}{{ m['content'] }}<eos>\n{% endgeneration %}"
    "{% else %}<|{{ m['role'] }}|>\n{{ m['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_PLAIN = _MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# The kinds of templates that models come with. An answer stands in [[ ]], which are transformers' marks in
# one copy, and nothing in the other.
_USER = "{% if m.role != 'assistant' %}<|{{ m.role }}|>\n{{ m.content }}\n"
_PROMPT = "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
_KINDS = {
    "one after the other": "{% for m in messages %}"
    + _USER
    + "{% else %}<|assistant|>\n[[{{ m.content }}<eos>\n]]"
    + _PROMPT,
    "begins with bos, trims": "<bos>{% for m in messages %}"
    + _USER.replace("m.content", "m.content | trim")
    + "{% else %}<|assistant|>\n[[{{ m.content | trim }}<eos>]]"
    + _PROMPT,
    "no prompt for an answer": "{% for m in messages %}{% if m.role == 'user' %}<bos>[INST] {{ m.content }} "
    "[/INST]{% elif m.role == 'assistant' %} [[{{ m.content }} <eos>]]{% else %}<<{{ m.content }}>>"
    "{% endif %}{% endfor %}",
    "a header, and no prompt": "{% for m in messages %}"
    + _USER
    + "{% else %}<|assistant|>\n[[{{ m.content }}<eos>\n]]{% endif %}{% endfor %}",
    "ends once": "{% for m in messages %}"
    + _USER
    + "{% else %}<|assistant|>\n[[{{ m.content }}{% if loop.last %}<eos>{% endif %}]]"
    + _PROMPT,
    # As Qwen3: the last answer has an empty thought before it, which a model writes itself.
    "thinks last": "{% for m in messages %}"
    + _USER
    + "{% else %}<|assistant|>\n[[{% if loop.last %}<think></think>{% endif %}{{ m.content }}<eos>\n]]"
    + _PROMPT,
    # As DeepSeek-R1: what was thought is dropped, and the prompt begins a thought that no conversation has.
    "prompts to think": "{% for m in messages %}"
    + _USER
    + "{% else %}<|assistant|>\n[[{{ m.content.split('</think>')[-1] }}<eos>\n]]"
    + _PROMPT.replace("<|assistant|>\n", "<|assistant|>\n<think>"),
    "tools": "{% for m in messages %}"
    + _USER
    + "{% else %}<|assistant|>\n[[{% if m.tool_calls %}{% for call in m.tool_calls %}<call>{{ call | "
    "tojson }}{% endfor %}{% else %}{{ m.content }}{% endif %}<eos>\n]]" + _PROMPT,
}
_TALKS = {
    "one question": [("user", "Who?"), ("assistant", "I.")],
    "three, and white space": [
        ("user", "a"),
        ("assistant", " b\n"),
        ("user", " c "),
        ("assistant", "d\ne "),
        ("user", "a"),
        ("assistant", "a"),
    ],
    "a system": [
        ("system", "Be brief."),
        ("user", "Who?"),
        ("assistant", "I."),
        ("user", "Why?"),
        ("assistant", "So."),
    ],
    "the last question is open": [("user", "Who?"), ("assistant", "I."), ("user", "Why?")],
    "an answer comes first": [("assistant", "Hello!"), ("user", "Who?"), ("assistant", "I.")],
    "two answers in a row": [("user", "Who?"), ("assistant", "I."), ("assistant", "I said.")],
    "a tool": [("user", "Sum?"), ("assistant", ""), ("tool", "42"), ("assistant", "It is 42.")],
    "thoughts": [
        ("user", "Who?"),
        ("assistant", "<think>Me?</think>I."),
        ("user", "No."),
        ("assistant", "You."),
    ],
    "an answer like a header": [
        ("user", "assistant"),
        ("assistant", "assistant"),
        ("user", "<|assistant|>"),
        ("assistant", "<eos>"),
    ],
}


def tokenizer_with(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def talk(*turns, system=None):
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": "system", "content": system}] if system else []
    return messages + [{"role": role, "content": text} for role, text in zip(roles, turns)]


def some(number):
    """Conversations of one to three questions; some begin with a system's words."""
    return [
        talk(
            *[
                text
                for turn in range(1 + row % 3)
                for text in (f"What is {turn} of {row}?", f"It\nis {turn}.")
            ],
            system="Be brief." if row % 4 == 0 else None,
        )
        for row in range(number)
    ]


def as_documents(conversations):
    return conversations_of([{"messages": messages} for messages in conversations], "here")


def test_answers_are_the_tokens_that_a_template_with_marks_says_they_are():
    """The oracle: transformers' own mask, which needs {% generation %} marks; ours does without."""
    marked, plain = tokenizer_with(_MARKED), tokenizer_with(_PLAIN)
    for messages, document in zip(some(40), as_documents(some(40))):
        oracle = marked.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        tokens, is_answer = tokens_of(plain, document)
        assert tokens == list(oracle["input_ids"])
        assert [int(known) for known in is_answer] == list(oracle["assistant_masks"])
        assert sum(is_answer)


# In one pair of them a thought that the template adds is not learnt, as no prompt ends before it.
_PAIRS = [
    pair for pair in itertools.product(_KINDS, _TALKS) if pair != ("thinks last", "two answers in a row")
]


@pytest.mark.parametrize(("kind", "talk"), _PAIRS)
def test_a_loss_lies_on_answers_with_every_kind_of_template(kind, talk):
    """The oracle, again, is transformers' mask of the template with marks, token by token."""
    marked = tokenizer_with(
        _KINDS[kind].replace("[[", "{% generation %}").replace("]]", "{% endgeneration %}")
    )
    plain = tokenizer_with(_KINDS[kind].replace("[[", "").replace("]]", ""))
    messages = [{"role": role, "content": text} for role, text in _TALKS[talk]]
    if talk == "a tool":
        messages[1]["tool_calls"] = [{"name": "sum", "arguments": {"of": [40, 2]}}]
    oracle = marked.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    (document,) = as_documents([messages])
    tokens, is_answer = tokens_of(plain, document)
    assert tokens == list(oracle["input_ids"])
    assert [int(known) for known in is_answer] == list(oracle["assistant_masks"])


def test_rows_hold_whole_conversations_and_a_loss_on_answers_only():
    tokenizer = tokenizer_with(_PLAIN)
    documents = as_documents(some(50))
    rows = chat_rows(tokenizer, documents, 400)
    expected = [tokens_of(tokenizer, document) for document in documents]
    assert rows.real_tokens == sum(len(tokens) for tokens, _ in expected)
    assert rows.learnt_tokens == sum(sum(known) for _, known in expected)
    real = rows.attention_mask.bool()
    assert rows.input_ids[real].tolist() == [token for tokens, _ in expected for token in tokens]
    assert (rows.labels[~real] == IGNORED).all()
    learnt = rows.labels != IGNORED
    assert torch.equal(rows.labels[learnt], rows.input_ids[learnt])
    said = tokenizer.decode(rows.labels[learnt])
    answers = [m["content"] for talks in some(50) for m in talks if m["role"] == "assistant"]
    assert said == "".join(f"{answer}<eos>\n" for answer in answers)
    assert "in answers, which alone have a loss" in str(rows)


def test_only_answers_are_learnt_from_in_training():
    """The loss of the first step is the cross entropy of the answers alone."""
    tokenizer, model = tokenizer_with(_PLAIN), tiny_llama()
    rows = chat_rows(tokenizer, as_documents(some(50)), 400)
    result = finetune_model(
        model, rows, steps=1, blocks_per_step=len(rows), learning_rate=1e-3, progress=False
    )
    with torch.no_grad():
        logits = model(rows.input_ids, attention_mask=rows.attention_mask).logits[:, :-1].double()
    labels = rows.labels[:, 1:]
    alone = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))
    assert result.losses["loss"].iloc[0] == pytest.approx(float(alone), abs=1e-3)
    everything = Rows(rows.input_ids, rows.attention_mask)
    assert everything.learnt_tokens > 1.5 * rows.learnt_tokens


@pytest.mark.parametrize("columns", ["messages", "prompt", "instruction", "response", "input"])
@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_chat_data_of_every_kind_is_read(tmp_path, columns, ending):
    path = tmp_path / f"chat.{ending}"
    rows = []
    for number in range(40):
        question, answer = f"Question {number}?", f"Answer {number}."
        rows.append(
            {
                "messages": {"messages": talk(question, answer)},
                "prompt": {"prompt": question, "completion": answer},
                "instruction": {"instruction": question, "output": answer},
                "response": {"instruction": question, "response": answer},
                "input": {"instruction": "Answer.", "input": question, "output": answer},
            }[columns]
        )
    write(path, rows)
    found = corpora.documents(str(path), split="train")
    assert len(found) > 20 and all(isinstance(document, Conversation) for document in found)
    contents = [message["content"] for message in found[0].messages]
    assert contents[1].startswith("Answer ") and "Question" in contents[0]
    assert columns != "input" or contents[0].startswith("Answer.\n\nQuestion")
    parameters = settings.Finetune(corpus=str(path), block_length=128)
    assert training_rows(parameters, tokenizer_with(_PLAIN)).learnt_tokens
    blocks = corpora.token_blocks(tokenizer_with(_PLAIN), str(path), split="test", block_length=32)
    assert "<|user|>" in tiny_tokenizer().decode(blocks.flatten())


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    elif path.suffix == ".parquet":
        import pandas as pd

        pd.DataFrame(rows).to_parquet(path)
    else:
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, fieldnames=list(rows[0]))
            table.writeheader()
            as_text = lambda value: value if isinstance(value, str) else json.dumps(value)  # noqa: E731
            table.writerows([{name: as_text(value) for name, value in row.items()} for row in rows])


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": []}, "row 1 has no messages"),
        ({"messages": "no JSON"}, "are not JSON"),
        ({"messages": [{"role": "user"}]}, "message 1, is no message"),
        ({"messages": [{"role": "user", "content": None}]}, "message 1, is no message"),
        ({"messages": talk("a", "")}, "message 2, is an empty answer"),
        ({"instruction": "a", "output": " \n"}, "row 1, message 2, is an empty answer"),
        ({"messages": ["hello"]}, "message 1, is no message"),
        ({"messages": talk("only a question")[:1]}, "no message of the role 'assistant'"),
        ({"instruction": "a", "output": 3}, "message 2, is no message"),
    ],
)
def test_what_is_no_conversation_is_named(row, says):
    with pytest.raises(PftoolsError, match=says):
        conversations_of([row], "chat.jsonl")


def test_what_cannot_be_told_apart_is_refused_in_one_sentence():
    (short,), (longer,) = as_documents([talk("a", "b")]), as_documents([talk("a", "b", "c", "d")])
    with pytest.raises(PftoolsError, match="no chat template"):
        tokens_of(tiny_tokenizer(), short)
    # One that writes how many messages there are cannot be followed from one to the next.
    counting = tokenizer_with(
        "{{ messages | length }}" + _PLAIN.replace("m['content']", "m['content'] | upper")
    )
    with pytest.raises(
        PftoolsError, match="does not show where message 2 of 4 is in the one that begins 'a'"
    ):
        tokens_of(counting, longer)
    with pytest.raises(
        PftoolsError, match="refuses a conversation: roles must alternate, in the one that .*: change"
    ):
        tokens_of(tokenizer_with("{{ raise_exception('roles must alternate') }}"), short)
    with pytest.raises(PftoolsError, match="conversation 1 of the train split has .* tokens"):
        chat_rows(tokenizer_with(_PLAIN), [short], 8)

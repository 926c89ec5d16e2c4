"""The documents in rows: one column of text, or the columns of conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pftools.corpora.chat import are_conversations, conversations_of
from pftools.errors import PftoolsError
from pftools.records import TEXT_ENDINGS, check_columns, kind_of, read_rows, read_text

_WORDS = {int: "a number", float: "a number", bool: "a truth value", list: "a list", dict: "an object"}
_OTHER_COLUMN = "name the column of text after a colon, as in my/rows.csv:story"


def texts_of(path: Path, columns: str = "") -> list[str]:
    """The documents of a file, as `documents_of` finds them in its rows; of a text without rows, the whole.

    Raises:
        PftoolsError: as `read_text` and `read_rows`; or the column is missing or holds something else than
        text.
    """
    if kind_of(path) in TEXT_ENDINGS:
        if columns:
            raise PftoolsError(f"{path} is a text without columns: leave {':' + columns!r} out.")
        return [read_text(path)]
    return documents_of(read_rows(path), columns, str(path))


def documents_of(rows: list[dict[str, Any]], columns: str, place: str) -> list[str]:
    """The documents of rows.

    Args:
        columns: one of text, or those of conversations, with commas between; empty: conversations where the
            rows are such, else `text`.
        place: where they are from, for the message.

    Raises:
        PftoolsError: a column is missing, or holds something else than text.
    """
    names = [name.strip() for name in columns.split(",") if name.strip()]
    if names:
        check_columns(rows, names, place, _OTHER_COLUMN)
        rows = [{name: row[name] for name in names} for row in rows]
    if are_conversations(rows):
        return list(conversations_of(rows, place))
    if len(names) > 1:
        raise PftoolsError(
            f"{place}: the columns {', '.join(names)} are no conversation: name one column of text, or those "
            "of a conversation, such as instruction,output."
        )
    return column_of(rows, names[0] if names else "text", place)


def column_of(rows: list[dict[str, Any]], column: str, place: str) -> list[str]:
    """One column of text.

    Raises:
        PftoolsError: a row has no such column, or something else than text in it.
    """
    check_columns(rows, (column,), place, _OTHER_COLUMN)
    for number, row in enumerate(rows, 1):
        value = row[column]
        if not isinstance(value, str):
            found = "null" if value is None or value != value else _WORDS.get(type(value), "something")
            raise PftoolsError(
                f"{place}, row {number}, has {found} in the column {column!r}: it should be text; mend or "
                "remove the row."
            )
    return [row[column] for row in rows]

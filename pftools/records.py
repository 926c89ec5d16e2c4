"""Files of text and files of rows, read whole or refused in one sentence.

Text: `.txt`, `.md`. Rows: `.jsonl` (one JSON object a line), `.json` (a list of objects), `.csv`, `.tsv` and
`.parquet`. All but the last may be gzipped (`.jsonl.gz`). Text is UTF-8, or UTF-16 or UTF-32 with a byte
order mark. The columns of a `.csv` are parted by commas, or by what its first line has instead: semicolons,
tabs or vertical bars.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pftools.errors import PftoolsError

TEXT_ENDINGS = (".txt", ".md")
ROW_ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
ENDINGS = tuple(f"{ending}{packed}" for ending in TEXT_ENDINGS + ROW_ENDINGS for packed in ("", ".gz"))
# UTF-32 first, as its mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def is_readable(name: str) -> bool:
    """Whether the ending of a file's name is one that is read here."""
    return name.lower().endswith(ENDINGS)


def kind_of(path: Path) -> str:
    """The ending of a file without `.gz`, in lower case.

    Raises:
        PftoolsError: it is none that is read here.
    """
    ending = Path(path.name.lower().removesuffix(".gz")).suffix
    if ending not in TEXT_ENDINGS + ROW_ENDINGS:
        raise PftoolsError(
            f"{path} is of a kind that is not read: give a file that ends with "
            f"{', '.join(TEXT_ENDINGS + ROW_ENDINGS)}, or one of these with .gz."
        )
    return ending


def read_text(path: Path) -> str:
    """The text of a file, gzipped or not.

    Raises:
        PftoolsError: it cannot be read, or is not in one of the encodings; the message names the line.
    """
    content = _bytes(path)
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise PftoolsError(
            f"{path}, line {line}, is not {encoding.removesuffix('-sig').upper()} (byte "
            f"{content[error.start]:#x}): save the file as UTF-8, as `iconv -f CP1252 -t UTF-8` does for one "
            "from Windows."
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise PftoolsError(
            f"{path}, line {line}, holds a null character: it is no text, or UTF-16 without a byte order "
            "mark; save it as UTF-8."
        )
    return text.replace("\r\n", "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, each with the names of its columns.

    Raises:
        PftoolsError: it cannot be read, or is damaged; the message names the line where there are lines.
    """
    kind = kind_of(path)
    if kind == ".jsonl":
        return _json_lines(path)
    if kind == ".json":
        return _json_list(path)
    if kind in TEXT_ENDINGS:
        raise PftoolsError(f"{path} is a text without columns: give a file of rows, such as .jsonl or .csv.")
    return _table(path, kind)


def check_columns(
    rows: list[dict[str, Any]],
    columns: Iterable[str],
    place: str,
    remedy: str = "give rows that all have these columns",
) -> None:
    """Refuse rows that lack a column.

    Raises:
        PftoolsError: no rows, or a missing column; the message names it, and the first row that lacks it.
    """
    if not rows:
        raise PftoolsError(f"{place} is empty: give a file with rows.")
    for number, row in enumerate(rows, 1):
        missing = [column for column in columns if column not in row]
        if missing:
            raise PftoolsError(
                f"{place}, row {number}, has no column {', '.join(missing)}: it has "
                f"{', '.join(row) or 'none'}; {remedy}."
            )


def _bytes(path: Path) -> bytes:
    try:
        if path.name.lower().endswith(".gz"):
            with gzip.open(path) as file:
                return file.read()
        return path.read_bytes()
    except (gzip.BadGzipFile, zlib.error, EOFError):
        raise PftoolsError(f"{path} is damaged, or no gzip file: fetch or pack it again.") from None
    except OSError as error:
        raise PftoolsError(
            f"{path} cannot be read ({error.strerror}): see that it is there, and is yours to read."
        ) from None


def _json_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    # Not `splitlines`, which also cuts at separators that may stand inside a JSON string.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError, RecursionError):
            raise PftoolsError(
                f"{path}, line {number}, is not a JSON object: the file should hold one a line."
            ) from None
    return rows


def _json_list(path: Path) -> list[dict[str, Any]]:
    text = read_text(path)
    try:
        found = json.loads(text) if text.strip() else []
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise PftoolsError(
            f"{path}, line {line}, is not JSON: give a list of objects, or name it .jsonl if it has one a "
            "line."
        ) from None
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise PftoolsError(
            f"{path} is not a list of JSON objects: give [{{...}}, {{...}}], or a .jsonl file."
        )
    return found


def _table(path: Path, kind: str) -> list[dict[str, Any]]:
    import pandas as pd
    import pyarrow
    from pyarrow import parquet

    try:
        if kind == ".parquet":
            return parquet.read_table(io.BytesIO(_bytes(path))).to_pylist()
        text = read_text(path)
        separator = _separator(text) if kind == ".csv" else "\t"
        # Every value as the text that stands there: "NA" is a word, and 007 is not a number.
        table = pd.read_csv(io.StringIO(text), sep=separator, dtype=str, keep_default_na=False)
    except pd.errors.EmptyDataError:
        return []
    except pyarrow.ArrowException:
        raise PftoolsError(f"{path} is damaged, or no Parquet file: fetch or write it again.") from None
    except pd.errors.ParserError as error:
        said = str(error).removeprefix("Error tokenizing data. C error: ").strip()
        raise PftoolsError(
            f"{path} is not a table ({said}): put text that holds separators or line breaks in double quotes."
        ) from None
    names = [name.strip() for name in table.columns]
    return [dict(zip(names, row)) for row in table.itertuples(index=False, name=None)]


def _separator(text: str) -> str:
    """What parts the columns of a table, by its first line."""
    header = text.partition("\n")[0]
    return next((letter for letter in (",", ";", "\t", "|") if letter in header), ",")

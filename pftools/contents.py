"""Digests of what a model's folder or a text file holds, to see whether an input is still the same.

What is on the hub is known by its revision.

Files of up to 64 MiB are read whole. Of a larger file the size and 256 pieces of 64 KiB, spread evenly, are
read: a model that was trained again differs in them, and a checkpoint of 100 GB is known in a second. A
single weight that was changed by hand may not be seen.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from pathlib import Path

from pftools.errors import PftoolsError
from pftools.records import ENDINGS, is_readable

# Weights, settings, vocabularies, texts, code.
_KINDS = (".safetensors", ".bin", ".model", ".tiktoken", ".jinja", ".py", *ENDINGS)
_WHOLE = 64 * 2**20
_PIECE, _PIECES = 64 * 2**10, 256


# Folders that people keep models and texts in, and that are no names of organizations on the hub.
_PLACES = ("models", "model", "checkpoints", "runs", "data", "corpora", "texts", "outputs")


def place_and_column(corpus: str) -> tuple[str, str]:
    """A corpus's file, folder or data set, and its column: `my/rows.csv:story` is (my/rows.csv, story).

    The column is empty where none is named, as in the path of a file whose own name holds a colon."""
    place, colon, column = corpus.rpartition(":")
    if not (colon and place and re.fullmatch(r"[^/\\]+", column)) or _is_there(corpus):
        return corpus, ""
    return place, column


def _is_there(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long, or an unknown user after ~
        return False


def data_set_of(corpus: str) -> tuple[str, str | None] | None:
    """(id, configuration) of a data set of the hub, `owner/name:column`; None: the corpus is none.

    With a configuration it is `owner/name/configuration:column`. What is there as a path is none."""
    place, column = place_and_column(corpus)
    found = re.fullmatch(r"(\w[\w.-]*/[\w.-]+)(?:/([\w.-]+))?", place)
    if not column or not found or is_readable(place) or _is_there(place):
        return None
    return found[1], found[2]


def is_path(corpus: str) -> bool:
    """Whether a corpus is named by a path; a data set of the hub looks alike where nothing is there."""
    place, _ = place_and_column(corpus)
    return "/" in place or place.startswith("~") or is_readable(place)


def looks_like_path(reference: str, folder: Path) -> bool:
    """Whether a name can be nothing but a path, as `../model`, `a/b/c` and `x.txt`; `org/model` is a hub id.

    Args:
        folder: where relative paths count from; what begins with the name of a folder there is a path.
    """
    first, *rest = reference.split("/")
    return (
        first in ("", ".", "..", *_PLACES)
        or first.startswith("~")
        or len(rest) > 1
        or is_readable(reference)
        or (bool(rest) and ((folder / first).is_dir() or Path(reference).exists()))
    )


def digest(reference: str) -> str | None:
    """The sha256 of what is at a path, in hexadecimal digits; None where nothing is there.

    Neither the path nor the files' times count. Of a folder, the files in it count and folders below do not,
    as neither models nor corpora are read from these.

    Raises:
        PftoolsError: a file cannot be read.
    """
    try:
        path = Path(reference).expanduser()
        if path.is_file():
            return _of_file(path)
        if not path.is_dir():
            return None
        found = [path / name for name in sorted(os.listdir(path)) if name.endswith(_KINDS)]
        files = [file for file in found if file.is_file() and not file.name.startswith(".")]
        listing = "\n".join(f"{file.name} {_of_file(file)}" for file in files)
    except RuntimeError:  # an unknown user after ~
        return None
    except OSError as error:
        raise PftoolsError(
            f"{error.filename or reference} cannot be read ({error.strerror}): see that it is there, and is "
            "yours to read."
        ) from None
    return hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest()


def digest_of_tree(reference: str) -> str | None:
    """The sha256 of all files in a folder and in folders below; None where no folder is there.

    Raises:
        PftoolsError: a file cannot be read.
    """
    folder = Path(reference).expanduser()
    if not folder.is_dir():
        return None
    files = sorted(
        file for file in folder.rglob("*") if file.is_file() and not {"__pycache__", ".git"} & set(file.parts)
    )
    listing = "\n".join(f"{file.relative_to(folder)} {digest(str(file))}" for file in files)
    return hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest()


def hub_revision(kind: str, name: str) -> str | None:
    """The commit hash of a model or data set in the hub's cache; None where it is not there.

    Args:
        kind: `models` or `datasets`.
        name: its id on the hub.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE) / f"{kind}--{name.replace('/', '--')}"
    try:
        if kind == "models":  # what a name without a revision stands for
            return f"revision {(folder / 'refs' / 'main').read_text().strip()}"
        # `datasets` asks for a commit, so no ref tells it: the newest is the one that was loaded last.
        snapshots = sorted((folder / "snapshots").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        return f"revision {snapshots[-1].name}" if snapshots else None
    except OSError:
        return None


def _of_file(path: Path) -> str:
    now = path.stat()
    return _read(path, now.st_size, now.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _read(path: Path, size: int, modified: int) -> str:
    """Kept for as long as the file's size and time stay the same in this process."""
    found = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _WHOLE:
            found.update(file.read())
        else:
            for piece in range(_PIECES):
                file.seek((size - _PIECE) * piece // (_PIECES - 1))
                found.update(file.read(_PIECE))
    return found.hexdigest()

"""A digest of what a model's folder or a text file holds: a name says where an input is, and not whether it is still the same.

Files of up to 64 MiB are read whole; of larger ones, 256 pieces of 64 KiB that are spread evenly, and the size: a model that was trained again
differs in them, and a checkpoint of a hundred gigabytes is known in a second. A single weight that was changed by hand may not be seen.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

_KINDS = {
    ".safetensors",
    ".bin",
    ".json",
    ".jsonl",
    ".txt",
    ".model",
    ".jinja",
    ".py",
}  # weights, settings, vocabularies, texts, code
_WHOLE = 64 * 2**20
_PIECE, _PIECES = 64 * 2**10, 256


def is_path(reference: str) -> bool:
    """Whether a corpus is named by a path."""
    return "/" in reference or reference.endswith((".txt", ".jsonl"))


def digest(reference: str) -> str | None:
    """The digest of the file or folder at a path, wherever it lies and whenever it was written; None where the reference is a mere name.

    Of a folder, the files in it count, as neither models nor corpora are read from folders below.
    """
    path = Path(reference).expanduser()
    if path.is_file():
        return _of_file(path)
    if not path.is_dir():
        return None
    files = sorted(file for file in path.iterdir() if file.suffix in _KINDS and not file.name.startswith("."))
    listing = "\n".join(f"{file.name} {_of_file(file)}" for file in files)
    return hashlib.sha256(listing.encode()).hexdigest()


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

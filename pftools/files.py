"""Files that are whole or not there: written beside their place, and put there in one rename."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pftools.errors import PftoolsError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``, that takes its place when the block ends without error.

    It may become a file or a folder; a folder replaces only an empty one. Readers see the old content or the
    new, never a part, also after a power cut. Folders above it are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    _remove(partial)
    try:
        yield partial
        if partial.is_file():
            _to_disk(partial)
        elif partial.is_dir():
            share(partial)
        os.replace(partial, path)
    finally:
        _remove(partial)


def refuse_full(folder: Path) -> None:
    """Refuse to write into a folder that holds something.

    Raises:
        PftoolsError: it is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise PftoolsError(f"the folder {folder} is not empty: choose another, or remove it first.")


def partial_path(path: Path) -> Path:
    """Where `replacing` writes what will be ``path``."""
    return path.with_name(f".{path.name}.partial")


def share(folder: Path) -> None:
    """Let all files in a folder be read by whom the umask allows: safetensors writes for its user only."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.stat().st_mode != mode:  # a drive may know one
            path.chmod(mode)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file in one atomic step."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, in UTF-8, in one atomic step."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed_sha256(path: Path) -> str:
    """`sha256` of a file that is on the disk, and not only in memory, when this returns."""
    _to_disk(path)
    return sha256(path)


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def as_bytes(number: float) -> str:
    """A number of bytes in words, such as `16.8 MB`."""
    for unit in ("bytes", "KB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"


def _to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)

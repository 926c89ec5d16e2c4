"""Where a corpus lies, told by its name, and the documents of its splits."""

from __future__ import annotations

import warnings
from pathlib import Path

from pftools import contents, hub
from pftools.corpora import pydocs
from pftools.corpora.data_root import data_root, read_split
from pftools.corpora.rows import column_of, documents_of, texts_of
from pftools.corpora.splits import SPLITS, pieces, split_documents
from pftools.errors import PftoolsError, nearest
from pftools.records import TEXT_ENDINGS, is_readable, kind_of

_HUB = ("wikitext2", "c4")  # the corpora that papers use: `data_root` knows where they are


def documents(corpus: str, *, split: str, data: str | Path | None = None) -> list[str]:
    """The documents (for WikiText: the lines; of chat data: `Conversation`s) of one split of a corpus.

    A folder without a calibration split lends its train split for it. A single file is split by documents (a
    text by paragraphs), always in the same way, and a warning says so.

    Raises:
        PftoolsError: unknown corpus or split, a file that cannot be read or is too small to be split, or a
            split without text.
    """
    if split not in SPLITS:
        raise PftoolsError(f"unknown split {split!r}: {nearest(split, SPLITS)}.")
    found = pydocs.documents()[split] if corpus == "pydocs" else _documents_of(corpus, split, data)
    if not any(document.strip() for document in found):
        raise PftoolsError(f"the {split} split of {corpus!r} is empty: choose another split or corpus.")
    return found


def _documents_of(corpus: str, split: str, data: str | Path | None) -> list[str]:
    path = _local_path(corpus, data_root(data))
    place, column = contents.place_and_column(corpus)
    if path is None and place in _HUB:
        return _from_hub(place, column or "text", split, data)
    if path is None and (data_set := contents.data_set_of(corpus)):
        return _of_data_set(*data_set, column, split)
    if path is None:
        raise PftoolsError(_unknown(corpus, data_root(data)))
    if path.is_dir() and not _is_heap(path):
        return texts_of(_file_for(path, split), column)
    files = _files_of(path) if path.is_dir() else [path]
    why = "has no file for a split" if path.is_dir() else "is one file"
    whole = [_pieces_of(file, column) for file in files]
    plain = all(kind_of(file) in TEXT_ENDINGS for file in files)
    return _part(sum(whole, []), split, f"{path}", why, "paragraphs" if plain else "documents")


def _pieces_of(file: Path, column: str) -> list[str]:
    """The documents of a file that is to be split; of a text, its paragraphs."""
    whole = texts_of(file, column)
    if not any(document.strip() for document in whole):
        raise PftoolsError(f"{file} is empty: give a file with text in it.")
    return pieces(whole[0]) if kind_of(file) in TEXT_ENDINGS else whole


def _part(whole: list[str], split: str, place: str, why: str, kind: str = "documents") -> list[str]:
    """A split of what has none, and a warning that says so."""
    parts = split_documents(whole, place)
    told = ", ".join(f"{len(parts[name])} {name}" for name in SPLITS)
    warnings.warn(f"{place} {why}, so its {kind} are split into parts that share none: {told}.", stacklevel=3)
    return parts[split]


def _of_data_set(name: str, configuration: str | None, column: str, split: str) -> list[str]:
    """The documents of a data set of the hub; each of its splits is fetched whole, once."""
    place = f"{name}/{configuration}" if configuration else name
    try:
        import datasets

        found = dict(datasets.load_dataset(name, configuration))
    except Exception as error:  # the hub and its data sets fail in many ways (offline, gated, no such name)
        # One of several configurations has to be named.
        several = isinstance(error, ValueError) and "config" in str(error).lower()
        remedy = f"name one of them, as {name}/CONFIGURATION:{column}" if several else hub.remedy_of(error)
        raise PftoolsError(
            f"{place!r} is no file or folder here, and as a data set of the hub it could not be loaded "
            f"({type(error).__name__}: {hub.cause_of(error)}): {remedy}."
        ) from error
    if len(found) == 1:
        (only,) = found
        return _part(
            documents_of(list(found[only]), column, place), split, place, f"has the split {only} alone"
        )
    wanted = "train" if split == "calibration" and "calibration" not in found else split
    if wanted not in found:
        raise PftoolsError(f"the data set {place} has no {split} split: it holds {', '.join(found)}.")
    return documents_of(list(found[wanted]), column, f"the {wanted} split of {place}")


def file_of(corpus: str, split: str, data: str | Path | None = None) -> Path | None:
    """The file, or folder of files, that a split is read from; None: none that is here and read."""
    path = _local_path(corpus, data_root(data))
    try:
        return _file_for(path, split) if path and path.is_dir() and not _is_heap(path) else path
    except PftoolsError:
        return None


def _unknown(corpus: str, root: Path | None) -> str:
    if contents.is_path(corpus):
        return (
            f"there is no corpus {corpus!r}: give the path of a file or of a folder that is there, or a data "
            "set of the hub with its column, as owner/name:text."
        )
    if Path(corpus).is_dir():
        return f"the corpus {corpus!r} is none of the data root: give the folder that is here as ./{corpus}."
    known = {"pydocs", *_HUB}
    if root and root.is_dir():
        known |= {folder.name for folder in root.iterdir() if folder.is_dir()}
    return (
        f"unknown corpus {corpus!r}: {nearest(corpus, known)}; or give the path of a text file or of a "
        "folder, or a folder under PFTOOLS_DATA."
    )


def _file_for(folder: Path, split: str) -> Path:
    """The file for a split, such as `train.jsonl`.

    Raises:
        PftoolsError: there is none, or more than one.
    """
    held: dict[str, list[Path]] = {}
    for file in _files_of(folder):
        held.setdefault(file.name.partition(".")[0], []).append(file)
    name = "train" if split == "calibration" and "calibration" not in held else split
    if name not in held:
        raise PftoolsError(
            f"the corpus folder {folder} has no {split} split: it holds {', '.join(held) or 'no files'}; add "
            f"a file such as {split}.jsonl."
        )
    if len(held[name]) > 1:
        both = " and ".join(file.name for file in held[name])
        raise PftoolsError(f"the corpus folder {folder} has {both}: keep one file for each split.")
    return held[name][0]


def _files_of(folder: Path) -> list[Path]:
    return sorted(
        file for file in folder.iterdir() if is_readable(file.name) and not file.name.startswith(".")
    )


def _is_heap(folder: Path) -> bool:
    """Whether a folder's files are no splits."""
    names = {file.name.partition(".")[0] for file in _files_of(folder)}
    return bool(names) and not names & set(SPLITS)


def _local_path(corpus: str, root: Path | None) -> Path | None:
    place, _ = contents.place_and_column(corpus)
    candidates = [Path(place).expanduser()] if contents.is_path(corpus) or Path(place).is_file() else []
    if root:
        candidates.append(root / place)
    return next((path for path in candidates if path.exists()), None)


def _from_hub(corpus: str, column: str, split: str, data: str | Path | None) -> list[str]:
    name = "train" if split == "calibration" else split
    try:
        return column_of(read_split(corpus, name, data=data), column, f"the {name} split of {corpus}")
    except PftoolsError as error:
        raise PftoolsError(f"{error} Without network, the corpus 'pydocs' is inside every Python.") from error

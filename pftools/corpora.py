"""Corpora by name, cut into blocks of tokens.

- `pydocs`: Python's own language reference, inside every Python: no network needed.
- any folder of the data root (`PFTOOLS_DATA`) or a path to a folder: a file for each split, such as
  `train.jsonl`.
- a path to one file, which is split by its documents. What files may be is told in `records`.
- `wikitext2` and `c4`: from the data root where it has them, else from the hub.
- `owner/name:column`: a column of a data set of the hub, `owner/name/configuration:column` where it has
  several. One with a single split is split by its documents.

A file or folder may be followed by `:column`, too, where its text is not in the column `text`.

Rows of conversations (see `chat`) are written by the model's chat template, one after the other.

Splits are `calibration`, `train`, `validation` and `test`.
"""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pftools import contents, pydocs, run_folder
from pftools.chat import Conversation, tokens_of
from pftools.data_root import data_root, read_split
from pftools.errors import PftoolsError, nearest
from pftools.records import TEXT_ENDINGS, column_of, documents_of, is_readable, kind_of, texts_of
from pftools.splits import SPLITS, pieces, split_documents

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

_HUB = ("wikitext2", "c4")  # the corpora that papers use: `data_root` knows where they are
# The papers join the lines of WikiText with a blank line between them; documents elsewhere likewise.
_JOINT = "\n\n"


def token_blocks(
    tokenizer: PreTrainedTokenizerBase,
    corpus: str = "pydocs",
    *,
    split: str,
    n_blocks: int | None = None,
    block_length: int,
    seed: int = 0,
    data: str | Path | None = None,
) -> Tensor:
    """Blocks of ``block_length`` tokens from a split of a corpus, its documents joined by blank lines.

    How blocks are chosen depends on what the split is for:

    - `validation`, `test`: consecutive blocks from the start, as papers compute perplexity; ``seed`` has no
      effect.
    - `train`: consecutive blocks, in an order shuffled by ``seed``.
    - `calibration`: blocks at random, drawn by ``seed`` without overlap; where the split is too short for
      that, random windows that may overlap, and a warning says so.

    Args:
        n_blocks: how many; None: all that the split holds.
        data: the data root; None: `PFTOOLS_DATA`.

    Returns:
        LongTensor of shape (n_blocks, block_length).

    Raises:
        PftoolsError: unknown corpus or split, an empty corpus, or fewer blocks than asked.
    """
    import torch

    if block_length < 2:
        raise PftoolsError(
            f"block_length is {block_length}: a block needs at least 2 tokens, one to predict the next."
        )
    if n_blocks is not None and n_blocks < 1:
        raise PftoolsError(f"n_blocks is {n_blocks}: ask for at least 1 block, or None for all.")
    stream = _token_stream(tokenizer, corpus, split, data)
    available = len(stream) // block_length
    if available == 0:
        raise PftoolsError(
            f"the {split} split of {corpus!r} has {len(stream)} tokens, less than one block of "
            f"{block_length}: choose a shorter block_length or another corpus."
        )
    chooser = random.Random(seed)
    if split == "calibration" and n_blocks is not None and n_blocks > available:
        warnings.warn(
            f"{n_blocks} calibration blocks of {block_length} tokens are asked and {corpus!r} holds "
            f"{available} without overlap: random windows that overlap are used.",
            stacklevel=2,
        )
        starts = [chooser.randrange(len(stream) - block_length + 1) for _ in range(n_blocks)]
    elif n_blocks is not None and n_blocks > available:
        raise PftoolsError(
            f"{n_blocks} blocks of {block_length} tokens are asked and the {split} split of {corpus!r} holds "
            f"{available}: ask for at most that many, or None for all."
        )
    else:
        starts = [block * block_length for block in range(available)]
        if split in ("calibration", "train"):
            chooser.shuffle(starts)
        starts = starts[:n_blocks]
    return torch.stack([stream[start : start + block_length] for start in starts])


def blocks_for(parameters: Any, tokenizer: PreTrainedTokenizerBase, *, split: str | None = None) -> Tensor:
    """`token_blocks` with what a step's parameters say of corpus, blocks, seed and data root.

    Args:
        parameters: those of a step that reads blocks.
        tokenizer: of the model that will read them.
        split: where the step's parameters name none.
    """
    return token_blocks(
        tokenizer,
        parameters.corpus,
        split=split or parameters.split,
        n_blocks=getattr(parameters, "n_blocks", None),
        block_length=parameters.block_length,
        seed=parameters.seed,
        data=getattr(parameters, "data", None),
    )


def save_blocks(path: str | Path, blocks: Tensor) -> None:
    """Keep chosen blocks as safetensors (int32: half the size, and every vocabulary fits)."""
    import torch
    from safetensors.torch import save_file

    save_file({"blocks": blocks.to(torch.int32)}, path)


def load_blocks(run: str | Path) -> Tensor:
    """The blocks that a calibrate run chose, (n_blocks, block_length), checked against their seal.

    Raises:
        PftoolsError: the run is not finished, damaged, or not a calibrate run.
    """
    from safetensors.torch import load_file

    if run_folder.verify(run)["step"] != "calibrate":
        raise PftoolsError(f"{run} holds no calibration blocks: give the folder of a finished calibrate run.")
    return load_file(Path(run) / "blocks.safetensors")["blocks"].long()


def _token_stream(
    tokenizer: PreTrainedTokenizerBase, corpus: str, split: str, data: str | Path | None
) -> Tensor:
    import torch

    found = documents(corpus, split=split, data=data)
    if isinstance(found[0], Conversation):
        written = [
            tokens_of(tokenizer, document)[0] for document in found if isinstance(document, Conversation)
        ]
        return torch.tensor([token for tokens in written for token in tokens], dtype=torch.long)
    # Without a warning about its length: it is cut into blocks, and never given to a model whole.
    tokens = tokenizer(_JOINT.join(found), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(tokens, dtype=torch.long)


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
    if path.is_dir():
        return texts_of(_file_for(path, split), column)
    whole = texts_of(path, column)
    if not any(document.strip() for document in whole):
        raise PftoolsError(f"{path} is empty: give a file with text in it.")
    if kind_of(path) in TEXT_ENDINGS:
        return _part(pieces(whole[0]), split, f"{path}", "is one file", "paragraphs")
    return _part(whole, split, f"{path}", "is one file")


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
        cause = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        raise PftoolsError(
            f"{place!r} is no file or folder here, and as a data set of the hub it could not be loaded "
            f"({type(error).__name__}: {cause}): mend the name, or fetch it into the hub's cache where there "
            "is network."
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
    """The file that a split is read from; None where it is no file on this machine, or none that is read."""
    path = _local_path(corpus, data_root(data))
    try:
        return _file_for(path, split) if path and path.is_dir() else path
    except PftoolsError:
        return None


def _unknown(corpus: str, root: Path | None) -> str:
    if contents.is_path(corpus):
        return (
            f"there is no corpus {corpus!r}: give the path of a file or of a folder that is there, or a data "
            "set of the hub with its column, as owner/name:text."
        )
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
    files = sorted(
        file for file in folder.iterdir() if is_readable(file.name) and not file.name.startswith(".")
    )
    held: dict[str, list[Path]] = {}
    for file in files:
        held.setdefault(file.name.partition(".")[0], []).append(file)
    name = "train" if split == "calibration" and "calibration" not in held else split
    if name not in held:
        raise PftoolsError(
            f"the corpus folder {folder} has no {split} split: it holds {', '.join(held) or 'no files'}."
        )
    if len(held[name]) > 1:
        both = " and ".join(file.name for file in held[name])
        raise PftoolsError(f"the corpus folder {folder} has {both}: keep one file for each split.")
    return held[name][0]


def _local_path(corpus: str, root: Path | None) -> Path | None:
    place, _ = contents.place_and_column(corpus)
    candidates = [Path(place).expanduser()] if contents.is_path(corpus) else []
    if root:
        candidates.append(root / place)
    return next((path for path in candidates if path.exists()), None)


def _from_hub(corpus: str, column: str, split: str, data: str | Path | None) -> list[str]:
    name = "train" if split == "calibration" else split
    try:
        return column_of(read_split(corpus, name, data=data), column, f"the {name} split of {corpus}")
    except PftoolsError as error:
        raise PftoolsError(f"{error} Without network, the corpus 'pydocs' is inside every Python.") from error

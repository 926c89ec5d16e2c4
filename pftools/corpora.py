"""Corpora by name, cut into blocks of tokens.

- `pydocs`: Python's own language reference (`pydoc_data.topics`), inside every Python: no network needed.
- any folder of the data root (`PFTOOLS_DATA`): JSON-lines files, one a split, with a `text` column.
- a path to such a folder or to one `.jsonl` or `.txt` file.
- `wikitext2` and `c4`: from the data root where it has them, else from the hub.

Splits are `calibration`, `train`, `validation` and `test`. `pydocs` is split by topic, and topics that repeat
each other's paragraphs go to the same split: the chapter "compound" contains the section "if", and a model
calibrated on one must not be tested on the other.
"""

from __future__ import annotations

import random
import warnings
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pftools import contents, run_folder
from pftools.data_root import check_columns, data_root, read_json_lines, read_split
from pftools.errors import PftoolsError, nearest

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

SPLITS = ("calibration", "train", "validation", "test")
_PYDOCS_SHARES = {"calibration": 0.36, "train": 0.34, "validation": 0.06, "test": 0.24}
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
    """Blocks of ``block_length`` tokens from one split of a corpus, whose documents are joined by blank lines.

    How blocks are chosen depends on what the split is for:

    - `validation`, `test`: consecutive blocks from the start, as papers compute perplexity; ``seed`` has no
    effect.
    - `train`: consecutive blocks, in an order shuffled by ``seed``.
    - `calibration`: blocks at random, drawn by ``seed`` without overlap; where the split is too short for
    that, random
      windows that may overlap, and a warning says so.

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
            f"the {split} split of {corpus!r} has {len(stream)} tokens, less than one block of {block_length}: "
            "choose a shorter block_length or another corpus."
        )
    chooser = random.Random(seed)
    if split == "calibration" and n_blocks is not None and n_blocks > available:
        warnings.warn(
            f"{n_blocks} calibration blocks of {block_length} tokens are asked and {corpus!r} holds {available} without "
            "overlap: random windows that overlap are used.",
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
    """`token_blocks` with what a step's parameters say of corpus, number and length of blocks, seed and data root.

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

    text = _JOINT.join(documents(corpus, split=split, data=data))
    # Through the backend without a length warning: the stream is cut into blocks, never given to a model whole.
    return torch.tensor(
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long
    )


def documents(corpus: str, *, split: str, data: str | Path | None = None) -> list[str]:
    """The documents (for WikiText: the lines) of one split of a corpus.

    A corpus without a calibration split lends its train split for it.

    Raises:
        PftoolsError: unknown corpus or split, or a split without text.
    """
    if split not in SPLITS:
        raise PftoolsError(f"unknown split {split!r}: {nearest(split, SPLITS)}.")
    found = _pydocs()[split] if corpus == "pydocs" else _documents_of(corpus, split, data_root(data))
    if not any(document.strip() for document in found):
        raise PftoolsError(f"the {split} split of {corpus!r} is empty: choose another split or corpus.")
    return found


def _documents_of(corpus: str, split: str, root: Path | None) -> list[str]:
    path = _local_path(corpus, root)
    if path is None and corpus in _HUB:
        return _from_hub(corpus, split)
    if path is None:
        known = {"pydocs", *_HUB}
        if root and root.is_dir():
            known |= {folder.name for folder in root.iterdir() if folder.is_dir()}
        raise PftoolsError(
            f"unknown corpus {corpus!r}: {nearest(corpus, known)}; or give the path of a .txt or .jsonl file, or a "
            "folder under PFTOOLS_DATA."
        )
    if path.is_file():
        return _read_file(path)
    wanted = [split, "train"] if split == "calibration" else [split]
    for name in wanted:
        for ending in (".jsonl", ".txt"):
            if (path / f"{name}{ending}").exists():
                return _read_file(path / f"{name}{ending}")
    held = sorted(file.stem for file in path.iterdir() if file.suffix in (".jsonl", ".txt"))
    raise PftoolsError(
        f"the corpus folder {path} has no {split} split: it holds {', '.join(held) or 'no files'}."
    )


def _local_path(corpus: str, root: Path | None) -> Path | None:
    candidates = [Path(corpus).expanduser()] if contents.is_path(corpus) else []
    if root:
        candidates.append(root / corpus)
    return next((path for path in candidates if path.exists()), None)


def _read_file(path: Path) -> list[str]:
    if path.suffix == ".txt":
        return [path.read_text(encoding="utf-8")]
    rows = read_json_lines(path)
    if rows:
        check_columns(rows, ("text",), str(path))
    return [row["text"] for row in rows]


def _from_hub(corpus: str, split: str) -> list[str]:
    name = "train" if split == "calibration" or (corpus == "c4" and split == "train") else split
    try:
        return [row["text"] for row in read_split(corpus, name)]
    except PftoolsError as error:
        raise PftoolsError(f"{error} Without network, the corpus 'pydocs' is inside every Python.") from error


# ------------------------------------------------------------------------------------------------------------
# Python's language reference


@cache
def _pydocs() -> dict[str, list[str]]:
    """The topics of each split. Groups of overlapping topics are dealt out whole, the largest first, each to
    the split that is furthest below its share; sections that a chapter of the same group repeats are
    dropped."""
    from pydoc_data.topics import topics

    groups = sorted(
        _overlapping(topics), key=lambda group: (-sum(len(topics[name]) for name in group), group)
    )
    kept = [_without_repeats({name: topics[name] for name in group}) for group in groups]
    total = sum(len(text) for texts in kept for text in texts)
    room = {split: share * total for split, share in _PYDOCS_SHARES.items()}
    dealt: dict[str, list[str]] = {split: [] for split in SPLITS}
    for texts in kept:
        split = max(room, key=room.get)
        dealt[split] += texts
        room[split] -= sum(map(len, texts))
    return dealt


def _paragraphs(text: str) -> set[str]:
    return {paragraph.strip() for paragraph in text.split("\n\n") if len(paragraph.strip()) > 60}


def _overlapping(topics: dict[str, str]) -> list[list[str]]:
    """Sorted groups of topics, linked where two share a paragraph."""
    group_of = {name: {name} for name in topics}
    holders = defaultdict(list)
    for name, text in topics.items():
        for paragraph in _paragraphs(text):
            holders[paragraph].append(name)
    for first, *others in holders.values():
        for other in others:
            if group_of[first] is not group_of[other]:
                group_of[first] |= group_of[other]
                for name in group_of[other]:
                    group_of[name] = group_of[first]
    return [sorted(group) for group in {id(group): group for group in group_of.values()}.values()]


def _without_repeats(topics: dict[str, str]) -> list[str]:
    """The texts of a group, longest first, less those whose paragraphs mostly stand in one already kept."""
    kept: list[str] = []
    seen: set[str] = set()
    for text in sorted(topics.values(), key=lambda text: (-len(text), text)):
        own = _paragraphs(text)
        if not own or len(own & seen) <= len(own) / 2:
            kept.append(text)
            seen |= own
    return kept

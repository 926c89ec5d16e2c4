"""Corpora by name, cut into blocks of tokens.

- `pydocs`: Python's own language reference, inside every Python: no network needed.
- any folder of the data root (`PFTOOLS_DATA`) or a path to a folder: a file for each split, such as
  `train.jsonl`; where no file has the name of a split, all files together, which are split like one.
- a path to one file, which is split by its documents. What files may be is told in `records`.
- `wikitext2` and `c4`: from the data root where it has them, else from the hub.
- `owner/name:column`: a column of a data set of the hub, `owner/name/configuration:column` where it has
  several. One with a single split is split by its documents.

A file or folder may be followed by `:column`, too, where its text is not in the column `text`.

Rows of conversations (see `chat`) are written by the model's chat template, one after the other.

Splits are `calibration`, `train`, `validation` and `test`.

blocks     `token_blocks`: a split as blocks of tokens
sources    `documents`: where a corpus lies, and its documents
rows       documents in rows: a column of text, or conversations
splits     from one heap of documents to four splits
pydocs     Python's own language reference
chat       conversations, and what the model's chat template makes of them
data_root  a folder of data sets, for machines without a hub
"""

from pftools.corpora.blocks import blocks_for, blocks_of, load_blocks, save_blocks, token_blocks
from pftools.corpora.sources import documents, file_of
from pftools.corpora.splits import SPLITS

__all__ = [
    "SPLITS",
    "blocks_for",
    "blocks_of",
    "documents",
    "file_of",
    "load_blocks",
    "save_blocks",
    "token_blocks",
]

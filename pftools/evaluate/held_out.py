"""The held-out text of a step: blocks that it never learns from, to tell at once what it did to the model.

It is the validation split of the step's own corpus, in blocks of the step's own length. What a model's
perplexity on it is, is kept beside the runs under the digests of its weights and of the text: what is "after"
of one step is "before" of the next, and every model of a study is measured once.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pftools import corpora, run_folder
from pftools.errors import PftoolsError
from pftools.evaluate.block_perplexity import first_token, perplexity
from pftools.files import write_json
from pftools.layers import fingerprint

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class HeldOut:
    """A held-out text.

    Attributes:
        blocks: LongTensor (n_blocks, block_length); None where no text is read.
        name: what it is, or why there is none, in words.
        kept: the folder where known perplexities are.
        batch_size: blocks a forward; None: chosen by size.
        tokenizer: what decides whether blocks begin with a first token (see `first_token`).
    """

    blocks: torch.Tensor | None
    name: str
    kept: Path
    batch_size: int | None = None
    tokenizer: Any = None

    def perplexity(self, model: PreTrainedModel) -> float | None:
        """The model's perplexity on the text, measured or known; None where there is no text."""
        if self.blocks is None:
            return None
        first = first_token(model, self.tokenizer) if self.tokenizer is not None else None
        parts = (fingerprint(model), hashlib.sha256(self.blocks.numpy().tobytes()).hexdigest(), str(first))
        path = self.kept / f"{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:24]}.json"
        try:
            return float(json.loads(path.read_text())["perplexity"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # not known, or the file is damaged: both are mended by measuring
        found = perplexity(
            model, self.blocks, first=first, batch_size=self.batch_size, progress=False
        ).perplexity
        write_json(path, {"perplexity": found})
        return found

    def says(self, before: float | None, after: float | None = None) -> str:
        """A sentence with the perplexity of a model, or with those before and after a step."""
        if before is None:
            return f"held-out perplexity is not measured: {self.name}"
        found = f"{before:.2f}" if after is None else f"{before:.2f} before, {after:.2f} after"
        return f"perplexity on {self.name}: {found}"


def held_out_text(parameters: Any, tokenizer: PreTrainedTokenizerBase) -> HeldOut:
    """The held-out text of a prune or finetune step.

    A prune step that is given a calibrate run reads the validation split of the corpus that this run was made
    from.

    Where the corpus has no validation split, or less than one block in it, there is none, and `name` says so.

    Args:
        parameters: of the step: corpus, block_length, held_out_blocks, and calibration where it has one.
        tokenizer: of the model that will read it.
    """
    kept = Path(parameters.runs) / ".held_out"
    if not parameters.held_out_blocks:
        return HeldOut(None, "held_out_blocks is 0", kept)
    source = {"corpus": parameters.corpus, "block_length": parameters.block_length}
    if calibration := getattr(parameters, "calibration", ""):
        told = run_folder.read_record(calibration)["parameters"]
        source = {name: told[name] for name in source}
    try:
        blocks = corpora.token_blocks(tokenizer, **source, split="validation")[: parameters.held_out_blocks]
    except PftoolsError as missing:
        return HeldOut(None, str(missing), kept)
    name = f"{len(blocks)} validation blocks of {blocks.shape[1]} tokens of {source['corpus']}"
    return HeldOut(blocks, name, kept, parameters.batch_size, tokenizer)

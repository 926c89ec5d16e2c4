"""The size of every linear input of an unpruned model, from one forward: enough to prune at any sparsity."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from pftools.models import decoder_layers, linear_modules
from pftools.prune import inputs


def layer_index(name: str) -> int:
    """The number of the layer that a module's full name holds; -1 where there is none."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


@dataclass
class ActivationStatistics:
    """Column norms of every linear input of an unpruned model, over the same calibration tokens.

    norms: {linear module's full name: (columns,), float32 on the CPU}; zeros where no token came.
    n_tokens: how many tokens were read.
    """

    norms: dict[str, torch.Tensor]
    n_tokens: int

    def save(self, path: str | Path) -> None:
        """Write as safetensors; a few MB even for large models."""
        from safetensors.torch import save_file

        own = {name: norm.clone() for name, norm in self.norms.items()}  # safetensors refuses shared memory
        save_file(own, path, metadata={"n_tokens": str(self.n_tokens)})

    @classmethod
    def load(cls, path: str | Path) -> ActivationStatistics:
        """Read what `save` wrote."""
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            return cls({name: file.get_tensor(name) for name in file.keys()}, int(file.metadata()["n_tokens"]))

    def table(self) -> pd.DataFrame:
        """A row a linear module: layer, module, mean_norm and max_norm of its input columns (root mean square a token),
        and outlier_share, the share of columns more than five times the mean."""
        rows = []
        for name, norm in self.norms.items():
            size = norm / self.n_tokens**0.5
            mean = float(size.mean())
            rows.append(
                {
                    "layer": layer_index(name),
                    "module": name.rpartition(".")[2],
                    "mean_norm": mean,
                    "max_norm": float(size.max()),
                    "outlier_share": float((size > 5 * mean).float().mean()),
                }
            )
        return pd.DataFrame(rows)


def measure_activations(
    model: nn.Module, blocks: torch.Tensor, *, batch_size: int | None = None, progress: bool = True
) -> ActivationStatistics:
    """One forward of the unpruned model over the calibration blocks: the norms of all linear inputs.

    With these, any sparsity, pattern and per-column criterion is pruned without another forward (`inputs="dense"`).

    Args:
        blocks: LongTensor (n_blocks, block_length).
    """
    prefix, layers = decoder_layers(model)
    batch_size = batch_size or inputs.batch_size_for(model, blocks.shape[1], len(blocks), str(model.device))
    norms = {name: torch.zeros(module.in_features) for name, module in linear_modules(model).items()}
    with inputs.inference(model), inputs.memory_advice(batch_size, blocks):
        hidden, calls = inputs.capture(model, blocks, batch_size)
        for index, layer in enumerate(tqdm(layers, desc="measuring", unit="layer", disable=not progress)):
            place = f"{prefix}.{index}"
            output = None if index == len(layers) - 1 else hidden
            measured = inputs.measure_layer(layer, calls[index], hidden, batch_size, place=place, output=output)
            norms |= {f"{place}.{name}": found.norms.cpu() for name, found in measured.items()}
    return ActivationStatistics(norms, blocks.numel())

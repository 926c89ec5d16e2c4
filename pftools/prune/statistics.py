"""Column norms of an unpruned model's linear inputs: for `inputs="dense"` and OWL, kept by `01_calibrate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from pftools import contents, run_folder
from pftools.errors import PftoolsError
from pftools.layers import matrices
from pftools.prune.inputs import Measured


@dataclass
class ActivationStatistics:
    """Column norms of every linear input of an unpruned model, over the same calibration tokens.

    Attributes:
        norms: {linear module's full name: Euclidean norms (columns,), float32 on the CPU}.
        n_tokens: how many tokens they were taken over.
        routed: {name: tokens} of the modules that saw fewer tokens, which are experts.
    """

    norms: dict[str, torch.Tensor]
    n_tokens: int
    routed: dict[str, int]

    def add(self, place: str, layer: nn.Module, measured: Measured) -> None:
        """Take in what was measured of one layer, whose full name is ``place``."""
        for name, matrix in matrices(layer).items():
            norms = measured.norms.get(name)  # an expert that saw no token has none
            norms = torch.zeros(matrix.weight(layer).shape[1]) if norms is None else norms.cpu()
            self.norms[f"{place}.{name}"] = norms
            if measured.tokens[name] != self.n_tokens:
                self.routed[f"{place}.{name}"] = measured.tokens[name]

    def save(self, path: str | Path) -> None:
        """Write as safetensors; a few MB even for large models."""
        from safetensors.torch import save_file

        counts = {f"tokens {name}": str(count) for name, count in self.routed.items()}
        save_file(
            {name: norm.clone() for name, norm in self.norms.items()},
            path,
            metadata={"n_tokens": str(self.n_tokens), **counts},
        )

    @classmethod
    def load(cls, path: str | Path) -> ActivationStatistics:
        """Read what `save` wrote."""
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            notes = file.metadata()
            routed = {
                key.removeprefix("tokens "): int(count)
                for key, count in notes.items()
                if key.startswith("tokens ")
            }
            return cls({name: file.get_tensor(name) for name in file.keys()}, int(notes["n_tokens"]), routed)

    @classmethod
    def of_run(cls, folder: str | Path, model: str) -> ActivationStatistics:
        """Those that the calibrate run ``folder`` kept, which have to be of the model that is to be pruned.

        Raises:
            PftoolsError: they are of another model.
        """
        record = run_folder.read_record(folder)
        measured = record["parameters"]["model"]
        same = run_folder.is_finished(model) and Path(measured).name == Path(model).name
        same |= record["inputs"].get("model") == (contents.digest(model) or "")  # wherever it is by now
        if measured != model and not same:
            raise PftoolsError(
                f"the statistics in {folder} are of {measured!r}, and {model!r} is to be pruned: "
                "run 01_calibrate on that model, or leave calibration empty."
            )
        return cls.load(Path(folder) / "statistics.safetensors")

    def table(self) -> pd.DataFrame:
        """A row a linear module, for figures.

        Returns:
            Columns layer and module; mean_norm and max_norm over its input columns, as root mean square a
            token; outlier_share, the share of columns whose norm is more than five times the mean.
        """
        rows = []
        for name, norm in self.norms.items():
            layer = next(int(part) for part in name.split(".") if part.isdigit())
            size = norm / max(self.routed.get(name, self.n_tokens), 1) ** 0.5
            mean = float(size.mean())
            share = float((size > 5 * mean).float().mean())
            module = name.rpartition(".")[2]
            rows.append(
                {
                    "layer": layer,
                    "module": module,
                    "mean_norm": mean,
                    "max_norm": float(size.max()),
                    "outlier_share": share,
                }
            )
        return pd.DataFrame(rows)

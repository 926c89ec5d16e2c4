"""Before a run is sealed: would what was written give the model that was measured?

A second training of the same network, or masks that were made after the measurement, would be sealed with
numbers of another model. Masks, weights and adapters are read back and compared with the model in memory;
loading the model a second time is not needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pftools import run_folder
from pftools.adapters import Adapter, load_adapter, mask_digest
from pftools.errors import PftoolsError
from pftools.layers import linear_weights
from pftools.mapped import in_turn, release
from pftools.masks import MASKS, read_masks, read_tensors

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

WEIGHTS, ADAPTER = "weights.safetensors", "adapter"
_ZEROS = "pftools_zeros"  # the attribute of a model for `remember_zeros`


def remember_zeros(model: PreTrainedModel) -> None:
    """Let a model that was just loaded remember how many zeros each of its weights has."""
    vars(model)[_ZEROS] = {name: _zeros(weight) for name, weight in in_turn(linear_weights(model).items())}


def _zeros(weight: torch.Tensor) -> int:
    return int((weight == 0).sum())


def check_prune(run: run_folder.Run, model: PreTrainedModel) -> None:
    """Compare the masks, and weights, that were written with the model's own zeros, and weights.

    Raises:
        PftoolsError: they differ.
    """
    import torch

    parameters, before = dict(model.named_parameters()), vars(model).get(_ZEROS, {})
    path = run.path(WEIGHTS)
    stored = set()
    for name, weight in read_tensors(path) if path.exists() else ():
        stored.add(name)
        if not torch.equal(weight, parameters[name].detach().cpu()):
            raise _not_as_measured(run, f"its {name} is not the one in memory")
        release(parameters[name])
    for name, mask in read_masks(run.path(MASKS)):
        weight, kept = parameters[name].detach(), mask.to(parameters[name].device)
        more = name not in stored and _zeros(weight[kept]) > before.get(name, 0)
        if more or bool(weight[~kept].any()):
            raise _not_as_measured(run, f"its masks do not have the zeros of {name} in memory")
        release(weight)


def check_finetune(run: run_folder.Run, merge: str, adapter: Adapter, model: PreTrainedModel) -> None:
    """Compare the adapter that was written with the one that was merged, and its zeros with the model's.

    Raises:
        PftoolsError: they differ.
    """
    import torch

    written = load_adapter(run.path(ADAPTER))
    for name, factors in adapter.factors.items():
        again = written.factors.get(name, ())
        if len(again) != 2 or not all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(factors, again)):
            raise _not_as_measured(run, f"its adapter is not the one that was merged, at {name}")
    if written.masked and merge == "masked" and written.mask != mask_digest(model, written.factors):
        raise _not_as_measured(run, "the merged model has other zeros than the adapter was trained on")


def _not_as_measured(run: run_folder.Run, why: str) -> PftoolsError:
    return PftoolsError(
        f"what {run.folder} would load is not what was measured, as {why}: nothing is sealed; execute the "
        "notebook again from the cell with models.load_for."
    )

"""What a decoder is made of: its layers, and the matrices that are pruned and counted.

"The linear weights" of a model are the matrices of the linear modules inside the decoder layers, fused
experts included. Embeddings, norms and the head are never pruned and never counted (as in Wanda and
SparseGPT).
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from pftools.errors import PftoolsError

if TYPE_CHECKING:
    import torch


def decoder_layers(model: torch.nn.Module) -> tuple[str, torch.nn.ModuleList]:
    """The name and the list of the decoder layers: the outermost `ModuleList` that holds `nn.Linear` modules.

    Raises:
        PftoolsError: the model has no such list, so it is not a decoder that pftools knows how to walk.
    """
    import torch

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module):
            if any(isinstance(inner, torch.nn.Linear) for inner in module[0].modules()):
                return name, module
    raise PftoolsError(
        f"{type(model).__name__} has no list of decoder layers with nn.Linear modules: pftools prunes "
        "decoder-only language models such as Llama, Mistral, Qwen, Gemma, Phi, OPT or GPT-NeoX."
    )


def linear_modules(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The linear modules inside the decoder layers, by their full name, in the model's order."""
    import torch

    prefix, layers = decoder_layers(model)
    return {
        f"{prefix}.{name}": module
        for name, module in layers.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def fused_experts(module: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The modules that hold the experts of a mixture in 3-D parameters, by name within ``module``.

    The parameters have the shape (experts, outputs, inputs), as in transformers 5.
    """
    return {
        name: inner
        for name, inner in module.named_modules()
        if getattr(getattr(inner, "down_proj", None), "ndim", 0) == 3 and hasattr(inner, "num_experts")
    }


def linear_weights(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The weights that are pruned and counted, by full parameter name.

    Linear modules have matrices (outputs, inputs), fused experts 3-D parameters (experts, outputs, inputs).
    """
    prefix, layers = decoder_layers(model)
    names = [f"{name}.weight" for name in linear_modules(model)]
    for name, module in fused_experts(layers).items():
        names += [f"{prefix}.{name}.{part}" for part, _ in module.named_parameters(recurse=False)]
    return {name: model.get_parameter(name) for name in names}


def measured_sparsity(model: torch.nn.Module) -> float:
    """Zeros / size over the linear weights, between 0 and 1: what is there, not what was asked for."""
    weights = linear_weights(model).values()
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return zeros / sum(weight.numel() for weight in weights)


def fingerprint(model: torch.nn.Module) -> str:
    """A digest of all parameters: models with the same weights, bit by bit, have the same one.

    Rows are combined by exclusive or on the device where they are (`torch.hash_tensor`), and sha256 goes over
    these: a third of a second for 100 million weights on a CPU. A permutation inside a row is not seen.
    """
    import torch

    found = hashlib.sha256()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            rows = torch.hash_tensor(
                weight.detach().reshape(len(weight), -1) if weight.dim() else weight[None, None], dim=1
            )
            found.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            found.update(rows.cpu().numpy().tobytes())
    return found.hexdigest()

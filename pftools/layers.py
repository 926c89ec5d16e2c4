"""What a decoder is made of: its layers, and the matrices that are pruned and counted. The one place that
knows.

"The weights" of a model are the matrices that its decoder layers multiply hidden states with: of linear
modules, of GPT-2's `Conv1D`, of stacked experts. Embeddings, norms and the head are never pruned and never
counted (the convention of Wanda and SparseGPT); nor are the small parts in `_SMALL_PARTS`: routers, short
convolutions, what a recurrence decays by. Layouts are told apart here, not families. A decoder layer that
holds a matrix in a layout that is not known is an error, since it would be neither pruned nor counted."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pftools.errors import PftoolsError
from pftools.mapped import in_turn

if TYPE_CHECKING:
    import torch

# Stacked experts: parameters (experts, outputs, inputs), or (experts, inputs, outputs) where a module is
# transposed.
_EXPERTS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
# {module class: {parameter: (attribute that says how many matrices it stacks, whether inputs come first)}}
_STACKED = {
    "DbrxExpertGLU": {name: ("moe_num_experts", name == "w2") for name in ("w1", "v1", "w2")},
    "DeepseekV4GroupedLinear": {"weight": ("n_groups", False)},
    "RecurrentGemmaRglru": {
        name: ("num_attention_heads", True) for name in ("input_gate_weight", "recurrent_gate_weight")
    },
}
# Subclasses of nn.Linear that compute what it computes.
_PLAIN_SUBCLASSES = ("FalconLinear",)
# Module classes and parameters that are known, small, and neither pruned nor counted.
_SMALL_PARTS = re.compile(
    r"\w*Router|\w*Norm|\w*HyperConnection|\w*Relative(PositionBias|Logits)|Embedding|Conv[123]d"
    r"|\w*\.(\w*bias|\w*scale|query|static_weight|A_log|D|[xd]t?_proj_weight)"
)


@dataclass(frozen=True)
class Matrix:
    """One matrix that counts.

    name: of its module within the layer, with a number where several are stacked. parameter: the parameter
    that holds it, within the layer. stack: (which, of how many). transposed: the parameter is laid out
    (inputs, outputs)."""

    name: str
    parameter: str
    stack: tuple[int, int] | None = None
    transposed: bool = False

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The matrix as a view (outputs, inputs) of a tensor that has the parameter's shape."""
        if self.stack is not None:
            which, number = self.stack
            tensor = tensor.view(number, -1, tensor.shape[-1])[which]
        return tensor.t() if self.transposed else tensor

    def weight(self, layer: torch.nn.Module) -> torch.Tensor:
        """Its weights in a layer, (outputs, inputs), without gradient."""
        return self.of(layer.get_parameter(self.parameter).detach())

    @property
    def is_expert(self) -> bool:
        """Whether it may rightly see few tokens, or none."""
        return self.stack is not None


# ------------------------------------------------------------------------------------------------------------
# The decoder


def decoder_layers(model: torch.nn.Module) -> tuple[str, torch.nn.ModuleList]:
    """The name and the list of the decoder layers: the outermost `ModuleList` of the text model that holds
    matrices.

    Raises:
        PftoolsError: the model has no such list, so it is not a decoder that pftools knows how to walk.
    """
    import torch

    for name, module in _text_modules(model):
        if isinstance(module, torch.nn.ModuleList) and len(module):
            if any(is_linear(inner) or _stacked(inner) for inner in module[0].modules()):
                return name, module
    raise PftoolsError(
        f"{type(model).__name__} has no list of decoder layers with linear modules: pftools prunes "
        "decoder-only language models such as Llama, Mistral, Qwen, Gemma, Phi, OPT or GPT-2."
    )


def _text_modules(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The modules of a model by name, without its towers for images and sound: models that have another
    configuration."""
    config: Any = getattr(model, "config", None)
    own = {type(config)}
    if hasattr(config, "get_text_config"):
        own.add(type(config.get_text_config(decoder=True)))
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop(0)
        yield name, module
        inner = [(f"{name}.{child}".lstrip("."), found) for child, found in module.named_children()]
        waiting = [
            (place, found)
            for place, found in inner
            if not hasattr(found, "base_model_prefix") or type(getattr(found, "config", None)) in own
        ] + waiting


def is_linear(module: torch.nn.Module) -> bool:
    """Whether a module is linear: an `nn.Linear` that is no router, or GPT-2's `Conv1D`."""
    import torch

    name = type(module).__name__
    return (isinstance(module, torch.nn.Linear) and not name.endswith("Router")) or (
        name == "Conv1D" and hasattr(module, "nf")
    )


def linear_modules(model: torch.nn.Module) -> dict[str, Any]:
    """The linear modules inside the decoder layers, by their full name, in the model's order.

    Without routers, stacked matrices, and subclasses that compute something else.
    """
    prefix, layers = decoder_layers(model)
    return {
        f"{prefix}.{name}": module
        for name, module in layers.named_modules()
        if is_linear(module) and not _stacked(module) and _counted(module)
    }


def rows_of(module: Any) -> torch.Tensor:
    """The weight of a linear module as (outputs, inputs), a view; GPT-2's `Conv1D` stores it the other way
    round."""
    return module.weight.t() if type(module).__name__ == "Conv1D" else module.weight


# ------------------------------------------------------------------------------------------------------------
# The matrices of a layer


def matrices(layer: torch.nn.Module) -> dict[str, Matrix]:
    """The matrices of a decoder layer that are pruned and counted, by name.

    Raises:
        PftoolsError: the layer holds a matrix in a layout that is not known.
    """
    found: dict[str, Matrix] = {}
    seen: set[int] = set()
    for place, module in layer.named_modules():
        known = _counted(module)
        for leaf, weight in module.named_parameters(recurse=False):
            path = f"{place}.{leaf}".lstrip(".")
            if id(weight) in seen or leaf not in known:
                if leaf not in known and not _is_small(module, leaf, weight):
                    raise PftoolsError(
                        f"{path} of {type(layer).__name__} is a matrix in a layout that is not known "
                        f"({type(module).__name__}, {tuple(weight.shape)}): it would be neither pruned nor "
                        "counted, so this model cannot be pruned."
                    )
                continue
            seen.add(id(weight))
            number, transposed = known[leaf]
            name = path.removesuffix(".weight")
            if number is None:
                found[name] = Matrix(name, path, None, transposed)
            else:
                parent, _, last = name.rpartition(".")
                for which in range(number):
                    single = f"{parent}.{which}.{last}" if parent else f"{which}.{last}"
                    found[single] = Matrix(single, path, (which, number), transposed)
    return found


def _counted(module: torch.nn.Module) -> dict[str, tuple[int | None, bool]]:
    """{parameter of the module itself: (how many matrices it stacks, whether inputs come first)}"""
    import torch

    if stacked := _stacked(module):
        return stacked
    if not is_linear(module):
        return {}
    if type(module).__name__ == "Conv1D":
        return {"weight": (None, True)}
    plain = type(module).forward is torch.nn.Linear.forward or type(module).__name__ in _PLAIN_SUBCLASSES
    return {"weight": (None, False)} if plain else {}


def _stacked(module: torch.nn.Module) -> dict[str, tuple[int | None, bool]]:
    """`_counted`, of a module that stacks matrices."""
    if known := _STACKED.get(type(module).__name__):
        return {leaf: (getattr(module, of), first) for leaf, (of, first) in known.items()}
    own = {name: weight for name, weight in module.named_parameters(recurse=False) if weight.ndim == 3}
    if set(own) & set(_EXPERTS):
        first = _inputs_first(module, own)
        return {name: (len(weight), first) for name, weight in own.items() if name in _EXPERTS}
    if "weight" in own and hasattr(module, "num_experts"):
        return {"weight": (len(own["weight"]), False)}
    return {}


def _inputs_first(module: torch.nn.Module, own: dict[str, Any]) -> bool:
    """Whether experts are laid out (experts, inputs, outputs)."""
    if hasattr(module, "is_transposed"):
        return bool(module.is_transposed)
    if "gate_up_proj" in own and "down_proj" in own:
        return own["gate_up_proj"].shape[1] == own["down_proj"].shape[2]
    return False


def _is_small(module: torch.nn.Module, leaf: str, weight: torch.Tensor) -> bool:
    if sum(size > 1 for size in weight.shape) < 2:
        return True
    name = type(module).__name__
    return any(_SMALL_PARTS.fullmatch(text) for text in (name, f"{name}.{leaf}"))


def linear_weights(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that are pruned and counted, by full name.

    Raises:
        PftoolsError: a layer holds a matrix in a layout that is not known.
    """
    prefix, layers = decoder_layers(model)
    weights: dict[str, torch.nn.Parameter] = {}
    known = set()
    for index, layer in enumerate(layers):
        for matrix in matrices(layer).values():
            weight = layer.get_parameter(matrix.parameter)
            name = f"{prefix}.{index}.{matrix.parameter}"
            if name in weights or id(weight) not in known:
                known.add(id(weight))
                weights[name] = weight
    return weights


def uncounted_weights(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters of two and more dimensions in the decoder layers that are neither pruned nor counted."""
    prefix, layers = decoder_layers(model)
    counted = {id(weight) for weight in linear_weights(model).values()}
    return {
        f"{prefix}.{name}": weight
        for name, weight in layers.named_parameters()
        if id(weight) not in counted and sum(size > 1 for size in weight.shape) > 1
    }


def measured_sparsity(model: torch.nn.Module) -> float:
    """Zeros / size over the linear weights of the decoder layers, between 0 and 1: what is there, not what
    was asked."""
    weights = linear_weights(model)
    zeros = sum(int((weight == 0).sum()) for _, weight in in_turn(weights.items()))
    return zeros / sum(weight.numel() for weight in weights.values())


def fingerprint(model: torch.nn.Module) -> str:
    """A digest of all parameters: models with the same weights, bit by bit, have the same one.

    Rows are combined by exclusive or on the device where they are (`torch.hash_tensor`), and sha256 goes over
    these: a third of a second for 100 million weights on a CPU. A permutation inside a row is not seen.
    """
    import torch

    found = hashlib.sha256()
    with torch.no_grad():
        for name, weight in in_turn(model.named_parameters()):
            rows = torch.hash_tensor(
                weight.detach().reshape(len(weight), -1) if weight.dim() else weight[None, None], dim=1
            )
            found.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            found.update(rows.cpu().numpy().tobytes())
    return found.hexdigest()

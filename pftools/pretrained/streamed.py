"""A model that is larger than the memory: its weights lie in a scratch file, and layers are used one by one.

It is an ordinary model of transformers (`placement: stream`). Weights are read from safetensors a layer at a
time, as `on_disk` reads them, in the dtype of the computation, and put into a `mapped.Scratch`. On a CPU a
layer's weights are let go of after it has run. With a GPU, embeddings, norms and head live there, and the
matrices of a layer are copied there for as long as it runs; where there is room, some layers stay.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pftools.layers import decoder_layers
from pftools.mapped import Scratch, is_mapped, release, room_for
from pftools.pretrained.base_models import cache_folder
from pftools.pretrained.on_disk import OnDisk

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Smaller parameters stay in memory: norms, biases.
_LEAST = 2**16
_SOURCE = "pftools_source"  # the attribute of a model that holds its `OnDisk`


def stream(
    name: str, dtype: torch.dtype, device: str, trust_remote_code: bool, resident: int = 0
) -> PreTrainedModel:
    """A model whose matrices lie in a scratch file.

    Args:
        name: a model in Hugging Face format, with safetensors.
        dtype: of the computation, and of the file.
        device: where layers are computed.
        resident: how many layers, from the first one, are on the device all the time, and not in the file.

    Raises:
        PftoolsError: as `OnDisk`, or too little room on the disk of the user's cache.
    """
    source = OnDisk(name, dtype, "cpu", trust_remote_code)
    model = source.model
    in_file = _in_file(model, resident, everything=device == "cpu")
    parameters = {key for key, _ in model.named_parameters()}
    sizes = room_for(model.get_parameter(key) for key in in_file)
    scratch = Scratch(sizes, cache_folder() / "scratch")
    for names in source.parts():
        source.load(names)
        for key in names & parameters:
            weight = model.get_parameter(key)
            weight.data = scratch.place(weight.data) if key in in_file else weight.data.to(device)
    _tie(model)
    source.check_whole()
    _to_device(model, device)
    _add_hooks(model, device)
    _add_generation_config(model, source.folder)
    vars(model)[_SOURCE] = source
    return model


def source_of(model: nn.Module) -> OnDisk | None:
    """The files that a streamed model was read from; None for any other model."""
    return vars(model).get(_SOURCE)


def _in_file(model: PreTrainedModel, resident: int, *, everything: bool) -> set[str]:
    """The parameters that go to the file: all large ones, or those of the layers only; none of resident
    layers."""
    prefix, _ = decoder_layers(model)
    large = {name for name, value in model.named_parameters() if value.numel() >= _LEAST}
    staying = tuple(f"{prefix}.{index}." for index in range(resident))
    return {
        name
        for name in large
        if not name.startswith(staying) and (everything or name.startswith(f"{prefix}."))
    }


def _tie(model: PreTrainedModel) -> None:
    """Tie the head to the embeddings as transformers does: where both are stored and differ, they stay so."""
    head: Any = model.get_output_embeddings()
    embeddings: Any = model.get_input_embeddings()
    configs = model.config, model.config.get_text_config()
    tied = any(getattr(config, "tie_word_embeddings", False) for config in configs)
    if tied and head is not None and not head.weight.is_meta and head.weight is not embeddings.weight:
        if embeddings.weight.is_meta:  # only the head is stored
            embeddings.weight = head.weight
        elif not torch.equal(head.weight, embeddings.weight):
            return
    model.tie_weights()


def _to_device(model: PreTrainedModel, device: str) -> None:
    """Move what is not in the file."""
    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if not is_mapped(tensor):
                tensor.data = tensor.data.to(device)


def _add_generation_config(model: PreTrainedModel, folder: Path) -> None:
    from transformers import GenerationConfig

    model.name_or_path = str(folder)
    if model.can_generate() and (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)


# ------------------------------------------------------------------------------------------------------------
# While a layer runs


def _add_hooks(model: PreTrainedModel, device: str) -> None:
    inside = set()
    for layer in decoder_layers(model)[1]:
        _Visit(device).hook(layer)
        inside |= set(layer.modules())
    for module in model.modules():
        if module not in inside and any(is_mapped(weight) for weight in module.parameters(recurse=False)):
            _Visit(device).hook(module)


class _Visit:
    """The weights of one module: on the device while it runs, and back in the file afterwards."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.homes: list[tuple[nn.Parameter, torch.Tensor]] = []

    def hook(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(self.begin)
        module.register_forward_hook(self.end, always_call=True)

    def begin(self, module: nn.Module, *_: Any) -> None:
        if "forward" in vars(module):  # a stand-in that computes nothing
            return
        with torch._C.DisableTorchFunction():  # whoever watches the uses of weights does not mean this one
            for weight in module.parameters():
                if is_mapped(weight):
                    self.homes.append((weight, weight.data))
                    weight.data = weight.data.to(self.device)

    def end(self, *_: Any) -> None:
        with torch._C.DisableTorchFunction():
            for weight, home in self.homes:
                weight.data = home
                release(home)
        self.homes.clear()

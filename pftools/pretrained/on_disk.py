"""A model in safetensors files, whose layers are loaded one at a time and written back one at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from pftools.errors import PftoolsError
from pftools.files import write_json
from pftools.layers import decoder_layers
from pftools.pretrained.base_models import model_source, resolve_dtype
from pftools.pretrained.suitable import skeleton, unsuitable_folder

INDEX = "model.safetensors.index.json"
# What may stand beside weights; other files may be the same weights in another format.
_BESIDE = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py", ".md", "")


class OnDisk:
    """A model's skeleton without weights, and the files that its weights come from: a `source.Source`."""

    def __init__(
        self, name: str | Path, dtype: str | torch.dtype, device: str, trust_remote_code: bool
    ) -> None:
        from transformers import AutoConfig
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.utils import logging

        logging.disable_progress_bar()  # transformers draws one for every layer that is loaded
        self.folder, self.device = _folder_of(str(name)), device
        config = AutoConfig.from_pretrained(self.folder, trust_remote_code=trust_remote_code)
        if why := unsuitable_folder(self.folder, config.to_dict(), trust_remote_code):
            raise PftoolsError(
                f"the model {str(name)!r} {why}: give a causal language model with plain weights."
            )
        stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        self.dtype = stored if dtype == "auto" else resolve_dtype(dtype)
        self.model = skeleton(self.folder, dtype=self.dtype, trust_remote_code=trust_remote_code)
        self.prefix, self.layers = decoder_layers(self.model)
        self.files = _files_by_name(self.folder)
        # How names and shapes on disk become the model's: transformers stacks a mixture's experts, for one.
        self.conversions = get_model_conversion_mapping(self.model)
        self.homes = self._homes()
        self.written: dict[str, str] = {}

    def _homes(self) -> dict[str, str]:
        """{name on disk: the parameter of the model that it becomes, or becomes a part of}"""
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        renamings = [entry for entry in self.conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self.conversions if isinstance(entry, WeightConverter)]
        state = self.model.state_dict()
        found = {}
        for name in self.files:
            for rules in ((renamings, converters), ([], [])):  # as transformers: a name may stand already
                found[name] = rename_source_key(name, *rules, self.model.base_model_prefix, state)[0]
                if found[name] in state or name not in state:
                    break
        return found

    def _split_off(self) -> set[str]:
        """Parameters that transformers splits off a tensor on disk, beside the first, its home."""
        return {
            home.replace(first, other)
            for first, *others in (getattr(entry, "target_patterns", ["?"]) for entry in self.conversions)
            for other in others
            for home in self.homes.values()
            if first in home
        }

    def parts(self) -> Iterator[set[str]]:
        """The names of all that is stored, in parts of a layer's size: what is outside of layers, one by one,
        then layer after layer."""
        on_disk = set(self.homes.values()) | self._split_off()  # a tied head is not
        stored = on_disk & set(self._stored())
        inside = {name for name in stored if name.startswith(f"{self.prefix}.")}
        yield from ({name} for name in sorted(stored - inside))
        for index in range(len(self.layers)):
            yield {name for name in inside if name.startswith(f"{self.prefix}.{index}.")}

    @contextmanager
    def entrance(self) -> Iterator[None]:
        """Context in which all pre-layer weights are loaded: all that is not in the layers or the head."""
        head, inward = self.model.get_output_embeddings(), self.model.get_input_embeddings().weight
        outside = {
            name
            for name, value in self._stored().items()
            if not name.startswith(f"{self.prefix}.")
            and (value is inward or head is None or value is not head.weight)
        }
        self.load(outside, "cpu")
        try:
            yield
        finally:
            self._drop(outside)

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """One layer with its weights, on the device; they are dropped afterwards."""
        names = {name for name in self._stored() if name.startswith(f"{self.prefix}.{index}.")}
        self.load(names, self.device)
        layer = self.layers[index].to(self.device)  # its buffers too
        try:
            yield layer.requires_grad_(False)
        finally:
            self._drop(names)

    def _stored(self) -> dict[str, torch.Tensor]:
        """All that a checkpoint of the model holds, by name: parameters, and buffers that are kept."""
        return self.model.state_dict(keep_vars=True)

    def load(self, names: set[str], device: str = "cpu") -> None:
        """Give parameters and buffers their values, by transformers' own loader.

        Raises:
            PftoolsError: the checkpoint lacks one of them.
        """
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        state = self._read([name for name, home in self.homes.items() if home in names])
        config = LoadStateDictConfig(
            dtype=self.dtype,
            dtype_plan=self.model._get_dtype_plan(self.dtype),
            device_map={"": device},
            weight_mapping=self.conversions,  # type: ignore[arg-type]
        )
        convert_and_load_state_dict_in_model(self.model, state, config)
        self.check_whole(names)

    def check_whole(self, names: Collection[str] | None = None) -> None:
        """Refuse a checkpoint that lacks one of these parameters; None: of all.

        Raises:
            PftoolsError: it does.
        """
        weights = [
            (name, weight) for name, weight in self.model.named_parameters() if names is None or name in names
        ]
        if missing := [name for name, weight in weights if weight.is_meta]:
            raise PftoolsError(
                f"{self.folder} holds nothing that becomes {missing[0]}: the checkpoint is not whole, or of "
                "another model."
            )

    def _read(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Tensors by their names on disk, copied: pages of a file that stays open count as memory."""
        from safetensors import safe_open

        found: dict[str, torch.Tensor] = {}
        for file in sorted({self.files[name] for name in names}):
            with safe_open(file, framework="pt") as opened:
                found |= {name: opened.get_tensor(name).clone() for name in names if self.files[name] == file}
        return found

    def _drop(self, names: set[str]) -> None:
        """Forget the weights of these names; buffers are small, and stay."""
        for name in names & {name for name, _ in self.model.named_parameters(remove_duplicate=False)}:
            owner, _, leaf = name.rpartition(".")
            forgotten = torch.empty_like(self.model.get_parameter(name), device="meta")
            module = self.model.get_submodule(owner)
            module._parameters[leaf] = nn.Parameter(forgotten, requires_grad=False)

    def write_layer(self, folder: Path, index: int) -> None:
        """The layer that is open, as a shard, under the names that it has on disk."""
        from transformers.core_model_loading import revert_weight_conversion

        own = {
            f"{self.prefix}.{index}.{name}": value for name, value in self.layers[index].state_dict().items()
        }
        homes = set(self.homes.values()) | self._split_off()
        stored = revert_weight_conversion(self.model, {name: own[name] for name in own if name in homes})
        self._save(
            {name: tensor.to("cpu").contiguous() for name, tensor in stored.items()},
            folder,
            f"layer-{index:05d}",
        )

    def write_rest(self, folder: Path) -> None:
        """Write all that is not in the layers, the index of all shards, and every other file."""
        rest = [name for name, home in self.homes.items() if not home.startswith(f"{self.prefix}.")]
        for number, name in enumerate(rest):
            self._save(
                {key: self._cast(tensor) for key, tensor in self._read([name]).items()},
                folder,
                f"rest-{number:05d}",
            )
        total = sum((folder / file).stat().st_size for file in set(self.written.values()))
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": self.written})
        for path in sorted(self.folder.iterdir()):
            if path.is_file() and path.suffix in _BESIDE and path.name not in (INDEX, "run.json"):
                shutil.copy(path, folder / path.name)
        self.model.config.dtype = self.dtype
        self.model.config.save_pretrained(folder)

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def _save(self, tensors: dict[str, torch.Tensor], folder: Path, part: str) -> None:
        from safetensors.torch import save_file

        file = f"model-{part}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        self.written |= dict.fromkeys(tensors, file)


def _folder_of(name: str) -> Path:
    source = model_source(name)
    if not Path(source).is_dir():
        from huggingface_hub import snapshot_download

        source = snapshot_download(
            source, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.py"]
        )
    return Path(source)


def _files_by_name(folder: Path) -> dict[str, str]:
    """{name of a tensor on disk: the file that holds it}"""
    from safetensors import safe_open

    if (folder / INDEX).exists():
        return {
            name: str(folder / file)
            for name, file in json.loads((folder / INDEX).read_text())["weight_map"].items()
        }
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise PftoolsError(
            f"{folder} holds no safetensors files: use placement 'one', or load the model once where it fits "
            "and write it with its save_pretrained."
        )
    found: dict[str, str] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), str(path))
    return found

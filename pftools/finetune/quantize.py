"""A frozen base in 8 bit or NF4 (bitsandbytes) while it is trained on.

All linear weights of the decoder layers are quantized, adapted or not, as `load_in_8bit` does it; embeddings
and head are not. The plain weights wait on the CPU meanwhile, or in the file of a streamed model, since the
merge goes into them.

A merged model has the update of a training on a quantized base, entry by entry. It does not have the rounding
of the base, so its perplexity is not the one in training: `benchmarks/merge.py` measures both.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pftools.errors import PftoolsError
from pftools.finetune.update import remember_kept
from pftools.layers import linear_modules, rows_of
from pftools.mapped import is_mapped, release

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BASES = ("plain", "8bit", "nf4")


@contextmanager
def quantized(
    model: PreTrainedModel, base: str, *, keep_masks_of: Collection[str] = (), plain: Collection[str] = ()
) -> Iterator[None]:
    """The linear modules of a model replaced by bitsandbytes', and put back at the end.

    Args:
        base: `plain` (nothing is done), `8bit` or `nf4`.
        keep_masks_of: names of modules whose zeros are remembered beside the quantized weight.
        plain: names of modules that stay as they are, since the model reads their weight itself.

    Raises:
        PftoolsError: bitsandbytes is not installed.
    """
    if base == "plain":
        yield
        return
    check_bitsandbytes(base)
    originals = {name: module for name, module in linear_modules(model).items() if name not in plain}
    homes = {name: module.weight.device for name, module in originals.items()}
    try:
        for name, module in originals.items():
            device = model.device if is_mapped(module.weight) else homes[name]
            new = _bitsandbytes_linear(module, base, device)
            if name in keep_masks_of:
                remember_kept(new, (rows_of(module).detach() != 0).to(device))
            model.set_submodule(name, new)
            if is_mapped(module.weight):
                release(module.weight)
            else:
                module.to("cpu")
        yield
    finally:
        for name, module in originals.items():
            model.set_submodule(name, module if is_mapped(module.weight) else module.to(homes[name]))


def check_bitsandbytes(base: str) -> None:
    """Refuse a quantized base where bitsandbytes is missing.

    Raises:
        PftoolsError: bitsandbytes is not installed.
    """
    if base == "plain":
        return
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise PftoolsError(
            f"base {base!r} needs bitsandbytes, which is not installed: pip install bitsandbytes, or use "
            "'plain'."
        ) from None


def _bitsandbytes_linear(module: Any, base: str, device: torch.device) -> nn.Linear:
    import bitsandbytes as bnb

    # bitsandbytes quantizes on the way from the CPU to the device.
    weight = rows_of(module).detach().cpu().clone(memory_format=torch.contiguous_format)
    shape, bias = (weight.shape[1], weight.shape[0]), module.bias
    new: nn.Linear
    if base == "8bit":
        new = bnb.nn.Linear8bitLt(*shape, bias=bias is not None, has_fp16_weights=False, threshold=6.0)
        new.weight = bnb.nn.Int8Params(weight.half(), requires_grad=False, has_fp16_weights=False)
    else:
        new = four_bit = bnb.nn.Linear4bit(
            *shape, bias=bias is not None, compute_dtype=module.weight.dtype, quant_type="nf4"
        )
        new.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=four_bit)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return new.to(device)

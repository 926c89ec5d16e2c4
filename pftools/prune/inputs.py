"""How large the inputs of a layer's matrices are: column norms, or second moments, measured while the layer
runs.

Products are watched, not modules: a stacked parameter holds one matrix for every expert, each with inputs of
its own, and some models multiply with a module's weight themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pftools.errors import PftoolsError
from pftools.layers import Matrix, decoder_layers, matrices
from pftools.prune.calls import Batch, Enough
from pftools.prune.source import device_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Numbers that the widest activation of one forward may hold: few on a CPU, whose caches they should stay in,
# many elsewhere.
_BATCH_BUDGET = 1_000_000
_BATCH_BUDGET_ELSEWHERE = 32_000_000
# Tokens squared at a time: few enough to stay in a core's cache.
_CHUNK = 256
# About so many calibration tokens are kept to measure the error of outputs on.
_SAMPLE = 256
# Columns of a block of X^T X: of the symmetric product, only blocks on and above the diagonal are computed.
_GRAM_BLOCK = 256
# {product: (place of the inputs, place of the weight, whether that is (outputs, inputs))}
_PRODUCTS = {
    F.linear: (0, 1, True),
    torch.addmm: (1, 2, False),
    torch.baddbmm: (1, 2, False),
    **dict.fromkeys(
        (
            torch.matmul,
            torch.mm,
            torch.bmm,
            torch.Tensor.matmul,
            torch.Tensor.mm,
            torch.Tensor.bmm,
            torch.Tensor.__matmul__,
        ),
        (0, 1, False),
    ),
}


def widest_output(layer: nn.Module) -> int:
    """Numbers that the widest matrix of a layer gives for a token."""
    return max(len(matrix.weight(layer)) for matrix in matrices(layer).values())


def batch_size_for(model: PreTrainedModel, block_length: int, n_blocks: int) -> int:
    """Blocks a forward: as many as keep the widest activation of a layer within the budget of its device, at
    least 1."""
    layer = decoder_layers(model)[1][0]
    budget = _BATCH_BUDGET if model.device.type in ("cpu", "meta") else _BATCH_BUDGET_ELSEWHERE
    return max(1, min(n_blocks, budget // (block_length * widest_output(layer))))


def squared_column_sums(x: torch.Tensor) -> torch.Tensor:
    """Sum of squares of every column over all tokens, in float32: (..., columns) -> (columns,)."""
    total = torch.zeros(x.shape[-1], device=x.device)
    for part in x.reshape(-1, x.shape[-1]).split(_CHUNK if x.device.type == "cpu" else x.numel()):
        total += part.float().square().sum(dim=0)
    return total


def add_gram(total: torch.Tensor, x: torch.Tensor) -> None:
    """Add X^T X to ``total`` (columns, columns), float32, on and above the diagonal blocks only.

    Products and sums are float32. On a CPU that multiplies bf16, its faster unit forms them from bf16 inputs:
    these products are exact and summed in float32, so nothing is lost."""
    flat = x.reshape(-1, x.shape[-1])
    with _bf16_unit(flat):
        flat = flat.float()
        for start in range(0, flat.shape[1], _GRAM_BLOCK):
            stop = start + _GRAM_BLOCK
            total[start:stop, start:].addmm_(flat[:, start:stop].t(), flat[:, start:])


@contextmanager
def _bf16_unit(x: torch.Tensor) -> Iterator[None]:
    if x.dtype != torch.bfloat16 or x.device.type != "cpu":
        yield
        return
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # set at import
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


class InputMeter(TorchFunctionMode):
    """Measures the inputs of a layer's matrices while the layer runs within it: column norms, or X^T X.

    Matrices that are given the same tensor (q, k and v; gate and up) are measured once, under the name of the
    first. Once every matrix has been reached, and the layer's output is not wanted, the forward ends: before
    the product of the last one."""

    def __init__(self, layer: nn.Module, *, gram: bool = False, sample_of: int = 0) -> None:
        """gram: X^T X instead of norms. sample_of: keep a sample of the inputs of so many tokens, as they
        come; 0: none."""
        super().__init__()
        self.layer, self.matrices, self.gram = layer, matrices(layer), gram
        # An odd distance, so that a sample does not hold the same positions of every block.
        self.every = max(1, sample_of // _SAMPLE) | 1 if sample_of else 0
        self.samples: dict[str, list[torch.Tensor]] = {}
        self.totals: dict[str, torch.Tensor] = {}
        self.leader: dict[str, str] = {}
        self.tokens: dict[str, int] = dict.fromkeys(self.matrices, 0)
        self.stop_early = False
        self._now: dict[str, torch.Tensor] = {}
        self._reached: set[str] = set()
        # {where a parameter's memory begins: {where a matrix begins in it: the matrix}}
        self._homes: dict[int, dict[int, Matrix]] = {}
        for matrix in self.matrices.values():
            view = matrix.weight(layer)
            home = self._homes.setdefault(view.untyped_storage().data_ptr(), {})
            home[int(view.storage_offset())] = matrix

    def begin(self, *, stop_early: bool) -> None:
        """A new forward begins."""
        self._now, self._reached, self.stop_early = {}, set(), stop_early

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _PRODUCTS:
            inputs, weight, outputs_first = _PRODUCTS[func]
            if len(args) > weight and isinstance(args[weight], torch.Tensor):
                found = self._homes.get(args[weight].untyped_storage().data_ptr())
                if found is not None:
                    self._note(found, args[inputs], args[weight], outputs_first)
                elif not outputs_first and args[inputs].untyped_storage().data_ptr() in self._homes:
                    found = self._homes[args[inputs].untyped_storage().data_ptr()]  # W x instead of x W^T
                    self._note(found, args[weight].transpose(-1, -2), args[inputs], True)
        return func(*args, **(kwargs or {}))

    def _note(
        self, home: dict[int, Matrix], inputs: torch.Tensor, weight: torch.Tensor, outputs_first: bool
    ) -> None:
        """``inputs`` are about to be multiplied with ``weight``, a view of a parameter."""
        if weight.dim() > 2:  # a matrix for each first index
            for which in range(len(weight)):
                self._note(home, inputs[which], weight[which], outputs_first)
            return
        matrix = home.get(int(weight.storage_offset()))
        view = weight if outputs_first else weight.t()
        if (
            matrix is None
            or view.stride() != matrix.weight(self.layer).stride()
            or (view.shape != matrix.weight(self.layer).shape)
        ):
            name = matrix.name if matrix else next(iter(home.values())).name
            raise PftoolsError(
                f"{name} of {type(self.layer).__name__} is multiplied in another way than it is "
                "laid out: this model cannot be pruned."
            )
        self._reach(matrix, inputs)
        if self.stop_early and len(self._reached) == len(self.matrices):
            raise Enough

    def _reach(self, matrix: Matrix, x: torch.Tensor) -> None:
        name = matrix.name
        leader = next((other for other, tensor in self._now.items() if tensor is x), name)
        if self.leader.setdefault(name, leader) != leader:
            raise self._inputs_of_its_own(name)
        if leader == name:
            self._now[name] = x
            self._measure(name, x)
        # Where all tokens go through all experts, those of the others come multiplied by zero.
        self.tokens[name] += int(x.any(dim=-1).sum()) if matrix.is_expert else x.numel() // x.shape[-1]
        self._reached.add(name)

    def _inputs_of_its_own(self, name: str) -> PftoolsError:
        """The sentence where a matrix shares its input with others, but not always."""
        shared = f"the input of {self.leader[name]}" if self.leader[name] != name else "an input of its own"
        how = (
            f"more than once in a forward, and not each time with {shared}"
            if name in self._reached
            else f"with {shared} in one forward and not in another"
        )
        return PftoolsError(
            f"{name} of {type(self.layer).__name__} is multiplied {how}, so its inputs cannot be measured: "
            "prune by magnitude, which measures none."
        )

    def _measure(self, name: str, x: torch.Tensor) -> None:
        if not self.gram:
            self.totals[name] = self.totals.get(name, 0) + squared_column_sums(x)
            if self.every:
                first = -self.tokens[name] % self.every
                self.samples.setdefault(name, []).append(
                    x.reshape(-1, x.shape[-1])[first :: self.every].clone()
                )
            return
        if name not in self.totals:
            self.totals[name] = torch.zeros(x.shape[-1], x.shape[-1], device=x.device)
        add_gram(self.totals[name], x)

    def finish(self, place: str) -> Measured:
        """What was measured.

        Raises:
            PftoolsError: an input held NaN or infinity.
        """
        norms, grams = {}, {}
        for name, total in self.totals.items():
            if self.gram:
                total = total.triu_()
                grams[name] = total + total.triu(1).t()
                total = total.diagonal()
            if not torch.isfinite(total).all():
                raise PftoolsError(
                    f"the input of {place}.{name} holds NaN or infinity on the calibration blocks: use dtype "
                    "float32 or bfloat16 (float16 overflows above 65,504), or check the model."
                )
            norms[name] = total.sqrt()
        shared = {name: norms[leader] for name, leader in self.leader.items()}
        samples = {name: torch.cat(parts) for name, parts in self.samples.items()}
        return Measured(shared, grams, self.leader, self.tokens, samples)


@dataclass
class Measured:
    """The inputs of a layer's matrices. Matrices that saw no token are in ``tokens`` only.

    Attributes:
        norms: {matrix: Euclidean norms of its input columns (columns,), float32}.
        grams: {first matrix of those with this input: X^T X (columns, columns), float32}.
        leader: {matrix: the first matrix with the same input}.
        tokens: {matrix: how many tokens it saw}.
        samples: {first matrix: some of these inputs, (tokens, columns), in their own dtype}.
    """

    norms: dict[str, torch.Tensor] = field(default_factory=dict)
    grams: dict[str, torch.Tensor] = field(default_factory=dict)
    leader: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    samples: dict[str, torch.Tensor] = field(default_factory=dict)


def run_layer(
    layer: nn.Module, index: int, batches: list[Batch], *, replace: bool, meter: InputMeter | None = None
) -> None:
    """Run all batches through a layer.

    Args:
        replace: overwrite the batches' hidden states by the layer's outputs. False: the outputs are not
            wanted, and each forward ends as soon as ``meter`` has all inputs.
        meter: measures the inputs of the layer's matrices meanwhile.
    """
    device = device_of(layer)
    for batch in batches:
        call = batch.calls[index].to(device)
        batch.hidden = batch.hidden.to(device)
        if meter is None:
            output = call(layer, batch.hidden)
        else:
            meter.begin(stop_early=not replace)
            try:
                with meter:
                    output = call(layer, batch.hidden)
            except Enough:
                continue
        if replace:
            batch.hidden.copy_(output)

"""The check before a walk: that replaying the layers one by one is what the model does."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from pftools.causal import ahead, pair_of, reading, reads_ahead, tolerance, without_cache
from pftools.errors import PftoolsError
from pftools.layers import decoder_layers
from pftools.memory import ran_out
from pftools.prune.calls import LayerCall, body_of, hidden_of, record, returned_by_layers
from pftools.prune.inputs import InputMeter
from pftools.prune.levers import naming_the_levers
from pftools.prune.source import Source, device_of


def check_replay(source: Source, blocks: torch.Tensor, batch_size: int) -> None:
    """Compare the model's own forward with the replayed calls, layer by layer, before anything is pruned.

    Two rows are read: the block, and the block with another last token, which nothing before it may notice.

    Args:
        blocks: LongTensor (n_blocks, block_length); the first is read.
        batch_size: of the walk, for the advice where memory runs out.

    Raises:
        PftoolsError: a replayed layer gives another output than in the model; hidden states are changed
            between layers; earlier positions depend on later tokens, as in an encoder; or the model itself
            cannot read the block.
    """
    model = source.model
    prefix, layers = decoder_layers(model)
    rows = pair_of(blocks[0]).to(device_of(model.get_input_embeddings()))
    recorded = record(model, rows, returned_by_layers(model, rows))
    check = _Check(source, recorded.calls)
    hooks = []
    for index, layer in enumerate(layers):
        hooks += [
            # before those of a streamed model, so that a layer is opened once, by the check
            layer.register_forward_pre_hook(check.before(index), with_kwargs=True, prepend=True),
            layer.register_forward_hook(check.after(index), with_kwargs=True),
        ]
    try:
        with reading(model, rows.shape[1]):
            body_of(model)(rows, **without_cache(body_of(model)))
    except (MemoryError, RuntimeError) as error:
        at = min(check.done, len(layers) - 1)
        with naming_the_levers(f"{prefix}.{at}", layers[at], blocks.shape, batch_size):
            raise error
    finally:
        for hook in hooks:
            hook.remove()
        check.close()
    if check.done < len(layers):
        raise check.refusal(f"only {check.done} of its {len(layers)} layers are run")


class _Check:
    """The hooks of `check_replay`: a layer is opened when its turn comes, and compared when it is through."""

    def __init__(self, source: Source, calls: list[LayerCall]) -> None:
        self.source, self.calls, self.done = source, calls, 0
        self.opened: ExitStack | None = None
        self.hidden = self.output = torch.empty(0)
        self.replaying = False

    def before(self, index: int) -> Callable[..., Any]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self.replaying:
                return None
            if index != self.done:
                raise self.refusal(f"layer {index} runs after layer {self.done - 1}")
            hidden = args[0] if args else kwargs["hidden_states"]
            if index and not _close(hidden, self.output):
                raise self.refusal(f"hidden states are changed between layers {index - 1} and {index}")
            self.opened = ExitStack()
            device = device_of(self.opened.enter_context(self.source.layer(index)))
            self.hidden = hidden.to(device)

            def move(value: Any) -> Any:
                return value.to(device) if torch.is_tensor(value) else value

            if hidden.device == device:
                return None
            return tree_map(move, args), tree_map(move, kwargs)

        return hook

    def after(self, index: int) -> Callable[..., Any]:
        def hook(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self.replaying:
                return
            self.output = hidden_of(output)
            self.replaying = True
            meter = InputMeter(layer)
            try:
                with meter:
                    replayed = self.calls[index].to(self.hidden.device)(layer, self.hidden)
            except PftoolsError:
                raise
            except Exception as error:
                if ran_out(error):
                    raise
                cause = " ".join(str(error).split())[:120]
                raise self.refusal(f"layer {index} cannot be run alone ({cause})") from error
            finally:
                self.replaying = False
            if not _close(replayed, self.output):
                raise self.refusal(f"layer {index} computes something else when it is run alone")
            if reads_ahead(self.output):
                raise ahead(self.source.model, f"its layer {index}")
            unused = [
                name
                for name, matrix in meter.matrices.items()
                if not (meter.tokens[name] or matrix.is_expert)
            ]
            if unused:
                raise self.refusal(
                    f"{unused[0]} of layer {index} is never multiplied with, as in half of an encoder-decoder"
                )
            self.close()
            self.done += 1

        return hook

    def close(self) -> None:
        """The open layer is closed."""
        if self.opened is not None:
            self.opened.close()
            self.opened = None

    def refusal(self, why: str) -> PftoolsError:
        """The sentence."""
        return PftoolsError(
            f"the layers of {type(self.source.model).__name__} cannot be pruned one after the "
            f"other: {why}; nothing was changed."
        )


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors differ by rounding only; numbers that are not finite are left to the walk."""
    if one.shape != other.shape:
        return False
    other = other.to(one.device)
    scale = other.abs().amax().clamp_min(1e-6)
    return not bool(((one - other).abs() > tolerance(one) * scale).any())

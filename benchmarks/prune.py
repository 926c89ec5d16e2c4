"""Pruning against its own floor and the published walk: time on SmolLM2-135M, 64 x 512 calibration tokens.

    floor        two plain batched forwards of the decoder layers: each batch through all layers
    layerwise    the same in the walk's order, all batches through one layer, then the next: its weights
                 stay in the cache
    wanda        `prune_model`, all masks included
    sparsegpt    `prune_model(method="sparsegpt")`
    seven        `measure_activations`, and then seven sparsities with `inputs="dense"`
    published    the reference walk, restated below as it is published: a sample at a time, a hook for every
                 module, whole sorts
    published sparsegpt    the same with a Hessian for every module and a loop over single columns

    python benchmarks/prune.py [--dtype float32 bfloat16] [--rounds 2] [--blocks 64] [--layers 30] [--store]
    python benchmarks/prune.py --device cuda

On a GPU it is a random Llama of Llama-2-7B's shape on disk, fp16, 128 x 2,048 tokens, streamed. The floors
and the walk run in the same batches.
"""

from __future__ import annotations

import copy
import tempfile
import time
from pathlib import Path

import torch
from _harness import arguments, in_turns, report, seconds
from memory import write_random_llama

from pftools import prune
from pftools.corpora import token_blocks
from pftools.layers import decoder_layers, is_linear
from pftools.models import load_model
from pftools.prune import calls, inputs

SPARSITIES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]


def plain_forwards(model, blocks, batch_size, passes):
    """Every batch through all decoder layers, ``passes`` times: nothing else."""
    layers = decoder_layers(model)[1]
    with calls.inference(model):
        for _ in range(passes):
            for batch in calls.record_batches(model, blocks, batch_size):
                hidden = batch.hidden
                for call, layer in zip(batch.calls, layers):
                    hidden = call(layer, hidden)


def layerwise_forwards(model, blocks, batch_size, passes):
    """All batches through each decoder layer ``passes`` times, in place: nothing else."""
    layers = decoder_layers(model)[1]
    with calls.inference(model):
        batches = calls.record_batches(model, blocks, batch_size)
        for index, layer in enumerate(layers):
            for number in range(passes):
                inputs.run_layer(layer, index, batches, replace=number == passes - 1)


def seven_sparsities(model, blocks):
    """One forward, then every sparsity; the weights are put back before each."""
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    statistics = prune.measure_activations(model, blocks, progress=False)
    for sparsity in SPARSITIES:
        prune.prune_model(
            model, blocks, sparsity=sparsity, inputs="dense", statistics=statistics, progress=False
        )
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(before[name])


# ------------------------------------------------------------------------------------------------------------
# The published walk, restated


def published_walk(model, blocks, *, sparsity=0.5, group=0, sparsegpt=False):
    """Layer by layer, twice over all samples, one at a time; with ``group``, N:M with half of them going."""
    layers = decoder_layers(model)[1]
    with calls.inference(model):
        batches = calls.record_batches(model, blocks, 1)
        states = [batch.hidden for batch in batches]
        for call, layer in zip(batches[0].calls, layers):
            modules = {name: module for name, module in layer.named_modules() if is_linear(module)}
            seen = {
                name: torch.zeros(2 * (module.in_features,)) if sparsegpt else torch.zeros(module.in_features)
                for name, module in modules.items()
            }
            hooks = [
                module.register_forward_hook(_published_hook(seen, name, sparsegpt))
                for name, module in modules.items()
            ]
            for state in states:
                call(layer, state)
            for hook in hooks:
                hook.remove()
            for name, module in modules.items():
                if sparsegpt:
                    _published_sparsegpt(module, seen[name] * 2 / len(states), sparsity)
                else:
                    _published_wanda(module, seen[name] / len(states), sparsity, group)
            states = [call(layer, state) for state in states]


def _published_hook(seen, name, sparsegpt):
    def hook(module, args, output):
        x = args[0].reshape(-1, args[0].shape[-1]).t().float()
        seen[name] += x.matmul(x.t()) if sparsegpt else torch.norm(x, p=2, dim=1) ** 2

    return hook


def _published_wanda(module, squares, sparsity, group):
    scores = module.weight.data.abs() * squares.sqrt().reshape(1, -1)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    if group:
        for start in range(0, scores.shape[1], group):
            lowest = torch.topk(scores[:, start : start + group], group // 2, dim=1, largest=False)[1]
            mask.scatter_(1, start + lowest, True)
    else:
        order = torch.sort(scores, dim=-1, stable=True)[1]
        mask.scatter_(1, order[:, : int(scores.shape[1] * sparsity)], True)
    module.weight.data[mask] = 0


def _published_sparsegpt(module, hessian, sparsity, block=128):
    weight = module.weight.data.clone().float()
    columns = weight.shape[1]
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        part, local = weight[:, start:stop].clone(), inverse[start:stop, start:stop]
        kept, errors = torch.zeros_like(part), torch.zeros_like(part)
        scores = part**2 / local.diagonal().reshape(1, -1) ** 2
        mask = scores <= torch.sort(scores.flatten())[0][int(scores.numel() * sparsity)]
        for column in range(stop - start):
            value = part[:, column]
            new = value.clone()
            new[mask[:, column]] = 0
            kept[:, column] = new
            error = (value - new) / local[column, column]
            part[:, column:] -= error.unsqueeze(1).matmul(local[column, column:].unsqueeze(0))
            errors[:, column] = error
        weight[:, start:stop] = kept
        weight[:, stop:] -= errors.matmul(inverse[start:stop, stop:])
    module.weight.data = weight.to(module.weight.dtype)


# ------------------------------------------------------------------------------------------------------------


def on_cpu(options, dtype):
    """SmolLM2-135M in one dtype: everybody in turns."""
    model, tokenizer = load_model("smollm2-135m", dtype=dtype, device="cpu")
    model.model.layers = model.model.layers[: options.layers]
    blocks = token_blocks(tokenizer, "pydocs", split="calibration", n_blocks=options.blocks, block_length=512)
    batch_size = inputs.batch_size_for(model, 512, options.blocks)
    twin = copy.deepcopy(model)

    def afresh():
        twin.load_state_dict(model.state_dict())  # a copy of 0.3 to 0.5 GB, a tenth of a second
        return twin

    contestants = {
        "floor": lambda: plain_forwards(model, blocks, batch_size, 2),
        "layerwise": lambda: layerwise_forwards(model, blocks, batch_size, 2),
        "wanda": lambda: prune.prune_model(afresh(), blocks, progress=False),
        "sparsegpt": lambda: prune.prune_model(afresh(), blocks, method="sparsegpt", progress=False),
        "seven": lambda: seven_sparsities(afresh(), blocks),
        "published": lambda: published_walk(afresh(), blocks),
        "published sparsegpt": lambda: published_walk(afresh(), blocks, sparsegpt=True),
    }
    contestants = {
        name: work for name, work in contestants.items() if not options.only or name in options.only
    }
    plain_forwards(model, blocks[:2], 1, 1)
    found = in_turns(contestants, rounds=options.rounds)
    pairs = [
        ("wanda", "floor"),
        ("wanda", "layerwise"),
        ("seven", "floor"),
        ("seven", "layerwise"),
        ("published", "floor"),
        ("published", "wanda"),
        ("sparsegpt", "published sparsegpt"),
    ]
    ratios = {
        f"{one} / {other}": round(found[one] / found[other], 3)
        for one, other in pairs
        if one in found and other in found
    }
    report(
        f"pruning SmolLM2-135M in {dtype}{', a part' if options.only else ''}: seconds and ratios",
        {"seconds": {name: round(value, 2) for name, value in found.items()}, **ratios},
        script=__file__,
        device="cpu",
        store=options.store,
        settings={
            "blocks": options.blocks,
            "block_length": 512,
            "batch_size": batch_size,
            "layers": len(model.model.layers),
            "rounds": options.rounds,
        },
    )


def on_cuda(options):
    """A Llama-2-7B shape with random weights, layer by layer from disk."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_random_llama(
            Path(scratch) / "llama",
            torch.float16,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            vocab_size=32000,
            max_position_embeddings=4096,
        )
        blocks = torch.randint(0, 32000, (128, 2048), generator=torch.Generator().manual_seed(0))
        torch.cuda.reset_peak_memory_stats()
        took = seconds(
            lambda: prune.prune_checkpoint(
                folder,
                blocks,
                Path(scratch) / "pruned",
                write="masks",
                device="cuda",
                batch_size=1,
                progress=False,
            ),
            "cuda",
        )
        peak = torch.cuda.max_memory_allocated()
        floor = 2 * _seconds_of_a_forward(folder, blocks)
    report(
        "a Llama-2-7B shape in fp16, streamed: seconds, ratio to two forwards, peak GPU memory",
        {
            "seconds": round(took, 1),
            "two forwards": round(floor, 1),
            "ratio": round(took / floor, 2),
            "peak_GiB": round(peak / 2**30, 2),
        },
        script=__file__,
        device="cuda",
        store=options.store,
        settings={"blocks": 128, "block_length": 2048, "batch_size": 1},
    )


def _seconds_of_a_forward(folder, blocks):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).to("cuda").eval()
    with torch.no_grad():
        model.model(blocks[:1].cuda())
        torch.cuda.synchronize()
        started = time.perf_counter()
        for block in blocks:
            model.model(block[None].cuda())
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=64)
    parser.add_argument(
        "--layers", type=int, default=30, help="the first so many decoder layers only, for development"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        help="some of: floor, layerwise, wanda, sparsegpt, seven, published, 'published sparsegpt'",
    )
    options = parser.parse_args()
    if options.device.startswith("cuda"):
        on_cuda(options)
    else:
        for dtype in options.dtype:
            on_cpu(options, dtype)

"""Peak memory of pruning a model that is larger than the memory it gets: a random Llama of 2.6 billion
parameters in bf16.

The model is written to disk a layer at a time, and pruned from there by `prune_checkpoint` in a process of
its own, whose peak resident set is read from the system. It takes some 6 GB of disk (twice that with
``--write model``), all removed afterwards.

    python benchmarks/memory.py [--write masks] [--method wanda] [--store]
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from _harness import arguments, report

SHAPE = dict(
    hidden_size=2560,
    intermediate_size=8192,
    num_hidden_layers=32,
    num_attention_heads=20,
    num_key_value_heads=4,
    vocab_size=32000,
    max_position_embeddings=4096,
)


def write_random_llama(folder, dtype, **shape):
    """A random Llama in Hugging Face format, a shard a layer; at most one tensor is in memory."""
    from accelerate import init_empty_weights
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**shape, dtype=dtype, tie_word_embeddings=False)
    with init_empty_weights():
        model = LlamaForCausalLM(config)
    folder.mkdir(parents=True)
    generator, shards = torch.Generator().manual_seed(0), {}
    for name, weight in model.named_parameters():
        tensor = (
            torch.ones(weight.shape)
            if weight.dim() == 1
            else torch.randn(weight.shape, generator=generator).mul_(0.02)
        )
        shards[name] = f"model-{len(shards):05d}.safetensors"
        save_file({name: tensor.to(dtype)}, folder / shards[name], metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    config.save_pretrained(folder)
    return folder


def prune_in_this_process(folder, target, write, method):
    """Prune, and print what it took as JSON."""
    from pftools import prune

    blocks = torch.randint(0, SHAPE["vocab_size"], (16, 512), generator=torch.Generator().manual_seed(0))
    before = _peak()
    result = prune.prune_checkpoint(folder, blocks, target, write=write, method=method, progress=False)
    rows = result.layers
    print(
        json.dumps(
            {
                "seconds": round(result.seconds, 1),
                "peak_resident_GiB": round(_peak() / 2**30, 2),
                "after_imports_GiB": round(before / 2**30, 2),
                "weights": len(rows),
                "measured_sparsity": round(float(rows["measured"].mean()), 4),
            }
        )
    )


def _peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--write", default="masks", choices=["masks", "model"])
    parser.add_argument("--method", default="wanda")
    parser.add_argument(
        "--layers", type=int, default=SHAPE["num_hidden_layers"], help="fewer, for development"
    )
    parser.add_argument("--worker", nargs=2, help="(used by itself)")
    options = parser.parse_args()
    if options.worker:
        prune_in_this_process(*options.worker, options.write, options.method)
        sys.exit()
    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        folder = write_random_llama(
            Path(scratch) / "llama", torch.bfloat16, **{**SHAPE, "num_hidden_layers": options.layers}
        )
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        print(
            f"wrote {size / 2e9:.2f} billion parameters in {time.perf_counter() - started:.0f} s", flush=True
        )
        command = [
            sys.executable,
            __file__,
            "--worker",
            str(folder),
            str(Path(scratch) / "pruned"),
            "--write",
            options.write,
            "--method",
            options.method,
        ]
        found = json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        )
    found = {"parameters_billion": round(size / 2e9, 2), "size_on_disk_GiB": round(size / 2**30, 2), **found}
    report(
        f"peak resident set of prune_checkpoint ({options.method}, write={options.write})",
        found,
        script=__file__,
        device="cpu",
        store=options.store,
        settings={
            **SHAPE,
            "num_hidden_layers": options.layers,
            "dtype": "bfloat16",
            "blocks": 16,
            "block_length": 512,
        },
    )

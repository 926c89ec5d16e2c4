"""All that only a GPU can show, in one command: a random Llama of LLaMA-7B's shape, in 16 bit.

    prune       Wanda on 128 x 2,048 tokens: seconds, and over two plain forwards of the layers
    sparse      2:4 products beside dense ones, for the matrices of a layer
    evaluate    5-shot choices a second, beside lm-eval's HFLM
    finetune    tokens a second of masked LoRA beside PEFT's, and on an NF4 base
    stream      a forward with no layer, half of them and all on the GPU, and what is copied there a second;
                takes as much disk as the model, twice

Each with the most memory that it held on the GPU, beside what `pftools.needs` says.

    python benchmarks/gpu.py [--only prune sparse evaluate finetune stream] [--store]
    python benchmarks/gpu.py --tiny     the same of a tiny model, on any machine: that it runs, not how fast

What cannot be measured where it runs is told in a sentence, and the rest goes on.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _harness import arguments, in_turns, report, seconds
from evaluate import contest, few_shot_requests
from memory import write_random_llama
from prune import layerwise_forwards
from transformers import LlamaConfig, LlamaForCausalLM

from pftools import needs, settings
from pftools.evaluate import perplexity
from pftools.finetune import finetune_model
from pftools.models import load_model
from pftools.prune import inputs, prune_model

sys.path.append(str(Path(__file__).parents[1]))
from tests.tiny import tiny_tokenizer  # noqa: E402

LARGE = dict(
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    vocab_size=32_000,
)
TINY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=512)


class Bench:
    """The model, and how large the work is."""

    def __init__(self, device: str, tiny: bool) -> None:
        self.device, self.tiny = device, tiny
        self.shape = TINY if tiny else LARGE
        self.dtype = torch.float32 if device == "cpu" else torch.float16
        self.blocks, self.length = (4, 64) if tiny else (128, 2048)
        self.facts = needs.facts_of_shapes(self.shape)
        self.tokenizer = tiny_tokenizer()
        config = LlamaConfig(**self.shape, max_position_embeddings=4096, dtype=self.dtype)
        torch.manual_seed(0)
        with torch.device(device):
            torch.set_default_dtype(self.dtype)
            try:
                self.model = LlamaForCausalLM(config).eval()
            finally:
                torch.set_default_dtype(torch.float32)

    def tokens(self, n_blocks: int, length: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, 256, (n_blocks, length), generator=generator)

    def with_peak(self, work: Callable[[], Any], parameters: settings.Step) -> dict[str, Any]:
        """GB that ``work`` held on the GPU at most, and what was said before; on a CPU the latter only."""
        kind = "cpu" if self.device == "cpu" else "cuda"
        told = needs.needs_of(parameters, self.facts, placement="one", device_kind=kind)
        if kind == "cpu":
            work()
            return {"estimated memory, GB": round(told.memory / 1e9, 2)}
        torch.cuda.reset_peak_memory_stats()
        work()
        peak = torch.cuda.max_memory_allocated()
        said = told.device - needs.CUDA_DEVICE  # the allocator does not see CUDA's own
        return {
            "peak, GB": round(peak / 1e9, 2),
            "estimated, GB": round(said / 1e9, 2),
            "estimated / measured": round(said / peak, 2),
        }


def prune(bench: Bench) -> dict[str, Any]:
    """Wanda beside two plain forwards in the same batches."""
    blocks = bench.tokens(bench.blocks, bench.length)
    batch_size = inputs.batch_size_for(bench.model, bench.length, bench.blocks)
    floor = seconds(lambda: layerwise_forwards(bench.model, blocks, batch_size, 2), bench.device)
    taken: list[float] = []
    asked = settings.Prune(
        n_blocks=bench.blocks, block_length=bench.length, held_out_blocks=0, **_dtype(bench)
    )
    memory = bench.with_peak(
        lambda: taken.append(seconds(lambda: prune_model(bench.model, blocks, progress=False), bench.device)),
        asked,
    )
    found = {"seconds": round(taken[0], 2), "two forwards, seconds": round(floor, 2)}
    return {**found, "ratio": round(taken[0] / floor, 2), **memory}


def sparse(bench: Bench) -> dict[str, Any]:
    """2:4 products of the matrices of a layer beside dense ones."""
    if bench.device == "cpu" or torch.cuda.get_device_capability()[0] < 8:
        return {"not measured": "2:4 products need a GPU with sparse tensor cores (Ampere or later)"}
    from torch.sparse import to_sparse_semi_structured

    found = {}
    width, inner = bench.shape["hidden_size"], bench.shape["intermediate_size"]
    for rows, columns in ((width, width), (inner, width), (width, inner)):
        weight = torch.randn(rows, columns, device=bench.device, dtype=bench.dtype)
        weight.view(rows, -1, 4)[..., 2:] = 0
        both = {"dense": weight, "2:4": to_sparse_semi_structured(weight)}
        for tokens in (16, 2048):
            x = torch.randn(columns, tokens, device=bench.device, dtype=bench.dtype)
            times = in_turns(
                {name: partial(_products, w, x) for name, w in both.items()}, device=bench.device
            )
            found[f"dense / 2:4, {rows} x {columns}, {tokens} tokens"] = round(
                times["dense"] / times["2:4"], 2
            )
    return found


def _products(weight: torch.Tensor, x: torch.Tensor) -> None:
    for _ in range(50):
        weight @ x


def evaluate(bench: Bench) -> dict[str, Any]:
    """5-shot choices, ours and HFLM's."""
    some = {"prefixes": 2, "questions": 3, "shared": 60, "own": 20} if bench.tiny else {}
    requests = few_shot_requests(bench.tokenizer, **some)
    found: dict[str, Any] = {}
    asked = settings.Evaluate(tasks=["mmlu"], n_blocks=1, block_length=64, batch_size=16, **_dtype(bench))
    memory = bench.with_peak(
        lambda: found.update(contest(bench.model, bench.tokenizer, requests, rounds=1, device=bench.device)),
        asked,
    )
    return {**found, **memory}


def finetune(bench: Bench) -> dict[str, Any]:
    """Masked LoRA, PEFT's own, and masked LoRA on an NF4 base; every step packed rows."""
    length = 64 if bench.tiny else 512
    rows, steps = bench.tokens(16, length), 2 if bench.tiny else 6
    prune_model(bench.model, rows[:2], method="magnitude", sparsity=0.5, progress=False)
    recipe = {"steps": steps, "gradient_checkpointing": not bench.tiny, "progress": False}
    ways = {
        "masked LoRA": {"keep_sparsity": True},
        "PEFT's LoRA": {"keep_sparsity": False},
        "masked LoRA on NF4": {"keep_sparsity": True, "base": "nf4"},
    }
    found = {
        f"{name}: {what}": value
        for name, words in ways.items()
        for what, value in _training(bench, rows, {**recipe, **words}).items()
    }
    masked, plain = (found[f"{name}: tokens a second"] for name in ("masked LoRA", "PEFT's LoRA"))
    return {**found, "masked / PEFT's": round(masked / plain, 2)}


def _training(bench: Bench, rows: torch.Tensor, recipe: dict[str, Any]) -> dict[str, Any]:
    asked = settings.Finetune(
        block_length=rows.shape[1],
        held_out_blocks=0,
        gradient_checkpointing=recipe["gradient_checkpointing"],
        base=recipe.get("base", "plain"),
        merge="masked" if recipe["keep_sparsity"] else "dense",
        **_dtype(bench),
    )
    trained: list[Any] = []
    memory = bench.with_peak(lambda: trained.append(finetune_model(bench.model, rows, **recipe)), asked)
    return {"tokens a second": trained[0].summary["tokens_per_second"], **memory}


def stream(bench: Bench) -> dict[str, Any]:
    """A forward of 4,096 tokens with some layers in the scratch file of a streamed model."""
    layers, blocks, found = bench.facts.layers, bench.tokens(2, bench.length), {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_random_llama(Path(scratch) / "model", bench.dtype, **bench.shape)
        bench.tokenizer.save_pretrained(folder)
        for stay in (0, layers // 2, layers):
            words = {"dtype": bench.dtype, "device": bench.device, "placement": "stream", "resident": stay}
            model, _ = load_model(folder, **words)
            forward = partial(perplexity, model, blocks, batch_size=2, progress=False)
            forward()  # the file is in the machine's memory from now on, if that is large enough
            found[stay] = seconds(forward, bench.device)
            del model, forward
    copied = bench.dtype.itemsize * bench.facts.linear / 1e9 / max(found[0] - found[layers], 1e-9)
    told = {f"{stay} of {layers} layers stay, seconds": round(took, 3) for stay, took in found.items()}
    return {**told, "GB copied a second": round(copied, 1)}


def _dtype(bench: Bench) -> dict[str, str]:
    return {"dtype": str(bench.dtype).removeprefix("torch.")}


WORK = {"prune": prune, "sparse": sparse, "evaluate": evaluate, "finetune": finetune, "stream": stream}
CLAIMS = {
    "prune": "Wanda on 128 x 2,048 tokens takes at most two plain forwards of the layers",
    "sparse": "2:4 products are faster than dense ones",
    "evaluate": "5-shot choices are answered several times as fast as by HFLM",
    "finetune": "A step of masked LoRA takes at most 1.5 x one of PEFT's",
    "stream": "A streamed evaluation takes as much longer as its layers take to be copied",
}


if __name__ == "__main__":
    parser = arguments(__doc__.splitlines()[0])
    parser.set_defaults(device="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: that it runs, not how fast")
    parser.add_argument("--only", nargs="+", choices=WORK, default=list(WORK))
    options = parser.parse_args()
    if options.device == "cpu" and not options.tiny:
        print("There is no GPU here, and a model of 7 billion weights is not for a CPU: give --tiny.")
        sys.exit()
    if options.tiny:
        print("A tiny model: what follows says that everything runs, and nothing about speed or memory.")
    bench = Bench(options.device, options.tiny)
    for name in options.only:
        try:
            measured = WORK[name](bench)
        except (RuntimeError, ValueError) as error:  # memory, a kernel that is not there: the others go on
            measured = {"not measured": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        report(
            CLAIMS[name],
            measured,
            script=__file__,
            device=options.device,
            store=options.store and not options.tiny,
            settings={**bench.shape, **_dtype(bench)},
        )

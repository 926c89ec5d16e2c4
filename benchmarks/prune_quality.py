"""What each pruning method does to SmolLM2-135M, and that our walk is the published one.

    inputs        masks of three layers beside those of float64 arithmetic and full sorts on the same inputs
    agreement     masks of `prune_model` beside those of the published walk (restated in prune.py), through
                  all 30 layers, fp32
    perplexity    every method at 50%, 16 x 512 calibration tokens, on the test split of Python's language
                  reference

    python benchmarks/prune_quality.py [--part inputs agreement perplexity] [--dtype bfloat16]
                                       [--methods wanda ria] [--store]

With `--store`, methods that are not asked for keep the perplexity that is stored, if it was measured with the
same settings.
"""

from __future__ import annotations

import copy

import torch
from _harness import arguments, report, seconds, stored
from prune import published_walk

from pftools import prune
from pftools.corpora import token_blocks
from pftools.evaluate import perplexity
from pftools.layers import linear_modules
from pftools.models import load_model
from pftools.prune.inputs import squared_column_sums
from pftools.prune.patterns import choose, parse_pattern

METHODS = {
    "wanda": {},
    "wanda 2:4": {"pattern": "2:4"},
    "sparsegpt": {"method": "sparsegpt"},
    "wanda, inputs=dense": {"inputs": "dense"},
    "wanda_variant": {"method": "wanda_variant"},
    "magnitude": {"method": "magnitude"},
    "wanda 4:8": {"pattern": "4:8"},
    "ria": {"method": "ria"},
    "sparsegpt 2:4": {"method": "sparsegpt", "pattern": "2:4"},
    "wanda, owl": {"allocation": "owl"},
    "ablate_wanda_seq": {"method": "ablate_wanda_seq"},
    "ablate_mag_iter": {"method": "ablate_mag_iter"},
    "wanda, reconstruction": {"reconstruct_steps": 32},
}


def same_inputs(options):
    """Given what a layer is given: the share of mask bits that float64 and full stable sorts choose too."""
    model, tokenizer = load_model("smollm2-135m", dtype="float32", device="cpu")
    block = token_blocks(tokenizer, "pydocs", split="calibration", n_blocks=1, block_length=512)
    modules = {
        name: module
        for name, module in linear_modules(model).items()
        if name.split(".")[2] in ("0", "15", "29")
    }
    seen = {}
    hooks = [
        module.register_forward_pre_hook(lambda module, args, name=name: seen.update({name: args[0][0]}))
        for name, module in modules.items()
    ]
    with torch.no_grad():
        model(block)
    for hook in hooks:
        hook.remove()
    equal, total = {"unstructured": 0, "2:4": 0}, 0
    for name, module in modules.items():
        weight = module.weight.detach()
        scores = weight * squared_column_sums(seen[name]).sqrt()
        exact = weight.double() * seen[name].double().square().sum(dim=0).sqrt()
        total += weight.numel()
        for pattern, group in (("unstructured", weight.shape[1]), ("2:4", 4)):
            ours = choose(scores.abs(), 0.5, parse_pattern(pattern))
            groups = exact.abs().view(-1, group)
            theirs = torch.zeros_like(groups, dtype=torch.bool).scatter_(
                1, groups.argsort(dim=1, stable=True)[:, : group // 2], True
            )
            equal[pattern] += int((ours == theirs.view_as(ours)).sum())
    found = {pattern: round(count / total, 7) for pattern, count in equal.items()}
    report(
        "masks given the same inputs, fp32 beside float64: share of equal bits",
        {**found, "bits": total},
        script=__file__,
        device="cpu",
        store=options.store,
        settings={"layers": [0, 15, 29], "tokens": 512, "sparsity": 0.5},
    )


def agreement(options):
    """The share of mask bits on which two independent walks agree: rounding grows from layer to layer."""
    model, tokenizer = load_model("smollm2-135m", dtype="float32", device="cpu")
    blocks = token_blocks(tokenizer, "pydocs", split="calibration", n_blocks=options.blocks, block_length=512)
    found = {}
    for pattern, group in (("unstructured", 0), ("2:4", 4)):
        ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
        result = prune.prune_model(ours, blocks, pattern=pattern, progress=False)
        published_walk(theirs, blocks, group=group)
        # Where a weight was zero before it is zero in both, whatever the masks say.
        same = {
            name: ((module.weight != 0) == (linear_modules(ours)[name].weight != 0)).float().mean().item()
            for name, module in linear_modules(theirs).items()
        }
        sizes = {name: module.weight.numel() for name, module in linear_modules(theirs).items()}
        found[pattern] = round(sum(same[name] * sizes[name] for name in same) / sum(sizes.values()), 6)
        found[f"{pattern}, last layer"] = round(
            min(value for name, value in same.items() if ".layers.29." in name), 6
        )
        assert len(result.masks) == len(same)
    report(
        "masks of two independent walks through SmolLM2-135M in fp32: share of equal bits",
        found,
        script=__file__,
        device="cpu",
        store=options.store,
        settings={"blocks": options.blocks, "block_length": 512, "sparsity": 0.5},
    )


def perplexities(options):
    """Perplexity after each method. Interrupted, it reports the methods that were done."""
    model, tokenizer = load_model("smollm2-135m", dtype=options.dtype, device="cpu")
    calibration = token_blocks(
        tokenizer, "pydocs", split="calibration", n_blocks=options.calibration_blocks, block_length=512
    )
    test = token_blocks(tokenizer, "pydocs", split="test", n_blocks=options.test_blocks, block_length=512)
    claim = f"perplexity of SmolLM2-135M at 50% sparsity, {options.dtype}"
    settings = {
        "calibration": f"{len(calibration)} x 512 tokens of pydocs",
        "test": f"{len(test)} x 512 tokens of pydocs",
        "reconstruction": "32 Adam steps of 2,048 tokens a layer",
    }
    found = stored(claim, script=__file__, device="cpu", settings=settings) if options.store else {}
    found["dense"] = {"perplexity": round(perplexity(model, test, progress=False).perplexity, 2)}
    try:
        for name in options.methods:
            twin = copy.deepcopy(model)
            took = seconds(
                lambda twin=twin, choice=METHODS[name]: prune.prune_model(
                    twin, calibration, progress=False, **choice
                )
            )
            found[name] = {
                "perplexity": round(perplexity(twin, test, progress=False).perplexity, 2),
                "seconds": round(took, 1),
            }
            print(name, found[name], flush=True)
    finally:
        report(claim, found, script=__file__, device="cpu", store=options.store, settings=settings)


if __name__ == "__main__":
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument(
        "--part",
        nargs="+",
        default=["inputs", "agreement", "perplexity"],
        choices=["inputs", "agreement", "perplexity"],
    )
    parser.add_argument("--dtype", default="bfloat16", help="of the perplexities")
    parser.add_argument(
        "--methods", nargs="+", default=list(METHODS), choices=list(METHODS), help="of the perplexities"
    )
    parser.add_argument("--blocks", type=int, default=16, help="calibration blocks of the agreement")
    parser.add_argument("--calibration-blocks", type=int, default=16, help="of the perplexities")
    parser.add_argument("--test-blocks", type=int, default=16)
    options = parser.parse_args()
    if "inputs" in options.part:
        same_inputs(options)
    if "agreement" in options.part:
        agreement(options)
    if "perplexity" in options.part:
        perplexities(options)

"""How much of what pruning cost each kind of fine-tuning wins back, and at which sparsity it ends.

    python benchmarks/recovery.py --store             (about half an hour a sparsity on 2 cores with bf16)

The embedded model is pruned with Wanda, then trained on the same tokens of `pydocs` with LoRA merged densely
(the published way), masked LoRA and HiRA; the dense merge is also pruned again to the sparsity that was
asked. Every way is tried at several learning rates, and the validation split chooses one: at a rate that
suits one of them alone, nothing could be said of the others. Perplexity is that of the test split; no two
splits share a topic. Recovery is what a way wins back of the perplexity that pruning cost, beside what the
dense merge wins back.

With `--store`, what is stored stays in the choice, if it was measured with the same settings: ways that are
not asked for (`--methods`) and learning rates that were tried before.
"""

import copy
import math

from _harness import arguments, report, stored
from transformers import TrainerCallback

from pftools import corpora, evaluate, finetune, models, prune

options = arguments(__doc__)
options.add_argument("--sparsity", type=float, nargs="*", default=[0.5, 0.6])
options.add_argument("--tokens", type=int, default=49_152)
options.add_argument("--methods", nargs="*", default=["dense", "masked", "HiRA"])
options.add_argument(
    "--learning-rates",
    type=float,
    nargs="*",
    default=[4e-3, 8e-3, 1.6e-2],
    help="to choose from, of dense and masked LoRA",
)
options.add_argument(
    "--hira-learning-rates",
    type=float,
    nargs="*",
    default=[2e-2, 4e-2, 8e-2],
    help="its update is a share of each weight",
)
options.add_argument("--test-blocks", type=int, default=40, help="blocks of 512 tokens of the test split")
options.add_argument("--validation-blocks", type=int, default=10)
options = options.parse_args()


class AtTheEnd(TrainerCallback):
    """Perplexity of the unmerged model at the end of its training."""

    def on_train_end(self, args, state, control, model, **_):
        self.perplexity = perplexity(model, validation)


def perplexity(model, blocks):
    return round(evaluate.perplexity(model, blocks, progress=False).perplexity, 3)


def described(model):
    return {"perplexity": perplexity(model, test), "sparsity": round(models.measured_sparsity(model), 6)}


def trained(pruned, method, learning_rate):
    """One try: the merged model, and what is known of it."""
    end = AtTheEnd()
    result = finetune.finetune_model(
        pruned,
        train,
        tokens=options.tokens,
        learning_rate=learning_rate,
        keep_sparsity=method != "dense",
        adapter="hira" if method == "HiRA" else "lora",
        progress=False,
        callbacks=[end],
    )
    merged = finetune.merge_adapter(
        copy.deepcopy(pruned), result.adapter, merge="dense" if method == "dense" else "masked"
    )
    known = {
        "learning_rate": learning_rate,
        "validation": perplexity(merged, validation),
        "validation, unmerged": end.perplexity,
        "tokens_per_second": result.summary["tokens_per_second"],
    }
    print(f"{method}: {known}", flush=True)
    return merged, known


model, tokenizer = models.load_model("smollm2-135m", device=options.device)
blocks_of = {
    "test": options.test_blocks,
    "validation": options.validation_blocks,
    "train": None,
    "calibration": 64,
}
test, validation, train, calibration = (
    corpora.token_blocks(tokenizer, "pydocs", split=split, block_length=512, n_blocks=n_blocks)
    for split, n_blocks in blocks_of.items()
)
settings = {
    "model": "smollm2-135m",
    "dtype": str(model.dtype).removeprefix("torch."),
    "corpus": "pydocs",
    "test_blocks": len(test),
    "validation_blocks": len(validation),
    "tokens": options.tokens,
    "rank": 8,
    "targets": "all-linear",
}

for sparsity in options.sparsity:
    claim = (
        f"After Wanda at {sparsity:.0%}, masked LoRA recovers at least 90% of what a dense merge recovers, "
        "at full sparsity"
    )
    rows = stored(claim, script=__file__, device=options.device, settings=settings) if options.store else {}
    pruned = copy.deepcopy(model)
    prune.prune_model(pruned, calibration, sparsity=sparsity, progress=False)
    rows["pruned"] = described(pruned)
    for method in options.methods:
        name = method if method == "HiRA" else f"{method} merge"
        for rate in options.hira_learning_rates if method == "HiRA" else options.learning_rates:
            merged, known = trained(pruned, method, rate)
            tried = {
                **rows.get(name, {}).get("validation by learning rate", {}),
                f"{rate:g}": known["validation"],
            }
            if known["validation"] == min(tried.values()):
                rows[name] = {**described(merged), **known}
                if method == "dense":
                    prune.prune_model(merged, calibration, sparsity=sparsity, progress=False)
                    rows["dense merge, pruned again"] = described(merged)
            rows[name]["validation by learning rate"] = tried
    if "dense merge" in rows:
        lost, dense = rows["pruned"]["perplexity"], rows["dense merge"]["perplexity"]
        for row in rows.values():
            row["recovery"] = round((lost - row["perplexity"]) / (lost - dense), 3)
            row["recovery, in log perplexity"] = round(
                math.log(lost / row["perplexity"]) / math.log(lost / dense), 3
            )
    rows["unpruned"] = described(model)
    report(claim, rows, script=__file__, device=options.device, store=options.store, settings=settings)

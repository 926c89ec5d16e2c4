"""How much of what pruning cost each kind of fine-tuning wins back, and at which sparsity it ends.

    python benchmarks/recovery.py --store                      (about 8 minutes a sparsity on 2 cores with bf16)

The embedded model is pruned with Wanda, then trained on the same tokens of `pydocs` with LoRA merged densely (the published way), masked LoRA and HiRA;
the dense merge is also pruned again to the sparsity that was asked. Perplexity is that of the test split, whose topics no other split shares.
"Unmerged" is the model as it stood at the end of training, adapter beside: the merge should not change it. Recovery is what a way wins back of the
perplexity that pruning cost, beside what the dense merge wins back. Dense and masked LoRA share one learning rate; HiRA's update is a small
share of each weight, and so it takes a larger one.

With `--store`, ways that are not asked for (`--methods`) keep what is stored, if it was measured with the same settings.
"""

import copy
import math

from _harness import arguments, report, stored
from transformers import TrainerCallback

from pftools import corpora, evaluate, finetune, models, prune

options = arguments(__doc__)
options.add_argument("--sparsity", type=float, nargs="*", default=[0.5, 0.6])
options.add_argument("--tokens", type=int, default=49_152)
options.add_argument("--learning-rate", type=float, default=5e-4, help="of dense and masked LoRA")
options.add_argument("--hira-learning-rate", type=float, default=1e-2)
options.add_argument("--methods", nargs="*", default=["dense", "masked", "HiRA"])
options.add_argument("--test-blocks", type=int, default=40, help="blocks of 512 tokens of the test split")
options = options.parse_args()


class AtTheEnd(TrainerCallback):
    """Perplexity of the unmerged model at the end of its training."""

    def on_train_end(self, args, state, control, model, **_):
        self.perplexity = perplexity(model)


def perplexity(model):
    return round(evaluate.perplexity(model, test, progress=False).perplexity, 3)


def described(model):
    return {"perplexity": perplexity(model), "sparsity": round(models.measured_sparsity(model), 6)}


model, tokenizer = models.load_model("smollm2-135m", device=options.device)
test = corpora.token_blocks(tokenizer, "pydocs", split="test", block_length=512, n_blocks=options.test_blocks)
train = corpora.token_blocks(tokenizer, "pydocs", split="train", block_length=512)
calibration = corpora.token_blocks(tokenizer, "pydocs", split="calibration", block_length=512, n_blocks=64)
settings = {"model": "smollm2-135m", "dtype": str(model.dtype).removeprefix("torch."), "corpus": "pydocs", "test_blocks": len(test),
            "tokens": options.tokens, "rank": 8, "targets": "all-linear"}  # fmt: skip

for sparsity in options.sparsity:
    claim = f"After Wanda at {sparsity:.0%}, masked LoRA recovers at least 90% of what a dense merge recovers, at full sparsity"
    rows = stored(claim, script=__file__, device=options.device, settings=settings) if options.store else {}
    pruned = copy.deepcopy(model)
    prune.prune_model(pruned, calibration, sparsity=sparsity, progress=False)
    rows["pruned"] = described(pruned)
    for method in options.methods:
        end, learning_rate = AtTheEnd(), options.hira_learning_rate if method == "HiRA" else options.learning_rate
        result = finetune.finetune_model(
            pruned, train, tokens=options.tokens, learning_rate=learning_rate, keep_sparsity=method != "dense",
            adapter="hira" if method == "HiRA" else "lora", progress=False, callbacks=[end],
        )  # fmt: skip
        merged = finetune.merge_adapter(copy.deepcopy(pruned), result.adapter, merge="dense" if method == "dense" else "masked")
        rows[method if method == "HiRA" else f"{method} merge"] = {
            **described(merged), "unmerged": end.perplexity, "learning_rate": learning_rate,
            "tokens_per_second": result.summary["tokens_per_second"],
        }  # fmt: skip
        print(rows, flush=True)
        if method == "dense":
            prune.prune_model(merged, calibration, sparsity=sparsity, progress=False)
            rows["dense merge, pruned again"] = described(merged)
    if "dense merge" in rows:
        lost, dense = rows["pruned"]["perplexity"], rows["dense merge"]["perplexity"]
        for row in rows.values():
            row["recovery"] = round((lost - row["perplexity"]) / (lost - dense), 3)
            row["recovery, in log perplexity"] = round(math.log(lost / row["perplexity"]) / math.log(lost / dense), 3)
    rows["unpruned"] = described(model)
    report(claim, rows, script=__file__, device=options.device, store=options.store, settings=settings)

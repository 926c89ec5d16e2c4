"""How much of what pruning cost each kind of fine-tuning wins back, and at which sparsity it ends.

    python benchmarks/recovery.py --store                      (about 8 minutes a sparsity on 2 cores with bf16)

The embedded model is pruned with Wanda, then trained on the same tokens of `pydocs` with LoRA merged densely (the published way), masked LoRA and HiRA;
the dense merge is also pruned again to the sparsity that was asked. Perplexity is that of the test split, whose topics no other split shares.
"Unmerged" is the model as it stood at the end of training, adapter beside: the merge must not change it. Recovery is what a way wins back in
log perplexity of what pruning lost, beside what the dense merge wins back. Dense and masked LoRA share one learning rate. HiRA's update is a share of
the weight, some fiftieth of it, and so it takes a larger one.
"""

import copy
import math

from _harness import arguments, report
from transformers import TrainerCallback

from pftools import corpora, evaluate, finetune, models, prune

options = arguments(__doc__)
options.add_argument("--sparsity", type=float, nargs="*", default=[0.5, 0.6])
options.add_argument("--tokens", type=int, default=49_152)
options.add_argument("--learning-rate", type=float, default=5e-4, help="of dense and masked LoRA")
options.add_argument("--hira-learning-rate", type=float, default=1e-2)
options.add_argument("--methods", nargs="*", default=["dense", "masked", "HiRA"])
options.add_argument("--test-blocks", type=int, default=None, help="blocks of the test split; all by default")
options = options.parse_args()


class AtTheEnd(TrainerCallback):
    """Perplexity of the unmerged model at the end of its training."""

    def on_train_end(self, args, state, control, model, **_):
        self.perplexity = perplexity(model)


def perplexity(model):
    return round(evaluate.perplexity(model, test, progress=False).perplexity, 3)


model, tokenizer = models.load_model("smollm2-135m", device=options.device)
test = corpora.token_blocks(tokenizer, "pydocs", split="test", block_length=512, n_blocks=options.test_blocks)
train = corpora.token_blocks(tokenizer, "pydocs", split="train", block_length=512)
calibration = corpora.token_blocks(tokenizer, "pydocs", split="calibration", block_length=512, n_blocks=64)
unpruned = perplexity(model)
print(f"unpruned: {unpruned}", flush=True)

for sparsity in options.sparsity:
    pruned = copy.deepcopy(model)
    prune.prune_model(pruned, calibration, sparsity=sparsity, progress=False)
    rows = {"pruned": {"perplexity": perplexity(pruned), "sparsity": models.measured_sparsity(pruned)}}
    print(rows, flush=True)
    for method in options.methods:
        end, learning_rate = AtTheEnd(), options.hira_learning_rate if method == "HiRA" else options.learning_rate
        result = finetune.finetune_model(
            pruned, train, tokens=options.tokens, learning_rate=learning_rate, keep_sparsity=method != "dense",
            adapter="hira" if method == "HiRA" else "lora", progress=False, callbacks=[end],
        )  # fmt: skip
        merge = "dense" if method == "dense" else "masked"
        merged = finetune.merge_adapter(copy.deepcopy(pruned), result.adapter, merge=merge)
        rows[f"{method} merge" if method != "HiRA" else method] = {
            "perplexity": perplexity(merged), "unmerged": end.perplexity, "sparsity": models.measured_sparsity(merged),
            "learning_rate": learning_rate, "tokens": result.summary["tokens"], "tokens_per_second": result.summary["tokens_per_second"],
        }  # fmt: skip
        print(rows, flush=True)
        if method == "dense":
            prune.prune_model(merged, calibration, sparsity=sparsity, progress=False)
            rows["dense merge, pruned again"] = {"perplexity": perplexity(merged), "sparsity": models.measured_sparsity(merged)}
    lost = rows["pruned"]["perplexity"]
    for row in rows.values():
        row["sparsity"] = round(row["sparsity"], 6)
        if "dense merge" in rows:
            row["recovery / dense merge"] = round(
                math.log(lost / row["perplexity"]) / math.log(lost / rows["dense merge"]["perplexity"]), 3
            )
            row["recovery of perplexity / dense merge"] = round(
                (lost - row["perplexity"]) / (lost - rows["dense merge"]["perplexity"]), 3
            )
    report(
        f"After Wanda at {sparsity:.0%}, masked LoRA recovers at least 90% of what a dense merge recovers, at full sparsity",
        {"unpruned": unpruned, **rows},
        script=__file__, device=options.device, store=options.store,
        settings={"model": "smollm2-135m", "dtype": str(model.dtype).removeprefix("torch."), "corpus": "pydocs", "test_blocks": len(test),
                  "tokens": options.tokens, "rank": 8, "targets": "all-linear"},
    )  # fmt: skip

"""Whether the merged model is the one that was trained, on every kind of base: perplexity and zeros.

    python benchmarks/merge.py --store                         (about 3 minutes on 2 cores with bf16)

On a plain base the two must agree: every training step computes with the weight as the merge stores it. On a
quantized base the training sees rounded weights and the merge goes into the plain ones. So two things are
measured: the merge into what the quantized weights stand for, which must agree with the training, and the
merge as it is done, which also takes the rounding away.
"""

import copy

from _harness import arguments, report
from transformers import TrainerCallback

from pftools import corpora, evaluate, finetune, layers, models, prune
from pftools.finetune.update import dense_weight

options = arguments(__doc__)
options.add_argument(
    "--cases", nargs="*", default=["float32 plain", "bfloat16 plain", "bfloat16 8bit", "bfloat16 nf4"]
)
options.add_argument("--steps", type=int, default=4)
options.add_argument("--learning-rate", type=float, default=2e-3)
options = options.parse_args()


def perplexity(model):
    return round(evaluate.perplexity(model, test, progress=False).perplexity, 5)


def zeros(model):
    return sum(int((module.weight == 0).sum()) for module in layers.linear_modules(model).values())


class AtTheEnd(TrainerCallback):
    """The unmerged model at the end of training: its perplexity, and what its frozen weights stand for."""

    def on_train_begin(self, args, state, control, model, **_):
        self.before = perplexity(model)

    def on_train_end(self, args, state, control, model, **_):
        self.perplexity = perplexity(model)
        self.base = {
            name.removeprefix("base_model.model."): dense_weight(module.base_layer).clone()
            for name, module in model.named_modules()
            if hasattr(module, "base_layer")
        }


measured = {}
for case in options.cases:
    dtype, base = case.split()
    model, tokenizer = models.load_model("smollm2-135m", dtype=dtype, device=options.device)
    test = corpora.token_blocks(tokenizer, "pydocs", split="test", block_length=256, n_blocks=16)
    train = corpora.token_blocks(tokenizer, "pydocs", split="train", block_length=256, n_blocks=64)
    prune.prune_model(model, train[:16], sparsity=0.5, progress=False)
    row = {"pruned": perplexity(model), "zeros before": zeros(model)}
    end = AtTheEnd()
    result = finetune.finetune_model(
        model,
        train,
        steps=options.steps,
        base=base,
        learning_rate=options.learning_rate,
        progress=False,
        callbacks=[end],
    )
    if base != "plain":
        rounded = copy.deepcopy(model)
        for name, (a, b) in result.adapter.factors.items():
            weight = rounded.get_submodule(name).weight
            new = finetune.updated_weight(
                end.base[name], a, b, result.adapter.scaling, kept=weight != 0, dtype=weight.dtype
            )
            weight.data.copy_(new)
        row |= {
            "rounded base, before training": end.before,
            "merged into the rounded base": perplexity(rounded),
        }
    finetune.merge_adapter(model, result.adapter)
    row |= {"unmerged": end.perplexity, "merged": perplexity(model), "zeros after": zeros(model)}
    row["merged / unmerged - 1"] = round(row["merged"] / row["unmerged"] - 1, 7)
    if base != "plain":
        row["merged into the rounded base / unmerged - 1"] = round(
            row["merged into the rounded base"] / row["unmerged"] - 1, 7
        )
    row["tokens_per_second"] = result.summary["tokens_per_second"]
    measured[case] = row
    print(case, row, flush=True)

report(
    "The merged model is the trained one: within 0.5% of perplexity in bf16, 1e-4 in float32; the number of "
    "zeros is the same",
    measured,
    script=__file__,
    device=options.device,
    store=options.store,
    settings={
        "model": "smollm2-135m",
        "pruned": "wanda 50%",
        "tokens": options.steps * 8 * 256,
        "learning_rate": options.learning_rate,
    },
)

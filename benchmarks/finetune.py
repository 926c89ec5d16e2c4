"""What a training step costs: masked LoRA beside plain LoRA and beside the model alone, packed rows beside
padded ones, bf16 beside float32.

    python benchmarks/finetune.py --store            (WikiText-2 lines from PFTOOLS_DATA, else from the hub)

A step is 8 blocks of 512 tokens, as in the notebook's defaults, through `finetune_model`, Trainer and
optimizer included. "Bare" is forward and backward of the same model without any adapter: once with frozen
weights, where gradients flow to the inputs of all layers and no further (what every low-rank method must
pay), once with gradients of all weights (what full fine-tuning pays, without its optimizer).
"""

import time
from statistics import median

import torch
from _harness import arguments, report
from transformers import TrainerCallback

from pftools import corpora, finetune, models, prune

CALLS, STEPS_A_CALL = 2, 2  # the first step of a call warms up and is not counted


class Clock(TrainerCallback):
    """Wall time of every optimizer step."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **_):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.started)


def trained(model, rows, **options):
    """Seconds of each counted step of a short training."""
    clock = Clock()
    finetune.finetune_model(model, rows, steps=STEPS_A_CALL, progress=False, callbacks=[clock], **options)
    return clock.seconds[1:]


def bare(model, rows, *, weights):
    """Seconds of each counted forward and backward pass of the model alone."""
    for parameter in model.parameters():
        parameter.requires_grad_(weights)
    if not weights:
        # Gradients flow through every layer, as an adapter in the first one needs.
        model.enable_input_require_grads()
    model.train()
    seconds, ids = [], rows[:8].to(model.device)
    for _ in range(STEPS_A_CALL):
        started = time.perf_counter()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        model.zero_grad(set_to_none=True)
    if not weights:
        model.disable_input_require_grads()
    model.eval().requires_grad_(True)
    return seconds[1:]


def in_turns(contestants):
    """Median seconds a step. Contestants take turns: a slow minute of the machine slows them all."""
    times = {name: [] for name in contestants}
    for _ in range(CALLS):
        for name, work in contestants.items():
            times[name] += work()
            print(f"  {name}: {times[name][-1]:.2f} s", flush=True)
    return {name: median(values) for name, values in times.items()}


options = arguments(__doc__)
options.add_argument("--model", default="smollm2-135m")
options = options.parse_args()
settings = {
    "model": options.model,
    "blocks": 8,
    "block_length": 512,
    "rank": 8,
    "targets": "all-linear",
    "counted_steps": CALLS * (STEPS_A_CALL - 1),
}


def store(claim, measured):
    report(claim, measured, script=__file__, device=options.device, store=options.store, settings=settings)


model, tokenizer = models.load_model(options.model, device=options.device)
settings["dtype"] = str(model.dtype).removeprefix("torch.")
packed = corpora.token_blocks(tokenizer, "wikitext2", split="train", block_length=512, n_blocks=24)
lines = corpora.documents("wikitext2", split="train")
padded = finetune.padded_rows(tokenizer, [line for line in lines if line.strip()], 512)
# A padded row costs the same whatever it holds, so the time is measured on some and the tokens are counted on
# all.
real = padded.real_tokens / len(padded)
some = finetune.Rows(padded.input_ids[:24], padded.attention_mask[:24])
prune.prune_model(model, packed[:2], method="magnitude", sparsity=0.5, progress=False)

step = in_turns(
    {
        "bare, frozen weights": lambda: bare(model, packed, weights=False),
        "bare, all gradients": lambda: bare(model, packed, weights=True),
        "plain LoRA": lambda: trained(model, packed, keep_sparsity=False),
        "masked LoRA": lambda: trained(model, packed),
        "HiRA": lambda: trained(model, packed, adapter="hira"),
        "plain LoRA, padded rows": lambda: trained(model, some, keep_sparsity=False),
    }
)
tokens = 8 * 512
seconds = {f"{name}, seconds a step": round(value, 3) for name, value in step.items()}
masked, plain, frozen, full = (
    step[name] for name in ("masked LoRA", "plain LoRA", "bare, frozen weights", "bare, all gradients")
)
store(
    "A step of masked LoRA takes at most 1.5 x one of plain LoRA; a step of plain LoRA at most 1.3 x the "
    "bare model",
    {
        **seconds,
        "masked / plain LoRA": round(masked / plain, 2),
        "HiRA / plain LoRA": round(step["HiRA"] / plain, 2),
        "plain LoRA / bare with frozen weights": round(plain / frozen, 2),
        "masked LoRA / bare with frozen weights": round(masked / frozen, 2),
        "masked LoRA / bare with all gradients": round(masked / full, 2),
        "masked LoRA, tokens a second": round(tokens / masked),
    },
)
store(
    "Packed rows train at least 4 x the real tokens a second of WikiText-2 lines padded to 512",
    {
        "packed, tokens a second": round(tokens / plain),
        "padded, real tokens a second": round(8 * real / step["plain LoRA, padded rows"]),
        "real tokens a padded row": round(real, 1),
        "packed / padded": round(tokens / plain / (8 * real / step["plain LoRA, padded rows"]), 2),
    },
)
if options.device == "cpu" and model.dtype == torch.bfloat16:
    slow = models.load_model(options.model, dtype="float32", device="cpu")[0]
    prune.prune_model(slow, packed[:2], method="magnitude", sparsity=0.5, progress=False)
    CALLS = 1
    step = in_turns({"bfloat16": lambda: trained(model, packed), "float32": lambda: trained(slow, packed)})
    store(
        "Where a CPU computes in bf16, masked LoRA trains about 3 x as fast in it as in float32",
        {f"{name}, tokens a second": round(tokens / value) for name, value in step.items()}
        | {"bfloat16 / float32": round(step["float32"] / step["bfloat16"], 2)},
    )

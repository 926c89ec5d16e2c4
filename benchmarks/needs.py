"""What steps take beside what `pftools.needs` says that they will: memory, of random Llamas of 50 to 500
million weights and of SmolLM2, in all five kinds of steps.

Each step is executed as always, its notebook in a kernel of its own, whose peak resident set is in the run's
record. A model is written to disk, and removed afterwards.

    python benchmarks/needs.py [--models llama-50m ...] [--placement one] [--base plain] [--store]
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from _harness import arguments, report
from memory import write_random_llama

from pftools import needs, run_folder, settings
from pftools.study import Study, plan_study, run_study

MODELS = {
    "llama-50m": (512, 1408, 8, 8, 8),
    "llama-200m": (1024, 2816, 12, 16, 4),
    "llama-500m": (1280, 3584, 24, 20, 5),
    "smollm2-135m": None,
}
STUDY = {
    "name": "needs",
    "orderings": ["P F"],
    "tokens": 2048,
    "analyse": True,
    "calibrate": {"n_blocks": 8, "block_length": 256},
    "finetune": {"block_length": 256},
    "evaluate": {"block_length": 256, "n_blocks": 16, "tasks": ["facts", "reading"], "limit": 20},
}


def model_in(folder: Path, name: str) -> str:
    """A random Llama with a tokenizer of one token a byte, or the embedded model."""
    sys.path.append(str(Path(__file__).parents[1]))
    from tests.tiny import tiny_tokenizer

    if MODELS[name] is None:
        return name
    width, inner, layers, heads, kept = MODELS[name]
    shape = dict(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kept,
        vocab_size=32_000,
        max_position_embeddings=4096,
    )
    path = write_random_llama(folder / name, torch.bfloat16, **shape)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def measured(name: str, words: dict, placement: str, folder: Path) -> dict[str, dict[str, float]]:
    """{step: measured and estimated peak in MB, and their ratio} of one study of one model."""
    model = model_in(folder, name)
    plan = plan_study(settings.check(Study, {**STUDY, **words, "model": model}), runs=folder / "runs")
    failures = run_study(plan, progress=False)
    if failures:
        raise SystemExit(str(failures[0]))
    facts, found = needs.facts_of(model), {}
    for step in plan.steps.values():
        parameters = step.parameters
        of_run = replace(facts, is_run=Path(parameters.model).name in plan.steps)
        told = needs.needs_of(parameters, of_run, placement=placement, device_kind="cpu").memory
        peak = run_folder.read_record(step.folder)["peak_memory_bytes"]
        found[parameters.step] = {
            "measured_MB": round(peak / 1e6),
            "estimated_MB": round(told / 1e6),
            "estimated / measured": round(told / peak, 2),
        }
        print(name, parameters.step, found[parameters.step], flush=True)
    return found


if __name__ == "__main__":
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--base", default="plain", help="how the frozen weights are held: plain, 8bit, nf4")
    parser.add_argument("--placement", default="one", choices=["one", "stream"])
    options = parser.parse_args()
    words = {
        "dtype": options.dtype,
        "placement": options.placement,
        "finetune": {**STUDY["finetune"], "base": options.base},
    }
    for name in options.models:
        with tempfile.TemporaryDirectory() as scratch:
            found = measured(name, words, options.placement, Path(scratch))
        report(
            f"Memory within a fifth: {name}, {options.placement}, {options.dtype}, {options.base} base",
            found,
            script=__file__,
            device="cpu",
            store=options.store,
            settings={**STUDY, **words},
        )

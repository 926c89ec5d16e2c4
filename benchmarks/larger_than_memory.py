"""A whole ordering with a model that is larger than the memory it gets: 2.7 billion random weights, 3.5 GiB.

The notebooks prune, fine-tune on an NF4 base, evaluate and analyse a random Llama that is stored in bf16, as
`pftools run` executes them with `placement: stream`; then its export is written and checked. The resident
memory of all processes together is watched ten times a second; above the limit they are killed. It takes
about 40 GB of disk for a while (scratch files in float32, where the CPU has no bf16).

    python benchmarks/larger_than_memory.py [--limit 3.5] [--layers 32] [--store]
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
import yaml
from _harness import arguments, report
from memory import SHAPE, write_random_llama

PFTOOLS = [sys.executable, "-c", "from pftools.cli import main; main()"]


def study_of(folder):
    """The smallest study that goes through every step."""
    return {
        "name": "larger",
        "model": str(folder),
        "placement": "stream",
        "orderings": ["prune_finetune"],
        "tokens": 128,
        "calibrate": {"n_blocks": 4, "block_length": 64},
        "prune": {"held_out_blocks": 1},
        "finetune": {"block_length": 64, "blocks_per_step": 2, "base": "nf4", "held_out_blocks": 1},
        "evaluate": {"block_length": 64, "n_blocks": 2, "tasks": ["facts"], "limit": 4},
        "analyse": True,
    }


def watched(command, folder, limit):
    """Run a command whose processes may hold ``limit`` bytes together; returns (peak in bytes, seconds)."""
    started, peak = time.perf_counter(), 0
    process = psutil.Popen(command, cwd=folder, start_new_session=True)
    while process.poll() is None:
        peak = max(peak, _resident([process, *process.children(recursive=True)]))
        if peak > limit:
            os.killpg(process.pid, 9)
            sys.exit(f"killed: {peak / 2**30:.2f} GiB are above the limit of {limit / 2**30:.2f} GiB")
        time.sleep(0.1)
    if process.returncode:
        sys.exit(f"{command[-3:]} failed")
    return peak, time.perf_counter() - started


def _resident(processes):
    total = 0
    for process in processes:
        try:
            total += process.memory_full_info().pss  # a page that two of them hold counts once
        except psutil.Error:
            pass
    return total


def main():
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--limit", type=float, default=3.5, help="GiB of all processes together")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    options = parser.parse_args()
    from transformers import AutoTokenizer

    from pftools.base_models import embedded_model_folder

    tokenizer = AutoTokenizer.from_pretrained(embedded_model_folder())
    shape = {**SHAPE, "vocab_size": 49_152, "num_hidden_layers": options.layers}
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_random_llama(Path(scratch) / "llama", torch.bfloat16, **shape)
        tokenizer.save_pretrained(folder)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        print(f"wrote {size / 2e9:.2f} billion weights, {size / 2**30:.2f} GiB", flush=True)
        (Path(scratch) / "larger.yaml").write_text(yaml.safe_dump(study_of(folder)))
        limit = options.limit * 2**30
        together, seconds = watched([*PFTOOLS, "run", "larger.yaml"], scratch, limit)
        steps = {}
        for path in sorted(Path(scratch).glob("runs/*/run.json"), key=lambda path: path.stat().st_mtime):
            record = json.loads(path.read_text())
            steps[f"{len(steps) + 1} {record['step']}"] = {
                "peak_GiB": round(record["peak_memory_bytes"] / 2**30, 2),
                "seconds": round(record["seconds"]),
                **{name: record["results"][name] for name in ("measured",) if name in record["results"]},
            }
        (tuned,) = Path(scratch).glob("runs/finetune-*")
        export = [*PFTOOLS, "export", str(tuned), "exported", "--placement", "stream"]
        peak, took = watched(export, scratch, limit)
        steps["export"] = {"peak_GiB": round(peak / 2**30, 2), "seconds": round(took)}
    found = {
        "weights_billion": round(size / 2e9, 2),
        "stored_GiB": round(size / 2**30, 2),
        "limit_GiB": options.limit,
        "all_processes_peak_GiB": round(together / 2**30, 2),
        "minutes": round(seconds / 60, 1),
        "steps": steps,
    }
    report(
        "an ordering with a model larger than the memory",
        found,
        script=__file__,
        device="cpu",
        store=options.store,
        settings=shape,
    )


if __name__ == "__main__":
    main()

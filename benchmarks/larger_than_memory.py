"""A whole ordering with a model that is larger than the memory it gets: 2.7 billion random weights, 3.5 GiB.

The notebooks prune, fine-tune on an NF4 base, evaluate and analyse a random Llama that is stored in bf16, as
`pftools run` executes them with `placement: stream`; then its export is written and checked. The resident
memory of all processes together is watched twenty times a second; above the limit they are killed. It takes
about 40 GB of disk for a while (scratch files in float32, where the CPU has no bf16).

    python benchmarks/larger_than_memory.py --folder scratch [--limit 3.5] [--layers 32] [--store]
"""

from __future__ import annotations

import json
import os
import sys
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
        time.sleep(0.05)
    if process.returncode:
        sys.exit(f"{command[-3:]} failed")
    return peak, time.perf_counter() - started


def _resident(processes):
    """Bytes that processes hold together: what is their own, and files that they map, which count once."""
    own, files = 0, [0]
    for process in processes:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except OSError:  # it has ended
            continue
        held = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss")}
        own += held.get("RssAnon", 0) + held.get("RssShmem", 0)
        files.append(held.get("RssFile", 0))
    return own + max(files)


def steps_of(folder):
    """What each finished step took, from its own record."""
    found = {}
    for path in sorted(folder.glob("runs/*/run.json"), key=lambda path: path.stat().st_mtime):
        record = json.loads(path.read_text())
        found[f"{len(found) + 1} {record['step']}"] = {
            "peak_GiB": round(record["peak_memory_bytes"] / 2**30, 2),
            "seconds": round(record["seconds"]),
            **{name: record["results"][name] for name in ("measured",) if name in record["results"]},
        }
    return found


def main():
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--limit", type=float, default=3.5, help="GiB of all processes together")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--folder", type=Path, required=True, help="it goes on from what is there")
    options = parser.parse_args()
    from transformers import AutoTokenizer

    from pftools.pretrained.base_models import embedded_model_folder

    shape = {**SHAPE, "vocab_size": 49_152, "num_hidden_layers": options.layers}
    folder, limit = options.folder.absolute(), options.limit * 2**30
    model, peaks = folder / "llama", folder / "peaks.json"
    if not (model / "tokenizer.json").exists():
        write_random_llama(model, torch.bfloat16, **shape)
        AutoTokenizer.from_pretrained(embedded_model_folder()).save_pretrained(model)
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    (folder / "larger.yaml").write_text(yaml.safe_dump(study_of(model)))
    together, _ = watched([*PFTOOLS, "run", "larger.yaml", "--no-report"], folder, limit)
    earlier = json.loads(peaks.read_text()) if peaks.exists() else []
    peaks.write_text(json.dumps([*earlier, together]))
    steps = steps_of(folder)
    (tuned,) = folder.glob("runs/finetune-*")
    export = [*PFTOOLS, "export", str(tuned), "exported", "--placement", "stream"]
    peak, took = watched(export, folder, limit)
    steps["6 export"] = {"peak_GiB": round(peak / 2**30, 2), "seconds": round(took)}
    found = {
        "weights_billion": round(size / 2e9, 2),
        "stored_GiB": round(size / 2**30, 2),
        "limit_GiB": options.limit,
        "all_processes_peak_GiB": round(max([*earlier, together]) / 2**30, 2),
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

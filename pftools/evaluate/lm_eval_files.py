"""Results as lm-eval's own output folder: what it writes with `--output_path` and `--log_samples`.

A run keeps lm-eval's record of every question compressed, as beginnings that many questions share compress
well. `export_results` writes them with lm-eval's own code, under its names.
"""

from __future__ import annotations

import gzip
import json
import logging
import time
from pathlib import Path
from typing import Any

from pftools import run_folder
from pftools.errors import PftoolsError
from pftools.files import refuse_full, replacing

RESULTS = "lm_eval.json"
SAMPLES = "lm_eval_samples.jsonl.gz"


def write_samples(path: Path, samples: dict[str, list[dict[str, Any]]]) -> None:
    """Keep lm-eval's records of all questions, a line each.

    Args:
        samples: {lm-eval's task: its records}.
    """
    from lm_eval.utils import handle_non_serializable

    # Without a name and a time in its header, so that the same records are the same bytes.
    with path.open("wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
        for task, records in samples.items():
            for record in records:
                line = json.dumps([task, record], default=handle_non_serializable, ensure_ascii=False)
                packed.write(line.encode() + b"\n")


def read_samples(path: Path) -> dict[str, list[dict[str, Any]]]:
    """What `write_samples` kept."""
    samples: dict[str, list[dict[str, Any]]] = {}
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as lines:
        for line in lines:
            task, record = json.loads(line)
            samples.setdefault(task, []).append(record)
    return samples


def export_results(run: str | Path, folder: str | Path) -> Path:
    """Write the task results of an evaluation as lm-eval does, in a folder named after the model.

    These are `results_*.json`, and `samples_*.jsonl` for each task.

    Raises:
        PftoolsError: no evaluation, one without lm-eval's tasks or of an older pftools, or a full folder.
    """
    from lm_eval.loggers import EvaluationTracker

    run, folder = Path(run), Path(folder)
    record = run_folder.verify(run)
    if RESULTS in record["outputs"] and SAMPLES not in record["outputs"]:
        raise PftoolsError(
            f"{run} is of an older pftools, which kept no {SAMPLES}: evaluate the model again."
        )
    samples = read_samples(run / SAMPLES) if SAMPLES in record["outputs"] else {}
    if not samples:
        raise PftoolsError(f"{run} has asked no tasks of lm-eval: give an evaluation with such tasks.")
    refuse_full(folder)
    results = json.loads((run / RESULTS).read_text(encoding="utf-8"))
    given = record["parameters"]
    name = _name(given["model"])
    results["config"] |= {"model_args": f"pretrained={name}"}
    with replacing(folder) as partial:
        tracker = EvaluationTracker(output_path=str(partial))
        about = tracker.general_config_tracker
        about.log_experiment_args(
            "pftools",
            {"pretrained": name},
            given["system_instruction"] or None,
            results.get("chat_template"),
            given["apply_chat_template"],
        )
        about.start_time = time.perf_counter() - record["seconds"]  # it logs how long the evaluation took
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it tells of each file
        tracker.save_results_aggregated(results, samples)
        for task, records in samples.items():
            tracker.save_results_samples(task, records)
        written = len(list(partial.rglob("samples_*.jsonl"))) if partial.exists() else 0
        if written != len(samples):  # lm-eval goes on where it cannot write
            raise PftoolsError(
                f"lm-eval wrote {written} of {len(samples)} files of samples into {folder}: is the disk full?"
            )
    return folder


def _name(model: str) -> str:
    """A model's name without a path of this machine."""
    path = Path(model).expanduser()
    return path.name if path.is_dir() else model

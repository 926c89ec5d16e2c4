"""The runs behind a result: their records, and what they took."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from pftools import run_folder
from pftools.files import size_of
from pftools.report.results import entry_table, final_states
from pftools.settings import STEPS


def runs_behind(model: str) -> list[Path]:
    """The folders of the steps that made a model, the last first; empty for a base model."""
    found, waiting = list[Path](), [model]
    while waiting:
        folder = Path(waiting.pop())
        if folder.name and (folder / "run.json").exists() and folder not in found:
            found.append(folder)
            record = run_folder.read_record(folder)
            waiting += [record["parameters"][name] for name in STEPS[record["step"]].parents]
    return found


def records_behind(evaluation: str, model: str) -> list[dict[str, Any]]:
    """The run records of an evaluation and of all steps behind its model, the last first."""
    return [run_folder.read_record(folder) for folder in [Path(evaluation), *runs_behind(model)]]


def entry_costs(table: pd.DataFrame) -> pd.DataFrame:
    """What each entry took, as a mean over its seeds.

    Returns:
        ordering, label, asked, perplexity, collapsed, tokens, seconds (of all steps that made the model, also
        where others share them), evaluation (seconds), memory (the most bytes of one of its steps) and disk
        (bytes of the steps that made it).
    """
    entries = entry_table(final_states(table))
    models = dict(zip(table["run"], table["model"]))
    rows = []
    for _, entry in entries.iterrows():
        found = pd.DataFrame([_spent(run, models[run]) for run in entry["runs"]])
        rows.append(
            {
                **entry[["ordering", "label", "asked", "perplexity", "collapsed"]].to_dict(),
                "tokens": entry["finetune_tokens"],
                **found[["seconds", "evaluation", "disk"]].mean().to_dict(),
                "memory": found["memory"].max(),
            }
        )
    return pd.DataFrame(rows)


def _spent(evaluation: str, model: str) -> dict[str, float]:
    made = runs_behind(model)
    records = [run_folder.read_record(folder) for folder in made]
    asked = run_folder.read_record(evaluation)
    return {
        "seconds": sum(record["seconds"] for record in records),
        "evaluation": asked["seconds"],
        "memory": max(record["peak_memory_bytes"] for record in [asked, *records]),
        "disk": sum(size_of(folder) for folder in made),
    }


def study_cost(table: pd.DataFrame) -> dict[str, float]:
    """Seconds, bytes of memory and bytes on disk of all finished steps behind these results, each once."""
    models = set(table["model"])
    folders = {folder for model in models for folder in runs_behind(model)} | {
        Path(run) for run in table["run"]
    }
    records = [run_folder.read_record(folder) for folder in folders]
    return {
        "steps": len(folders),
        "seconds": sum(record["seconds"] for record in records),
        "memory": max(record["peak_memory_bytes"] for record in records),
        "disk": sum(size_of(folder) for folder in folders),
    }


def in_words(seconds: float) -> str:
    """A duration as it is read: 8.2 s, 4.5 min, 3.1 h."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"

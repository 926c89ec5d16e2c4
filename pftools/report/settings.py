"""What decided the numbers of a report: the parameters of every step, machine and versions."""

from __future__ import annotations

from typing import Any

import pandas as pd
from pandas.io.formats.style import Styler

from pftools import run_folder
from pftools.report.lineage import records_behind
from pftools.report.markdown import code, plain
from pftools.report.results import entry_table, final_states
from pftools.report.tables import WORDS, styled
from pftools.settings import STEPS

# What tells entries apart, or stands in the table of results.
_ELSEWHERE = {"model", "parent", "calibration", "seed", "method", "pattern", "sparsity", "tokens"}


def settings_table(table: pd.DataFrame) -> Styler:
    """Every parameter that decided a number, by step; where entries differ in it, a row a value."""
    entries = entry_table(final_states(table))
    models = dict(zip(table["run"], table["model"]))
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for label, run in zip(entries["label"], (runs[0] for runs in entries["runs"])):
        for place, value in _settings(models[run], run).items():
            found.setdefault(place, {}).setdefault(value, []).append(label)
    rows = [
        {
            "step": step,
            "setting": name,
            "value": value,
            "of": "all" if len(values) == 1 else ", ".join(dict.fromkeys(labels)),
        }
        for (step, name), values in sorted(found.items(), key=lambda item: list(STEPS).index(item[0][0]))
        for value, labels in values.items()
    ]
    shown = pd.DataFrame(rows, columns=["step", "setting", "value", "of"])
    return styled(shown, {}).set_properties(["value", "of"], **WORDS)


def _settings(model: str, evaluation: str) -> dict[tuple[str, str], str]:
    """{(step, setting): value} of an evaluation and of all steps behind its model."""
    values: dict[tuple[str, str], list[str]] = {}
    for record in records_behind(evaluation, model):
        step = record["step"]
        names = [name for name in STEPS[step].key_fields() if name not in _ELSEWHERE]
        told = {name: record["parameters"].get(name) for name in names} | _told(record)
        for name, value in told.items():
            values.setdefault((step, name), []).append(_in_words(value))
    return {place: " / ".join(dict.fromkeys(found)) for place, found in values.items()}


def _told(record: dict[str, Any]) -> dict[str, Any]:
    """What a run records beside its parameters: what `auto` became, and digests of its inputs."""
    found = {name: record["results"][name] for name in ("dtype", "merge") if record["results"].get(name)}
    inputs = record.get("inputs") or {}
    return found | {f"{name}, sha256": str(digest)[:12] for name, digest in inputs.items()}


def _in_words(value: Any) -> str:
    if value is None:
        return "all"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def circumstances(table: pd.DataFrame) -> str:
    """Model, budget, machine and versions, as a list."""
    study = table.attrs["study"]
    records = [run_folder.read_record(run) for run in table["run"]]
    dtypes = sorted({record["results"].get("dtype", "unknown") for record in records})
    machine, versions = records[0]["machine"], records[0]["versions"]
    cut = max(record["results"].get("truncated", 0) for record in records)
    mixed = " (**mixed: compare with care**)" if len(dtypes) > 1 else ""
    budget = "an ordering, split over its F's" if study["budget"] == "total" else "each F"
    gpu = f"GPU {plain(machine['gpu'])}" if machine["gpu"] else "no GPU"
    known = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    lines = [
        f"- Model {code(study['model'])}, computed in {' and '.join(dtypes)}{mixed}",
        f"- Budget: {study['tokens']:,} fine-tuning tokens {budget}",
        f"- Machine: {plain(machine['platform'])}, {machine['cores']} cores, {gpu}",
        f"- Versions: {plain(known)}",
        "- Intervals: 95%, paired by block or question; with several seeds, over trainings too; "
        "p-values: corrected by Holm over the pairs of a metric",
        f"- Runs: the evaluations are the folders `evaluate-*` of {code(table.attrs['runs'])}; each holds "
        "its losses, answers and executed notebook",
    ]
    if cut:
        lines.append(
            f"- **{cut} prompts of a model were longer than its context, and cut at their beginning**"
        )
    return "\n".join(lines)

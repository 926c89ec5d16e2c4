"""Writes the results of a finished study as small tables.

    python data/results/make.py data/studies/seeds.yaml --runs RUNS

In `data/results/<study>/`: the losses of every block, a file an ordering; `results.csv`, a row a training;
`trials.csv`, a row a learning rate that was tried; `steps.csv`, a row a step with its parameters.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd

from pftools import run_folder, study
from pftools.study.finished import block_losses

HERE = Path(__file__).parent


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("study")
    arguments.add_argument("--runs", default="runs")
    given = arguments.parse_args()
    plan = study.plan_study(study.load_study(given.study), runs=given.runs)
    if plan.open or plan.missing():
        raise SystemExit(
            f"{plan.study.name} is not finished in {given.runs}: {len(plan.missing())} steps to do."
        )
    folder = HERE / plan.study.name
    folder.mkdir(exist_ok=True)
    results = study.results(plan)
    losses = block_losses(results)
    for ordering, rows in results.groupby("ordering"):
        tables = [
            pd.DataFrame({"seed": seed, "block": range(len(losses[run])), "nll": losses[run]})
            for seed, run in zip(rows["seed"], rows["run"])
        ]
        pd.concat(tables).to_csv(folder / f"{ordering}.csv", index=False, float_format="%.6f")
    names = {"model": results["model"].map(_name), "run": results["run"].map(_name)}
    results.assign(**names).to_csv(folder / "results.csv", index=False, float_format="%.6f")
    if plan.study.tune:
        study.trials(plan).to_csv(folder / "trials.csv", index=False, float_format="%.6f")
    _steps(plan).to_csv(folder / "steps.csv", index=False)


def _name(folder: str) -> str:
    return Path(folder).name


def _steps(plan: study.Plan) -> pd.DataFrame:
    """A row a step: stage, run, parents, seconds, what computed it, and its parameters as JSON."""
    rows = []
    for name, step in plan.steps.items():
        record = run_folder.read_record(step.folder)
        decisive = {one: record["parameters"][one] for one in step.parameters.key_fields()}
        decisive |= {one: _name(record["parameters"][one]) for one in step.parameters.parents}
        rows.append(
            {
                "stage": step.stage,
                "run": name,
                "starts from": " ".join(step.parents),
                "seconds": record["seconds"],
                "dtype": record["results"].get("dtype", ""),
                "parameters": json.dumps(decisive),
            }
        )
    return pd.DataFrame(rows)


if __name__ == "__main__":
    main()

"""Draws the perplexities of a stored study: each ordering's mean, and every training faintly.

    python data/results/figure.py seeds figures/seeds.svg

It reads `data/results/<study>` and the study's file, and no run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from pftools import compare, figures, study
from pftools.compare.other_losses import read_losses
from pftools.inference.looks import Looks

if TYPE_CHECKING:
    import altair as alt

HERE = Path(__file__).parent


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("study", help="a folder of data/results")
    arguments.add_argument("figure", type=Path, help="the file to write: .svg, .png or .html")
    given = arguments.parse_args()
    print(figures.save(chart(given.study), given.figure))


def chart(name: str) -> alt.LayerChart:
    """Perplexity by ordering, as the report of the study draws it."""
    trainings = pd.read_csv(HERE / name / "results.csv")
    entries = compare.entries(trainings)
    asked = study.load_study(HERE.parent / "studies" / f"{name}.yaml")
    looks = Looks(len(asked.seeds), asked.most_seeds) if asked.most_seeds else None
    (best,) = compare.best_sets(
        trainings, _losses(name, trainings), margin=asked.equivalent_within, looks=looks
    )
    read = _evaluation(name, trainings)
    return figures.metric_chart(
        entries.assign(may_be_best=entries["label"].isin(best.members)),
        "perplexity",
        by="ordering",
        title="Perplexity",
        subtitle=f"{read['split'].capitalize()} split of {read['corpus']}, {read['n_blocks']} blocks of "
        f"{read['block_length']} tokens; logarithmic. Ringed: may be the best. Faint: single trainings.",
        label="perplexity",
        log=True,
        orderings=[own.ordering for own in asked.orderings],
        seeds=trainings.assign(label=trainings["ordering"]),
    ).properties(description=compare.set_in_words(best))


def _losses(name: str, trainings: pd.DataFrame) -> dict[str, Any]:
    """{evaluation: the mean loss of each block, in nats a token}"""
    grids = {
        ordering: read_losses(HERE / name / f"{ordering}.csv") for ordering in trainings["ordering"].unique()
    }
    return {row.run: grids[row.ordering].loc[row.seed].to_numpy() for row in trainings.itertuples()}


def _evaluation(name: str, trainings: pd.DataFrame) -> dict[str, Any]:
    """On which text the trainings were evaluated."""
    steps = pd.read_csv(HERE / name / "steps.csv").set_index("run")
    found: dict[str, Any] = json.loads(steps.loc[trainings["run"].iloc[0], "parameters"])
    return found


if __name__ == "__main__":
    main()

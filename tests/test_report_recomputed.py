"""The numbers of a report, computed again from the run folders by other code than the kit's.

Read are `run.json` and the parquet files of every evaluation; computed with numpy, scipy and statsmodels.
Nothing of `pftools.compare` or `pftools.inference` is imported here: the definitions are those of the papers
that their docstrings name.
"""

from __future__ import annotations

import json
import math
import re
from html import unescape
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy import optimize, stats
from statsmodels.formula.api import ols
from statsmodels.stats.multitest import multipletests

from pftools import report, study
from tests.stub_engine import StubEngine

GAP = {"prune": 0.20, "finetune_prune": 0.012, "prune_finetune": 0.0}
RIGHT = {"prune": 0.35, "finetune_prune": 0.62, "prune_finetune": 0.66}
SEEDS = 4


def trained(variant, seed, rate):
    return (
        3 + GAP[variant.ordering] + 0.01 * np.random.default_rng([seed, *variant.ordering.encode()]).normal()
    )


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The report's table of a finished study, and all its words on one line."""
    folder = tmp_path_factory.mktemp("recomputed")
    words = {"name": "again", "orderings": list(GAP), "seeds": list(range(SEEDS))}
    (folder / "again.yaml").write_text(json.dumps({**words, "evaluate": {"tasks": ["facts"]}}))
    plan = study.plan_study(study.load_study(folder / "again.yaml"), runs=folder / "runs")
    StubEngine(trained, right=lambda variant, seed: RIGHT[variant.ordering], n_blocks=30, n_questions=60).run(
        plan
    )
    table = report.study_results(folder / "again.yaml", runs=folder / "runs")
    parts = [report.headline(table), report.verdict_list(report.pair_table(table))]
    parts.append(report.told_apart(report.task_pairs(table)))
    return table, unescape(" ".join(parts)), read_runs(folder / "runs")


def read_runs(runs: Path) -> dict[str, dict[str, np.ndarray]]:
    """{ordering: losses (seeds, blocks), correct (seeds, questions), perplexity and sparsity by seed}."""
    records = {path.parent.name: json.loads(path.read_text()) for path in runs.glob("*/run.json")}
    found: dict[str, dict[int, dict]] = {}
    for name, record in records.items():
        if record["step"] == "evaluate":
            kinds, model = "", record["parameters"]["model"]
            while Path(model).name in records:
                kinds = records[Path(model).name]["step"] + " " + kinds
                model = records[Path(model).name]["parameters"]["model"]
            ordering = kinds.strip().replace(" ", "_")
            found.setdefault(ordering, {})[record["parameters"]["seed"]] = {
                "nll": pd.read_parquet(runs / name / "block_nll.parquet").sort_values("block")["nll"],
                "correct": pd.read_parquet(runs / name / "samples.parquet").sort_values("question")[
                    "correct"
                ],
                "perplexity": record["results"]["perplexity"],
                "measured": record["results"]["measured"],
            }
    return {
        ordering: {
            what: np.array([by_seed[seed][what] for seed in range(SEEDS)], dtype=float)
            for what in ("nll", "correct", "perplexity", "measured")
        }
        for ordering, by_seed in found.items()
    }


# ------------------------------------------------------------------------------- other code, same papers


def mean_squares(d: np.ndarray) -> tuple[float, float, float]:
    """Of seeds, blocks and the rest, each over seeds x blocks: statsmodels' analysis of variance."""
    seeds, blocks = d.shape
    long = pd.DataFrame(
        {"d": d.ravel(), "seed": np.repeat(range(seeds), blocks), "block": np.tile(range(blocks), seeds)}
    )
    anova = sm.stats.anova_lm(ols("d ~ C(seed) + C(block)", long).fit())
    squares = anova["sum_sq"] / anova["df"] / d.size
    return tuple(squares[["C(seed)", "C(block)", "Residual"]])


def half_width(squares: tuple[float, float, float], seeds: int, blocks: int, level: float) -> float:
    """Banerjee's interval of a crossed mean."""
    by_seed, by_block, rest = squares
    of_seeds = stats.t.isf(level / 2, seeds - 1) ** 2
    of_blocks = stats.t.isf(level / 2, blocks - 1) ** 2 * by_block
    alone = of_seeds * by_seed if by_seed >= by_block else 0.0
    return math.sqrt(max(of_seeds * max(by_seed - rest, 0.0) + of_blocks, alone))


def p_value(mean: float, squares: tuple[float, float, float], seeds: int, blocks: int) -> float:
    """The level at which the interval just reaches 0."""
    missing = lambda log: half_width(squares, seeds, blocks, math.exp(log)) - abs(mean)  # noqa: E731
    return math.exp(optimize.brentq(missing, -200, -1e-9)) if missing(-1e-9) < 0 else 1.0


def confidence_set(losses: dict[str, np.ndarray], level: float = 0.05) -> set[str]:
    left = set(losses)
    while len(left) > 1:
        behind = {}
        for one in left:
            d = losses[one] - np.mean([losses[other] for other in left - {one}], axis=0)
            behind[one] = d.mean() / half_width(mean_squares(d), *d.shape, 1.5 * level)
        worst = max(left, key=behind.__getitem__)
        if behind[worst] <= 1:
            break
        left.remove(worst)
    return left


PAIRS = [("prune", "finetune_prune"), ("prune", "prune_finetune"), ("finetune_prune", "prune_finetune")]


# ----------------------------------------------------------------------------------------------- the checks


def test_perplexities_and_sparsities(told):
    table, words, runs = told
    html = unescape(report.result_table(table).to_html())
    for found in runs.values():
        np.testing.assert_allclose(np.exp(found["nll"].mean(axis=1)), found["perplexity"], rtol=1e-12)
        assert f">{math.exp(found['nll'].mean()):.2f}<" in html
        assert f">{found['measured'].mean():.2%}<" in html and f">{found['correct'].mean():.1%}<" in html
    best = min(runs, key=lambda ordering: runs[ordering]["nll"].mean())
    reached = f"{math.exp(runs[best]['nll'].mean()):.2f}"
    assert f"The lowest number is that of {best}, {reached}." in words


def test_ratios_intervals_p_values_and_what_varies(told):
    _, words, runs = told
    p = []
    for first, second in PAIRS:
        d = runs[first]["nll"] - runs[second]["nll"]
        p.append(p_value(d.mean(), mean_squares(d), *d.shape))
    corrected = multipletests(p, method="holm")[1]
    for (one, other), p_holm in zip(PAIRS, corrected):
        better, worse = sorted((one, other), key=lambda name: runs[name]["nll"].mean())
        d = runs[better]["nll"] - runs[worse]["nll"]
        squares = mean_squares(d)
        half = half_width(squares, *d.shape, 0.05)
        ratio, low, high = np.exp([d.mean(), d.mean() - half, d.mean() + half])
        told_p = "< 0.001" if p_holm < 0.001 else f"{p_holm:.3f}"
        verb = f"{better} is better than {worse} at 50%"
        if p_holm >= 0.05:
            verb = f"{better} and {worse} cannot be told apart at 50% on 30 blocks"
        values = [f"{math.exp(runs[name]['nll'].mean()):.2f}" for name in (better, worse)]
        numbers = f"({' vs '.join(values)}, ratio {ratio:.3f} [{low:.3f}, {high:.3f}]"
        numbers += f", corrected p {told_p}, 4 seeds)"
        assert f"{verb} {numbers}" in words
        if p_holm < 0.05:
            agree = int((d.mean(axis=1) < 0).sum())
            # Components of variance from the expected mean squares, and their shares of the mean's variance.
            parts = [max(squares[0] - squares[2], 0), max(squares[1] - squares[2], 0), squares[2]]
            shares = [part / sum(parts) for part in parts]
            said = f"{shares[0]:.0%} is seeds, {shares[1]:.0%} blocks, {shares[2]:.0%} the rest"
            assert f"the same sign in {agree} of 4 seeds; of the variance of the mean, {said}" in words


def test_who_may_be_the_best(told):
    table, words, runs = told
    inside = confidence_set({name: found["nll"] for name, found in runs.items()})
    sentence = re.search(
        r"At 50%, (.*?) has the lowest perplexity \(95% confidence, 4 seeds, 30 blocks\)", words
    )
    assert set(re.findall(r"\w+_\w+|prune\b", sentence[1])) == inside and "prune" not in inside
    html = report.result_table(table).to_html()
    assert html.count(">yes<") == len(inside)


def test_accuracies_of_pairs(told):
    table, words, runs = told
    pairs = report.task_pairs(table).set_index(["first", "second"])
    p = []
    for first, second in PAIRS:
        d = runs[first]["correct"] - runs[second]["correct"]
        # Bonett and Price: two made-up questions count in the variance.
        more = np.concatenate([d, np.tile([1.0, -1.0], (SEEDS, 1))], axis=1)
        squares = tuple(square * more.shape[1] / d.shape[1] for square in mean_squares(more))
        half = half_width(squares, *d.shape, 0.05)
        row = pairs.loc[(first, second)]
        expected = (d.mean(), d.mean() - half, d.mean() + half)
        np.testing.assert_allclose(row[["difference", "low", "high"]].astype(float), expected, rtol=1e-9)
        p.append(p_value(d.mean(), squares, *d.shape))
    corrected = multipletests(p, method="holm")[1]
    np.testing.assert_allclose(pairs.loc[PAIRS, "p_holm"].astype(float), corrected, rtol=1e-6)
    best, worst = runs["prune_finetune"]["correct"].mean(), runs["prune"]["correct"].mean()
    assert f"facts: prune_finetune is better than prune at 50% ({best:.1%} vs {worst:.1%}, " in words

"""The numbers of a report, computed again from the run folders by other code than the kit's.

Read are `run.json` and the parquet files of every evaluation; computed with numpy, scipy and statsmodels.
Nothing of `pftools.compare` or `pftools.inference` is imported here: the definitions are those of the papers
that their docstrings name.
"""

from __future__ import annotations

import csv
import json
import math
import re
from html import unescape
from io import StringIO
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

PUBLISHED = ("prune_finetune_llm_llama7b.csv", "wanda_llama2_wikitext2_ppl.csv")
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


def records_of(table: pd.DataFrame) -> dict[str, dict]:
    """{run: its record, with the bytes of its files}."""
    found = {}
    for path in Path(table.attrs["runs"]).glob("*/run.json"):
        size = sum(file.stat().st_size for file in path.parent.rglob("*") if file.is_file())
        found[path.parent.name] = json.loads(path.read_text()) | {"bytes": size}
    return found


def chain_of(records: dict[str, dict], model: str) -> list[str]:
    """The runs that made a model, and those that they read."""
    name = Path(model).name
    if name not in records:
        return []
    given = records[name]["parameters"]
    return list(
        dict.fromkeys(
            [name, *chain_of(records, given["model"]), *chain_of(records, given.get("calibration") or "")]
        )
    )


def numbers_of(words: str) -> list[float]:
    return [float(found.replace(",", "")) for found in re.findall(r"\d[\d,]*\.?\d*", words)]


def test_costs(told):
    table, words, _ = told
    records = records_of(table)
    said = re.search(r"\*(\d+) steps took ([\d.]+) (\w+) of computing, (.*?) of memory at most and", words)
    assert int(said[1]) == len(records)
    seconds = sum(record["seconds"] for record in records.values())
    assert float(said[2]) * {"s": 1, "min": 60}[said[3]] == pytest.approx(seconds, rel=0.06, abs=0.051)
    memory = max(record["peak_memory_bytes"] for record in records.values())
    unit = {"MB": 1e6, "GB": 1e9}[said[4].split()[-1]]
    assert numbers_of(said[4])[0] == pytest.approx(memory / unit, rel=0.01, abs=0.051)
    costs = report.entry_costs(table).set_index("ordering")
    for ordering, rows in table.groupby("ordering"):
        chains = [chain_of(records, model) for model in rows["model"]]
        spent = [sum(records[name]["seconds"] for name in chain) for chain in chains]
        disk = [sum(records[name]["bytes"] for name in chain) for chain in chains]
        assert costs.loc[ordering, "seconds"] == pytest.approx(np.mean(spent))
        assert costs.loc[ordering, "disk"] == pytest.approx(np.mean(disk))
        held = [records[name]["peak_memory_bytes"] for chain in chains for name in chain]
        held += [records[Path(run).name]["peak_memory_bytes"] for run in rows["run"]]
        assert costs.loc[ordering, "memory"] == max(held)
    shown = pd.read_html(StringIO(report.step_table(table).to_html()))[0].set_index("run")
    for name, record in records.items():
        assert shown.loc[name, "seconds"] == pytest.approx(record["seconds"], abs=0.051)


def test_what_is_drawn(told):
    table, _, runs = told
    expected = {name: math.exp(found["nll"].mean()) for name, found in runs.items()}
    chart = report.quality_chart(table).to_dict()
    drawn = [row for rows in chart["datasets"].values() for row in rows if "may_be_best" in row]
    assert {row["ordering"]: row["perplexity"] for row in drawn} == pytest.approx(expected)
    inside = confidence_set({name: found["nll"] for name, found in runs.items()})
    assert {row["ordering"] for row in drawn if row["may_be_best"]} == inside
    singly = [row for rows in chart["datasets"].values() for row in rows if "seed" in row and "label" in row]
    assert sorted(row["perplexity"] for row in singly) == pytest.approx(
        sorted(value for found in runs.values() for value in found["perplexity"])
    )
    (accuracies,) = report.task_charts(table)
    drawn = [row for rows in accuracies.to_dict()["datasets"].values() for row in rows if "facts" in row]
    right = {row["ordering"]: (row["facts"], row["facts_low"], row["facts_high"]) for row in drawn}
    for name, found in runs.items():
        by_seed = found["correct"].mean(axis=1)
        bounds = (by_seed.mean(), (by_seed - 0.08).mean(), (by_seed + 0.08).mean())  # as the stub seals them
        assert right[name] == pytest.approx(bounds)
    ratios = report.ratio_chart(report.pair_table(table)).to_dict()
    drawn = [row for rows in ratios["datasets"].values() for row in rows if "ratio" in row]
    assert len(drawn) == len(PAIRS)
    for row in drawn:
        worse, better = row["pair"].removesuffix(", 50%").split(" / ")
        d = runs[worse]["nll"] - runs[better]["nll"]
        half = half_width(mean_squares(d), *d.shape, 0.05)
        limits = np.exp([d.mean(), d.mean() - half, d.mean() + half])
        assert [row["ratio"], row["low"], row["high"]] == pytest.approx(limits.tolist())


def test_the_matrix_of_verdicts(told):
    table, _, runs = told
    entries = report.entry_table(report.final_states(table))
    html = report.verdict_matrix(report.pair_table(table), report.ordering_names(table), entries)
    shown = pd.read_html(StringIO(html), index_col=0)[0]
    names = [re.sub(r"^\d+ ", "", name) for name in shown.index]
    assert names == sorted(runs, key=lambda name: runs[name]["nll"].mean())
    for row, one in enumerate(names):
        for column, other in enumerate(names):
            if one != other:
                ratio = math.exp((runs[one]["nll"] - runs[other]["nll"]).mean())
                assert float(shown.iat[row, column]) == pytest.approx(ratio, abs=0.0051)


def test_guessing_and_what_every_training_reached(told):
    table, _, runs = told
    shown = pd.read_html(StringIO(report.guessing_table(table).to_html()))[0].iloc[0]
    low, high = stats.binom.ppf([0.025, 0.975], 60, 0.25) / 60
    assert shown["95% of guessers"] == f"{low:.1%} to {high:.1%}" and shown["questions"] == 60
    behind = [name for name, found in runs.items() if found["correct"].mean() <= high + 1e-9]
    assert shown["not better than guessing"] == (", ".join(f"{name} at 50%" for name in behind) or "none")
    trainings = pd.read_html(StringIO(report.training_table(table).to_html()))[0]
    for row in trainings.itertuples():
        found = runs[row.ordering]
        assert row.perplexity == pytest.approx(found["perplexity"][row.seed], abs=0.0051)
        assert row.facts == f"{found['correct'][row.seed].mean():.1%}"


def power_of(
    difference: float, squares: tuple[float, float, float], seeds: int, blocks: int, level: float
) -> float:
    """In which share of 4,000 simulated studies with these variances a true difference is found."""
    by_seed, by_block, rest = squares
    spread = [max(by_seed - rest, 0.0) * seeds, max(by_block - rest, 0.0) * blocks, rest * seeds * blocks]
    draw = np.random.default_rng(5).normal
    found = 0
    for _ in range(4000):
        d = (
            difference
            + draw(0, math.sqrt(spread[0]), (seeds, 1))
            + draw(0, math.sqrt(spread[1]), (1, blocks))
        )
        d = d + draw(0, math.sqrt(spread[2]), (seeds, blocks))
        rows, columns = d.mean(axis=1), d.mean(axis=0)
        left = ((d - rows[:, None] - columns + d.mean()) ** 2).sum() / ((seeds - 1) * (blocks - 1))
        drawn = (rows.var(ddof=1) * blocks, columns.var(ddof=1) * seeds, left)
        found += d.mean() > half_width(tuple(one / d.size for one in drawn), seeds, blocks, level)
    return found / 4000


def test_what_is_seen_four_times_in_five_is(told):
    table, words, runs = told
    level = 0.05 / len(PAIRS)  # Holm's strictest step
    pairs = report.pair_table(table).set_index(["first", "second"])
    tasks = report.task_pairs(table).set_index(["first", "second"])
    shown = pd.read_html(StringIO(report.visible_differences(tasks.reset_index()).to_html()))[0]
    shown = shown.set_index("pair")["seen four times in five"]
    for first, second in PAIRS:
        d = runs[first]["nll"] - runs[second]["nll"]
        row = pairs.loc[(first, second)]
        power = power_of(math.log(row["visible"]), mean_squares(d), *d.shape, level)
        assert power == pytest.approx(0.8, abs=0.03)
        if row["verdict_kind"] == "cannot be told apart":
            assert f"a difference of {row['visible'] - 1:.1%} would be seen four times in five" in words
        d = runs[first]["correct"] - runs[second]["correct"]
        more = np.concatenate([d, np.tile([1.0, -1.0], (SEEDS, 1))], axis=1)
        squares = tuple(square * more.shape[1] / d.shape[1] for square in mean_squares(more))
        visible = float(shown[f"{first} / {second}, 50%"]) / 100
        assert power_of(visible, squares, *d.shape, level) == pytest.approx(0.8, abs=0.03)
    assert (pairs["verdict_kind"] == "cannot be told apart").any()


# Where and how fast a step ran, and what a table of results says anyway.
NO_SETTINGS = set(
    "model parent calibration seed method pattern sparsity tokens device placement runs batch_size "
    "held_out_blocks show_dense_cost gradient_checkpointing track save_every data".split()
)


def test_the_settings_that_decided_the_numbers(told):
    table, _, _ = told
    records, orderings = records_of(table), dict(zip(table["run"], table["ordering"]))
    expected: dict[tuple[str, str], dict[str, set[str]]] = {}
    for run, ordering in orderings.items():
        for name in chain_of(records, run):
            record = records[name]
            told_of = {k: v for k, v in record["parameters"].items() if k not in NO_SETTINGS}
            told_of |= {k: record["results"][k] for k in ("dtype", "merge") if record["results"].get(k)}
            for setting, value in told_of.items():
                expected.setdefault((record["step"], setting), {}).setdefault(said_of(value), set()).add(
                    ordering
                )
    shown = pd.read_html(StringIO(report.settings_table(table).to_html()), keep_default_na=False)[0].astype(
        str
    )
    shown = shown[~shown["setting"].str.endswith(", sha256")]
    found: dict[tuple[str, str], dict[str, set[str]]] = {}
    for row in shown.itertuples():
        values = found.setdefault((row.step, row.setting), {})
        values[row.value] = set(orderings.values()) if row.of == "all" else set(row.of.split(", "))
    assert set(found) == set(expected)
    for place, values in expected.items():
        assert set(found[place]) == set(values), place
        if len(values) > 1:
            assert found[place] == values, place


def said_of(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    return "all" if value is None else str(value)


def test_the_published_numbers_are_those_of_their_files(told):
    table, _, _ = told
    folder = Path(__file__).parents[1] / "data" / "published"
    study_rows, wanda = (list(csv.DictReader((folder / name).open())) for name in PUBLISHED)
    theirs = [
        (row["pipeline"], float(row["sparsity_measured"]), float(row["wikitext2_ppl"])) for row in study_rows
    ]
    theirs += [
        ("base" if row["method"] == "dense" else "prune", float(row["sparsity"]), float(row["llama2_7b"]))
        for row in wanda
    ]
    drawn = [row for rows in report.published_chart(table).to_dict()["datasets"].values() for row in rows]
    marks = sorted(
        {(row["ordering"], row["measured"], row["perplexity"]) for row in drawn if "perplexity" in row}
    )
    assert marks == sorted(set(theirs))
    drawn = [row for rows in report.sparsity_chart(table).to_dict()["datasets"].values() for row in rows]
    hollow = {
        (r["ordering"], r["asked"], r["measured"]) for r in drawn if r.get("source", "").startswith("Prune-")
    }
    asked = {
        (r["pipeline"], float(r["sparsity_requested"]), float(r["sparsity_measured"])) for r in study_rows
    }
    assert hollow == asked
    said = report.lost_zeros()
    for row in study_rows:
        lost = float(row["sparsity_requested"]) - float(row["sparsity_measured"])
        if row["sparsity_requested"] == "0.5":
            words = f"{row['pipeline']} asked 50% and has {float(row['sparsity_measured']):.0%}"
            assert (words in said) == (lost > 0.005)
    for metric in ("mmlu", "belebele_eng", "factoid_qa", "bbh_logical_deduction_five_objects"):
        column = report.published_numbers()[metric].dropna() * 100
        assert sorted(column) == pytest.approx(sorted(float(row[metric]) for row in study_rows))

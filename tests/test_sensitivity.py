"""What a study will be able to see, from how much earlier runs varied."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from pftools import cli, study
from pftools.compare.other_losses import compare_losses, read_losses
from pftools.inference.crossed import crossed_mean
from pftools.inference.power import visible_difference
from pftools.inference.verdict import judge_losses
from pftools.study import sensitivity
from tests.stub_engine import StubEngine

GAP = {"prune": 0.3, "finetune_prune": 0.1, "prune_finetune": 0.0}


def trained(variant, seed, rate):
    return 3 + GAP[variant.ordering] + 0.02 * np.random.default_rng([seed, len(variant.ordering)]).normal()


def planned(folder, name="planned", **words):
    content = {"name": name, "orderings": list(GAP), "evaluate": {"tasks": ["facts"]}, **words}
    (folder / f"{name}.yaml").write_text(json.dumps(content))
    return study.plan_study(study.load_study(folder / f"{name}.yaml"), runs=folder / "runs")


def test_earlier_runs_of_other_studies_tell_what_will_be_seen(tmp_path):
    earlier = StubEngine(trained).run(planned(tmp_path, "earlier", seeds=[0, 1, 2, 3]))
    plan = planned(tmp_path, seeds=[7, 8, 9], tokens=1024, evaluate={"tasks": ["facts"], "n_blocks": 100})
    found = sensitivity.sensitivity(plan)
    losses = {
        name: np.stack(
            [
                pd.read_parquet(Path(row.evaluation) / "block_nll.parquet")["nll"]
                for row in earlier.rows
                if row.ordering == name
            ]
        )
        for name in GAP
    }
    each = [
        crossed_mean(losses[one] - losses[other]).variances
        for one, other in [
            ("prune", "finetune_prune"),
            ("prune", "prune_finetune"),
            ("finetune_prune", "prune_finetune"),
        ]
    ]
    mean = type(each[0])(
        *(float(np.mean([getattr(v, part) for v in each])) for part in ("seeds", "blocks", "rest"))
    )
    expected = np.expm1(visible_difference(mean, 3, 100, level=0.05 / 3))
    assert found.table.loc[3, "perplexity"] == pytest.approx(expected)
    assert found.pairs == 3 and found.n == {"perplexity": 100, "facts": 150} and "3 pairs" in found.source
    assert math.isinf(found.table.loc[1, "perplexity"]) and list(found.table.index) == [1, 3, 5, 10]
    assert (found.table.loc[3:].diff().dropna() < 0).all().all()  # more seeds see more


def test_trials_and_other_models_tell_nothing(tmp_path):
    StubEngine(trained).run(planned(tmp_path, "earlier", seeds=[0, 1], model="another/model"))
    found = sensitivity._earlier(planned(tmp_path))
    assert found == {}


def test_a_study_of_one_ordering_has_nothing_to_see(tmp_path):
    assert sensitivity.sensitivity(planned(tmp_path, orderings=["prune"])) is None


def test_the_plan_shows_it(tmp_path):
    StubEngine(trained).run(planned(tmp_path, "earlier", seeds=[0, 1, 2]))
    planned(tmp_path, "next", seeds={"start": 3, "most": 8})
    asked = ["plan", str(tmp_path / "next.yaml"), "--runs", str(tmp_path / "runs")]
    shown = CliRunner().invoke(cli.app, asked).output
    assert "smallest difference that it will see" in shown and "two models only" in shown
    assert "3 (this study)" in shown and "8 (this study)" in shown and "points" in shown


def test_without_earlier_runs_the_committed_study_tells(tmp_path):
    found = sensitivity.sensitivity(planned(tmp_path, orderings=["prune_finetune", "finetune_prune"]))
    assert "the study 'seeds' that comes with pftools" in found.source and "up to 3 seeds" in found.source
    folder = sensitivity.DATA / "results" / "seeds"
    grids = [
        pd.read_csv(folder / f"{name}.csv").pivot(index="seed", columns="block", values="nll").to_numpy()
        for name in ("finetune_prune", "prune_finetune")
    ]
    variances = crossed_mean(grids[0] - grids[1]).variances
    expected = math.expm1(visible_difference(variances, 5, grids[0].shape[1]))
    assert found.table.loc[5, "perplexity"] == pytest.approx(expected) and found.pairs == 1


def test_the_readme_says_what_the_committed_results_say():
    folder = sensitivity.DATA / "results" / "seeds"
    readme = " ".join((sensitivity.DATA.parent / "README.md").read_text().replace("\n>", "\n").split())
    losses = {name: pd.read_csv(folder / f"{name}.csv") for name in ("prune_finetune", "finetune_prune")}
    means = {name: rows.groupby("seed")["nll"].mean() for name, rows in losses.items()}
    values = {name: math.exp(mean.mean()) for name, mean in means.items()}
    assert f"({values['prune_finetune']:.2f} vs {values['finetune_prune']:.2f}, ratio" in readme
    difference = means["prune_finetune"] - means["finetune_prune"]
    assert f"ratio {math.exp(difference.mean()):.3f} [" in readme and (difference < 0).all()
    varies = f"varies by {means['prune_finetune'].std():.3f} (`prune_finetune`) and "
    varies += f"{means['finetune_prune'].std():.3f} nats (`finetune_prune`), the difference of the two by "
    assert f"{varies}{difference.std():.3f}, where it is {-difference.mean():.3f}" in readme
    results = pd.read_csv(folder / "results.csv").set_index(["ordering", "seed"])
    for (ordering, seed), row in results.iterrows():
        assert row["perplexity"] == pytest.approx(math.exp(means[ordering][seed]), rel=1e-5)
    trials = pd.read_csv(folder / "trials.csv")
    chosen = trials[trials["chosen"]].set_index("ordering")
    assert not chosen["edge"].any() and set(chosen["learning_rate"]) == {0.008}
    for ordering, tried in trials.groupby("ordering"):
        assert tried.set_index("learning_rate")["loss"].idxmin() == chosen.loc[ordering, "learning_rate"]


def test_the_verdict_in_bf16_is_that_in_fp32():
    folder = sensitivity.DATA / "results" / "seeds"
    names = ("prune_finetune.csv", "finetune_prune.csv")
    in_bf16 = compare_losses(*(folder / "bf16" / name for name in names))
    both = [read_losses(folder / name) for name in names]
    in_fp32 = judge_losses(*(losses[list(range(24))] for losses in both))
    assert in_bf16.kind == in_fp32.kind(in_fp32.p) == "differs"
    assert in_bf16.judged.mean == pytest.approx(in_fp32.mean, abs=0.005)
    words = " ".join((folder / "README.md").read_text().split())
    for found in (in_bf16.judged, in_fp32):
        ratio, low, high = (math.exp(value) for value in (found.mean, *found.interval))
        assert f"{ratio:.3f} [{low:.3f}, {high:.3f}], p {found.p:.3f}" in words


def test_the_figure_of_the_committed_results_is_drawn_from_them(tmp_path):
    root = sensitivity.DATA.parent
    script = root / "data" / "results" / "figure.py"
    made = tmp_path / "seeds.svg"
    subprocess.run([sys.executable, str(script), "seeds", str(made)], check=True, cwd=root)
    drawn, committed = made.read_text(), (root / "figures" / "seeds.svg").read_text()
    words = re.compile(r">([^<>]+)</text>")
    assert words.findall(drawn) == words.findall(committed)
    outlines = re.compile(r'<path aria-label="([^"]+)"')
    assert outlines.findall(drawn) == outlines.findall(committed)
    results = pd.read_csv(root / "data" / "results" / "seeds" / "results.csv")
    singly = {
        f"perplexity: {row.perplexity:.6f}; label: {row.ordering}; ordering: {row.ordering}; seed: {row.seed}"
        for row in results.itertuples()
    }
    assert len(singly) == len(results) and singly <= set(outlines.findall(drawn))

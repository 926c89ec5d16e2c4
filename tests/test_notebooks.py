"""Every notebook under plain papermill, with tiny parameters; and a whole study on a tiny model."""

import ast
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import papermill
import pytest
import torch
import yaml

from pftools import cells, checkpoints, models, redaction, run_folder, settings, study
from pftools.execute import steps
from tests.tiny import save_tiny, tiny_blocks

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
KINDS = {
    "00_plan_study": settings.PlanStudy,
    "01_calibrate": settings.Calibrate,
    "02_prune": settings.Prune,
    "03_finetune": settings.Finetune,
    "04_evaluate": settings.Evaluate,
    "05_analyse_weights": settings.Analyse,
    "06_compare_orderings": settings.Compare,
}
TINY = {"block_length": 32, "dtype": "float32"}


def read(name):
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


@pytest.mark.parametrize("name", KINDS)
def test_the_parameters_cell_says_what_the_settings_say(name):
    cells = [cell for cell in read(name).cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(cells) == 1 and cells[0].source.startswith("# Parameters")
    assigned = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(cells[0].source).body}
    defaults = {field: info.default for field, info in KINDS[name].model_fields.items()}
    assert assigned == defaults
    lines = cells[0].source.splitlines()[1:]
    assert all("  # " in line for line in lines), "a comment for every parameter"


@pytest.mark.parametrize("name", KINDS)
def test_notebooks_are_stripped_open_with_words_and_are_made_of_short_cells(name):
    notebook = read(name)
    assert notebook.cells[0].cell_type == "markdown" and len(notebook.cells[0].source) > 300
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
            assert "parameters" in cell.metadata.get("tags", []) or len(cell.source.splitlines()) <= 32


@pytest.mark.parametrize("name", KINDS)
def test_no_other_cell_sets_a_parameter(name):
    """Else the value that is read again would be another than the parameters cell shows."""
    for cell in read(name).cells:
        if cell.cell_type == "code" and "parameters" not in cell.metadata.get("tags", []):
            assert not cells.assigned(cell.source) & set(KINDS[name].model_fields), cell.source


@pytest.mark.parametrize("name", KINDS)
def test_a_cell_takes_few_parameters_one_by_one(name):
    for cell in read(name).cells:
        if cell.cell_type == "code":
            assert cell.source.count("parameters.") <= 7, cell.source


def execute(name, tmp_path, **parameters):
    papermill.execute_notebook(
        str(NOTEBOOKS / f"{name}.ipynb"),
        str(tmp_path / f"{name}.out.ipynb"),
        parameters,
        kernel_name="python3",
        progress_bar=False,
        cwd=str(tmp_path),
    )


def run_of(tmp_path, step):
    (folder,) = (tmp_path / "runs").glob(f"{step}-*")
    assert not list((tmp_path / "runs" / ".work").iterdir())
    return run_folder.verify(folder), str(folder)


@pytest.mark.slow
def test_stepping_through_the_notebooks_one_after_the_other(tmp_path):
    base = {"model": str(save_tiny(tmp_path / "tiny")), "dtype": "float32"}
    execute("01_calibrate", tmp_path, **base, block_length=32, n_blocks=4)
    _, calibration = run_of(tmp_path, "calibrate")
    execute("02_prune", tmp_path, **base, calibration=calibration, sparsity=0.5, inputs="dense")
    record, pruned = run_of(tmp_path, "prune")
    assert record["results"]["measured"] == 0.5
    execute("03_finetune", tmp_path, model=pruned, **TINY, steps=2, blocks_per_step=2)
    before = record["results"]["perplexity_after"]
    record, tuned = run_of(tmp_path, "finetune")
    assert record["results"]["measured"] == 0.5 and record["results"]["merge"] == "masked"
    assert (
        record["results"]["perplexity_before"] == before
    )  # one text; the three models were measured once each
    assert len(list((tmp_path / "runs" / ".held_out").glob("*.json"))) == 3
    execute("04_evaluate", tmp_path, model=tuned, **TINY, n_blocks=4, tasks=["facts"], limit=5)
    record, evaluation = run_of(tmp_path, "evaluate")
    assert record["results"]["perplexity"] > 1 and record["results"]["tasks"]["facts"]["n"] == 5
    assert len(pd.read_parquet(Path(evaluation) / "block_nll.parquet")) == 4
    execute("05_analyse_weights", tmp_path, model=tuned, dtype="float32")
    record, _ = run_of(tmp_path, "analyse")
    assert record["results"]["parent"] == pruned


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"sparsity": 1.7}, "the parameter sparsity of the prune step is 1.7: it should be less than 1"),
        ({"sparsty": 0.5}, "unknown parameter 'sparsty' of the prune step: did you mean 'sparsity'?"),
        ({"HF_TOKEN": "hf_0123456789"}, "looks like a secret"),
    ],
)
def test_a_wrong_parameter_is_one_sentence_and_leaves_nothing(tmp_path, parameters, says):
    with pytest.raises(papermill.PapermillExecutionError) as failure:
        execute("02_prune", tmp_path, **parameters)
    assert says in failure.value.evalue
    assert not (tmp_path / "runs").exists()
    errors = [
        output
        for cell in nbformat.read(tmp_path / "02_prune.out.ipynb", 4).cells
        for output in cell.get("outputs", [])
        if output.output_type == "error"
    ]
    assert len(errors) == 1 and len(errors[0]["traceback"]) == 1


@pytest.mark.slow
def test_a_whole_study_runs_resumes_reports_and_exports(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = {
        "name": "tiny",
        "model": str(save_tiny(tmp_path / "tiny")),
        "dtype": "float32",
        "orderings": ["base", "prune", "finetune_prune", "prune_finetune"],
        "tokens": 256,
        "calibrate": {"n_blocks": 4, "block_length": 32},
        "finetune": {"block_length": 32, "blocks_per_step": 2},
        "evaluate": {"block_length": 32, "n_blocks": 6, "tasks": ["facts"], "limit": 8},
        "analyse": False,
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(words))
    command = [sys.executable, "-c", "from pftools.cli import main; main()", "run", "tiny.yaml"]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("prune_finetune") and "Report:" in first.stdout

    plan = study.plan_study(study.load_study("tiny.yaml"))
    table = study.results(plan)
    assert len(table) == 4 and table["measured"].tolist() == pytest.approx([0, 0.5, 0.5, 0.5])
    assert set(table["finetune_tokens"]) == {0, 256}
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/run.json")}
    assert (
        len(stamps) == 9
        and not list((tmp_path / "runs").glob(".work/*"))
        and not list((tmp_path / "runs").rglob(".*.partial"))
    )
    assert study.run_study(plan, progress=False) == []
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}  # nothing was done twice

    html = (tmp_path / "reports" / "tiny" / "index.html").read_text()
    assert "<svg" in html and "prune_finetune" in html
    assert not [
        link
        for link in ('src="http', 'href="http', "@import", "cdn.")
        if link in html.replace('href="https://github.com', "")
    ]

    model, _ = models.load_model(table["model"].iloc[3], dtype="float32")
    assert models.measured_sparsity(model) == 0.5
    exported = checkpoints.export(table["model"].iloc[3], tmp_path / "exported", dtype="float32")
    again, _ = models.load_model(exported, dtype="float32")
    with torch.no_grad():
        assert torch.equal(model(tiny_blocks()).logits, again(tiny_blocks()).logits)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "the kernel died"),
        ("import sys; sys.exit(0)", "without sealing"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_success_is_never_inferred_from_the_notebook(tmp_path, body, says):
    cells = [
        nbformat.v4.new_code_cell("# Parameters\nmodel = ''", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(body),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "bad.ipynb")
    folder = tmp_path / "runs" / "prune-0123456789ab"
    step = {"notebook": str(tmp_path / "bad.ipynb"), "folder": str(folder), "parameters": {}}
    with pytest.raises(Exception, match=says):
        steps.execute_step(step)
    assert says in steps.read_failure(folder).cause and not run_folder.is_finished(folder)


def test_secrets_are_blotted_out_of_any_text(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", 'a "quoted" key')
    found = redaction.redact(json.dumps(['a "quoted" key', "hf_" + "x" * 34, "hf_transfer"]))
    assert json.loads(found) == ["[redacted]", "[redacted]", "hf_transfer"]


def test_what_01_says_of_growing_signals_is_what_the_model_shows():
    """The subtitle is computed: with a model whose signals shrink it says so."""
    cells = {cell.id: cell.source for cell in read("01_calibrate").cells}
    shown = {}
    figures = SimpleNamespace(heat_map=lambda *_, **options: shown.update(options))
    rows = [(layer, module, 8.0 / 2**layer) for layer in range(3) for module in ("q_proj", "up_proj")]
    table = pd.DataFrame([*rows[:-1], (2, "up_proj", 0.5)], columns=["layer", "module", "mean_norm"])
    exec(cells["01-07"], {"table": table, "figures": figures})
    assert "0.16 times what it is in the first" in shown["subtitle"]
    assert "up_proj varies most, by a factor of 16" in shown["subtitle"]

"""A browser, and reports of made-up studies to open in it."""

import ast
import json
import shutil
from pathlib import Path

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from pftools import report, run_folder, study
from pftools.report import page as pages
from tests.made_up import GAIN, seal_study

SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MANY = [
    "base",
    "finetune",
    *GAIN,
    "finetune_iter_prune",
    "prune_finetune_iter",
    "iter_pf",
    "iter_fp",
    "(P F)*2",
]
HARM = dict(zip(MANY, (0, 0, 0.5, 0.3, 0.1, 0.28, 0.1004, 0.05, 0.2, 0.08)))


def harm(row):
    return HARM[row.ordering] * 4 * row.asked**2 + 0.002 * row.seed + 0.05 * (row.method == "magnitude")


def without_prune(row):
    return row.ordering == "prune"


STUDIES = {
    "finished": {},
    "half": {"skip": without_prune},
    "failed": {"skip": without_prune},
    "one_ordering": {"orderings": ["prune"]},
    "seeds": {
        "orderings": ["base", *GAIN],
        "sparsities": [0.3, 0.6],
        "seeds": [0, 1, 2],
        "methods": ["wanda", "magnitude"],
    },
    "eighty": {"orderings": MANY, "sparsities": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]},
}


@pytest.fixture(scope="session")
def browser():
    if CHROMIUM is None:
        pytest.skip("chromium is not installed: tests/browser/run installs it")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def reports(browser, tmp_path_factory):
    """{name of a study: (its results, its page)}, each made when it is first asked for."""
    return Reports(tmp_path_factory)


class Reports(dict):
    def __init__(self, folders):
        super().__init__()
        self.folders = folders

    def __missing__(self, name):
        folder = self.folders.mktemp(name)
        file = seal_study(folder, harm=harm, **STUDIES[name])
        if name == "failed":
            fail(study.plan_study(study.load_study(file), runs=folder / "runs"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pages, "_executed", executed_here)
            path = report.render(file, runs=folder / "runs", output=folder / "report")
        self[name] = report.study_results(file, runs=folder / "runs"), path
        return self[name]


def keep(page, name, *, whole=False):
    """A picture of what a test has opened, for people to look at: the window, or the whole page."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=whole)


def fail(plan):
    """As the unfinished evaluation would look after its fifth cell has failed."""
    (row,) = [row for row in plan.rows if not run_folder.is_finished(row.evaluation)]
    name = plan.steps[row.evaluation.rpartition("/")[2]].name
    attempt = row.evaluation.replace(name, f".work/{name}.1")
    shutil.os.makedirs(attempt)
    cause = {"run": name, "cell": 5, "cause": "OutOfMemoryError: 12 GiB <asked>"}
    with open(f"{attempt}/failure.json", "w") as file:
        json.dump(cause, file)


def showing_its_end(source):
    """The source with its last expression, which only a kernel shows, given to `display`."""
    last = ast.parse(source).body[-1]
    if not isinstance(last, ast.Expr) or "display(" in ast.unparse(last):
        return source
    before = source.splitlines()[: last.lineno - 1]
    return "\n".join([*before, f"_end = {ast.unparse(last)}", "if _end is not None:", "    display(_end)"])


def executed_here(study_file, parameters):
    """The report's notebook, executed in this process: a kernel for each study would take long."""
    notebook = nbformat.read(pages.NOTEBOOKS / "06_compare_orderings.ipynb", 4)
    InteractiveShell.clear_instance()
    shell = InteractiveShell.instance()
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        source = cell.source
        if "parameters" in cell.metadata.get("tags", []):
            source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
        with capture_output() as captured:
            shell.run_cell(showing_its_end(source), store_history=True).raise_error()
        for shown in captured.outputs:
            cell.outputs.append(nbformat.v4.new_output("display_data", shown.data, metadata=shown.metadata))
        if captured.stdout:
            cell.outputs.append(nbformat.v4.new_output("stream", text=captured.stdout))
    InteractiveShell.clear_instance()
    return notebook

"""All seven notebooks, executed on the embedded model, as pages with their outputs: what `make gallery` runs.

The notebooks in `notebooks/` are kept without outputs, and a code host shows nothing of them. The five of the
steps are those that a small study executed; finished steps are not executed again.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import papermill
from nbconvert import MarkdownExporter

from pftools.colab import cell as colab_cell
from pftools.colab import without_badge
from pftools.execute.steps import NOTEBOOK_OF, kernel_options
from pftools.figures import LIVE
from pftools.redaction import redact
from pftools.report.notebooks import with_parameters
from pftools.shipped import NOTEBOOKS
from pftools.study import load_study, plan_study, run_study

HERE = Path(__file__).resolve().parent
STUDY = Path(os.path.relpath(HERE)) / "study.yaml"
ON_COLAB = colab_cell("").partition("\n")[0]  # how the cell begins that only Colab needs
WIDGET = "application/vnd.jupyter.widget-view+json"


def main(study: Path = STUDY, runs: str = "runs", folder: Path = HERE) -> list[Path]:
    """Write `<notebook>.md` and its pictures for each notebook into ``folder``; returns the pages."""
    plan = plan_study(load_study(study), runs=runs)
    if failures := run_study(plan):
        sys.exit("\n".join(map(str, failures)))
    executed, given = {}, {}
    for step in plan.steps.values():  # the last of each kind has the most behind it
        name = Path(NOTEBOOK_OF[step.parameters.step]).stem
        executed[name] = step.folder / "notebook.ipynb"
        given[name] = step.parameters.model_dump(mode="json")
    parameters = {"study": str(study), "runs": runs}
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("00_plan_study", "06_compare_orderings"):
            executed[name], given[name] = Path(scratch) / f"{name}.ipynb", parameters
            with kernel_options() as options:
                papermill.execute_notebook(
                    str(NOTEBOOKS / f"{name}.ipynb"), str(executed[name]), parameters, **options
                )
        return [
            write(name, nbformat.read(path, 4), folder, given[name])
            for name, path in sorted(executed.items())
        ]


def still(data: dict[str, Any]) -> dict[str, Any]:
    """An output, by media type, for a page without a script: of a chart, or a widget, its drawing."""
    kept = {kind: shown for kind, shown in data.items() if kind not in (LIVE, WIDGET)}
    return {} if WIDGET in data and set(kept) == {"text/plain"} else kept


def write(name: str, notebook: Any, folder: Path, parameters: dict[str, Any]) -> Path:
    """One executed notebook as Markdown, with its pictures in `<name>/` beside it.

    Its parameters are shown as they were given, and paths from the folder that it was made in.
    """
    cells = [cell for cell in notebook.cells if not cell.source.startswith(ON_COLAB)]
    notebook.cells = with_parameters(cells, parameters)
    for cell in notebook.cells:
        cell.metadata = {}
        cell.source = without_badge(cell.source)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "data" in output:
                    output.data = still(output.data)
            cell.outputs = [output for output in cell.outputs if output.get("data", True)]
    resources: dict[str, Any] = {"output_files_dir": name, "unique_key": "picture"}
    body, resources = MarkdownExporter().from_notebook_node(notebook, resources)
    for place, content in resources["outputs"].items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(content)
    page = folder / f"{name}.md"
    page.write_text(redact(body.replace(f"{Path.cwd()}/", "")), encoding="utf-8")
    return page


if __name__ == "__main__":
    print(*main(), sep="\n")

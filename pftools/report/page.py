"""The notebook `06_compare_orderings`, executed, as one HTML file that needs no network and no script.

The cells' tags say what becomes of them. The first screen holds the title of the cell tagged `opening`, the
cell tagged `answer` and, beside it, the one tagged `main-chart`. The opening's other words follow as "How to
read it".
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from html import escape
from pathlib import Path
from typing import Any

from pftools import files
from pftools.errors import PftoolsError
from pftools.redaction import redact
from pftools.steps import NOTEBOOKS, kernel_options
from pftools.study import Plan, load_study, plan_study, run_state

_NOTEBOOK = "06_compare_orderings.ipynb"
_HERE = Path(__file__).parent
_TEMPLATE = _HERE / "page.html"


def render(
    study: str | Path,
    *,
    runs: str | Path = "runs",
    output: str | Path | None = None,
    figures: str | Path | None = None,
) -> Path:
    """Write the report of a study. A file that shows the runs as they are is left as it is.

    Args:
        study: the study file.
        runs: the folder of run folders.
        output: the file; default `reports/<study>.html`.
        figures: a folder for the figures as files.

    Raises:
        PftoolsError: nothing is finished yet, or the notebook failed.
    """
    plan = plan_study(load_study(study), runs=runs)
    path = Path(output) if output else Path("reports") / f"{plan.study.name}.html"
    state = _state(study, plan)
    if path.exists() and not figures and f'content="{state}"' in path.read_text(encoding="utf-8")[:2000]:
        return path
    notebook = _executed(study, {"study": str(study), "runs": str(runs), "save_figures": str(figures or "")})
    files.write_text(path, redact(_html(notebook, plan.study.name, state)))
    return path


def _state(study: str | Path, plan: Plan) -> str:
    """A digest of all that a report depends on: the study, its runs, and the code that draws it."""
    found = hashlib.sha256(Path(study).read_bytes() + str(plan.runs).encode())
    for step in plan.steps.values():
        record = step.folder / "run.json"
        found.update(record.read_bytes() if record.exists() else run_state(step.folder).encode())
    package = _HERE.parent
    code = [NOTEBOOKS / _NOTEBOOK, _TEMPLATE]
    for name in ("report", "compare", "figures"):
        code += sorted((package / name).glob("*.py"))
    for file in code:
        found.update(file.read_bytes())
    return found.hexdigest()


def _executed(study: str | Path, parameters: dict[str, str]) -> Any:
    import nbformat
    import papermill

    with tempfile.TemporaryDirectory() as scratch:
        executed = str(Path(scratch) / "report.ipynb")
        try:
            with kernel_options() as options:
                papermill.execute_notebook(str(NOTEBOOKS / _NOTEBOOK), executed, parameters, **options)
        except papermill.PapermillExecutionError as error:
            raise PftoolsError(f"the report of {study} could not be made: {error.evalue}") from None
        return nbformat.read(executed, as_version=4)


def _html(notebook: Any, name: str, state: str) -> str:
    """The notebook's words and outputs, without its code, in a page of our own."""
    from jinja2 import Environment

    for number, cell in enumerate(notebook.cells):
        _tidy(cell, f"cell{number}")
    tagged = {tag: cell for cell in notebook.cells for tag in cell.metadata.get("tags", [])}
    title, how = _opening(tagged["opening"].source)
    first = [tagged["answer"], tagged["main-chart"]]
    others = [cell for cell in notebook.cells if _has_words(cell) and cell not in [tagged["opening"], *first]]
    template = Environment(autoescape=True).from_string(_TEMPLATE.read_text(encoding="utf-8"))
    answer, chart = (_body(notebook, [cell]) for cell in first)
    return template.render(
        name=name, state=state, title=title, answer=answer, chart=chart, body=_body(notebook, [how, *others])
    )


def _opening(source: str) -> tuple[str, Any]:
    """(the notebook's title as a report's, a cell with the words under it)."""
    import nbformat

    first, _, words = source.partition("\n")
    title = first.removeprefix("#").partition("·")[2].partition(":")[2].strip() or first.strip("# ")
    return f"{title[:1].upper()}{title[1:]}", nbformat.v4.new_markdown_cell(f"## How to read it\n{words}")


def _body(notebook: Any, cells: list[Any]) -> str:
    """These cells as HTML. nbconvert's own page loads scripts from elsewhere."""
    import nbformat
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(
        template_name="basic",
        exclude_input=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        exclude_anchor_links=True,
    )
    plain = [nbformat.from_dict({**cell, "metadata": {}}) for cell in cells]
    body, _ = exporter.from_notebook_node(nbformat.v4.new_notebook(cells=plain, metadata=notebook.metadata))
    return body


def _has_words(cell: Any) -> bool:
    return cell.cell_type == "markdown" or bool(cell.get("outputs"))


def _tidy(cell: Any, prefix: str) -> None:
    """Charts become part of the page; what the kernel warns of belongs to a notebook, not to a report."""
    if cell.cell_type != "code":
        return
    cell.outputs = [
        output for output in cell.outputs if output.output_type != "stream" or output.get("name") == "stdout"
    ]
    for number, output in enumerate(cell.outputs):
        data = output.get("data", {})
        if "image/svg+xml" in data:
            output.data = type(data)({"text/html": _figure(data["image/svg+xml"], f"{prefix}-{number}")})
        elif "<table" in data.get("text/html", ""):
            output.data = type(data)(
                {"text/html": f'<div class="wide" tabindex="0">{data["text/html"]}</div>'}
            )


def _figure(svg: str, prefix: str) -> str:
    """A chart as part of the page: it has a name that is read aloud, and ids of its own.

    Where the screen is narrow it scrolls inside itself, so that its words stay readable.
    """
    svg = re.sub(r'(\bid="|url\(#|href="#)', lambda found: f"{found.group(1)}{escape(prefix)}-", svg)
    words = re.search(r"(?:Title text|Subtitle text) '([^\"]*)'\"", svg)
    name = words.group(1) if words else "Chart"
    return f'<figure role="group" aria-label="{name}" tabindex="0">{svg}</figure>'

"""The notebook `06_compare_orderings`, executed, as a page that asks nothing of any network.

The cells' tags say what becomes of them. The first screen holds the title of the cell tagged `opening`, the
cell tagged `answer` and, beside it, the one tagged `main-chart`. The opening's other words follow as "How to
read it". A cell tagged `folded` is closed until a reader opens it, under its first line, a comment. Cells
tagged `lesson` are for readers of the notebook.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from html import escape
from pathlib import Path
from typing import Any

from pftools import figures as drawings
from pftools import files
from pftools.errors import PftoolsError
from pftools.execute.steps import NOTEBOOKS, kernel_options
from pftools.redaction import redact
from pftools.report import cells_html, live, matrix, notebooks, templates
from pftools.study import Plan, load_study, plan_study, run_state

_NOTEBOOK = "06_compare_orderings.ipynb"
_HERE = Path(__file__).parent


def render(
    study: str | Path,
    *,
    runs: str | Path = "runs",
    output: str | Path | None = None,
    figures: str | Path | None = None,
    single_file: bool = False,
) -> Path:
    """Write the report of a study. What shows the runs as they are is left as it is.

    Args:
        study: the study file.
        runs: the folder of run folders.
        output: a folder, which gets `index.html` and a page for every executed step in `steps`; or a file
            that ends with .html, which is then all of the report. Default: `reports/<study>`.
        figures: a folder for the figures as files.
        single_file: write one file, by default `reports/<study>.html`.

    Returns:
        The page to open.

    Raises:
        PftoolsError: nothing is finished yet, or the notebook failed.
    """
    plan = plan_study(load_study(study), runs=runs)
    path, steps = _places(plan.study.name, output, single_file)
    pages = notebooks.write_pages(plan, steps) if steps else set[str]()
    state = _state(study, plan)
    if path.exists() and not figures and f'content="{state}"' in path.read_text(encoding="utf-8")[:2000]:
        return path
    notebook = _executed(study, {"study": str(study), "runs": str(runs), "save_figures": str(figures or "")})
    orderings = list(dict.fromkeys(row.ordering for row in plan.rows))
    files.write_text(path, redact(_linked(_html(notebook, plan.study.name, state, orderings), pages)))
    return path


def _places(name: str, output: str | Path | None, single_file: bool) -> tuple[Path, Path | None]:
    """(the page, the folder for the pages of steps or None)."""
    if single_file or (output and Path(output).suffix.lower() in (".html", ".htm")):
        return Path(output) if output else Path("reports") / f"{name}.html", None
    folder = Path(output) if output else Path("reports") / name
    if folder.is_file():
        raise PftoolsError(f"--output is {folder}, a file: give a folder, or a name that ends with .html.")
    return folder / "index.html", folder / "steps"


def _state(study: str | Path, plan: Plan) -> str:
    """A digest of all that a report depends on: the study, its runs, and the code that draws it."""
    found = hashlib.sha256(Path(study).read_bytes() + str(plan.runs).encode())
    for step in plan.steps.values():
        record = step.folder / "run.json"
        found.update(record.read_bytes() if record.exists() else run_state(step.folder).encode())
    found.update(repr(plan.outdated()).encode())
    package = _HERE.parent
    code = [NOTEBOOKS / _NOTEBOOK, *templates.FILES]
    for name in ("report", "compare", "inference", "figures"):
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


def _html(notebook: Any, name: str, state: str, orderings: list[str]) -> str:
    """The notebook's words and outputs, without its code, in a page of our own."""
    cells = [cell for cell in notebook.cells if "lesson" not in cells_html.tags_of(cell)]
    for number, cell in enumerate(cells):
        cells_html.tidy(cell, f"cell{number}")
    tagged = {tag: cell for cell in cells for tag in cells_html.tags_of(cell)}
    title, how = _opening(tagged["opening"].source)
    first = [tagged["answer"], tagged["main-chart"]]
    left_out = [tagged["opening"], *first]
    others = [cell for cell in cells if cells_html.has_words(cell) and cell not in left_out]
    exporter = cells_html.Exporter()
    answer, chart = (exporter([cell]) for cell in first)
    body = cells_html.with_ids("\n".join(_part(exporter, cell) for cell in [*others, how]))
    alive = "data-says=" in chart + body
    return templates.filled(
        "page.html",
        templates.text_of("page.css"),
        _colours(orderings),
        name=name,
        state=state,
        title=title,
        answer=answer,
        chart=chart,
        body=body,
        sections=cells_html.sections(body),
        key=_key(orderings),
        vega=live.script() if alive else "",
        script=templates.text_of("page.js"),
    )


def _part(exporter: cells_html.Exporter, cell: Any) -> str:
    """A cell of the page's body, closed where it is tagged so."""
    html = exporter([cell])
    if "folded" not in cells_html.tags_of(cell):
        return html
    summary = cell.source.partition("\n")[0].strip("# ")
    return f"<details><summary>{escape(summary)}</summary>\n{html}\n</details>"


def _opening(source: str) -> tuple[str, Any]:
    """(the notebook's title as a report's, a cell with the words under it)."""
    import nbformat

    first, _, words = source.partition("\n")
    title = first.removeprefix("#").partition("·")[2].partition(":")[2].strip() or first.strip("# ")
    return f"{title[:1].upper()}{title[1:]}", nbformat.v4.new_markdown_cell(f"## How to read it\n{words}")


def _key(orderings: list[str]) -> str:
    """A button an ordering, with its mark: what it shows and hides is in all charts and tables."""
    if len(orderings) < 2:
        return ""
    buttons = [
        f'<button type="button" aria-pressed="true" data-ordering="{escape(name)}" data-number="{number}">'
        f"{matrix.glyph(name, orderings)}{escape(name)}</button>"
        for number, name in enumerate(orderings)
    ]
    return "\n".join([*buttons, '<button type="button" class="all">all</button>'])


def _colours(orderings: list[str]) -> str:
    """The colours of the orderings as variables of the page, for light and for dark."""
    looks = drawings.looks_of(orderings).values()
    light = " ".join(f"--o{number}: {colour};" for number, (colour, _) in enumerate(looks))
    dark = " ".join(
        f"--o{number}: {drawings.DARK.get(colour, colour)};" for number, (colour, _) in enumerate(looks)
    )
    return f":root {{ {light} }}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"


_RUN = re.compile(r"<td([^>]*)>([a-z]+-[0-9a-f]{12})</td>")


def _linked(html: str, pages: set[str]) -> str:
    """The page with a link at every run in a table that has a page of its own."""

    def link(found: re.Match[str]) -> str:
        attributes, name = found.groups()
        if name not in pages:
            return found.group()
        return f'<td{attributes}><a id="{name}" href="steps/{name}.html">{name}</a></td>'

    return _RUN.sub(link, html)

"""The executed notebooks of a study's steps as pages, beside its report and linked with it both ways."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from pftools import cells as sources
from pftools import files, run_folder
from pftools.files import as_bytes
from pftools.redaction import redact
from pftools.report import cells_html, templates
from pftools.report.lineage import in_words
from pftools.run_folder.attempt import NOTEBOOK, attempts
from pftools.study import Plan, PlannedStep

_HERE = Path(__file__).parent


def write_pages(plan: Plan, folder: Path) -> set[str]:
    """A page for every step of a plan that was executed; those that show their runs as they are stay.

    Returns:
        The names of the runs that have a page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    exporter: cells_html.Exporter | None = None
    written = set()
    for name, step in plan.steps.items():
        notebook = notebook_of(step)
        if notebook is None:
            continue
        written.add(name)
        page, state = folder / f"{name}.html", _state(notebook)
        if page.exists() and f'content="{state}"' in page.read_text(encoding="utf-8")[:2000]:
            continue
        exporter = exporter or cells_html.Exporter(code=True)
        files.write_text(page, redact(_page(plan, step, notebook, state, exporter)))
    for page in folder.glob("*.html"):
        if page.stem not in written:
            page.unlink()
    return written


def notebook_of(step: PlannedStep) -> Path | None:
    """The executed notebook of a step: of its run, else of its last attempt; None: there is none."""
    found = [step.folder / NOTEBOOK] if run_folder.is_finished(step.folder) else []
    found += [attempt / NOTEBOOK for attempt in reversed(attempts(step.folder))]
    return next((path for path in found if path.exists()), None)


def _state(notebook: Path) -> str:
    code = b"".join(path.read_bytes() for path in (*templates.FILES, *sorted(_HERE.glob("*.py"))))
    return hashlib.sha256(code + notebook.read_bytes()).hexdigest()


def _page(plan: Plan, step: PlannedStep, notebook: Path, state: str, exporter: cells_html.Exporter) -> str:
    import nbformat
    from pygments.formatters import HtmlFormatter

    executed = nbformat.read(notebook, as_version=4)
    shown = with_parameters(executed.cells, step.parameters.model_dump(mode="json"))
    for number, cell in enumerate(shown):
        cells_html.tidy(cell, f"cell{number}")
    light, dark = (HtmlFormatter(style=name).get_style_defs(".highlight") for name in ("tango", "monokai"))
    plain = re.compile(r"background(-color)?:[^;}]*;?")
    code_style = (
        f"{plain.sub('', light)}\n@media screen and (prefers-color-scheme: dark) {{ {plain.sub('', dark)} }}"
    )
    return templates.filled(
        "step.html",
        templates.text_of("page.css"),
        templates.text_of("step.css"),
        code_style,
        run=step.name,
        study=plan.study.name,
        label=step.label,
        parents=step.parents,
        facts=_facts(step),
        state=state,
        body=exporter(shown),
    )


def _facts(step: PlannedStep) -> list[tuple[str, str]]:
    if not run_folder.is_finished(step.folder):
        return [("state", "not finished")]
    record = run_folder.read_record(step.folder)
    return [
        ("took", in_words(record["seconds"])),
        ("peak memory", as_bytes(record["peak_memory_bytes"])),
        ("finished", record["finished"]),
        ("cores", str(record["machine"]["cores"])),
        ("GPU", record["machine"]["gpu"] or "none"),
        *(("when memory ran out", what) for what in record.get("relieved", ())),
    ]


def with_parameters(cells: list[Any], parameters: dict[str, Any]) -> list[Any]:
    """The cells with one cell of parameters: the notebook's own, with the values that were given."""
    shown = []
    for cell in cells:
        tags = cells_html.tags_of(cell)
        if "injected-parameters" in tags or cell.source.startswith(sources.COLAB):
            continue
        if "parameters" in tags:
            cell.source = "\n".join(given(line, parameters) for line in cell.source.splitlines())
        if cell.cell_type == "markdown" or cell.source.strip():
            shown.append(cell)
    return shown


def given(line: str, parameters: dict[str, Any]) -> str:
    """A line `name = value  # comment` with the value that the step was given."""
    (name, *_) = sources.assigned(line) or {""}
    if name not in parameters:
        return line
    _, mark, comment = line.partition("  # ")
    return f"{name} = {parameters[name]!r}{mark}{comment}"

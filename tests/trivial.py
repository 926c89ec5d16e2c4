"""Step notebooks that do next to nothing, quickly: what is tested with them is everything around a step.

A trivial step writes one small file made of its parameters and its parents' results, and a line in
`journal.txt` of the runs folder when it begins and when it has sealed.
"""

from __future__ import annotations

from pathlib import Path

import nbformat

from pftools import settings
from pftools.execute.steps import NOTEBOOK_OF
from pftools.study import Plan, Study, plan_study

_BODY = """
import hashlib, json, os, time
from pathlib import Path
from pftools import notebook, settings
parameters, run = notebook.start(settings.STEPS[{step!r}], globals())
def journal(word):
    with open(Path(parameters.runs) / "journal.txt", "a") as file:
        file.write(f"{{word}} {{run.folder.name}}\\n")
def result(parent):
    path = Path(parent) / "result.txt"
    return [path.read_text()] if path.exists() else []
journal("begins")
outputs = ["result.txt"]
{work}
found = [text for name in parameters.parents for text in result(getattr(parameters, name))]
text = json.dumps([run.folder.name, found])
run.path("result.txt").write_text(hashlib.sha256(text.encode()).hexdigest())
run.path("half-done.tmp").write_text("goes away")
if {step!r} == "evaluate" and "block_nll.parquet" not in outputs:
    import pyarrow, pyarrow.parquet
    losses = [0.1 * len(found), 0.2, 0.3]
    pyarrow.parquet.write_table(pyarrow.table({{"nll": losses}}), run.path("block_nll.parquet"))
    outputs.append("block_nll.parquet")
run.seal(outputs, perplexity=float(len(found)), measured=0.5, tasks={{}})
journal("sealed")
"""
_PLAIN = """
import hashlib, json
from pathlib import Path
from pftools import notebook, settings
parameters = notebook.read(settings.STEPS[{step!r}], globals())
text = json.dumps(str(parameters))
Path(parameters.runs).with_suffix(".txt").write_text(hashlib.sha256(text.encode()).hexdigest())
"""


def write_notebooks(folder: Path, *, plain: bool = False, **work: str) -> Path:
    """A folder with a trivial notebook for every step.

    Args:
        plain: nothing of runs is in them; the file goes to where `runs` says.
        work: {step: lines of code} to execute between start and seal.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for step, kind in settings.STEPS.items():
        defaults = [f"{name} = {field.default!r}" for name, field in kind.model_fields.items()]
        body = (_PLAIN if plain else _BODY).format(step=step, work=work.get(step, "")).strip()
        source = "# Parameters: of a trivial step\n" + "\n".join(defaults)
        cells = [
            nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]}),
            nbformat.v4.new_code_cell(body),
        ]
        language = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=language), folder / NOTEBOOK_OF[step])
    return folder


def trivial_plan(root: Path, **words: object) -> Plan:
    """The plan of a small study whose runs are in ``root``; six steps unless ``words`` say otherwise."""
    study = {"name": "trivial", "model": "somebody/model", "orderings": ["P", "F P"], **words}
    return plan_study(settings.check(Study, study), runs=root)


def contents(plan: Plan) -> dict[str, str]:
    """What the steps of a plan found: {run: its result}."""
    return {name: (step.folder / "result.txt").read_text() for name, step in plan.steps.items()}

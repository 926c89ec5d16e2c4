"""Step notebooks that do next to nothing, quickly: what is tested with them is everything around a step.

A trivial step writes one small file made of its parameters and its parents' results, and a line in `journal.txt` of the
runs folder when it begins and when it has sealed.
"""

from __future__ import annotations

from pathlib import Path

import nbformat

from pftools import settings
from pftools.executors import NOTEBOOK_OF
from pftools.study import Plan, Study, plan_study

_BODY = """
import hashlib, json, os, time
from pathlib import Path
{before}
from pftools import notebook, settings
parameters = notebook.read(settings.STEPS[{step!r}], globals())
started = time.perf_counter()
from pftools import run_folder
run = run_folder.start(parameters)
in_start = time.perf_counter() - started
def journal(word):
    with open(Path(parameters.runs) / "journal.txt", "a") as file:
        file.write(f"{{word}} {{run.folder.name}}\\n")
journal("begins")
{work}
parents = [getattr(parameters, name) for name in parameters.parents]
found = [(Path(parent) / "result.txt").read_text() for parent in parents if (Path(parent) / "result.txt").exists()]
text = json.dumps([run.folder.name, found])
run.path("result.txt").write_text(hashlib.sha256(text.encode()).hexdigest())
run.path("half-done.tmp").write_text("goes away")
started = time.perf_counter()
run.seal(["result.txt"], perplexity=float(len(found)), measured=0.5, tasks={{}})
in_seal = time.perf_counter() - started
journal("sealed")
"""
# A kernel has nearly 64 files open, and with the 64th Linux grows its table, once, and waits about 10 ms for all its threads. A step that
# reads a model has that behind it when it seals; here it would be taken for a cost of sealing.
_MANY_FILES = "files = [os.dup(0) for _ in range(16)]"
_TIMED = '(run.folder / "seconds.json").write_text(json.dumps(in_start + in_seal))'
_PLAIN = """
import hashlib, json
from pathlib import Path
from pftools import notebook, settings
parameters = notebook.read(settings.STEPS[{step!r}], globals())
Path(parameters.runs).with_suffix(".txt").write_text(hashlib.sha256(json.dumps(str(parameters)).encode()).hexdigest())
"""


def write_notebooks(folder: Path, *, timed: bool = False, plain: bool = False, **work: str) -> Path:
    """A folder with a trivial notebook for every step.

    Args:
        timed: leave beside each run how many seconds `start` and `seal` took, in `seconds.json`.
        plain: nothing of runs is in them; the file goes to where `runs` says.
        work: {step: lines of code} to execute between start and seal.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for step, kind in settings.STEPS.items():
        defaults = [f"{name} = {field.default!r}" for name, field in kind.model_fields.items()]
        body = (
            (_PLAIN if plain else _BODY)
            .format(step=step, work=work.get(step, ""), before=_MANY_FILES if timed else "")
            .strip()
        )
        cells = [
            nbformat.v4.new_code_cell(
                "# Parameters: of a trivial step\n" + "\n".join(defaults), metadata={"tags": ["parameters"]}
            ),
            nbformat.v4.new_code_cell(body + ("\n" + _TIMED if timed else "")),
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

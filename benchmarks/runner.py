"""What a step costs beyond its work: planning, keys, locks, a process, a kernel, a seal.

A study of steps that do next to nothing, one at a time, beside a plain loop of papermill over a quarter of
them: that keeps nothing, neither keys nor seals, and cannot go on where it was stopped.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from _harness import arguments, report, seconds

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from pftools import run_folder  # noqa: E402
from pftools.study import Plan, load_study, plan_study  # noqa: E402
from tests.trivial import write_notebooks  # noqa: E402

_DRIVE = """
import sys
from pftools.study import load_study, plan_study, run_study
plan = plan_study(load_study(sys.argv[1]), runs=sys.argv[2])
assert not run_study(plan, notebooks=sys.argv[3], progress=False)
"""
_LOOP = """
import json, sys
import papermill
from pftools.execute.steps import kernel_options
for notebook, parameters, output in json.load(open(sys.argv[1])):
    with kernel_options() as options:
        papermill.execute_notebook(notebook, output, parameters, **options)
"""


def main() -> None:
    parser = arguments("What a step costs beyond its work.")
    parser.add_argument("--targets", type=int, default=10, help="sparsities; 4 steps for each, and one more")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(Path(folder), options.targets)
    report(
        "a step costs at most 4 seconds beyond its work",
        measured,
        script=__file__,
        device=options.device,
        store=options.store,
        settings={"targets": options.targets},
    )


def measure(folder: Path, targets: int) -> dict[str, float]:
    """Wall seconds of the study, of the loop, and of the commands that look at a finished study."""
    study = folder / "trivial.yaml"
    sparsities = [round(0.1 + 0.8 * number / targets, 4) for number in range(targets)]
    study.write_text(f"model: somebody/model\norderings: [P, P F]\nsparsities: {sparsities}\n")
    plan = plan_study(load_study(study), runs=folder / "runs")
    notebooks = write_notebooks(folder / "notebooks")
    wall = seconds(lambda: call("-c", _DRIVE, study, plan.runs, notebooks))
    for step in plan.steps.values():
        run_folder.verify(step.folder)
    loop = seconds(lambda: call("-c", _LOOP, written_orders(plan, folder)))
    command = ("-m", "pftools.cli")
    published = ROOT / "data/studies/published.yaml"
    timed = {
        "rerun_when_finished_seconds": (*command, "run", study, "--runs", plan.runs, "--no-report"),
        "status_seconds": (*command, "status", study, "--runs", plan.runs),
        "plan_published_grid_seconds": (*command, "plan", published, "--runs", folder / "none"),
    }
    return {
        "steps": len(plan.steps),
        "wall_seconds": round(wall, 2),
        "wall_seconds_a_step": round(wall / len(plan.steps), 3),
        "papermill_loop_seconds_a_step": round(loop / (len(plan.steps) // 4), 3),
        **{name: round(seconds(lambda words=words: call(*words)), 2) for name, words in timed.items()},
    }


def written_orders(plan: Plan, folder: Path) -> Path:
    """What the plain loop executes: the notebooks of all steps with nothing of runs in them."""
    plain = write_notebooks(folder / "plain", plain=True)
    orders = []
    for step in list(plan.steps.values())[: len(plan.steps) // 4]:
        output = folder / "outputs" / f"{step.name}.ipynb"
        output.parent.mkdir(exist_ok=True)
        notebook = next(plain.glob(f"0*_{step.parameters.step}*.ipynb"))
        parameters = {**step.parameters.model_dump(mode="json"), "runs": str(output)}
        orders.append([str(notebook), parameters, str(output)])
    path = folder / "orders.json"
    path.write_text(json.dumps(orders))
    return path


def call(*command: object) -> None:
    subprocess.run([sys.executable, *map(str, command)], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()

"""What running a study costs beyond its steps: planning, keys, locks, processes, seals, and looking at what is there.

A study of 201 steps that do next to nothing, beside a plain loop of papermill over a quarter of them, which keeps nothing: no
keys, no seals, no way to go on. What counts as the runner's own is

    the wall time of the driver, minus papermill's (which starts the kernels), plus what kernels spent in start and seal

so the processes, the waiting between steps, and every hash are in it.
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
from pftools.study import load_study, plan_study  # noqa: E402
from tests.trivial import write_notebooks  # noqa: E402

_DRIVE = """
import sys
from pftools.executors import run_plan
from pftools.study import load_study, plan_study
assert not run_plan(plan_study(load_study(sys.argv[1]), runs=sys.argv[2]), notebooks=sys.argv[3], progress=False)
"""
_LOOP = """
import json, sys
import papermill
from pftools.executors import kernel_options
for notebook, parameters, output in json.load(open(sys.argv[1])):
    papermill.execute_notebook(notebook, output, parameters, **kernel_options())
"""


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument(
        "--targets",
        type=int,
        default=50,
        help="sparsities of the study; it has 4 steps for each, and one more",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(Path(folder), options.targets)
    report(
        "the runner's own cost is under 5% of a study of 200 trivial steps",
        measured,
        script=__file__,
        device=options.device,
        store=options.store,
        settings={"targets": options.targets},
    )


def measure(folder: Path, targets: int) -> dict[str, float]:
    study = folder / "trivial.yaml"
    sparsities = [round(0.1 + 0.8 * number / targets, 4) for number in range(targets)]
    study.write_text(f"model: somebody/model\norderings: [P, P F]\nsparsities: {sparsities}\n")
    plan = plan_study(load_study(study), runs=folder / "runs")
    notebooks = write_notebooks(folder / "notebooks", timed=True)
    wall = seconds(lambda: call("-c", _DRIVE, study, plan.runs, notebooks))
    in_papermill = in_kernels = 0.0
    for step in plan.steps.values():
        in_papermill += json.loads((step.folder / "notebook.ipynb").read_text())["metadata"]["papermill"][
            "duration"
        ]
        in_kernels += json.loads((step.folder / "seconds.json").read_text())
        run_folder.verify(step.folder)
    loop = seconds(lambda: call("-c", _LOOP, written_orders(plan, folder)))
    own = wall - in_papermill + in_kernels
    pftools = ("-m", "pftools.cli")
    return {
        "steps": len(plan.steps),
        "wall_seconds": round(wall, 2),
        "wall_seconds_a_step": round(wall / len(plan.steps), 3),
        "papermill_loop_seconds_a_step": round(loop / (len(plan.steps) // 4), 3),
        "own_seconds": round(own, 2),
        "own_share": round(own / wall, 4),
        "own_milliseconds_a_step": round(1000 * own / len(plan.steps), 1),
        "rerun_when_finished_seconds": round(
            seconds(lambda: call(*pftools, "run", study, "--runs", plan.runs, "--no-report")), 2
        ),
        "status_seconds": round(seconds(lambda: call(*pftools, "status", study, "--runs", plan.runs)), 2),
        "plan_published_grid_seconds": round(
            seconds(
                lambda: call(
                    *pftools, "plan", ROOT / "data/studies/published.yaml", "--runs", folder / "none"
                )
            ),
            2,
        ),
    }


def written_orders(plan: object, folder: Path) -> Path:
    """What the plain loop executes: the notebooks of all steps with nothing of runs in them."""
    plain = write_notebooks(folder / "plain", plain=True)
    orders = []
    for step in list(plan.steps.values())[: len(plan.steps) // 4]:
        output = folder / "outputs" / f"{step.name}.ipynb"
        output.parent.mkdir(exist_ok=True)
        notebook = next(plain.glob(f"0*_{step.parameters.step}*.ipynb"))
        orders.append(
            [str(notebook), {**step.parameters.model_dump(mode="json"), "runs": str(output)}, str(output)]
        )
    path = folder / "orders.json"
    path.write_text(json.dumps(orders))
    return path


def call(*command: object) -> None:
    subprocess.run([sys.executable, *map(str, command)], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()

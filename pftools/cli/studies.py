"""Commands about a study: what it will do, doing it, how far it is, what it found, what may go."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from pftools import needs, run_folder
from pftools import study as studies
from pftools.cli.console import coloured, err, out
from pftools.cli.tables import print_answers, print_results, print_sensitivity
from pftools.errors import PftoolsError, nearest
from pftools.files import as_bytes, size_of
from pftools.study import checks, costs, durations

StudyFile = Annotated[
    Path, typer.Argument(help="The study file, such as data/studies/quick.yaml", metavar="STUDY.yaml")
]
Runs = Annotated[Path, typer.Option(help="The folder of run folders", callback=Path.expanduser)]
_RUNS = Path("runs")


def plan(
    study: StudyFile,
    runs: Runs = _RUNS,
    on: Annotated[
        str, typer.Option(help="Also tell what it takes on a device that is not here, by its datasheet: t4")
    ] = "",
) -> None:
    """Show the steps of a study, what is shared, what earlier runs hold, and what it will cost."""
    device = needs.DEVICES.get(on)
    if on and device is None:
        raise PftoolsError(f"--on is {on!r}: {nearest(on, needs.DEVICES)}.")
    planned = _plan(study, runs)
    checks.check_plan(planned)
    outdated = planned.outdated()
    stages = ["stage"] if any(step.stage for step in planned.steps.values()) else []
    columns = ("", *stages, "step", "does", "run", "shared by", "state")
    table = Table(*columns, title=planned.study.name, title_justify="left")
    for number, step in enumerate(planned.steps.values(), 1):
        state = "to do" if step.name in outdated else studies.run_state(step.folder)
        table.add_row(
            str(number),
            *([step.stage] if stages else []),
            step.parameters.step,
            step.label,
            step.name,
            str(len(step.orderings)),
            coloured(state),
        )
    out.print(table)
    for line in [*costs.summary(planned), *outdated.values()]:
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    if device is not None:
        out.print(f"On {device.name}, by its datasheet:")
        for line in costs.paper_lines(planned, device):
            out.print(line, highlight=False, markup=False, soft_wrap=True)
    print_sensitivity(planned)


def run(
    study: StudyFile,
    runs: Runs = _RUNS,
    executor: Annotated[str, typer.Option(help="local or slurm")] = "local",
    jobs: Annotated[int, typer.Option(help="local: how many steps at a time")] = 1,
    detach: Annotated[
        bool, typer.Option("--detach", help="slurm: leave once all jobs are submitted")
    ] = False,
    slurm: Annotated[
        list[str] | None, typer.Option(help="slurm: an option of sbatch, NAME=VALUE; repeatable")
    ] = None,
    report: Annotated[bool, typer.Option(help="Write the report at the end")] = True,
) -> None:
    """Execute the missing steps of a study, then write its report."""
    planned = _plan(study, runs)
    checks.check_plan(planned)
    options = _slurm_options(slurm or [])
    for line in costs.summary(planned):
        out.print(line, highlight=False)
    if executor == "local" and planned.missing() and not durations.estimate_seconds(planned)[0]:
        out.print(durations.first_times(planned), highlight=False)
    again = _command("run", study, runs, executor=executor, jobs=jobs, slurm=slurm or [])
    try:
        failures = studies.run_study(planned, executor=executor, jobs=jobs, wait=not detach, slurm=options)
    except KeyboardInterrupt:
        kept = "the jobs go on without it" if executor == "slurm" else "what is finished is kept"
        err.print(f"Stopped; {kept}: `{again}` goes on from there.", highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None
    for failure in failures:
        err.print(f"[bold red]failed:[/] {escape(str(failure))}", highlight=False, soft_wrap=True)
    if detach and executor == "slurm":
        out.print(f"Submitted. `{_command('status', study, runs)}` tells how far it is.", highlight=False)
        return
    print_results(planned)
    if len(planned.rows) and not failures:
        print_answers(study, runs)
    if report and len(planned.rows) and not failures:
        _write_report(study, runs, None, None)
    if failures:
        left = len(planned.missing())
        raise PftoolsError(
            f"{left} steps are not finished; what is finished is kept: mend the cause and call `{again}` "
            "again."
        )


def status(study: StudyFile, runs: Runs = _RUNS) -> None:
    """Say which steps are finished, running, failed (with cell and cause) or still to do."""
    planned = _plan(study, runs)
    queue, outdated = _queue(planned), planned.outdated()
    table = Table("step", "does", "run", "state", "", title=planned.study.name, title_justify="left")
    counts: dict[str, int] = {}
    broken: set[str] = set()  # steps that failed, and all that depend on them
    for name, step in planned.steps.items():
        state, remark = _state(step, queue.get(name), broken)
        if state == "finished" and name in outdated:
            state, remark = "to do", outdated[name]
        counts[state] = counts.get(state, 0) + 1
        table.add_row(step.parameters.step, step.label, name, coloured(state), escape(remark))
    out.print(table)
    out.print(", ".join(f"{number} {state}" for state, number in counts.items()), highlight=False)
    for what in planned.open:
        out.print(f"Not planned yet: {what}.", highlight=False)


def _state(step: studies.PlannedStep, job: Any, broken: set[str]) -> tuple[str, str]:
    """The state of a step, and a remark: who works on it, why it failed, what it waits for.

    Args:
        step: the step.
        job: its job in SLURM's queue, or None.
        broken: names of failed steps and of all that depend on them; grows by this one where it is such.
    """
    from pftools.execute.steps import read_failure

    state = studies.run_state(step.folder)
    if job is not None and state != "finished":
        reason = f" ({job.reason})" if job.reason != "None" else ""
        at_work = job.state in ("RUNNING", "COMPLETING")
        return "running" if at_work else "queued", f"SLURM job {job.id}, {job.state.lower()}{reason}"
    if state == "running":
        return state, run_folder.owner(step.folder)
    if state == "failed":
        broken.add(step.name)
        failure = read_failure(step.folder)
        return state, (f"cell {failure.cell}: " if failure.cell else "") + failure.cause
    if state == "to do" and (causes := broken & set(step.parents)):
        broken.add(step.name)
        return state, f"needs {', '.join(sorted(causes))}"
    if state == "to do" and run_folder.was_interrupted(step.folder):
        return state, f"was cut short ({run_folder.owner(step.folder)}); the next run goes on from there"
    return state, ""


def report(
    study: StudyFile,
    runs: Runs = _RUNS,
    output: Annotated[
        Path | None,
        typer.Option(help="A folder, or one file that ends with .html; default: reports/STUDY"),
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Also write the figures as files into this folder")
    ] = None,
    single_file: Annotated[
        bool, typer.Option("--single-file", help="One file, without the notebooks of the steps")
    ] = False,
) -> None:
    """Render the comparison of a study's finished orderings as pages that need no network."""
    _write_report(study, runs, output, figures, single_file)


def clean(
    keep: Annotated[
        list[Path], typer.Argument(help="The study files whose runs are kept", metavar="STUDY.yaml...")
    ],
    runs: Runs = _RUNS,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask")] = False,
) -> None:
    """Remove the runs that none of the given studies needs; shows what would go, and asks."""
    kept = {name for study in keep for name in _plan(study, runs).steps}
    unneeded = run_folder.unneeded(runs, kept)
    if not unneeded:
        out.print("Nothing to remove: every run is needed.")
        return
    table = Table("run", "size", "state")
    for folder in unneeded:
        table.add_row(folder.name, as_bytes(size_of(folder)), studies.run_state(folder))
    out.print(table)
    if yes or typer.confirm(f"Remove these {len(unneeded)} runs?"):
        for folder in unneeded:
            run_folder.remove(folder)
        out.print(f"Removed {len(unneeded)} runs.", highlight=False)


def _plan(study: Path, runs: Path) -> studies.Plan:
    return studies.plan_study(studies.load_study(study), runs=runs)


def _command(name: str, study: Path, runs: Path, **options: Any) -> str:
    """A command to type, with the options that were given to this one."""
    words = ["pftools", name, str(study), *(["--runs", str(runs)] if runs != _RUNS else [])]
    if options.get("executor", "local") != "local":
        words += ["--executor", options["executor"]]
    if options.get("jobs", 1) != 1:
        words += ["--jobs", str(options["jobs"])]
    for option in options.get("slurm", ()):
        words += ["--slurm", option]
    return shlex.join(words)


def _slurm_options(given: list[str]) -> dict[str, str]:
    for option in given:
        if "=" not in option:
            raise PftoolsError(f"--slurm is {option!r}: give NAME=VALUE, such as --slurm partition=gpu.")
    return dict(option.partition("=")[::2] for option in given)


def _queue(planned: studies.Plan) -> dict[str, Any]:
    """{run: job} of SLURM's queue; empty where no study with this folder of runs was given to SLURM."""
    if not (Path(planned.runs) / ".slurm").is_dir():
        return {}
    from pftools.execute import slurm_queue

    try:
        return slurm_queue.queue(Path(planned.runs))
    except PftoolsError as error:  # what the run folders say is still worth showing
        err.print(f"[yellow]The queue is not known:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return {}


def _write_report(
    study: Path, runs: Path, output: Path | None, figures: Path | None, single_file: bool = False
) -> None:
    from pftools import report as reports

    for why in _plan(study, runs).outdated().values():
        err.print(f"[yellow]Old:[/] {escape(why)}", highlight=False, soft_wrap=True)
    path = reports.render(study, runs=runs, output=output, figures=figures, single_file=single_file)
    out.print(f"Report: {path.resolve()}", highlight=False, soft_wrap=True)

"""The command line: pftools plan | run | status | report | compare | export | clean | fetch-data | settings |
doctor.

Each command is a few lines over a function of the package; heavy imports wait until a command needs them.
"""

from __future__ import annotations

import errno
import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pftools import needs, run_folder, settings
from pftools import study as studies
from pftools.errors import PftoolsError, nearest
from pftools.files import as_bytes, size_of
from pftools.study import checks, costs

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="In which order should a language model be pruned and fine-tuned, and is the difference real?",
)
out, err = Console(), Console(stderr=True)

StudyFile = Annotated[
    Path, typer.Argument(help="The study file, such as data/studies/quick.yaml", metavar="STUDY.yaml")
]
Runs = Annotated[Path, typer.Option(help="The folder of run folders", callback=Path.expanduser)]
_RUNS = Path("runs")


def main() -> None:
    """The console script: errors that a person can mend are one sentence, everything else is a traceback."""
    try:
        app()
    except PftoolsError as error:
        _refuse(str(error))
    except OSError as error:
        if error.errno not in _NO_PLACE or not error.filename:
            raise
        _refuse(
            f"{error.filename} cannot be written ({error.strerror}): make room, or give --runs and --output "
            "places that are yours to write to."
        )


# A disk that is read-only or full, or somebody else's.
_NO_PLACE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT)


def _refuse(sentence: str) -> None:
    err.print(f"[bold red]pftools:[/] {escape(sentence)}", highlight=False, soft_wrap=True)
    sys.exit(1)


@app.command()
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
            _coloured(state),
        )
    out.print(table)
    for line in [*costs.summary(planned), *outdated.values()]:
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    if device is not None:
        out.print(f"On {device.name}, by its datasheet:")
        for line in costs.paper_lines(planned, device):
            out.print(line, highlight=False, markup=False, soft_wrap=True)
    _print_sensitivity(planned)


@app.command()
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
    if executor == "local" and planned.missing() and not costs.estimate_seconds(planned)[0]:
        out.print(costs.first_times(planned), highlight=False)
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
    _print_results(planned)
    if len(planned.rows) and not failures:
        _print_answers(study, runs)
    if report and len(planned.rows) and not failures:
        _write_report(study, runs, None, None)
    if failures:
        left = len(planned.missing())
        raise PftoolsError(
            f"{left} steps are not finished; what is finished is kept: mend the cause and call `{again}` "
            "again."
        )


@app.command()
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
        table.add_row(step.parameters.step, step.label, name, _coloured(state), escape(remark))
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


@app.command()
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


@app.command()
def compare(
    first: Annotated[
        Path, typer.Argument(help="Results: CSV, JSONL or a folder of lm-eval's samples", metavar="A")
    ],
    second: Annotated[Path, typer.Argument(help="Results of the same questions", metavar="B")],
    metric: Annotated[
        str | None, typer.Option(help="lm-eval's metric that is 1 for right; default: acc, else exact_match")
    ] = None,
    equivalent_within: Annotated[
        float | None,
        typer.Option(
            help="Points of accuracy, or per cent of perplexity, that do not matter: 1", min=0.0001, max=100
        ),
    ] = None,
) -> None:
    """Compare two sets of answers, or block losses, of other programs: paired by question and seed."""
    from pftools.compare import other_losses

    margin = None if equivalent_within is None else equivalent_within / 100
    for sentence in other_losses.sentences(first, second, metric=metric, margin=margin):
        out.print(sentence, highlight=False, markup=False, soft_wrap=True)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The run folder of a step", metavar="RUN")],
    folder: Annotated[Path, typer.Argument(help="The folder to write", metavar="FOLDER")],
    dtype: Annotated[str, typer.Option(help="auto (the run's own), float32, bfloat16 or float16")] = "auto",
    adapter: Annotated[bool, typer.Option("--adapter", help="Only the adapter, in PEFT's format")] = False,
    push: Annotated[str, typer.Option(help="Also push to this repository of the hub", metavar="REPO")] = "",
    placement: Annotated[
        settings.PlacementName, typer.Option(help="Where the weights are meanwhile; auto: what fits")
    ] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let a hub model run its own code")
    ] = False,
) -> None:
    """Write a run's model as a plain Hugging Face folder with a model card, and check its logits.

    Of an evaluation: its task results as lm-eval's own output folder.
    """
    from pftools import checkpoints, evaluate

    if run_folder.is_finished(run) and run_folder.read_record(run)["step"] == settings.Evaluate.step:
        if adapter or push:
            raise PftoolsError(f"{run} is an evaluation and holds no model: leave --adapter and --push out.")
        path = evaluate.export_results(run, folder)
        out.print(f"The results are in {path}, as lm-eval writes them.", highlight=False)
        return
    if adapter:
        path = checkpoints.export_adapter(
            run, folder, placement=placement, trust_remote_code=trust_remote_code
        )
        out.print(f"The adapter is in {path}.", highlight=False)
    else:
        path = checkpoints.export(
            run, folder, dtype=dtype, placement=placement, trust_remote_code=trust_remote_code
        )
        out.print(f"Exported to {path}; its logits equal the run's.", highlight=False)
    if push:
        out.print(f"Pushed to {checkpoints.push(folder, push)}.", highlight=False)


@app.command()
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


@app.command("fetch-data")
def fetch_data(
    folder: Annotated[
        Path | None, typer.Argument(help="The folder to fill; default: PFTOOLS_DATA", metavar="[FOLDER]")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="A data set, such as mmlu; repeatable; default: all")
    ] = None,
) -> None:
    """Fill a data root from the hub, for machines without network.

    WikiText-2, C4, MMLU, BBH, Belebele, FreebaseQA.
    """
    from pftools.corpora import data_root

    for path, rows in data_root.fetch(only or (), data=folder):
        out.print(
            f"{path}: {'there already' if rows is None else f'{rows:,} rows'}",
            highlight=False,
            soft_wrap=True,
        )
    out.print(
        f"Set PFTOOLS_DATA={data_root.data_root(folder)}, or the parameter data of a step.",
        highlight=False,
        soft_wrap=True,
    )


@app.command("settings")
def show_settings(
    step: Annotated[
        str, typer.Argument(help=f"study, {', '.join(settings.STEPS)}", metavar="[STEP]")
    ] = "study",
) -> None:
    """List what can be set in a study file, or in a step: each with its default and what it does."""
    kinds: dict[str, type[settings.Parameters]] = {"study": studies.Study, **settings.STEPS}
    if step not in kinds:
        raise PftoolsError(f"unknown step {step!r}: {nearest(step, kinds)}.")
    table = Table("name", "default", "what it is")
    for name, field in kinds[step].model_fields.items():
        default = "" if field.is_required() else json.dumps(field.default)
        table.add_row(name, default, escape(field.description or ""))
    out.print(table)


@app.command()
def doctor() -> None:
    """Say what this machine has: versions, devices, the embedded model, data, SLURM."""
    from pftools import doctor as doctors

    table = Table("", "what", "found")
    for fine, what, found in doctors.findings():
        table.add_row("[green]ok[/]" if fine else "[yellow]--[/]", what, found)
    out.print(table)


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


def _coloured(state: str) -> str:
    colour = {"finished": "green", "failed": "red", "running": "cyan", "queued": "cyan"}.get(state, "dim")
    return f"[{colour}]{state}[/]"


def _queue(planned: studies.Plan) -> dict[str, Any]:
    """{run: job} of SLURM's queue; empty where no study with this folder of runs was given to SLURM."""
    if not (Path(planned.runs) / ".slurm").is_dir():
        return {}
    from pftools.execute import slurm

    try:
        return slurm.queue(Path(planned.runs))
    except PftoolsError as error:  # what the run folders say is still worth showing
        err.print(f"[yellow]The queue is not known:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return {}


def _print_results(planned: studies.Plan) -> None:
    """A row a distinct result, with the method, pattern, merge and seed where the study has several."""
    from pftools import compare

    found = studies.results(planned)
    if not len(found):
        return
    tasks = [name for name in found.columns if name in _task_names(planned)]
    several = [name for name in ("method", "pattern", "merge", "seed") if found[name].nunique() > 1]
    columns = ("ordering", *several, "asked", "measured", "perplexity", *tasks)
    table = Table(*columns, title="Results", title_justify="left")
    asked = compare.sparsity_words(found["asked"])
    for _, same in found.groupby("run", sort=False):
        row = same.iloc[0]
        scores = [f"{row[task]:.1%}" if row[task] <= 1 else f"{row[task]:.2f}" for task in tasks]
        table.add_row(
            " = ".join(dict.fromkeys(same["ordering"])),
            *(str(row[name]) if same[name].nunique() == 1 else "all" for name in several),
            asked[round(row["asked"], 10)],
            f"{row['measured']:.2%}",
            compare.perplexity_in_words(row["perplexity"]),
            *scores,
        )
    out.print(table)


def _print_sensitivity(planned: studies.Plan) -> None:
    """Which differences the study will see, by numbers of seeds."""
    from pftools.study import sensitivity

    found = sensitivity.sensitivity(planned)
    if found is None:
        return
    shown = found.in_words()
    table = Table("seeds", *shown, title="The smallest difference that it will see", title_justify="left")
    own = {len(planned.study.seeds), planned.study.most_seeds}
    for seeds, row in zip(shown.index, shown.to_numpy()):
        table.add_row(f"{seeds}{' (this study)' if seeds in own else ''}", *row)
    out.print(table)
    corrected = f", corrected for {found.pairs} pairs" if found.pairs > 1 else ""
    out.print(f"In four of five such studies{corrected}, {found.source}.", highlight=False)


def _print_answers(study: Path, runs: Path) -> None:
    """By sparsity, and by perplexity and task: which orderings may be the best."""
    from pftools import compare, report

    for found in report.best_sets(report.study_results(study, runs=runs)):
        out.print(compare.set_in_words(found), highlight=False, markup=False, soft_wrap=True)


def _task_names(planned: studies.Plan) -> list[str]:
    return planned.study.parameters(settings.Evaluate).tasks


def _write_report(
    study: Path, runs: Path, output: Path | None, figures: Path | None, single_file: bool = False
) -> None:
    from pftools import report as reports

    for why in _plan(study, runs).outdated().values():
        err.print(f"[yellow]Old:[/] {escape(why)}", highlight=False, soft_wrap=True)
    path = reports.render(study, runs=runs, output=output, figures=figures, single_file=single_file)
    out.print(f"Report: {path.resolve()}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()

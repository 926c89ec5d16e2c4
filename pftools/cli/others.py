"""Commands that need no study: other programs' results, a single run, data sets, settings, this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from pftools import run_folder, settings
from pftools import study as studies
from pftools.cli.console import out
from pftools.errors import PftoolsError, nearest


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


def doctor() -> None:
    """Say what this machine has: versions, devices, the embedded model, data, SLURM."""
    from pftools import doctor as doctors

    table = Table("", "what", "found")
    for fine, what, found in doctors.findings():
        table.add_row("[green]ok[/]" if fine else "[yellow]--[/]", what, found)
    out.print(table)

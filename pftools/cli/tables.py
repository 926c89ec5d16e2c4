"""What `plan` and `run` tell beside the steps: results, answers, and what the study will be able to see."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from pftools import settings
from pftools import study as studies
from pftools.cli.console import out


def print_results(planned: studies.Plan) -> None:
    """A row a distinct result, with the method, pattern, merge and seed where the study has several."""
    from pftools import compare

    found = studies.results(planned)
    if not len(found):
        return
    tasks = [name for name in found.columns if name in planned.study.parameters(settings.Evaluate).tasks]
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


def print_sensitivity(planned: studies.Plan) -> None:
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


def print_answers(study: Path, runs: Path) -> None:
    """By sparsity, and by perplexity and task: which orderings may be the best."""
    from pftools import compare, report

    for found in report.best_sets(report.study_results(study, runs=runs)):
        out.print(compare.set_in_words(found), highlight=False, markup=False, soft_wrap=True)

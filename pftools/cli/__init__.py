"""The command line: pftools plan | run | status | report | compare | export | clean | fetch-data | settings |
doctor.

Each command is a few lines over a function of the package; heavy imports wait until a command needs them.

studies  commands about a study
others   commands about results of other programs, a single run, data sets, settings, this machine
tables   what `plan` and `run` tell beside the steps
console  where all of them print
"""

import errno
import sys
from collections.abc import Callable

import typer
from rich.markup import escape

from pftools.cli.console import err, out
from pftools.cli.others import compare, doctor, export, fetch_data, show_settings
from pftools.cli.studies import clean, plan, report, run, status
from pftools.errors import PftoolsError

__all__ = ["app", "err", "main", "out"]
__all__ += [
    "clean",
    "compare",
    "doctor",
    "export",
    "fetch_data",
    "plan",
    "report",
    "run",
    "show_settings",
    "status",
]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="In which order should a language model be pruned and fine-tuned, and is the difference real?",
)
_COMMANDS: dict[str, Callable[..., None]] = {
    "plan": plan,
    "run": run,
    "status": status,
    "report": report,
    "compare": compare,
    "export": export,
    "clean": clean,
    "fetch-data": fetch_data,
    "settings": show_settings,
    "doctor": doctor,
}
for name, command in _COMMANDS.items():
    app.command(name)(command)


# A disk that is read-only or full, or somebody else's.
_NO_PLACE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT)


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


def _refuse(sentence: str) -> None:
    err.print(f"[bold red]pftools:[/] {escape(sentence)}", highlight=False, soft_wrap=True)
    sys.exit(1)

"""The first call of every notebook: read its parameters, and open the run of its step.

    parameters, run = notebook.start(settings.Prune, globals())

The parameters are those that the reader sees: the values that the last executed parameters cell has set, and
what papermill injected after it. A value that cannot be known for sure is an error. When parameters are read
again in the same kernel, everything that was made from the earlier ones is forgotten, so that no run mixes
two sets of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from pftools import bars, cells, contents, inputs, needs, run_folder, settings
from pftools.errors import PftoolsError

_Kind = TypeVar("_Kind", bound=BaseModel)
_Step = TypeVar("_Step", bound=settings.Step)
_forgotten: set[str] = set()  # names that were made from earlier parameters
_MARK = "# Parameters"  # how a parameters cell begins; the first line of papermill's own is nothing else


def start(kind: type[_Step], namespace: dict[str, Any]) -> tuple[_Step, run_folder.Run]:
    """`read` the parameters of a step, open its run, and print where it is and what the step needs.

    By hand, the run gets a name of its own when code is executed that is not the notebook's.

    Raises:
        PftoolsError: as `read` and `run_folder.start`; or the step cannot fit this machine.
    """
    parameters = read(kind, namespace)
    needed = needs.before(parameters)
    own, begun = cells.of_notebook(run_folder.notebook_of(parameters)), len(namespace["In"]) - 1
    run = run_folder.start(parameters, inputs=inputs.visible)

    def own_cells() -> str:
        executed = (source for source in namespace["In"][begun:] if not _is_parameters_cell(kind, source))
        return cells.others(executed, own)

    run.own_cells = own_cells
    bars.watch_cells()
    print(run, *needed, sep="\n")
    return parameters, run


def read(kind: type[_Kind], namespace: dict[str, Any]) -> _Kind:
    """The checked parameters of a notebook. Call it with `globals()`, in the cell under the parameters.

    Parameters that are not set have their defaults. Names that begin with an underscore, imports and
    functions are helpers and no parameters. Paths count from the project's folder, also where JupyterLab
    starts the kernel in `notebooks/`.

    Raises:
        PftoolsError: no parameters cell was executed, a value of it cannot be known, a name is unknown (the
            nearest valid one is offered), or a value is out of its range.
    """
    _forget_what_was_made(namespace)
    values = _values(kind, namespace["In"][:-1], namespace)
    parameters = settings.check(kind, _from_the_project(kind, values))
    _watch(kind, namespace)
    return parameters


# ------------------------------------------------------------------------------------------------------------
# Which values the reader sees


def _values(kind: type[BaseModel], executed: list[str], namespace: dict[str, Any]) -> dict[str, Any]:
    """{name: value} of the notebook's own parameters cell, and of papermill's where it was executed later.

    Args:
        kind: the class of the parameters.
        executed: the sources of all executed cells, in order.
        namespace: the names of the kernel.
    """
    found = [number for number, source in enumerate(executed) if _is_parameters_cell(kind, source)]
    if not found:
        raise PftoolsError(
            f"no parameters cell was executed: execute the cell that begins with {_MARK!r} before this one."
        )
    own = next((number for number in reversed(found) if not _is_injected(kind, executed[number])), found[-1])
    counted = sorted({own, found[-1]})
    names = set[str]().union(*(_names_set_by(kind, executed[number]) for number in counted))
    for number in range(own, len(executed)):
        again = cells.assigned(executed[number]) & names if number not in counted else set()
        if again:
            raise PftoolsError(
                f"{', '.join(sorted(again))} was set again in cell [{number}], after the parameters: write "
                "the value into the parameters cell, and execute that again."
            )
    written: dict[str, Any] = {}
    for number in counted:
        written |= cells.literals(executed[number])
    for name in names:  # a cell that failed half-way leaves older values
        if name not in namespace or (name in written and repr(namespace[name]) != repr(written[name])):
            raise PftoolsError(
                f"{name} is not what the parameters cell says: execute that cell again, to its end."
            )
    return {name: namespace[name] for name in names}


def _is_parameters_cell(kind: type[BaseModel], source: str) -> bool:
    """Whether a cell is marked as one, also behind a magic, or sets most parameters."""
    magic = source.startswith("get_ipython()") and _MARK in source
    return source.lstrip().startswith(_MARK) or magic or _sets_most(kind, source)


def _is_injected(kind: type[BaseModel], source: str) -> bool:
    """Whether papermill wrote a cell to set some of the parameters."""
    return source.lstrip().partition("\n")[0].strip() == _MARK and not _sets_most(kind, source)


def _sets_most(kind: type[BaseModel], source: str) -> bool:
    known = cells.assigned(source) & set(kind.model_fields)
    return len(known) >= max(3, len(kind.model_fields) / 2)


def _names_set_by(kind: type[BaseModel], source: str) -> set[str]:
    """The names that a parameters cell has set.

    Raises:
        PftoolsError: whether it has set them cannot be known.
    """
    if hidden := cells.hidden_assignment(source):
        raise PftoolsError(
            f"what the parameters cell sets cannot be known, as it uses {hidden}: write a line "
            "`name = value` for each parameter."
        )
    names = cells.assigned(source)
    unsure = sorted((names - cells.surely_assigned(source)) & set(kind.model_fields))
    if unsure:
        raise PftoolsError(
            f"whether the parameters cell sets {unsure[0]} depends on a condition or a loop: give it a value "
            "before that, in the same cell."
        )
    return names


# ------------------------------------------------------------------------------------------------------------
# Paths


def _from_the_project(kind: type[BaseModel], given: dict[str, Any]) -> dict[str, Any]:
    """The parameters, with paths that are good from where the kernel works."""
    project = project_folder()
    if project == Path.cwd():
        return given
    values = {name: field.default for name, field in kind.model_fields.items()} | given
    found = {}
    for name, value in values.items():
        field = kind.model_fields.get(name)
        if not isinstance(value, str) or not value or field is None:
            continue
        names_an_input = name in getattr(kind, "parents", ()) and value != settings.EMBEDDED_MODEL
        names_an_input |= name == "corpus" and contents.is_path(value)
        place = contents.place_and_column(value)[0] if name == "corpus" else value
        if settings.A_PATH in field.metadata or (names_an_input and (project / place).exists()):
            found[name] = str(project / Path(value).expanduser())
    return given | found


def project_folder() -> Path:
    """The folder that paths count from: where the kernel works, or above it if that is `notebooks/`."""
    here = Path.cwd()
    inside = here.name == "notebooks" and (here.parent / "pyproject.toml").exists()
    return here.parent if inside else here


# ------------------------------------------------------------------------------------------------------------
# Reading again


def _forget_what_was_made(namespace: dict[str, Any]) -> None:
    """Delete the parameters and the run that were read before, and the names that cells made from them."""
    for name in cells.made_from(("parameters", "run"), namespace["In"]):
        if namespace.pop(name, None) is not None:
            _forgotten.add(name)


def _watch(kind: type[BaseModel], namespace: dict[str, Any]) -> None:
    """Forget as soon as a parameters cell is executed again, and say so where a forgotten name is used.

    Without that, the cells below would work with parameters that the notebook no longer shows.
    """
    from IPython import get_ipython

    shell = get_ipython()
    if shell is None or namespace is not shell.user_ns:
        return

    def after_each_cell(result: Any) -> None:
        if _is_parameters_cell(kind, result.info.raw_cell or ""):
            _forget_what_was_made(namespace)

    for earlier in [
        found for found in shell.events.callbacks["post_run_cell"] if found.__name__ == "after_each_cell"
    ]:
        shell.events.unregister("post_run_cell", earlier)
    shell.events.register("post_run_cell", after_each_cell)
    shell.set_custom_exc((NameError,), _explain)


def _explain(
    shell: Any, kind: type[NameError], error: NameError, trace: Any, tb_offset: int | None = None
) -> None:
    """Show that a name was forgotten, or else the error as it is."""
    if error.name not in _forgotten:
        shell.showtraceback((kind, error, trace), tb_offset=tb_offset)
        return
    sentence = PftoolsError(
        f"{error.name} was made from parameters that were read before: execute the notebook again from the "
        "cell that reads the parameters."
    )
    shell.showtraceback((PftoolsError, sentence, None))

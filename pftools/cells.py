"""What the source of a notebook's cell sets, and which cells a notebook has, told without executing them."""

from __future__ import annotations

import ast
import hashlib
import json
import symtable
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from pftools.errors import PftoolsError

COLAB = "# On Colab"  # how the cell begins that installs pftools there, and does nothing elsewhere
# Calls that set names, or may, where the source does not show them.
_HIDDEN_CALLS = ("exec", "eval", "globals", "locals", "vars", "get_ipython")


def assigned(source: str) -> set[str]:
    """The names that a cell may set.

    Imports, functions, classes and names with a leading underscore are left out. Source that is no Python
    sets none.
    """
    try:
        symbols = symtable.symtable(source, "cell", "exec").get_symbols()
    except SyntaxError:
        return set()
    return {
        symbol.get_name()
        for symbol in symbols
        if symbol.is_assigned()
        and not (symbol.is_imported() or symbol.is_namespace() or symbol.get_name().startswith("_"))
    }


def surely_assigned(source: str) -> set[str]:
    """The names that a cell sets whatever its conditions and loops do."""
    return _surely_assigned(ast.parse(source).body)


def _surely_assigned(statements: list[ast.stmt]) -> set[str]:
    names: set[str] = set()
    for statement in statements:
        match statement:
            case ast.If():
                names |= _surely_assigned(statement.body) & _surely_assigned(statement.orelse)
            case ast.With():
                names |= _surely_assigned(statement.body)
            case ast.For() | ast.While() | ast.Try() | ast.Match() | ast.AnnAssign(value=None):
                pass
            case ast.Delete():
                names -= {target.id for target in statement.targets if isinstance(target, ast.Name)}
            case _:
                names |= _names(statement, ast.Store)
    return names


def hidden_assignment(source: str) -> str | None:
    """What in a cell can set names that its source does not show, such as `exec`; None: nothing."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Name(id=name)) if name in _HIDDEN_CALLS:
                return name
            case ast.ImportFrom(names=[ast.alias(name="*")]):
                return "import *"
            case ast.Global():
                return "global"
    return None


def literals(source: str) -> dict[str, Any]:
    """{name: value} of the lines `name = value` of a cell, where the value is written out and set once."""
    tree = ast.parse(source)
    stored = [
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    ]
    found: dict[str, Any] = {}
    for statement in tree.body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if stored.count(name) == 1:
                try:
                    found[name] = ast.literal_eval(value)
                except ValueError:
                    pass  # it is computed, so only the kernel knows it
    return found


def made_from(roots: Iterable[str], sources: Iterable[str]) -> set[str]:
    """``roots``, and the names that statements set from one of them or from a name so made; no functions."""
    made = set(roots)
    for source in sources:
        try:
            statements = ast.parse(source).body
        except SyntaxError:
            continue
        for statement in statements:
            defines = isinstance(statement, ast.FunctionDef | ast.ClassDef)
            if not defines and made & _names(statement, ast.Load):
                made |= _names(statement, ast.Store)
    return made


def _names(statement: ast.stmt, context: type[ast.expr_context]) -> set[str]:
    nodes = ast.walk(statement)
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, context)}


# ------------------------------------------------------------------------------------------------------------
# The cells of a notebook

# Calls that only look at what they are given.
_LOOKING = ("display", "len", "list", "max", "min", "print", "repr", "round", "sorted", "str", "sum", "type")


def of_notebook(path: Path) -> tuple[str, ...]:
    """The code that a notebook executes, a text a cell, without what installs pftools on Colab.

    Of its parameters cell that is what is no plain `name = value`, as papermill sets the values anew.

    Raises:
        PftoolsError: it is missing, or no notebook.
    """
    try:
        now = path.stat()
        return _of_notebook(path, now.st_size, now.st_mtime_ns)
    except OSError as error:
        raise PftoolsError(f"the notebook {path} cannot be read ({error.strerror}): put it back.") from None


@lru_cache(maxsize=64)
def _of_notebook(path: Path, size: int, modified: int) -> tuple[str, ...]:
    found: list[str] = []
    try:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"]).strip()
            if cell["cell_type"] == "code" and not source.startswith(COLAB):
                is_parameters = "parameters" in cell["metadata"].get("tags", ())
                found.append(_beside_values(source) if is_parameters else source)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise PftoolsError(
            f"{path} is damaged, or no notebook: put back the one that came with pftools."
        ) from None
    return tuple(source for source in found if source)


def _beside_values(source: str) -> str:
    """The statements of a cell that do more than to set a name to a value that is written out."""
    try:
        statements = ast.parse(source).body
    except SyntaxError:
        return source
    plain = literals(source)
    kept = [
        ast.get_source_segment(source, statement) or ""
        for statement in statements
        if not (
            isinstance(statement, ast.Assign)
            and isinstance(statement.targets[0], ast.Name)
            and statement.targets[0].id in plain
        )
    ]
    return "\n".join(kept)


def digest(sources: Iterable[str]) -> str:
    """The sha256 of cells, in hexadecimal digits."""
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


def others(executed: Iterable[str], own: Iterable[str]) -> str:
    """The digest of the cells among ``executed`` that are not ``own`` and do more than look; empty: none."""
    known = {source.strip() for source in own}
    found = [source.strip() for source in executed]
    found = [source for source in found if source not in known and not only_looks(source)]
    found = [source for source in found if not source.startswith(COLAB)]
    return digest(found) if found else ""


def only_looks(source: str) -> bool:
    """Whether a cell changes nothing: it sets no name, and calls only what shows or counts."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return False
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=name)) if name in _LOOKING:
                pass
            case ast.Call() | ast.Delete() | ast.Import() | ast.ImportFrom() | ast.Global() | ast.NamedExpr():
                return False
            case ast.Name(ctx=ast.Store()) | ast.Attribute(ctx=ast.Store()) | ast.Subscript(ctx=ast.Store()):
                return False
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef() | ast.Await():
                return False
    return True

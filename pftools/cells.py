"""What the source of a notebook's cell sets, told without executing it."""

from __future__ import annotations

import ast
import symtable
from collections.abc import Iterable
from typing import Any

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

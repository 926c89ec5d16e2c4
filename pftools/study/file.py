"""A study file, read: mistakes are named with their line, and paths count from its folder."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal

from pftools import contents, settings
from pftools.errors import PftoolsError
from pftools.shipped import shipped_studies
from pftools.study.words import PLANNED, Study, at
from pftools.study.yaml_file import read_yaml


def load_study(path: str | Path) -> Study:
    """Read and check a study file, or one that comes with pftools: `quick` or `published`.

    Paths in it (of a model, a corpus, a data root, a folder of tasks) count from the file's own folder,
    wherever pftools is called from.

    Raises:
        PftoolsError: no such file, or a mistake in it; the message names the line and what to write instead.
    """
    path = Path(path).expanduser()
    if not path.exists():
        path = shipped_studies().get(str(path), path)
    try:
        source = read_yaml(path)
    except FileNotFoundError:
        known = ", ".join([*map(str, sorted(Path("data/studies").glob("*.yaml")))] or shipped_studies())
        raise PftoolsError(f"there is no study file {path}: give one such as {known}.") from None
    if not isinstance(source.content, dict):
        raise PftoolsError(f"{path}, line 1: this is not a study: write 'name:', 'orderings:' and so on.")
    try:
        given = {"name": re.sub(r"[^A-Za-z0-9_.-]", "-", path.stem), **source.content}
        study = settings.check(Study, _with_paths(given, path.parent))
    except PftoolsError as error:
        raise PftoolsError(f"{source.place(error.where)}: {error}") from None
    study._source = source
    return study


_Located = Literal["model", "corpus", "data root", "folder of tasks"]
# Parameters of a section.
_PATHS: dict[str, _Located] = {"corpus": "corpus", "data": "data root", "include": "folder of tasks"}


def _with_paths(given: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A study's content, in which relative paths have become absolute ones."""
    found = dict(given)
    if isinstance(given.get("model"), str):
        with at("model"):
            found["model"] = locate(given["model"], folder, "model")
    for section in PLANNED:
        if not isinstance(given.get(section), dict):
            continue
        found[section] = dict(given[section])
        for name, kind in _PATHS.items():
            if isinstance(value := given[section].get(name), str) and value:
                with at(section, name):
                    found[section][name] = locate(value, folder, kind)
    return found


def locate(reference: str, folder: Path, kind: _Located) -> str:
    """What a study calls a model, corpus or folder: a name as it is, a path as an absolute one.

    Args:
        reference: a name or a path.
        folder: where relative paths count from.
        kind: what it stands for.

    Raises:
        PftoolsError: it looks like a path, and nothing is there.
    """
    whole, column = reference, ""
    if kind == "corpus":
        reference, column = _place_and_column(reference, folder)
    try:
        path = (folder / Path(reference).expanduser()).absolute()
        there = path.exists()
    except (OSError, RuntimeError, ValueError):  # too long, or an unknown user after ~
        path, there = folder / reference, False
    if reference == settings.EMBEDDED_MODEL or (kind == "corpus" and not contents.is_path(reference)):
        return whole
    if there:
        return os.path.normpath(path) + (f":{column}" if column else "")
    if kind == "corpus" and contents.data_set_of(whole):
        return whole
    if kind in ("data root", "folder of tasks") or contents.looks_like_path(reference, folder):
        here = Path(reference).expanduser()
        hint = f" (from here it is {os.path.relpath(here, folder)!r})" if here.exists() else ""
        raise PftoolsError(
            f"there is no {kind} {reference!r}, which is {os.path.normpath(path)}: paths count from the "
            f"folder of the study file; mend the path{hint}."
        )
    return whole


def _place_and_column(corpus: str, folder: Path) -> tuple[str, str]:
    """`contents.place_and_column`, where paths count from a folder."""
    if (folder / Path(corpus).expanduser()).exists():
        return corpus, ""
    return contents.place_and_column(corpus)

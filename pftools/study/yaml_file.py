"""A YAML file, with the line of everything in it.

Values are read by the rules of YAML 1.2: `010` is ten, `1e-3` a number, `2:4` and `no` are text, only `true`
and `false` are truth values. (PyYAML's own rules are those of YAML 1.1, where these are 8, a text, 124 and
false.) Keys that stand twice, keys that are no text, and a value that contains itself are refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pftools.errors import PftoolsError, not_yaml

_TAG = "tag:yaml.org,2002:"
# The core schema of YAML 1.2 (chapter 10.3 of its specification), and `<<`, which merges a dictionary into
# another.
_SCALARS = {
    "null": (r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}
_KINDS = {"str", "map", "seq", *_SCALARS}
_MOST_NODES = 100_000  # a value that names an earlier one can grow without end
_MOST_DIGITS = 300


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader by the rules of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, Any] = {}


for _kind, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(_TAG + _kind, re.compile(rf"(?:{_pattern})\Z"), _first)


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    base = {"0o": 8, "0x": 16}.get(node.value[:2])
    return int(node.value[2:], base) if base else int(node.value)


_Loader.add_constructor(_TAG + "int", _integer)


@dataclass(frozen=True)
class YamlFile:
    """What a file holds.

    Attributes:
        path: where it was read.
        content: dictionaries, lists, text, numbers, truth values and None.
        tree: the same as nodes that know their line.
    """

    path: Path
    content: Any
    tree: yaml.Node | None

    def place(self, where: tuple[str | int, ...]) -> str:
        """Where a value stands, such as `quick.yaml, line 7`.

        Args:
            where: the names and indices that lead to the value; followed as far as the file has them.
        """
        node, line = self.tree, None
        for part in where:
            if isinstance(node, yaml.MappingNode):
                found = [(key, value) for key, value in node.value if key.value == part]
                if not found:
                    break
                key, node = found[0]
                line = key.start_mark.line + 1
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                node = node.value[part]
                line = node.start_mark.line + 1
        return f"{self.path}, line {line or 1}"


def read_yaml(path: Path) -> YamlFile:
    """Read a YAML file.

    Raises:
        FileNotFoundError: nothing is there.
        PftoolsError: a folder, not UTF-8, or not YAML; the message names the line and what to do.
    """
    text = _text(path)
    try:
        tree = yaml.compose(text, Loader=_Loader)
        if tree is not None:
            _check(tree, path)
        return YamlFile(path, yaml.load(text, Loader=_Loader), tree)
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise PftoolsError(
            f"{path}, line {line}: the character U+{ord(text[error.position]):04X} is not allowed in YAML: "
            "remove it."
        ) from None
    except yaml.MarkedYAMLError as error:
        raise not_yaml(path, error) from None
    except RecursionError:
        raise PftoolsError(f"{path} has brackets in brackets without end: remove some.") from None


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except IsADirectoryError:
        held = ", ".join(str(file) for file in sorted(path.glob("*.yaml"))) or "one with the ending .yaml"
        raise PftoolsError(f"{path} is a folder: give a file, such as {held}.") from None
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        says = getattr(error, "strerror", None) or str(error)
        raise PftoolsError(f"{path} cannot be read ({says}): give a file that can.") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise PftoolsError(
            f"{path}, line {line}: the file is not UTF-8 text: save it as UTF-8 in your editor."
        ) from None


def _check(root: yaml.Node, path: Path) -> None:
    """Refuse keys that stand twice or are no text, and values without end."""
    above: set[int] = set()
    seen = 0

    def walk(node: yaml.Node) -> None:
        nonlocal seen
        seen += 1
        line = node.start_mark.line + 1
        if id(node) in above:
            raise PftoolsError(f"{path}, line {line}: this value contains itself: write it out.")
        if seen > _MOST_NODES:
            raise PftoolsError(
                f"{path}, line {line}: the file names values within values more than {_MOST_NODES:,} times: "
                "write fewer."
            )
        above.add(id(node))
        _check_kind(node, f"{path}, line {line}")
        if isinstance(node, yaml.MappingNode):
            _check_keys(node, path)
        for child in node.value if isinstance(node, yaml.CollectionNode) else ():
            for part in child if isinstance(child, tuple) else (child,):
                walk(part)
        above.discard(id(node))

    walk(root)


def _check_kind(node: yaml.Node, place: str) -> None:
    kind = node.tag.removeprefix(_TAG)
    if kind not in _KINDS:
        raise PftoolsError(
            f"{place}: the mark {node.tag.replace(_TAG, '!!')} is not known here: leave it out."
        )
    if kind in _SCALARS and not re.fullmatch(_SCALARS[kind][0], str(node.value)):
        raise PftoolsError(f"{place}: {node.value!r} is marked as !!{kind} and is none: leave the mark out.")
    if kind == "int" and len(node.value) > _MOST_DIGITS:
        raise PftoolsError(
            f"{place}: a number of {len(node.value)} digits is too large: write a smaller one."
        )


def _check_keys(node: yaml.MappingNode, path: Path) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if key.tag == _TAG + "merge":
            continue
        if key.tag != _TAG + "str":
            written = f"the key {key.value!r}" if isinstance(key, yaml.ScalarNode) else "a key with parts"
            raise PftoolsError(
                f"{path}, line {line}: {written} is no text: names stand before the colon; put quotes "
                "round it if it is one."
            )
        if key.value in lines:
            raise PftoolsError(
                f"{path}, line {line}: {key.value!r} stands in line {lines[key.value]} already, and only one "
                "of them can count: remove the other."
            )
        lines[key.value] = line

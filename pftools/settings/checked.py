"""Values that a person wrote: understood where they can mean one thing only, else refused in one sentence."""

from __future__ import annotations

import json
import os
import re
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from pftools.errors import PftoolsError, nearest


class Parameters(BaseModel):
    """Values that a person wrote, in a notebook, on a command line or in a file."""

    # Defaults are validated too, so that 16 and 16.0 never make two keys of one step.
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _as_it_was_meant(cls, value: Any, info: ValidationInfo) -> Any:
        """Understand what can mean one thing only, such as `~/runs` and papermill's `-p limit null`."""
        kinds = _kinds(cls.model_fields[info.field_name or ""].annotation)
        if isinstance(value, str) and value.startswith("~/"):
            value = os.path.expanduser(value)
        if isinstance(value, str) and str not in kinds and value in ("null", "None"):
            value = None
        elif list in kinds and isinstance(value, (str, int, float)):
            value = _listed(value)
        found = value if isinstance(value, list) else [value]
        if not kinds & {bool, Any} and any(isinstance(item, bool) for item in found):
            wanted = "text, in quotes" if str in kinds else "a number"
            raise ValueError(f"true and false have no meaning here: give {wanted}.")
        return value


def _kinds(annotation: Any) -> set[Any]:
    """The plain types in an annotation: {int, NoneType} of `int | None`, {list, str} of `list[str]`."""
    origin = get_origin(annotation)
    if origin is None:
        return {annotation}
    if origin is Literal:
        return {type(value) for value in get_args(annotation)}
    if origin is Annotated:
        return _kinds(get_args(annotation)[0])
    if origin is dict:
        return {dict}
    inner = set().union(*map(_kinds, get_args(annotation)))
    return inner | {list} if origin is list else inner


def _listed(value: str | float) -> list[Any]:
    """One value is a list of one; `facts, reading` and `["facts", "reading"]` are lists of two."""
    if not isinstance(value, str):
        return [value]
    if not value.lstrip().startswith("["):
        return [part.strip() for part in value.split(",")]
    try:
        return list(json.loads(value))
    except ValueError:
        raise ValueError('a list is written as \'["facts", "reading"]\' or as facts,reading.') from None


_SECRET = re.compile(r"(^|_)(token|secret|password|api_?key|credential)s?$", re.IGNORECASE)
HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")


_Kind = TypeVar("_Kind", bound=BaseModel)


def check(kind: type[_Kind], given: dict[str, Any], *, place: str = "") -> _Kind:
    """``kind(**given)``, with pydantic's complaints turned into one sentence.

    Args:
        kind: the class of the parameters.
        given: their values by name.
        place: where the values stand, such as "prune in the study 'quick'", for the message.

    Raises:
        PftoolsError: an unknown name (the nearest valid one is offered), or a value out of its range.
    """
    for name, value in given.items():
        secret_name = name not in kind.model_fields and _SECRET.search(name)
        if secret_name or (isinstance(value, str) and HUB_TOKEN.search(value)):
            raise PftoolsError(
                f"{name} looks like a secret, and parameters are written into notebooks and reports: set it "
                "as an environment variable instead (HF_TOKEN for the hub).",
                where=(name,),
            )
    try:
        return kind(**given)
    except ValidationError as failure:
        raise PftoolsError(_sentence(kind, failure, place), where=_where(failure)) from None


def _where(failure: ValidationError) -> tuple[str | int, ...]:
    first = failure.errors()[0]
    return first["loc"] + getattr(first.get("ctx", {}).get("error"), "where", ())


def _sentence(kind: type[BaseModel], failure: ValidationError, place: str) -> str:
    first = failure.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    step = getattr(kind, "step", kind.__name__)
    of = f" of {place or ('the study' if step == 'study' else f'the {step} step')}"
    if first["type"] == "extra_forbidden":
        return f"unknown parameter {name!r}{of}: {nearest(name, kind.model_fields)}."
    if isinstance(first.get("ctx", {}).get("error"), PftoolsError) or not name:
        return first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"the parameter {name}{of} is missing: add '{name}:' with its value."
    return f"the parameter {name}{of} is {_shown(first['input'])}: {_remedy(first)}."


def _remedy(error: Any) -> str:
    """What a value should be, from pydantic's description of the mistake."""
    says = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ").removesuffix(".")
    if error["type"] == "value_error":
        return says
    if error["type"] == "literal_error" and isinstance(error["input"], str):
        return nearest(error["input"], re.findall(r"'([^']*)'", error["ctx"]["expected"]))
    if error["type"] == "string_type" and isinstance(error["input"], (int, float)):
        return f"it should be text: put it in quotes, '{error['input']}'"
    if error["type"] == "string_pattern_mismatch":
        return "use letters, digits, '.', '_' and '-' only"
    if says.startswith("String should"):
        return says.replace("String should", "the text should")
    return f"it should be {says[:1].lower()}{says[1:]}"


def _shown(value: Any) -> str:
    """A value in a line of readable length."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

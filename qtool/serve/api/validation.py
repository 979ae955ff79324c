"""What a validation error in the body of a request tells the client."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from qtool.errors import one_line
from qtool.serve.api.other_fields import MAX_UNKNOWN, NOT_OFFERED, nearest_name
from qtool.serve.api.schemas import ErrorDetail

MAX_ERRORS = 100  # of one body that are read
# pydantic's -> OpenAI's
CODES = {
    "extra_forbidden": "unknown_parameter",
    "not_offered": "unsupported_parameter",
    "missing": "missing_required_parameter",
}
OTHER_FIELDS = ("extra_forbidden", "unknown_parameter", "not_offered")
"""Kinds of errors about a field that the model does not have."""


@dataclass(frozen=True)
class _LocatedError:
    """One of pydantic's errors and the field it is about."""

    error: ErrorDetails
    path: list[str | int]
    """The way to the field, without the names of a union's members."""

    known: Collection[str]
    """The names of the fields that may stand there."""

    @property
    def kind(self) -> str:
        return self.error["type"]

    @property
    def field(self) -> str:
        steps = (f"[{step}]" if isinstance(step, int) else f".{step[:100]}" for step in self.path)
        return "".join(steps).removeprefix(".")


def describe_invalid_body(errors: Sequence[ErrorDetails], model: type[BaseModel]) -> ErrorDetail:
    """Return what pydantic's ``errors`` in a body of ``model`` mean: which field, what it takes,
    and the nearest name to one that is unknown.

    The innermost of several errors counts: those of a union's other members are further out.
    """
    located = [_locate(error, model) for error in errors[:MAX_ERRORS]]
    worst = max(located, key=lambda one: (len(one.path), one.kind in OTHER_FIELDS))
    return ErrorDetail(
        message=_describe(worst, located),
        type="invalid_request_error",
        param=worst.field or None,
        code=CODES.get(worst.kind, worst.kind),
    )


def _describe(worst: _LocatedError, located: Iterable[_LocatedError]) -> str:
    field = worst.field
    if worst.kind in OTHER_FIELDS:
        name = str(worst.path[-1])
        instead = (worst.error.get("ctx") or {}).get("instead") or NOT_OFFERED.get(name)
        if instead is not None:
            return f"`{field}` is not offered: {instead}"
        near = nearest_name(name, worst.known)
        return f"unknown field `{field}`" + (f"; did you mean `{near}`?" if near else "")
    if worst.kind == "missing":
        return f"`{field}` is missing" if field else "the request has no body"
    same = dict.fromkeys(_explain(one.error) for one in located if one.path == worst.path)
    reasons = ", or ".join(same)
    return f"`{field}`: {reasons}" if field else reasons


def _locate(error: ErrorDetails, model: type[BaseModel]) -> _LocatedError:
    path: list[str | int] = []
    models = {model}
    known: Collection[str] = ()
    way = list(error["loc"])
    way = way[way[:1] == ["body"] :]
    other = (error.get("ctx") or {}).get("field") if error["type"] in OTHER_FIELDS else None
    if other is not None:  # an error of its object
        way.append(other)
    for number, step in enumerate(way, start=1):
        if isinstance(step, int):
            path.append(step)
            continue
        fields = _fields_of(models)
        if step in fields:
            path.append(step)
            models = _models_in(fields[step].annotation)
        elif number == len(way) and error["type"] in OTHER_FIELDS:
            path.append(step)
            known = fields.keys()
    if error["type"] == "missing" and isinstance(error["input"], dict):
        name = str(path[-1])
        given = list(error["input"])[:MAX_UNKNOWN]
        typos = [one for one in given if nearest_name(one, [name])]
        if typos:
            path[-1] = typos[0]
            return _LocatedError({**error, "type": "extra_forbidden"}, path, [name])
    return _LocatedError(error, path, known)


def _fields_of(models: Iterable[type[BaseModel]]) -> dict[str, FieldInfo]:
    """Return the fields of ``models`` by their names in JSON."""
    return {
        field.alias or name: field for one in models for name, field in one.model_fields.items()
    }


def _models_in(annotation: object) -> set[type[BaseModel]]:
    """Return the models that a value of this type may be, or hold."""
    if arguments := get_args(annotation):
        return {model for argument in arguments for model in _models_in(argument)}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}
    return set()


def _explain(error: ErrorDetails) -> str:
    """Return what is wrong, in JSON's words."""
    text = one_line(Exception(error["msg"].removeprefix("Value error, ")))
    return re.sub(
        r"a valid dictionary( or instance of \w+| or object to extract fields from)?",
        "an object",
        text,
    )

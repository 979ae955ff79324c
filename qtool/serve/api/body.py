"""What all parts of a request share: strict types, and a rule for every other field.

A value of null, false or empty asks for nothing, in any field. Of the fields that a `Body` has
not, those that are not offered and those with a name one or two letters from a known one are
refused, and others are ignored, with a line in the log for each name. A `Part` ignores them all,
as vLLM and SGLang do. Validated with ``extra="forbid"``, both refuse whatever they would ignore.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError, create_model, model_validator
from pydantic_core import PydanticCustomError

from qtool.serve.api.other_fields import (
    MAX_UNKNOWN,
    NO_EFFECT,
    asks_for_nothing,
    log_without_effect,
    nearest_name,
    reason_not_offered,
)

GRAMMARS = frozenset(
    ("regex", "ebnf", "json_schema", "structural_tag", "json", "choice", "grammar", "guided_json")
)
"""Fields whose empty value is refused: a client whose grammar came out empty must not get free
text."""

STRICT = ConfigDict(strict=True)
EMPTY: dict[str, object] = {"bool": False, "str": "", "list": [], "dict": {}}


class Body(BaseModel):
    """A request, or options in it."""

    model_config = ConfigDict(
        extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=()
    )
    ignores_unknown: ClassVar[bool] = True
    """Whether fields that nobody defines are ignored and not refused."""
    without_effect: ClassVar[frozenset[str]] = frozenset()
    """Fields of this route that change nothing here, beside `NO_EFFECT`."""
    not_offered: ClassVar[Mapping[str, str]] = {}
    """Fields of this route that would change the answer, and what to do instead, beside
    `NOT_OFFERED`.
    """

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nothing(cls, value: object) -> object:
        """Leave out what asks for nothing, unless the field takes it."""
        if not isinstance(value, dict):
            return value
        nothing = [name for name, one in value.items() if asks_for_nothing(one)]
        dropped = {name for name in nothing if not _takes(cls, name, value[name])}
        return {name: one for name, one in value.items() if name not in dropped}

    @model_validator(mode="after")
    def _check_other_fields(self) -> Self:
        other = self.model_extra or {}
        if len(other) > MAX_UNKNOWN:
            message = "{count} unknown fields are too many"
            raise PydanticCustomError("too_many_errors", message, {"count": len(other)})
        for name, value in other.items():
            self._check_other_field(name, value)
        other.clear()
        return self

    def _check_other_field(self, name: str, value: object) -> None:
        instead = reason_not_offered(name, value, self.not_offered)
        if instead is not None:
            context = {"field": name, "instead": instead}
            raise PydanticCustomError("not_offered", "not offered", context)
        defined = name in NO_EFFECT or name in self.without_effect
        near = None if defined else nearest_name(name, _fields_of(type(self)))
        if near is not None or not (self.ignores_unknown or defined):
            raise PydanticCustomError("unknown_parameter", "unknown field", {"field": name})
        log_without_effect(name)


class Part(Body):
    """A part of a request whose unknown fields mean nothing to any server."""

    model_config = ConfigDict(extra="ignore")


@cache
def _fields_of(cls: type[BaseModel]) -> dict[str, Any]:
    """Return the fields of ``cls`` by their names in JSON."""
    return {field.alias or name: field for name, field in cls.model_fields.items()}


def _takes(cls: type[BaseModel], name: str, value: object) -> bool:
    """Whether the field ``name`` takes ``value``, which is null, false or empty, or must refuse
    it.
    """
    if name in GRAMMARS and value is not None and value is not False:
        return True
    field = _fields_of(cls).get(name)
    if field is None:
        return False
    if field.is_required() or value is None or (isinstance(value, list) and value):
        return True
    return _takes_empty(cls, name, type(value).__name__)


@cache
def _takes_empty(cls: type[BaseModel], name: str, kind: str) -> bool:
    """Whether the field ``name`` takes the empty value of the type ``kind``."""
    field = _fields_of(cls)[name]
    annotation = field.annotation
    for constraint in field.metadata:
        annotation = Annotated[annotation, constraint]
    model: Any = create_model("Probe", __config__=STRICT, value=(annotation, ...))
    try:
        model.model_validate({"value": EMPTY[kind]})
    except ValidationError:
        return False
    return True

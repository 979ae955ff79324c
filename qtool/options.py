"""Options as frozen dataclasses: the bounds and the documentation of each field.

A field's meaning stands under it as a string literal; the command line shows it as help.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar, cast

from qtool.errors import UsageError, nearest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")
Options = TypeVar("Options", bound="DataclassInstance")


@dataclass(frozen=True)
class Bounds:
    """The numbers that an option may be."""

    minimum: int
    maximum: int | None = None
    whole: bool = True
    own_maximum: int | None = None
    """The maximum of qtool's own engine; other engines may go further."""

    def reason(self, value: object) -> str:
        """Return what ``value`` must be; empty when it is within the bounds."""
        maximum = self.maximum if self.own_maximum is None else self.own_maximum
        kinds = (int,) if self.whole else (int, float)
        if type(value) in kinds:
            number = cast(float, value)
            if self.minimum <= number and (maximum is None or number <= maximum):
                return ""
        noun = "a whole number" if self.whole else "a number"
        return f"{noun} from {self.minimum} {'on' if maximum is None else f'to {maximum}'}"


def bounded(
    default: T,
    minimum: int,
    maximum: int | None = None,
    *,
    whole: bool = True,
    own_maximum: int | None = None,
) -> T:
    """Return a dataclass field whose value is None or within `Bounds`."""
    bounds = Bounds(minimum, maximum, whole=whole, own_maximum=own_maximum)
    return dataclasses.field(default=default, metadata={"bounds": bounds})


def bounds_of(field: dataclasses.Field[object]) -> Bounds | None:
    """Return the bounds of an option; None when it has none."""
    return field.metadata.get("bounds")


def check_bounds(options: DataclassInstance, owner: type[DataclassInstance]) -> None:
    """Check those fields of ``options`` that ``owner`` itself declares.

    Raises: UsageError, for a number out of its bounds.
    """
    declared = inspect.get_annotations(owner)
    for field in fields(owner):
        bounds = bounds_of(field)
        value = getattr(options, field.name)
        if bounds is None or value is None or field.name not in declared:
            continue
        reason = bounds.reason(value)
        if reason:
            raise UsageError("E_LIMIT", f"{field.name} is {value!r}", hint=reason)


def make_options(kind: type[Options], keywords: Mapping[str, object]) -> Options:
    """Return the options that ``keywords`` name.

    Raises: UsageError, for a name that ``kind`` has not.
    """
    known = [field.name for field in fields(kind)]
    for name in keywords:
        if name not in known:
            raise UsageError(
                "E_UNKNOWN_OPTION", f"unknown option `{name}`", hint=nearest(name, known)
            )
    return kind(**keywords)


def flag_of(name: str) -> str:
    """Return the flag of an option; it leaves out the unit."""
    return f"--{name.removesuffix('_s').replace('_', '-')}"


@cache
def field_docs(kind: type[DataclassInstance]) -> Mapping[str, str]:
    """Return the documentation of each field: the string literal under it, on one line."""
    docs: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        if is_dataclass(owner):
            docs.update(_own_docs(owner))
    return docs


def _own_docs(kind: type) -> Iterator[tuple[str, str]]:
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    for field, below in pairwise(cast(ast.ClassDef, tree).body):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            text = ast.literal_eval(below.value)
            yield ast.unparse(field.target), " ".join(text.split())

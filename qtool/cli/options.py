"""Options of commands: those of every command, and those that a dataclass has as fields."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qtool.options import bounds_of, field_docs, flag_of, make_options

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Command = Callable[..., None]
# options that are spelled in several ways
SPELLINGS = {
    "model_path": ("--model-path", "--model"),
    "method": ("--method", "--quantization-method", "-m"),
    "output": ("--output", "--export-dir", "-o"),
    "overwrite": ("--overwrite/--no-overwrite",),
    "pack": ("--pack/--truncate",),
    "lm_head": ("--lm-head/--no-lm-head",),
    "trust_pickle": ("--trust-pickle/--no-trust-pickle",),
    "trust_remote_code": ("--trust-remote-code/--no-trust-remote-code",),
    "tp": ("--tp", "--tp-size", "--tensor-parallel-size"),
    "pp": ("--pp", "--pp-size", "--pipeline-parallel-size"),
    "dp": ("--dp", "--dp-size", "--data-parallel-size"),
}
ENVIRONMENT = {"api_key": "QTOOL_API_KEY"}


def takes(
    kind: type[DataclassInstance],
    *,
    without: Collection[str] = (),
    defaults: type[DataclassInstance] | None = None,
) -> Callable[[Command], Command]:
    """Give a command one option for each field of ``kind``; it gets them as one object of it.

    Args:
        kind: a dataclass of options. The command's parameter of this type takes the object.
        without: fields that the command does not offer.
        defaults: a subclass whose defaults the help shows.
    """
    known = [field for field in fields(kind) if field.name not in without]
    parameters = [_parameter(field, kind, defaults or kind) for field in known]

    def decorate(command: Command) -> Command:
        own = inspect.signature(command, eval_str=True).parameters
        target = _name_of_type(own, kind)

        @functools.wraps(command)
        def parsed(**values: object) -> None:
            given = {field.name: values.pop(field.name) for field in known}
            command(**{target: make_options(kind, _without_none(given))}, **values)

        signature = [*parameters, *(own[name] for name in own if name != target)]
        _set_signature(parsed, signature)
        return parsed

    return decorate


def _name_of_type(parameters: Mapping[str, inspect.Parameter], kind: type) -> str:
    (name,) = [name for name, each in parameters.items() if each.annotation is kind]
    return name


def _without_none(values: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in values.items() if value is not None}


def _set_signature(command: Command, parameters: Sequence[inspect.Parameter]) -> None:
    """Let typer see ``parameters``, each by keyword."""
    named = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters]
    command.__annotations__ = {each.name: each.annotation for each in named}
    command.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]


def _parameter(
    field: Field[object], kind: type[DataclassInstance], defaults: type[DataclassInstance]
) -> inspect.Parameter:
    """Return the parameter of a command for a field."""
    value_type = _value_type(field)
    default = field.default
    if default is MISSING:
        default = inspect.Parameter.empty
    elif value_type is not bool and not isinstance(default, str):
        default = None
    bounds = bounds_of(field)
    option = typer.Option(
        *SPELLINGS.get(field.name, (flag_of(field.name),)),
        help=_help(field, kind, defaults),
        envvar=ENVIRONMENT.get(field.name),
        min=bounds.minimum if bounds else None,
        max=bounds.maximum if bounds else None,
        metavar="<path>" if "PathLike" in str(field.type) else None,
        show_default=isinstance(default, str),
    )
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[value_type, option],
    )


def _value_type(field: Field[object]) -> type:
    """Return the type that a value on the command line has; the field's type is text."""
    words = re.findall(r"\w+", str(field.type))
    if "Sequence" in words:
        return list[str]
    return next((kind for kind in (bool, int, float) if kind.__name__ in words), str)


def _help(
    field: Field[object], kind: type[DataclassInstance], defaults: type[DataclassInstance]
) -> str:
    text = field_docs(kind)[field.name]
    (default,) = [each.default for each in fields(defaults) if each.name == field.name]
    if default in (field.default, MISSING):
        return text
    return f"{text} [{default:g}]" if isinstance(default, float) else f"{text} [{default}]"


ModelPath = Annotated[
    str,
    typer.Option(
        "--model-path", "--model", help="Checkpoint folder or Hub name.", show_default=False
    ),
]
HtmlReport = Annotated[
    Path | None,
    typer.Option(help="Write the report to this file, one page.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Nothing but warnings and errors on stderr.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="More detail on stderr.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a Hub model.", show_default=False)
]

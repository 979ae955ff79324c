"""Options of commands: those that several have, and those that are fields of a dataclass."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Collection
from dataclasses import MISSING, Field, fields
from typing import TYPE_CHECKING, Annotated

import typer

from qtool.options import bounds_of, field_docs, flag_of, make_options

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Command = Callable[..., None]
# options that are spelled in several ways
SPELLINGS = {
    "model_path": ("--model-path", "--model"),
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
        without: fields that are no options of the command.
        defaults: a subclass whose defaults the help shows.
    """
    known = [field for field in fields(kind) if field.name not in without]
    parameters = [_parameter(field, kind, defaults or kind) for field in known]

    def decorate(command: Command) -> Command:
        own = inspect.signature(command, eval_str=True).parameters.values()
        (target,) = [parameter.name for parameter in own if parameter.annotation is kind]
        others = [parameter for parameter in own if parameter.name != target]

        @functools.wraps(command)
        def parsed(**values: object) -> None:
            given = {field.name: values.pop(field.name) for field in known}
            given = {name: value for name, value in given.items() if value is not None}
            command(**{target: make_options(kind, given)}, **values)

        signature = [*parameters, *(other.replace(kind=other.KEYWORD_ONLY) for other in others)]
        parsed.__annotations__ = {each.name: each.annotation for each in signature}
        parsed.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
        return parsed

    return decorate


def _parameter(
    field: Field[object], kind: type[DataclassInstance], defaults: type[DataclassInstance]
) -> inspect.Parameter:
    """Return the parameter of a command for a field."""
    default = inspect.Parameter.empty if field.default is MISSING else field.default or None
    value_type = _value_type(field)
    if value_type is bool and field.default is False:
        default = False
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
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Nothing but warnings and errors on stderr.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="More detail on stderr.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a Hub model.", show_default=False)
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:<n>.")]
Overwrite = Annotated[bool, typer.Option(help="Replace an output that exists, at the very end.")]
TrustRemoteCode = Annotated[
    bool, typer.Option(help="Run model code that comes with the checkpoint.")
]
TrustPickle = Annotated[
    bool,
    typer.Option(
        help="Accept a state file of mto.save; ModelOpt loads it with weights-only loading."
    ),
]
RestorePath = Annotated[
    str | None,
    typer.Option(
        "--checkpoint-restore-path",
        help="ModelOpt: skip calibration, take the state kept here.",
        show_default=False,
    ),
]

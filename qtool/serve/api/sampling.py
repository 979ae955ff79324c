"""The sampling parameters of a request: its fields, then the model's defaults, then OpenAI's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import msgspec

from qtool.engine.sampling_params import ANY_JSON_OBJECT, CONSTRAINTS, SamplingParams
from qtool.errors import UsageError
from qtool.serve.api.fields import Json
from qtool.serve.api.protocol import (
    OpenAISamplingFields,
    ResponseFormat,
    SamplingFields,
    StructuredOutputs,
)

Constraint = tuple[str, str]
"""One of SamplingParams' CONSTRAINTS, and its text."""


def sampling_params(
    request: OpenAISamplingFields,
    defaults: Mapping[str, object],
    max_new_tokens: int | None,
    forced: tuple[str, Json] | None = None,
) -> SamplingParams:
    """Return the sampling parameters of ``request``.

    Args:
        defaults: the model's own, for fields that the request leaves out.
        max_new_tokens: None is to the end of the context.
        forced: the constraint that the answer must satisfy because of its tools, and its kind.
    Raises: UsageError.
    """
    values: Json = {"max_new_tokens": None, **defaults}
    given: Json = {name: getattr(request, name) for name in SamplingFields.model_fields}
    given |= {"min_new_tokens": request.min_tokens, "max_new_tokens": max_new_tokens}
    given["no_stop_trim"] = request.no_stop_trim or request.include_stop_str_in_output
    given |= _find_constraint(request, forced)
    if given["top_k"] == 0:
        given["top_k"] = -1  # what vLLM means by it
    values |= {name: value for name, value in given.items() if value is not None}
    return SamplingParams.from_dict(values)


def is_constrained(request: OpenAISamplingFields) -> bool:
    """Whether ``request`` names a constraint of its answer, besides its tools."""
    return bool(_find_constraint(request, None))


def _find_constraint(
    request: OpenAISamplingFields, forced: tuple[str, Json] | None
) -> dict[str, str]:
    """Return the constraint of the answer, if any. Raises: UsageError, if there are several."""
    found = [
        *_own_constraints(request),
        *_response_format(request.response_format),
        *_structured_outputs(request.structured_outputs),
    ]
    if forced is not None:
        kind, constraint = forced
        found.append((kind, _dumps(constraint)))
    if len(found) > 1:
        names = ", ".join(name for name, _ in found)
        raise UsageError(
            "E_GRAMMAR",
            f"the answer is constrained {len(found)} times ({names})",
            hint="give one of them: tool_choice counts too",
        )
    return dict(found)


def _own_constraints(request: SamplingFields) -> Iterator[Constraint]:
    for name in CONSTRAINTS:
        if (value := getattr(request, name, None)) is not None:
            yield name, value


def _response_format(form: ResponseFormat | None) -> Iterator[Constraint]:
    """Yield OpenAI's constraint."""
    if form is None or form.type == "text":
        return
    if form.type == "json_object":
        yield "json_schema", ANY_JSON_OBJECT
    elif form.type == "structural_tag":
        yield "structural_tag", form.model_dump_json(exclude_none=True)
    elif form.json_schema is None or form.json_schema.schema_ is None:
        raise UsageError(
            "E_GRAMMAR",
            "response_format says json_schema and has none",
            hint="give json_schema: {name, schema}",
        )
    else:
        yield "json_schema", _dumps(form.json_schema.schema_)


def _structured_outputs(given: StructuredOutputs | None) -> Iterator[Constraint]:
    """Yield vLLM's constraints."""
    if given is None:
        return
    if isinstance(given.json_, str):
        yield "json_schema", given.json_
    elif given.json_ is not None:
        yield "json_schema", _dumps(given.json_)
    if given.choice is not None:
        quoted = [json.dumps(choice, ensure_ascii=False) for choice in given.choice]
        yield "ebnf", "root ::= " + " | ".join(quoted)
    if given.json_object:
        yield "json_schema", ANY_JSON_OBJECT
    texts = {
        "regex": given.regex,
        "ebnf": given.grammar,
        "structural_tag": given.structural_tag,
    }
    for name, text in texts.items():
        if text is not None:
            yield name, text


def _dumps(schema: Json) -> str:
    """Return ``schema`` as JSON. msgspec is used because `json` would hold the GIL for long.

    Raises: UsageError, if it is nested too deeply.
    """
    try:
        return msgspec.json.encode(schema).decode()
    except RecursionError as error:
        raise UsageError(
            "E_GRAMMAR", "a schema is nested too deeply", hint="use $defs and $ref"
        ) from error

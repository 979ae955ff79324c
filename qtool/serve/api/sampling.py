"""What a request asks of the sampler: its own fields, then the model's defaults, then OpenAI's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qtool.engine.sampling_params import ANY_JSON_OBJECT, SamplingParams
from qtool.errors import UsageError
from qtool.serve.api.protocol import Draw, Sampling


def sampling_params(
    request: Sampling,
    defaults: Mapping[str, Any],
    max_new_tokens: int | None,
    forced_schema: Any = None,
) -> SamplingParams:
    """Return what ``request`` asks of the sampler: its own fields, then the model's defaults, then
    OpenAI's.

    ``forced_schema``: a JSON schema that the answer must satisfy because of its tools. Raises:
        UsageError.
    """
    values: dict[str, Any] = {"max_new_tokens": None, **defaults}
    given = {name: getattr(request, name) for name in Draw.model_fields}
    given |= {"min_new_tokens": request.min_tokens, "max_new_tokens": max_new_tokens}
    given["no_stop_trim"] = request.no_stop_trim or request.include_stop_str_in_output
    given |= _constraint(request, forced_schema)
    if given["top_k"] == 0:
        given["top_k"] = -1  # what vLLM means by it
    values |= {name: value for name, value in given.items() if value is not None}
    return SamplingParams.from_dict(values)


def _constraint(request: Sampling, forced_schema: Any) -> dict[str, str]:
    """Return the constraint that ``request`` names, under the name of SamplingParams."""
    found: list[tuple[str, str]] = [
        (name, value)
        for name in ("regex", "ebnf", "json_schema")
        if (value := getattr(request, name)) is not None
    ]
    if form := request.response_format:
        if form.type == "json_object":
            found.append(("json_schema", ANY_JSON_OBJECT))
        elif form.type == "json_schema":
            if form.json_schema is None or form.json_schema.schema_ is None:
                raise UsageError(
                    "E_GRAMMAR",
                    "response_format says json_schema and has none",
                    hint="give json_schema: {name, schema}",
                )
            found.append(("json_schema", json.dumps(form.json_schema.schema_)))
        elif form.type == "structural_tag":
            found.append(("structural_tag", form.model_dump_json(exclude_none=True)))
    if others := request.structured_outputs:
        if others.json_ is not None:
            found.append(
                (
                    "json_schema",
                    others.json_ if isinstance(others.json_, str) else json.dumps(others.json_),
                )
            )
        if others.choice is not None:
            found.append(
                (
                    "ebnf",
                    "root ::= "
                    + " | ".join(
                        json.dumps(choice, ensure_ascii=False) for choice in others.choice
                    ),
                )
            )
        if others.json_object:
            found.append(("json_schema", ANY_JSON_OBJECT))
        found += [
            (theirs, value)
            for theirs, value in (
                ("regex", others.regex),
                ("ebnf", others.grammar),
                ("structural_tag", others.structural_tag),
            )
            if value
        ]
    if forced_schema is not None:
        found.append(("json_schema", json.dumps(forced_schema)))
    if len(found) > 1:
        names = ", ".join(name for name, _ in found)
        raise UsageError(
            "E_GRAMMAR",
            f"the answer is constrained {len(found)} times ({names})",
            hint="one of them: tool_choice counts too",
        )
    return dict(found)

"""What counts in a record: the first that it has of ``input_ids``, the text column, ``messages``,
``prompt`` + ``completion``, ``text``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from qtool.calibration.sources import MIN_TOKENS, CalibrationSpec, bad_line, rows
from qtool.checkpoint.strict_json import Json, JsonDict
from qtool.errors import DataRefused, nearest


@dataclass(frozen=True, slots=True)
class Record:
    """What a record gives: ``ids``, or else ``messages``, or else ``text``; ``where`` says file and
    line.
    """

    where: str
    text: str = ""
    messages: Sequence[Json] = ()
    ids: Sequence[int] | None = None

    @property
    def most_tokens(self) -> int:
        """A bound: tokenizers make at most one token of a byte.

        What a chat template adds is taken to be enough for a sample.
        """
        if self.ids is not None:
            return len(self.ids)
        return (
            max(MIN_TOKENS, len(str(self.messages)))
            if self.messages
            else len(self.text.strip().encode())
        )


def records(spec: CalibrationSpec) -> Iterator[Record]:
    """Yield the records of ``spec.source`` in the order of the draw, each checked when it is drawn.

    Raises: DataRefused, naming file, line and field, or when there is no record at all;
        ResourceError, when the Hub does not answer.
    """
    empty = True
    for where, fields in rows(spec):
        empty = False
        yield _record(where, fields, spec.text_column)
    if empty:
        raise DataRefused(
            "E_DATA_EMPTY",
            f"{spec.source} holds no records",
            hint="give some hundred texts of the kind that the model will serve",
        )


def _record(where: str, fields: Any, text_column: str | None) -> Record:
    if not isinstance(fields, dict):
        raise bad_line(where, f"found {_kind(fields)}")
    given = {name: value for name, value in fields.items() if value is not None}
    if "input_ids" in given:
        return Record(where, ids=_ids(where, given["input_ids"], given.get("attention_mask")))
    if text_column:
        if text_column not in fields:
            hint = nearest(text_column, fields) or "give one of these as --text-column"
            raise DataRefused(
                "E_DATA_FIELD",
                f"{where}: no field `{text_column}`; it has {_listed(fields)}",
                hint=hint,
            )
        return Record(where, _text(where, text_column, given.get(text_column, "")))
    if "messages" in given:
        return Record(where, messages=_messages(where, "messages", given["messages"]))
    if "prompt" in given and "completion" in given:
        if isinstance(given["prompt"], list):  # a conversation, cut before its last answer
            both = [_messages(where, name, given[name]) for name in ("prompt", "completion")]
            return Record(where, messages=both[0] + both[1])
        return Record(
            where,
            _text(where, "prompt", given["prompt"])
            + _text(where, "completion", given["completion"]),
        )
    if "text" in given:
        return Record(where, _text(where, "text", given["text"]))
    if {"input_ids", "messages", "text"} & fields.keys() or {
        "prompt",
        "completion",
    } <= fields.keys():
        return Record(where)  # null: nothing to use, as with an empty text
    column = next((name for name, value in given.items() if isinstance(value, str)), "NAME")
    message = (
        f"{where}: no `text`, `messages`, `prompt` with `completion`, or `input_ids`; it has "
        f"{_listed(fields)}"
    )
    raise DataRefused(
        "E_DATA_FIELD",
        message,
        hint=f"say which field holds the text, for example --text-column {column}",
    )


def _text(where: str, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _bad_field(where, f"`{name}` is {_kind(value)}", "a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _bad_field(
            where,
            f"`{name}` has half of a surrogate pair at character {error.start + 1}",
            "Unicode text",
        ) from error
    return value


def _messages(where: str, name: str, value: Any) -> list[JsonDict]:
    if not isinstance(value, list) or not value:
        raise _bad_field(where, f"`{name}` is {_kind(value)}", "a list of messages")
    for number, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _bad_field(
                where,
                f"`{name}[{number}]` is no message",
                'an object such as {"role": "user", "content": "..."}',
            )
        if not isinstance(message.get("content"), str | list) and not message.get("tool_calls"):
            raise _bad_field(
                where, f"`{name}[{number}].content` is {_kind(message.get('content'))}", "a string"
            )
    return value


def _ids(where: str, ids: Any, mask: Any) -> list[int]:
    if not isinstance(ids, list):
        raise _bad_field(where, f"`input_ids` is {_kind(ids)}", "a list of token ids")
    for number, value in enumerate(ids):
        if type(value) is not int or value < 0:
            raise _bad_field(
                where,
                f"`input_ids[{number}]` is {json.dumps(value, default=str)[:40]}",
                "a whole number, 0 or more",
            )
    if mask is None:
        return ids
    if not isinstance(mask, list) or len(mask) != len(ids):
        raise _bad_field(
            where,
            "`attention_mask` does not go with `input_ids`",
            f"a list of {len(ids)} zeros and ones",
        )
    # padding must not enter the statistics
    return [value for value, kept in zip(ids, mask, strict=True) if kept]


_KINDS = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}


def _kind(value: Any) -> str:
    return "an empty list" if value == [] else _KINDS.get(type(value), type(value).__name__)


def _listed(fields: Json) -> str:
    names = [f"`{name}`" for name in islice(fields, 12)]
    return (
        ", ".join(names) + (f" and {len(fields) - 12} more" if len(fields) > 12 else "")
        or "no fields"
    )


def _bad_field(where: str, what: str, expected: str) -> DataRefused:
    hint = "correct the record, or name another field with --text-column"
    return DataRefused("E_DATA_FIELD", f"{where}: {what}; expected {expected}", hint=hint)

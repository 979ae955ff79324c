"""What counts in a record: the first that it has of ``input_ids``, the text column, ``messages``,
``prompt`` + ``completion``, ``text``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from qtool.calibration.sources import bad_line, rows
from qtool.calibration.spec import MIN_TOKENS, CalibrationSpec
from qtool.errors import DataRefused, nearest

PAIR = {"prompt", "completion"}
SHOWN_FIELDS = 12  # of a record, in a message


@dataclass(frozen=True, slots=True)
class Record:
    """What a record gives: ``ids``, or else ``messages``, or else ``text``."""

    where: str
    """File and line, for messages."""
    text: str = ""
    messages: Sequence[Mapping[str, object]] = ()
    ids: Sequence[int] | None = None
    is_rendered: bool = False
    """Whether ``text`` is from a chat template, which adds the special tokens itself."""

    @property
    def most_tokens(self) -> int:
        """A bound: tokenizers make at most one token of a byte.

        What a chat template adds is taken to be enough for a sample.
        """
        if self.ids is not None:
            return len(self.ids)
        if self.messages:
            return max(MIN_TOKENS, len(str(self.messages)))
        return len(self.text.strip().encode())


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


def _record(where: str, fields: object, text_column: str | None) -> Record:
    if not isinstance(fields, dict):
        raise bad_line(where, f"found {_kind(fields)}")
    given = {name: value for name, value in fields.items() if value is not None}
    if "input_ids" in given:
        return Record(where, ids=_ids(where, given["input_ids"], given.get("attention_mask")))
    if text_column:
        return _column(where, fields, text_column)
    if "messages" in given:
        return Record(where, messages=_messages(where, "messages", given["messages"]))
    if given.keys() >= PAIR:
        return _completed_prompt(where, given["prompt"], given["completion"])
    if "text" in given:
        return Record(where, _text(where, "text", given["text"]))
    if fields.keys() & {"input_ids", "messages", "text"} or fields.keys() >= PAIR:
        return Record(where)  # null: nothing to use, as with an empty text
    raise _no_known_field(where, fields)


def _column(where: str, fields: Mapping[str, object], text_column: str) -> Record:
    if text_column not in fields:
        raise DataRefused(
            "E_DATA_FIELD",
            f"{where}: no field `{text_column}`; it has {_listed(fields)}",
            hint=nearest(text_column, fields) or "give one of these as --text-column",
        )
    text = fields[text_column]
    return Record(where, _text(where, text_column, "" if text is None else text))


def _completed_prompt(where: str, prompt: object, completion: object) -> Record:
    if isinstance(prompt, list):  # a conversation, cut before its last answer
        start = _messages(where, "prompt", prompt)
        return Record(where, messages=start + _messages(where, "completion", completion))
    text = _text(where, "prompt", prompt) + _text(where, "completion", completion)
    return Record(where, text)


def _no_known_field(where: str, fields: Mapping[str, object]) -> DataRefused:
    column = next((name for name, value in fields.items() if isinstance(value, str)), "NAME")
    return DataRefused(
        "E_DATA_FIELD",
        f"{where}: no `text`, `messages`, `prompt` with `completion`, or `input_ids`; it has "
        f"{_listed(fields)}",
        hint=f"say which field holds the text, for example --text-column {column}",
    )


def _text(where: str, name: str, value: object) -> str:
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


def _messages(where: str, name: str, value: object) -> list[dict[str, object]]:
    if not isinstance(value, list) or not value:
        raise _bad_field(where, f"`{name}` is {_kind(value)}", "a list of messages")
    for number, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _bad_field(
                where,
                f"`{name}[{number}]` is not a message",
                'an object such as {"role": "user", "content": "..."}',
            )
        if not isinstance(message.get("content"), str | list) and not message.get("tool_calls"):
            raise _bad_field(
                where, f"`{name}[{number}].content` is {_kind(message.get('content'))}", "a string"
            )
    return value


def _ids(where: str, ids: object, mask: object) -> list[int]:
    if not isinstance(ids, list):
        raise _bad_field(where, f"`input_ids` is {_kind(ids)}", "a list of token ids")
    for number, value in enumerate(ids):
        if type(value) is not int or value < 0:
            shown = json.dumps(value, default=str)[:40]
            raise _bad_field(
                where, f"`input_ids[{number}]` is {shown}", "a whole number, 0 or more"
            )
    if mask is None:
        return ids
    if not isinstance(mask, list) or len(mask) != len(ids):
        expected = f"a list of {len(ids)} zeros and ones"
        raise _bad_field(where, "`attention_mask` does not go with `input_ids`", expected)
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


def _kind(value: object) -> str:
    return "an empty list" if value == [] else _KINDS.get(type(value), type(value).__name__)


def _listed(fields: Mapping[str, object]) -> str:
    if not fields:
        return "no fields"
    names = ", ".join(f"`{name}`" for name in islice(fields, SHOWN_FIELDS))
    left = len(fields) - SHOWN_FIELDS
    return f"{names} and {left} more" if left > 0 else names


def _bad_field(where: str, what: str, expected: str) -> DataRefused:
    hint = "correct the record, or name another field with --text-column"
    return DataRefused("E_DATA_FIELD", f"{where}: {what}; expected {expected}", hint=hint)

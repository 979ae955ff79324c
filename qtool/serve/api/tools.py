"""Tools of the OpenAI chat API: what a request may call, the schema that forces a call, and the
calls in what a model writes.

Styles of calls in text, and what SGLang and vLLM call them: `STYLES`. A parser takes the text in
pieces, however they are cut, and gives out content and calls as they become certain; the work is
linear in the text. What it does where the engines of the field differ:

- Arguments are the model's own JSON text, given out as it comes; nothing is re-encoded. So a call
whose arguments turn out broken, or cut off
  by the length limit, after some of them were given out stays a call with what there is of them, as
  OpenAI warns its clients.
- A call that was given out in no part (no name, no arguments, cut off before them) is content,
marker included, exactly as the model wrote it.
- A marked call is given out whatever the function's name: the client knows how to answer a call of
a tool that it does not have. JSON without
  a marker (Llama) is a call only of a tool that exists, because a model may be asked to answer in
  JSON.
- White space between content and calls is dropped: before the first call, between calls, after the
last. Text without calls comes out unchanged.
"""

from __future__ import annotations

import json
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Any, Literal, Protocol, TypeVar

from qtool.errors import UsageError, nearest

MAX_TOOLS = 128  # OpenAI's limit
MAX_NAME = 64

# Names of `--tool-call-parser` -> style. hermes, llama3_json, llama4_json are vLLM's; hermes, qwen,
# qwen25, llama3 SGLang's.
STYLES = {
    "hermes": "hermes",
    "qwen": "hermes",
    "qwen25": "hermes",
    "qwen3": "hermes",
    "llama3": "llama3_json",
    "llama3_json": "llama3_json",
    "llama4_json": "llama3_json",
}

# documented without the dot; OpenAI's own check has it
_NAME = re.compile(rf"[A-Za-z0-9_.-]{{1,{MAX_NAME}}}")
_JSON_ARGUMENTS = re.compile(r"\\?\"arguments\\?\"")
# Qwen3-Coder, GLM: Hermes' marker around what is not JSON
_XML_ARGUMENTS = re.compile(r"<function=|<arg_key>")
_LLAMA_FORMAT = re.compile(r'\{\\?"name\\?": function name, \\?"parameters\\?": ')


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A piece of call number ``index``, as OpenAI streams it: ``id`` and ``name`` in the first
    piece, ``arguments`` in all.
    """

    index: int
    id: str | None
    name: str | None
    arguments: str


@dataclass(frozen=True, slots=True)
class Delta:
    """What became certain with one more piece of text."""

    content: str
    calls: tuple[CallDelta, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """What a request lets the model call.

    ``tools`` are those it may call, in OpenAI's shape: the ones to show to the template.
    """

    mode: Literal["none", "auto", "required", "named"]
    tools: tuple[Mapping[str, Any], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the functions it may call."""
        return tuple(tool["function"]["name"] for tool in self.tools)


class ToolParser(Protocol):
    """Text in, content and calls out. One for each answer."""

    def push(self, text: str) -> Delta:
        """Take the next piece of text; what may be the beginning of a call or a marker is kept
        back.
        """

    def finish(self) -> Delta:
        """Say that the text has ended, and get what was kept back."""

    @property
    def called(self) -> bool:
        """Whether a call was given out: `finish_reason` is then ``tool_calls``."""


# What a request asks for


def style_named(name: str) -> str:
    """Return the style that a flag's value names. Raises UsageError for another name."""
    if name not in STYLES:
        raise UsageError(
            "E_TOOLS",
            f"unknown tool call parser `{name}`",
            hint=nearest(name, STYLES) or f"known are {', '.join(STYLES)}",
        )
    return STYLES[name]


def detect(template: str | None) -> str | None:
    """Return the style of calls that a chat template teaches the model, None when it teaches none
    that we read.
    """
    if template is None:
        return None
    if (
        "<tool_call>" in template
        and _JSON_ARGUMENTS.search(template)
        and not _XML_ARGUMENTS.search(template)
    ):
        return "hermes"
    return "llama3_json" if _LLAMA_FORMAT.search(template) else None


def choose(
    tools: Sequence[Mapping[str, Any]] | None, tool_choice: str | Mapping[str, Any] | None
) -> Choice:
    """Return what ``tool_choice`` means for these tools; both are a request's fields, of OpenAI's
    shape.

    Left out, it is ``auto`` where there are tools. Allowed tools become the only ones.
    Raises: UsageError, for tools that cannot be called by name and for a choice of what is not
        there.
    """
    tools = tuple(tools or ())
    _check_names(tools)
    if tool_choice is None:
        tool_choice = "auto"
    if isinstance(tool_choice, str):
        return _choose(tool_choice, tools)
    if tool_choice["type"] == "allowed_tools":
        allowed = tool_choice["allowed_tools"]
        return _choose(
            allowed["mode"], _named([tool["function"]["name"] for tool in allowed["tools"]], tools)
        )
    return Choice("named", _named([tool_choice["function"]["name"]], tools))


def schema_for(choice: Choice, *, parallel: bool = True) -> dict[str, Any] | None:
    """Return the JSON schema of an answer that is nothing but the call asked for; None when the
    model may answer freely.

    A named function: its arguments. Required: an array of ``{"name", "parameters"}``, of one when
        not ``parallel``.
    Raises: UsageError, when a schema is nested too deeply to copy.
    """
    if choice.mode == "named":
        return dict(_parameters(choice.tools[0]))
    if choice.mode != "required":
        return None
    try:
        # A schema's own references are from its root, which is now below `$defs`; no escapes, names
        # have neither / nor ~.
        definitions = {
            name: _rebase(_parameters(tool), f"#/$defs/{name}")
            for name, tool in zip(choice.names, choice.tools, strict=True)
        }
    except RecursionError as error:
        raise UsageError(
            "E_TOOLS", "the parameters of a tool are nested too deeply", hint="use $defs and $ref"
        ) from error
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "parameters": {"$ref": f"#/$defs/{name}"}},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for name in choice.names
    ]
    schema = {"type": "array", "minItems": 1, "items": {"anyOf": calls}, "$defs": definitions}
    return schema if parallel else {**schema, "maxItems": 1}


def parser_for(choice: Choice, style: str | None) -> ToolParser | None:
    """Return the parser of one answer: of what `schema_for` makes of it, or of a free one in
    ``style``; None when all of it is content.
    """
    if choice.mode == "named":
        return NamedParser(choice.names[0])
    if choice.mode == "required":
        return RequiredParser()
    return make_parser(style, choice.names) if choice.mode == "auto" and style is not None else None


def make_parser(style: str, tool_names: Iterable[str]) -> ToolParser:
    """Return a parser of free answers in ``style``, one of the values of `STYLES`."""
    return HermesParser() if style == "hermes" else LlamaParser(tool_names)


def fold(deltas: Iterable[Delta]) -> tuple[str | None, list[dict[str, Any]]]:
    """Return the content and, in OpenAI's shape, the calls of a whole answer; content is None when
    there are calls and nothing else.
    """
    deltas = list(deltas)
    calls = [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in _joined(call for delta in deltas for call in delta.calls)
    ]
    return "".join(delta.content for delta in deltas) or (None if calls else ""), calls


def for_template(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return copies of a request's messages as chat templates expect them, which is as vLLM gives
    them.

    Arguments of calls are mappings; what is no JSON object becomes an empty one: the templates fail
    on anything else, and a conversation with one broken call in it could not go on. Content is a
    string, text parts joined by line breaks, empty when there is none, and fields without a value
    are left out, because templates ask whether ``tool_calls`` is there.
    """
    return [_for_template(message) for message in messages]


# Parsers


class NamedParser:
    """An answer that is, by its schema, the arguments of one function and nothing else."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.called = False

    def push(self, text: str) -> Delta:
        """Take the next piece of the arguments; the first gives out the name as well."""
        if not text:
            return Delta("", ())
        first, self.called = not self.called, True
        return Delta(
            "", (CallDelta(0, _new_id() if first else None, self._name if first else None, text),)
        )

    def finish(self) -> Delta:
        """Nothing is kept back."""
        return Delta("", ())


_T = TypeVar("_T")
_Reading = Generator[None, None, _T]  # yields when it needs more text, returns what it read

_SPACE = re.compile(r"[ \t\r\n]+")
_ANY = re.compile(r".", re.DOTALL)
_REST = re.compile(r".+", re.DOTALL)
_NO_MARKER = re.compile(r"[^<]+")
_IN_STRING = re.compile(r'[^"\\]+')
_IN_VALUE = re.compile(r'[^"{}\[\]<]+')
_SCALAR = re.compile(r'[^\s",:{}\[\]<]+')
_ARGUMENTS = ("arguments", "parameters")
_KEYS = ("name", *_ARGUMENTS, "type")  # Llama also writes "type": "function"


class _CallReader(ABC):
    """Reads text in pieces by a generator, `_read`, that waits where the piece ends; what it reads
    is held until it knows what it is.

    Each character is read once: JSON is followed by its quotes and brackets, not parsed again with
    each piece.
    """

    def __init__(self) -> None:
        self._piece, self._at, self._ended = "", 0, False
        self._held: list[str] = []  # read, and not known to be content or call
        self._space: list[
            str
        ] = []  # white space of content, dropped when calls are all that follows
        self._content: list[str] = []
        self._deltas: list[CallDelta] = []
        self._calls = 0
        self._spoke = False
        self._reading = self._read()
        next(self._reading)

    @abstractmethod
    def _read(self) -> _Reading[None]:
        """Read the whole answer."""

    @property
    def called(self) -> bool:
        """Whether a call was given out."""
        return self._calls > 0

    def push(self, text: str) -> Delta:
        """Take the next piece of text; what may be the beginning of a call or a marker is kept
        back.
        """
        self._piece, self._at = text, 0
        next(self._reading)
        return self._delta()

    def finish(self) -> Delta:
        """Say that the text has ended, and get what was kept back."""
        self._piece, self._at, self._ended = "", 0, True
        for _ in self._reading:
            pass
        if not self._calls:
            self._content += self._space
            self._space.clear()
        return self._delta()

    def _delta(self) -> Delta:
        delta = Delta("".join(self._content), _joined(self._deltas))
        self._content.clear()
        self._deltas.clear()
        return delta

    # What is held becomes content, part of a call, or nothing

    def _give_content(self) -> None:
        text = "".join(self._held)
        self._held.clear()
        solid = text.rstrip()
        if solid:
            whole = "".join((*self._space, solid))
            self._content.append(whole if self._spoke or not self._calls else whole.lstrip())
            self._space.clear()
            self._spoke = True
        self._space.append(text[len(solid) :])

    def _begin_call(self, name: str) -> None:
        self._deltas.append(CallDelta(self._calls, _new_id(), name, ""))
        self._calls += 1

    def _give_arguments(self, text: str) -> None:
        self._held.clear()
        self._deltas.append(CallDelta(self._calls - 1, None, None, text))

    # Reading

    def _peek(self) -> _Reading[str]:
        """The next character, empty at the end of the text."""
        while self._at == len(self._piece):
            if self._ended:
                return ""
            yield
        return self._piece[self._at]

    def _take(self, pattern: re.Pattern[str] = _ANY) -> str:
        """What matches at this place of the piece, and is held from here on; the next piece may go
        on with it.
        """
        match = pattern.match(self._piece, self._at)
        text = match.group() if match else ""
        self._at += len(text)
        self._held.append(text)
        return text

    def _take_space(self) -> _Reading[None]:
        while (char := (yield from self._peek())) and char in " \t\r\n":
            self._take(_SPACE)

    def _take_char(self, wanted: str) -> _Reading[bool]:
        """White space and then this character, if it is the next."""
        yield from self._take_space()
        found = (yield from self._peek()) == wanted
        if found:
            self._take()
        return found

    def _take_marker(self, *markers: str) -> _Reading[str]:
        """The marker that stands here, or empty when none does; what it has in common with one is
        held.

        Only their first character is ``<``.
        """
        seen = ""
        while char := (yield from self._peek()):
            if not any(marker.startswith(seen + char) for marker in markers):
                return ""
            seen += self._take()
            if seen in markers:
                return seen
        return ""

    def _take_string(self, give: Callable[[str], object]) -> _Reading[bool]:
        """The JSON string that begins here, in pieces; False when it does not end."""
        give(self._take())
        while char := (yield from self._peek()):
            if char == '"':
                give(self._take())
                return True
            if char == "\\":
                give(self._take())
                if (yield from self._peek()):
                    give(self._take())
            else:
                give(self._take(_IN_STRING))
        return False

    def _take_name(self) -> _Reading[str | None]:
        """White space and then a JSON string, decoded; None when there is none, or it stands for no
        text.
        """
        yield from self._take_space()
        raw: list[str] = []
        if (yield from self._peek()) != '"' or not (yield from self._take_string(raw.append)):
            return None
        try:
            name: str = json.loads("".join(raw))
            name.encode()  # a lone surrogate is no character
        except ValueError:
            return None
        return name

    def _take_value(self, give: Callable[[str], object]) -> _Reading[bool]:
        """The JSON value that begins here, in pieces; False when it breaks off.

        A ``<`` outside of strings ends it: that is a marker.
        """
        depth = 0
        while (char := (yield from self._peek())) and char != "<":
            if char == '"':
                if not (yield from self._take_string(give)):
                    return False
            elif char in "{[":
                depth += 1
                give(self._take())
            elif depth and char in "}]":
                depth -= 1
                give(self._take())
            elif depth:
                give(self._take(_IN_VALUE))
            else:
                return (yield from self._take_scalar(give))
            if not depth:
                return True
        return False

    def _take_scalar(self, give: Callable[[str], object]) -> _Reading[bool]:
        found = False
        while (yield from self._peek()) and (text := self._take(_SCALAR)):
            give(text)
            found = True
        return found

    def _take_call(self, known: Collection[str] | None = None) -> _Reading[bool]:
        """A JSON object of a name and arguments, in any order. True when it, or what there is of
        it, was given out as a call.

        ``known``: the only names and keys that make it a call. None: it is meant as one, so other
            keys are passed over and none are needed.
        """
        name: str | None = None
        arguments: list[str] | None = None  # what was read of them before the name
        more = yield from self._take_char("{")
        while more:
            key = yield from self._take_name()
            if (
                key is None
                or (known is not None and key not in _KEYS)
                or not (yield from self._take_char(":"))
            ):
                break
            yield from self._take_space()
            if key == "name" and name is None:
                name = yield from self._take_name()
                if not name or (known is not None and name not in known):
                    return False
                if arguments is not None:
                    self._begin_call(name)
                    self._give_arguments("".join(arguments))
            elif key in _ARGUMENTS and arguments is None:
                first = yield from self._peek()
                if not first or first in "<,:}]":
                    break
                arguments = []
                if name is not None:
                    self._begin_call(name)
                if not (
                    yield from self._take_value(
                        arguments.append if name is None else self._give_arguments
                    )
                ):
                    break
            elif not (yield from self._take_value(_ignore)):
                break
            more = yield from self._take_char(",")
            if (
                not more
                and (yield from self._take_char("}"))
                and name
                and arguments is None
                and known is None
            ):
                self._begin_call(name)
                self._give_arguments("{}")
                return True
        return name is not None and arguments is not None


class HermesParser(_CallReader):
    """Calls between ``<tool_call>`` and ``</tool_call>``, content around them.

    An end that is missing is not missed.
    """

    def _read(self) -> _Reading[None]:
        called = False  # in a call that was given out, its end still to come
        while char := (yield from self._peek()):
            if char != "<":
                self._take(_NO_MARKER)
                self._give_content()
                continue
            marker = yield from self._take_marker("<tool_call>", "</tool_call>")
            if marker == "</tool_call>" and called:
                called = False
                self._held.clear()
                continue
            if marker == "<tool_call>":
                yield from self._take_space()
                called = yield from self._take_call()
            if marker == "<tool_call>" and called:
                self._held.clear()
            else:
                self._give_content()


class LlamaParser(_CallReader):
    """Calls that are the whole answer, separated by ``;`` or white space; or that follow
    ``<|python_tag|>``, with or without content before.
    """

    def __init__(self, tool_names: Iterable[str]) -> None:
        self._names = frozenset(tool_names)
        super().__init__()

    def _read(self) -> _Reading[None]:
        bare = True  # a call may begin here without a marker: at the start, or after another call
        while char := (yield from self._peek()):
            if bare:
                if self._calls:
                    yield from self._take_char(";")
                yield from self._take_space()
                char = yield from self._peek()
                if self._calls and not char:
                    self._held.clear()
            marked = char == "<" and bool((yield from self._take_marker("<|python_tag|>")))
            if marked:
                yield from self._take_space()
            bare = (marked or (bare and char == "{")) and (
                yield from self._take_call(None if marked else self._names)
            )
            if bare:
                self._held.clear()
            else:
                self._give_content()
                self._take(_NO_MARKER)
                self._give_content()


class RequiredParser(_CallReader):
    """The array of calls that `schema_for` makes of an answer that must call."""

    def _read(self) -> _Reading[None]:
        more = yield from self._take_char("[")
        while more and (yield from self._take_call()):
            more = yield from self._take_char(",")
            if not more:
                yield from self._take_char("]")
            self._held.clear()
        while (yield from self._peek()):
            self._take(_REST)
        self._give_content()


# Details


def _new_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _joined(pieces: Iterable[CallDelta]) -> tuple[CallDelta, ...]:
    """Pieces that follow one another in the same call, as one."""
    calls = []
    for index, group in groupby(pieces, attrgetter("index")):
        first, *rest = group
        calls.append(
            CallDelta(
                index, first.id, first.name, "".join(piece.arguments for piece in (first, *rest))
            )
        )
    return tuple(calls)


def _ignore(text: str) -> None:
    """Takes the pieces of a value that nobody asks for; they stay held."""


def _check_names(tools: Sequence[Mapping[str, Any]]) -> None:
    if len(tools) > MAX_TOOLS:
        raise UsageError(
            "E_TOOLS",
            f"{len(tools)} tools in one request, at most {MAX_TOOLS} are taken",
            hint="send those the model may need now",
        )
    seen = set()
    for position, tool in enumerate(tools):
        name = tool["function"]["name"]
        if not _NAME.fullmatch(name):
            message = f"tools[{position}].function.name {name[: MAX_NAME + 1]!r} is not a name"
            raise UsageError(
                "E_TOOLS",
                message,
                hint=f"1 to {MAX_NAME} of the characters a-z, A-Z, 0-9, _, - and .",
            )
        if name in seen:
            raise UsageError(
                "E_TOOLS",
                f"tools[{position}].function.name `{name}` is there twice",
                hint="give each function a name of its own",
            )
        seen.add(name)


def _choose(mode: str, tools: tuple[Mapping[str, Any], ...]) -> Choice:
    if mode == "required":
        if not tools:
            raise UsageError(
                "E_TOOLS",
                'tool_choice is "required" and there are no tools',
                hint="send `tools`, or leave tool_choice out",
            )
        return Choice("required", tools)
    if mode not in ("auto", "none"):
        raise UsageError(
            "E_TOOLS",
            f"unknown tool_choice {mode!r}",
            hint='"none", "auto", "required" or one function by name',
        )
    return Choice("auto", tools) if mode == "auto" and tools else Choice("none", ())


def _named(
    names: Iterable[str], tools: Sequence[Mapping[str, Any]]
) -> tuple[Mapping[str, Any], ...]:
    by_name = {tool["function"]["name"]: tool for tool in tools}
    for name in (names := dict.fromkeys(names)):
        if name not in by_name:
            hint = nearest(name, by_name) or (
                "the tools are " + ", ".join(list(by_name)[:8]) if by_name else "send `tools`"
            )
            raise UsageError(
                "E_TOOLS",
                f"tool_choice names {name[: MAX_NAME + 1]!r}, which is not among the tools",
                hint=hint,
            )
    return tuple(by_name[name] for name in names)


def _parameters(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of a function's arguments; left out, it takes none (OpenAI's reference)."""
    return tool["function"].get("parameters") or {"type": "object", "properties": {}}


_SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_DATA = ("const", "enum", "default", "examples")


def _rebase(schema: Any, root: str) -> Any:
    """Copy a JSON schema so that its references into itself go through ``root``, the place it will
    have in a larger one.
    """
    if isinstance(schema, list):
        return [_rebase(item, root) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    copy: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str) and value.startswith("#"):
            copy[key] = root + value[1:]
        elif key in _SCHEMAS_BY_NAME and isinstance(value, Mapping):
            copy[key] = {name: _rebase(part, root) for name, part in value.items()}
        else:
            copy[key] = value if key in _DATA else _rebase(value, root)
    return copy


def _for_template(message: Mapping[str, Any]) -> dict[str, Any]:
    copy = {key: value for key, value in message.items() if value is not None}
    content = copy.get("content", "")
    copy["content"] = (
        content
        if isinstance(content, str)
        else "\n".join(part.get("text") or part.get("refusal") or "" for part in content)
    )
    calls = copy.pop("tool_calls", None)
    if calls:
        copy["tool_calls"] = [
            {
                **call,
                "function": {
                    **call["function"],
                    "arguments": _mapping(call["function"].get("arguments")),
                },
            }
            for call in calls
        ]
    return copy


def _mapping(arguments: Any) -> dict[str, Any]:
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return {}
    return arguments if isinstance(arguments, dict) else {}

"""`POST /v1/messages`: what a chat replies in Anthropic's shape, whole or streamed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Iterator
from typing import NamedTuple

import msgspec
from msgspec import UNSET
from starlette.responses import Response

from qtool.engine.outputs import CompletionOutput, FinishInfo
from qtool.errors import UsageError
from qtool.serve.api.answer_reader import AnswerReader, read_whole
from qtool.serve.api.answering import FIRST_EVENT_S, Reply, named_event
from qtool.serve.api.chat import Chat, count_prompt_tokens, run_chat
from qtool.serve.api.fields import Json
from qtool.serve.api.messages.protocol import MessagesRequest
from qtool.serve.api.messages.request import chat_request
from qtool.serve.api.messages.schemas import (
    AnthropicMessage,
    Content,
    MessageBlockDelta,
    MessageBlockStart,
    MessageBlockStop,
    MessageDelta,
    MessageEvent,
    MessageInputDelta,
    MessageOutputTokens,
    MessageSignatureDelta,
    MessageStart,
    MessageStop,
    MessageText,
    MessageTextDelta,
    MessageThinking,
    MessageThinkingDelta,
    MessageToolUse,
    MessageUsage,
    Ping,
    StopInfo,
    StopReason,
)
from qtool.serve.api.replies import finish_reason
from qtool.serve.api.sealed_thoughts import MARK, seal
from qtool.serve.api.tools.deltas import CallDelta, Delta
from qtool.serve.backend.engine_client import OutputStream
from qtool.serve.http.errors import ANTHROPIC_PATH, error_body, error_detail, status_of
from qtool.serve.service import Service
from qtool.serve.turns import current_origin, name_request

INVALID_INPUT = "INVALID_JSON"
"""The key of an input that is not a JSON object, as Anthropic proposes."""


async def answer_message(service: Service, body: MessagesRequest) -> Response:
    """Answer ``body``. Raises: UsageError, ModelNotFound, Busy."""
    rid = name_request(service.new_id("msg_"))
    chat = await service.threads.run(
        current_origin().body_bytes, chat_request, body, rid, service.templates.text
    )
    shows = not (body.thinking and body.thinking.display == "omitted")

    def make_reply(chat: Chat) -> Reply:
        _check_room(service, chat.prompt_tokens)
        return _MessageReply(chat, shows_thoughts=shows)

    return await run_chat(service, chat, make_reply, rid=rid, kind="messages", fits_answer=True)


async def count_tokens(service: Service, body: MessagesRequest) -> int:
    """Return the tokens of the prompt of ``body``. Raises: UsageError, ModelNotFound."""
    rid = service.new_id("msg_")
    chat = await service.threads.run(
        current_origin().body_bytes, chat_request, body, rid, service.templates.text
    )
    return await count_prompt_tokens(service, chat)


def _check_room(service: Service, prompt_tokens: int) -> None:
    """Raise: UsageError in the words by which Claude Code knows that it has to compact, if no
    token fits after the prompt.
    """
    most = service.info.context_length - 1
    if prompt_tokens > most:
        raise UsageError(
            "E_TOO_LONG",
            f"prompt is too long: {prompt_tokens} tokens > {most} maximum",
            hint="shorten the prompt",
        )


class _Stop(NamedTuple):
    reason: StopReason
    sequence: str | None


class _MessageReply(Reply):
    """The reply to one request."""

    def __init__(self, chat: Chat, *, shows_thoughts: bool) -> None:
        self._chat = chat
        self._account = chat.account
        self._shows_thoughts = shows_thoughts
        self._reader = AnswerReader(chat.form)
        self._blocks = _Blocks(shows_thoughts)

    def whole(self, outputs: list[CompletionOutput]) -> AnthropicMessage:
        """Return the reply as one object."""
        [output] = outputs
        assert output.finish is not None
        self._account.note(output, 1)
        whole = read_whole(self._chat.form, output.text)
        content: list[Content] = []
        if whole.reasoning:
            content.append(_thinking(whole.reasoning, self._shows_thoughts))
        if whole.content:
            content.append(MessageText(whole.content))
        for call in whole.calls:
            function = call.function
            content.append(MessageToolUse(call.id, function.name, tool_input(function.arguments)))
        return self._message(content, self._stop(output.finish, called=bool(whole.calls)))

    async def events(self, stream: OutputStream) -> AsyncGenerator[bytes, None]:
        """Yield the reply as events: the message without content, its blocks, why it ended."""
        await stream.wait(FIRST_EVENT_S)
        yield _join([MessageStart(self._message([], None)), Ping()])
        async for outputs in stream:
            for output in outputs:
                self._account.note(output, 1)
                if events := _join(self._events_of(output)):
                    yield events

    def waiting(self) -> bytes:
        """Return an event that says nothing."""
        return _join([Ping()])

    def failure(self, error: Exception) -> bytes:
        """Return the event that ends a stream because of ``error``."""
        body = error_body(ANTHROPIC_PATH, status_of(error), error_detail(error))
        return named_event("error", body)

    def close(self) -> None:
        """Record what the request used."""
        self._account.close(self._chat.rid)

    def _events_of(self, output: CompletionOutput) -> Iterator[MessageEvent]:
        yield from self._blocks.add(self._reader.push(output.text))
        if output.finish is None:
            return
        yield from self._blocks.add(self._reader.finish())
        yield from self._blocks.close()
        stop = self._stop(output.finish, called=self._reader.called)
        yield MessageDelta(StopInfo(stop.reason, stop.sequence), self._usage())
        yield MessageStop()

    def _message(self, content: list[Content], stop: _Stop | None) -> AnthropicMessage:
        return AnthropicMessage(
            id=self._chat.rid,
            model=self._chat.model,
            content=content,
            stop_reason=stop and stop.reason,
            stop_sequence=stop and stop.sequence,
            usage=self._usage(),
        )

    def _stop(self, finish: FinishInfo, *, called: bool) -> _Stop:
        """Return why the answer ended; one that was aborted ends like one that is cut off."""
        matched = finish.reason.get("matched")
        if finish_reason(finish) == "stop":
            if called:
                return _Stop("tool_use", None)
            if isinstance(matched, str):
                return _Stop("stop_sequence", matched)
            return _Stop("end_turn", None)
        most = self._chat.body.max_tokens
        room = self._chat.service.info.context_length - self._chat.prompt_tokens
        if finish_reason(finish) == "length" and (most is None or room < most):
            return _Stop("model_context_window_exceeded", None)
        return _Stop("max_tokens", None)

    def _usage(self) -> MessageUsage:
        usage = self._account.usage()
        cached = usage.prompt_tokens_details.cached_tokens
        thinking = self._account.reasoning_tokens
        return MessageUsage(
            input_tokens=usage.prompt_tokens - cached,
            output_tokens=usage.completion_tokens,
            cache_read_input_tokens=cached,
            output_tokens_details=UNSET if thinking is None else MessageOutputTokens(thinking),
        )


class _Blocks:
    """The blocks of a streamed message, which come one after the other."""

    def __init__(self, shows_thoughts: bool) -> None:
        self._shows_thoughts = shows_thoughts
        self._index = -1
        self._open: str | int | None = None
        """``thinking``, ``text``, or the number of a call."""
        self._thoughts: list[str] = []
        """Those that are not shown."""

    def add(self, delta: Delta) -> Iterator[MessageEvent]:
        """Yield the events for ``delta``."""
        if delta.reasoning:
            yield from self._start("thinking", MessageThinking("", ""))
            if self._shows_thoughts:
                yield MessageBlockDelta(self._index, MessageThinkingDelta(delta.reasoning))
            else:
                self._thoughts.append(delta.reasoning)
        if delta.content:
            yield from self._start("text", MessageText(""))
            yield MessageBlockDelta(self._index, MessageTextDelta(delta.content))
        for call in delta.calls:
            yield from self._start(call.index, _tool_use(call))
            if call.arguments:
                yield MessageBlockDelta(self._index, MessageInputDelta(call.arguments))

    def close(self) -> Iterator[MessageEvent]:
        """Yield the events that end the block that is open, if one is."""
        if self._open is None:
            return
        if self._open == "thinking":
            signature = _signature("".join(self._thoughts), self._shows_thoughts)
            yield MessageBlockDelta(self._index, MessageSignatureDelta(signature))
            self._thoughts.clear()
        yield MessageBlockStop(self._index)
        self._open = None

    def _start(self, block: str | int, content: Content) -> Iterator[MessageEvent]:
        if self._open == block:
            return
        yield from self.close()
        self._open = block
        self._index += 1
        yield MessageBlockStart(self._index, content)


def _join(events: Iterable[MessageEvent]) -> bytes:
    return b"".join(named_event(_tag(event), event) for event in events)


def _tag(event: MessageEvent) -> str:
    tag = event.__struct_config__.tag
    assert isinstance(tag, str)
    return tag


def _thinking(thoughts: str, shows_thoughts: bool) -> MessageThinking:
    return MessageThinking(thoughts if shows_thoughts else "", _signature(thoughts, shows_thoughts))


def _signature(thoughts: str, shows_thoughts: bool) -> str:
    """Return a signature, which clients ask for; it holds the thoughts if nothing else does."""
    return MARK if shows_thoughts else seal(thoughts)


def _tool_use(call: CallDelta) -> MessageToolUse:
    return MessageToolUse(call.id or "", call.name or "", {})


def tool_input(arguments: str) -> Json:
    """Return the ``arguments`` of a call as an object.

    An answer that is cut off, or a model that errs, may leave something else: it is given under
    `INVALID_INPUT`, so that nothing is lost.
    """
    try:
        value = msgspec.json.decode(arguments or "{}")
        if isinstance(value, str):  # some models write the object as a text
            value = msgspec.json.decode(value)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {INVALID_INPUT: arguments}

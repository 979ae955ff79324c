"""`POST /v1/chat/completions`: what a chat replies in OpenAI's shape, whole or streamed."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator

from msgspec import UNSET
from starlette.responses import Response

from qtool.engine.outputs import CompletionOutput
from qtool.serve.api.answer_reader import AnswerReader, read_whole
from qtool.serve.api.answering import DONE, Reply, event
from qtool.serve.api.chat import Chat, run_chat
from qtool.serve.api.protocol import ChatRequest
from qtool.serve.api.replies import StreamUsage, chat_logprobs, finish_reason
from qtool.serve.api.schemas import (
    Answer,
    CalledPart,
    CallPart,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Delta,
    FinishReason,
    Usage,
)
from qtool.serve.api.tools import deltas
from qtool.serve.api.tools.deltas import CallDelta
from qtool.serve.backend.engine_client import OutputStream
from qtool.serve.service import Service
from qtool.serve.turns import name_request


async def chat(service: Service, body: ChatRequest) -> Response:
    """Answer ``body``. Raises: UsageError, ModelNotFound, Busy."""
    rid = name_request(body.rid or service.new_id("chatcmpl-"))
    return await run_chat(service, body, _ChatReply, rid=rid)


class _ChatReply(Reply):
    """The reply to one request."""

    def __init__(self, chat: Chat) -> None:
        self._service = chat.service
        self._body = chat.body
        self._id = chat.rid
        self._account = chat.account
        self._form = chat.form
        self._model = chat.model
        self._created = int(time.time())
        self._stream_usage = StreamUsage(chat.body.stream_options, chat.account)
        self._readers: dict[int, AnswerReader] = {}
        """Of a streamed reply, by choice."""

    def whole(self, outputs: list[CompletionOutput]) -> ChatCompletion:
        """Return the reply as one object."""
        for output in outputs:
            self._account.note(output, len(outputs))
        return ChatCompletion(
            id=self._id,
            object="chat.completion",
            created=self._created,
            model=self._model,
            choices=[self._whole_choice(output) for output in outputs],
            usage=self._account.usage(),
        )

    def close(self) -> None:
        """Record what the request used."""
        self._account.close(self._id)

    async def events(self, stream: OutputStream) -> AsyncGenerator[bytes, None]:
        """Yield the reply as events: the role of each choice, its text and calls, why it ended, and
        at last the usage.
        """
        each = self._body.n or 1
        async for outputs in stream:
            events = []
            for output in outputs:
                if output.index not in self._readers:
                    self._readers[output.index] = AnswerReader(self._form)
                    role = Delta(role="assistant", content="")
                    events.append(event(self._chunk(_chunk_choice(output.index, role))))
                self._account.note(output, each)
                events += [event(self._chunk(choice)) for choice in self._chunk_choices(output)]
            if events:
                yield b"".join(events)
        if self._stream_usage.at_end:
            yield event(self._chunk(usage=self._account.usage()))
        yield DONE

    def _whole_choice(self, output: CompletionOutput) -> ChatChoice:
        assert output.finish is not None
        whole = read_whole(self._form, output.text)
        message = Answer(
            role="assistant",
            content=whole.content,
            reasoning_content=whole.reasoning,
            reasoning=whole.reasoning,
        )
        reason: FinishReason = finish_reason(output.finish)
        if whole.calls:
            message.tool_calls = whole.calls
            reason = "tool_calls" if reason == "stop" else reason
        return ChatChoice(
            index=output.index,
            message=message,
            logprobs=self._logprobs(output),
            finish_reason=reason,
            matched_stop=output.finish.reason.get("matched"),
        )

    def _chunk(self, *choices: ChatChunkChoice, usage: Usage | None = None) -> ChatChunk:
        return ChatChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._model,
            choices=list(choices),
            usage=self._stream_usage.of_chunk() if usage is None else usage,
        )

    def _chunk_choices(self, output: CompletionOutput) -> Iterator[ChatChunkChoice]:
        """Yield what ``output`` adds to its choice: deltas, the reason for its end."""
        index = output.index
        reader = self._readers[index]
        for number, delta in enumerate(self._deltas(output, reader)):
            logprobs = self._logprobs(output) if number == 0 else None
            yield _chunk_choice(index, delta, logprobs)
        if output.finish is not None:
            reason: FinishReason = finish_reason(output.finish)
            if reader.called and reason == "stop":
                reason = "tool_calls"
            yield ChatChunkChoice(
                index,
                Delta(),
                logprobs=None,
                finish_reason=reason,
                matched_stop=output.finish.reason.get("matched"),
            )

    def _deltas(self, output: CompletionOutput, reader: AnswerReader) -> list[Delta]:
        found = _delta_parts(reader.push(output.text))
        if output.finish is not None:
            found += _delta_parts(reader.finish())
        return found or ([Delta(content="")] if self._body.logprobs and output.logprobs else [])

    def _logprobs(self, output: CompletionOutput) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        return chat_logprobs(output, self._service.vocabulary)


def _chunk_choice(
    index: int, delta: Delta, logprobs: ChatLogprobs | None = None
) -> ChatChunkChoice:
    return ChatChunkChoice(index, delta, logprobs, finish_reason=None)


def _delta_parts(delta: deltas.Delta) -> list[Delta]:
    """Return ``delta`` as OpenAI's, each with one thing: reasoning, content or a piece of a
    call.
    """
    found = []
    if delta.reasoning:
        found.append(Delta(reasoning_content=delta.reasoning, reasoning=delta.reasoning))
    if delta.content:
        found.append(Delta(content=delta.content))
    return found + [Delta(tool_calls=[_call_part(call)]) for call in delta.calls]


def _call_part(call: CallDelta) -> CallPart:
    function = CalledPart(name=call.name or UNSET, arguments=call.arguments)
    if call.id is None:
        return CallPart(index=call.index, function=function)
    return CallPart(index=call.index, id=call.id, type="function", function=function)

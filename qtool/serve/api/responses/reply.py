"""`POST /v1/responses`: what a chat replies as OpenAI's responses, whole or streamed."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncGenerator, Iterable, Iterator
from typing import Literal

from msgspec.structs import replace
from pydantic import BaseModel
from starlette.responses import Response

from qtool.engine.outputs import CompletionOutput, FinishInfo
from qtool.serve.api.answer_reader import AnswerReader
from qtool.serve.api.answering import FIRST_EVENT_S, LOGPROB_BYTES, Reply, named_event
from qtool.serve.api.chat import Chat, count_prompt_tokens, run_chat
from qtool.serve.api.fields import Json
from qtool.serve.api.replies import chat_logprobs, finish_reason
from qtool.serve.api.responses.items import OutputItems
from qtool.serve.api.responses.protocol import ChosenTool, Reasoning, ResponsesRequest
from qtool.serve.api.responses.request import SEALED_THOUGHTS, Translation, translate
from qtool.serve.api.responses.schemas import (
    FailedResponse,
    Incomplete,
    InputTokens,
    OutputTokens,
    ResponseCompleted,
    ResponseCreated,
    ResponseEvent,
    ResponseFailed,
    ResponseIncomplete,
    ResponseInProgress,
    ResponseObject,
    ResponseUsage,
)
from qtool.serve.api.schemas import TokenLogprob
from qtool.serve.backend.engine_client import OutputStream
from qtool.serve.http.errors import error_detail
from qtool.serve.service import Service
from qtool.serve.turns import current_origin, name_request

FAILURES = {"rate_limit_error": "rate_limit_exceeded", "server_error": "server_error"}
"""OpenAI's types of errors -> codes of failed responses; others keep their own."""


async def respond(service: Service, body: ResponsesRequest) -> Response:
    """Answer ``body``. Raises: UsageError, ModelNotFound, Busy."""
    rid = name_request(body.request_id or service.new_id("resp_"))
    translation, begun = await service.threads.run(
        current_origin().body_bytes, _prepare, service, body, rid
    )

    def make_reply(chat: Chat) -> Reply:
        seals_thoughts = SEALED_THOUGHTS in (body.include or ())
        items = OutputItems(translation.tools, seals_thoughts=seals_thoughts)
        return _ResponseReply(chat, begun, items)

    return await run_chat(service, translation.chat, make_reply, rid=rid, kind="responses")


async def count_input_tokens(service: Service, body: ResponsesRequest) -> int:
    """Return the tokens of the prompt of ``body``. Raises: UsageError, ModelNotFound."""
    rid = service.new_id("resp_")
    translation = await service.threads.run(
        current_origin().body_bytes, translate, body, rid, service.templates.text
    )
    return await count_prompt_tokens(service, translation.chat)


def _prepare(
    service: Service, body: ResponsesRequest, rid: str
) -> tuple[Translation, ResponseObject]:
    """Return ``body`` as a chat, and its response before the first item."""
    choice = body.tool_choice
    begun = ResponseObject(
        id=rid,
        created_at=int(time.time()),
        status="in_progress",
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata or {},
        model=body.model or service.settings.name,
        output=[],
        parallel_tool_calls=body.parallel_tool_calls is not False,
        reasoning=_fields(body.reasoning or Reasoning()),
        temperature=body.temperature,
        text=_fields(body.text) if body.text else {"format": {"type": "text"}},
        tool_choice=_fields(choice) if isinstance(choice, ChosenTool) else choice or "auto",
        tools=[_fields(tool) for tool in body.tools or ()],
        top_logprobs=body.top_logprobs,
        top_p=body.top_p,
    )
    return translate(body, rid, service.templates.text), begun


class _ResponseReply(Reply):
    """The reply to one request."""

    def __init__(self, chat: Chat, begun: ResponseObject, items: OutputItems) -> None:
        self._chat = chat
        self._account = chat.account
        self._reader = AnswerReader(chat.form)
        self._items = items
        self._begun = begun
        self._request_bytes = current_origin().body_bytes
        self._answer_bytes = 0
        self._numbers = itertools.count()

    def whole(self, outputs: list[CompletionOutput]) -> ResponseObject:
        """Return the reply as one object."""
        [output] = outputs
        self._account.note(output, 1)
        for _ in self._events_of(output):
            pass
        assert output.finish is not None
        return self._ended(output.finish)

    async def events(self, stream: OutputStream) -> AsyncGenerator[bytes, None]:
        """Yield the reply as events: that it begins, its items, and the whole of it."""
        threads = self._chat.service.threads
        begun = self._begun  # it repeats the request, which may be large
        head: list[ResponseEvent] = [
            ResponseCreated(response=begun),
            ResponseInProgress(response=begun),
        ]
        await stream.wait(FIRST_EVENT_S)
        yield await threads.run(self._request_bytes, self._join, head)
        async for outputs in stream:
            for output in outputs:
                self._account.note(output, 1)
                self._answer_bytes += len(output.text) + LOGPROB_BYTES * len(output.logprobs)
                if events := self._join(self._events_of(output)):
                    yield events
                if output.finish is not None:
                    size = self._request_bytes + self._answer_bytes
                    yield await threads.run(size, self._join, [self._last(output.finish)])

    def waiting(self) -> bytes:
        """Return the event once more that the answer begins: Codex takes comments for silence, and
        gives up after five minutes of it.
        """
        return self._join([ResponseInProgress(response=self._begun)])

    def failure(self, error: Exception) -> bytes:
        """Return the event that ends a stream because of ``error``."""
        detail = error_detail(error)
        code = FAILURES.get(detail.type, detail.code or "server_error")
        response = replace(
            self._begun,
            status="failed",
            error=FailedResponse(code, detail.message),
            output=self._items.done,
        )
        return self._join([ResponseFailed(response=response)])

    def close(self) -> None:
        """Record what the request used."""
        self._account.close(self._chat.rid)

    def _events_of(self, output: CompletionOutput) -> Iterator[ResponseEvent]:
        delta = self._reader.push(output.text)
        yield from self._items.add(delta, self._logprobs(output), output.reasoning_tokens)
        if output.finish is not None:
            yield from self._items.add(self._reader.finish(), [], 0)
            yield from self._items.finish(complete=finish_reason(output.finish) == "stop")

    def _last(self, finish: FinishInfo) -> ResponseEvent:
        response = self._ended(finish)
        if response.status == "completed":
            return ResponseCompleted(response=response)
        return ResponseIncomplete(response=response)

    def _ended(self, finish: FinishInfo) -> ResponseObject:
        reason = finish_reason(finish)
        status: Literal["completed", "incomplete"] = (
            "completed" if reason == "stop" else "incomplete"
        )
        cut = Incomplete("max_output_tokens" if reason == "length" else None)
        return replace(
            self._begun,
            status=status,
            incomplete_details=None if reason == "stop" else cut,
            output=self._items.done,
            usage=self._usage(),
        )

    def _usage(self) -> ResponseUsage:
        usage = self._account.usage()
        return ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputTokens(usage.prompt_tokens_details.cached_tokens),
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputTokens(self._account.reasoning_tokens or 0),
            total_tokens=usage.total_tokens,
        )

    def _logprobs(self, output: CompletionOutput) -> list[TokenLogprob]:
        if not self._chat.body.logprobs:
            return []
        return chat_logprobs(output, self._chat.service.vocabulary).content

    def _join(self, events: Iterable[ResponseEvent]) -> bytes:
        return b"".join(map(self._encode, events))

    def _encode(self, event: ResponseEvent) -> bytes:
        event.sequence_number = next(self._numbers)
        tag = event.__struct_config__.tag
        assert isinstance(tag, str)
        return named_event(tag, event)


def _fields(part: BaseModel) -> Json:
    """Return a part of the request as plain data."""
    return part.model_dump(by_alias=True)

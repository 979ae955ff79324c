"""How a reply is sent: whole, as events, or as an error in OpenAI's shape; whatever ends it, its
slot is released.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from typing import Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from qtool.engine.outputs import CompletionOutput
from qtool.errors import QtoolError
from qtool.serve.backend.engine_client import OutputStream
from qtool.serve.backend.messages import Submission
from qtool.serve.http.errors import error_detail
from qtool.serve.service import Busy, Service, Slot

LOGPROB_BYTES = 80  # of one log probability in a reply
DONE = b"data: [DONE]\n\n"
COMMENT = b": waiting\n\n"
COMMENT_S = 15.0  # without an event, after which a comment is sent
FIRST_EVENT_S = 0.1  # for the first event, before the headers are sent
_encode = msgspec.json.Encoder().encode


class Reply(Protocol):
    """Makes the reply of one route from the engine's outputs."""

    def whole(self, outputs: list[CompletionOutput]) -> object:
        """Return the reply to a request that is not streamed; one output for each choice, in
        order.
        """

    def events(self, stream: OutputStream) -> AsyncGenerator[bytes, None]:
        """Yield the reply to a streamed request."""

    def waiting(self) -> bytes:
        """Return what tells a client that its stream waits; nothing if it would be an error."""
        return COMMENT

    def failure(self, error: Exception) -> bytes:
        """Return the events that end a stream because of ``error``."""
        return event({"error": error_detail(error).model_dump()}) + DONE

    def close(self) -> None:
        """Record what the request used; called however it ends."""


async def answer(
    service: Service, slot: Slot, submission: Submission, reply: Reply, max_tokens: int | None
) -> Response:
    """Let the engine work on ``submission``, and return what ``reply`` makes of it.

    Args:
        service: the served model.
        slot: of the request.
        submission: what the engine computes.
        reply: makes the response.
        max_tokens: the limit that the request itself named.
    Raises: UsageError, for an invalid request; Busy, when the server ends; what went wrong in the
        engine before anything was answered.
    """
    return await answer_all(service, slot, [submission], reply, [max_tokens])


async def answer_all(
    service: Service,
    slot: Slot,
    submissions: Sequence[Submission],
    reply: Reply,
    max_tokens: Sequence[int | None],
) -> Response:
    """Do as `answer` for a request of several submissions, each with its own limit."""
    stream = service.submit(slot, submissions, max_tokens)
    if submissions[0].stream:
        return await EventStream.started(reply, stream, slot)
    try:
        outputs = await stream.collect()
        return await service.threads.run(
            reply_bytes(outputs, *submissions), lambda: json_reply(reply.whole(outputs))
        )
    finally:
        reply.close()


def reply_bytes(outputs: Sequence[CompletionOutput], *submissions: Submission) -> int:
    """Return an estimate of the bytes of a reply with ``outputs``."""
    logprobs = 0
    for output in outputs:
        logprobs += len(output.logprobs) + len(output.prompt_logprobs)
    top = max(submission.top_logprobs or 0 for submission in submissions)
    each = LOGPROB_BYTES * (1 + top)
    # the reply may repeat them
    prompts = sum(len(prompt) for submission in submissions for prompt in submission.prompts)
    return sum(len(output.text) for output in outputs) + prompts + logprobs * each


def event(data: object) -> bytes:
    """Return ``data`` as a server-sent event."""
    return b"data: " + _encode(data) + b"\n\n"


def named_event(name: str, data: object) -> bytes:
    """Return ``data`` as a server-sent event with a name."""
    return b"event: " + name.encode() + b"\ndata: " + _encode(data) + b"\n\n"


class EventStream(Response):
    """A response of server-sent events.

    Whatever ends it, ``slot`` is released: a client that leaves frees its pages.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        first: asyncio.Future[bytes],
        events: AsyncGenerator[bytes, None],
        reply: Reply,
        slot: Slot,
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._events = events
        self._reply = reply
        self._slot = slot
        self._sent = time.monotonic()

    @classmethod
    async def started(cls, reply: Reply, stream: OutputStream, slot: Slot) -> EventStream:
        """Return the stream, for which the engine has begun to work.

        It waits a moment for the first event, so that an error which the engine finds at once gets
        its own status; a request that waits for its turn gets its headers.
        """
        events = reply.events(stream)
        first = asyncio.ensure_future(anext(events))
        try:
            await asyncio.wait({first}, timeout=FIRST_EVENT_S)
            if first.done():
                first.result()
        except BaseException:
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            reply.close()
            raise
        slot.belongs_to_stream = True
        return cls(first, events, reply, slot)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end or the client is gone."""
        sending = asyncio.create_task(self._send(send))
        watching = asyncio.create_task(gone(receive))
        commenting = asyncio.create_task(self._comment(send))
        tasks = [sending, watching, commenting]
        try:
            await asyncio.wait({sending, watching}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for task in tasks:
                task.cancel()
            self._first.cancel()
            await asyncio.gather(*tasks, self._first, return_exceptions=True)
            await self._events.aclose()
            self._reply.close()
            self._slot.release()

    async def _send(self, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        try:
            await self._send_event(send, await self._first)
            async for some in self._events:
                self._sent = time.monotonic()
                await send({"type": "http.response.body", "body": some, "more_body": True})
        except (QtoolError, Busy) as error:
            last = self._reply.failure(error)
            await send({"type": "http.response.body", "body": last, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_event(self, send: Send, some: bytes) -> None:
        self._sent = time.monotonic()
        await send({"type": "http.response.body", "body": some, "more_body": True})

    async def _comment(self, send: Send) -> None:
        """Send a comment whenever there was no event for a while, because proxies end connections
        without bytes.
        """
        while True:
            wait_s = self._sent + COMMENT_S - time.monotonic()
            if wait_s <= 0 and (comment := self._reply.waiting()):
                await self._send_event(send, comment)
            await asyncio.sleep(max(wait_s, COMMENT_S / 10))


async def gone(receive: Receive) -> None:
    """Return when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(request: Request, answer: Awaitable[Response]) -> Response:
    """Return ``answer``, unless the client leaves first: then it is cancelled, and what runs for it
    ends.
    """
    answering = asyncio.ensure_future(answer)
    watching = asyncio.create_task(gone(request.receive))
    try:
        await asyncio.wait({answering, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            return Response(status_code=499)  # nobody reads it
        return answering.result()
    finally:
        for task in (answering, watching):
            task.cancel()
        await asyncio.gather(answering, watching, return_exceptions=True)


def json_reply(
    content: object, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return ``content``, structs or plain data, as a response of JSON."""
    return Response(
        _encode(content), status_code=status, headers=headers, media_type="application/json"
    )

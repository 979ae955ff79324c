"""A stream of events that waits: its headers, its comments, and how it ends."""

from __future__ import annotations

import asyncio

import pytest

from qtool.errors import UsageError
from qtool.serve.api import answering
from qtool.serve.api.answering import COMMENT, DONE, EventStream, Reply


class WaitingReply(Reply):
    """The reply of an engine that says nothing until it is told to."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.error: UsageError | None = None
        self.is_closed = False

    def whole(self, outputs):
        raise NotImplementedError

    async def events(self, stream):
        await self.go_on.wait()
        if self.error is not None:
            raise self.error
        yield b"data: 1\n\n"
        yield DONE

    def close(self) -> None:
        self.is_closed = True


class Slot:
    """A slot that notes its release."""

    belongs_to_stream = False
    is_released = False

    def release(self) -> None:
        self.is_released = True


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(answering, "FIRST_EVENT_S", 0.001)
    monkeypatch.setattr(answering, "COMMENT_S", 0.01)


async def read(reply: WaitingReply, slot: Slot, *, wait_s: float = 0.05) -> list[dict]:
    """What is sent while the reply waits and after it."""
    sent: list[dict] = []

    async def send(message) -> None:
        sent.append(message)

    async def receive():
        await asyncio.Event().wait()

    response = await EventStream.started(reply, None, slot)
    sending = asyncio.ensure_future(response({}, receive, send))
    await asyncio.sleep(wait_s)
    reply.go_on.set()
    await sending
    return sent


def test_headers_go_out_at_once_and_comments_while_a_request_waits(quick):
    async def run():
        reply, slot = WaitingReply(), Slot()
        start, *bodies = await read(reply, slot)
        assert start["type"] == "http.response.start" and start["status"] == 200
        comments = [one for one in bodies if one["body"] == COMMENT]
        assert len(comments) >= 2 and bodies[: len(comments)] == comments
        assert [one["body"] for one in bodies[len(comments) :]] == [b"data: 1\n\n", DONE, b""]
        assert reply.is_closed and slot.is_released

    asyncio.run(run())


def test_an_error_after_the_headers_is_an_event(quick):
    async def run():
        reply, slot = WaitingReply(), Slot()
        reply.error = UsageError("E_PROMPT", "no")
        *_, last, end = await read(reply, slot)
        assert b'"error"' in last["body"] and last["body"].endswith(DONE) and end["body"] == b""
        assert slot.is_released

    asyncio.run(run())


def test_an_error_that_is_found_at_once_gets_its_own_status():
    async def run():
        reply, slot = WaitingReply(), Slot()
        reply.error = UsageError("E_PROMPT", "no")
        reply.go_on.set()
        with pytest.raises(UsageError):
            await EventStream.started(reply, None, slot)
        assert reply.is_closed and not slot.belongs_to_stream

    asyncio.run(run())


def test_a_client_that_leaves_while_a_request_waits_frees_its_slot(quick):
    async def run():
        reply, slot = WaitingReply(), Slot()

        async def send(message) -> None:
            pass

        async def receive():
            return {"type": "http.disconnect"}

        response = await EventStream.started(reply, None, slot)
        await response({}, receive, send)
        assert reply.is_closed and slot.is_released

    asyncio.run(run())

"""The engine in a process of its own: its steps and the server's event loop never wait for one
another's Python.

The two ends talk over a socket pair. A message is a length (4 bytes, big-endian) and a pickle; both
ends are ours, and neither passes on bytes of a client unread. The engine ends when the socket does,
so it never outlives the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import pickle
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from qtool.engine.sampling_params import SamplingParams
from qtool.errors import QtoolError, ResourceError, from_wire

LOG = logging.getLogger("qtool.serve")
LENGTH = struct.Struct("!I")
PATIENCE_S = 15.0  # for the engine to say what it is doing: a step of its may be long
END_S = 5.0  # for it to end by itself
# the natural logarithm, the token; SGLang's third place is empty
Logprob = tuple[float | None, int, None]


class Ending(NamedTuple):
    """What is known of a choice once it is complete.

    ``reason``: as SGLang tells it. Seconds count from its arrival in the engine.
    """

    reason: Mapping[str, Any]
    prompt_tokens: int
    cached_tokens: int
    first_token_s: float | None
    seconds: float
    input_logprobs: list[Logprob]
    input_top: list[list[Logprob] | None]


class Piece(NamedTuple):
    """What a choice has got since the last piece of it."""

    choice: int
    text: str
    tokens: list[int]
    logprobs: list[Logprob]
    top: list[list[Logprob]]
    ending: Ending | None


@dataclass(frozen=True)
class Submission:
    """Prompts to be completed, ``params.n`` times each.

    ``grammar``: (kind, text, compiled) of the constraint in ``params``.
    """

    prompts: Sequence[Sequence[int]]
    params: SamplingParams
    stream: bool
    rid: str
    top_logprobs: int | None = None
    """None: no log probabilities."""
    prompt_logprobs_from: int = -1
    """-1: none of the prompt."""
    grammar: tuple[str, str, str] | None = None

    @property
    def choices(self) -> int:
        """How many completions are asked for."""
        return len(self.prompts) * self.params.n


@dataclass(frozen=True)
class Facts:
    """What the engine says of itself once it is loaded."""

    model_path: str
    tokenizer_path: str
    tokenizer: str
    """tokenizer.json, as the tokenizers library writes it."""
    eos_ids: tuple[int, ...]
    vocab_size: int
    context_length: int
    max_running: int
    max_total_tokens: int
    device: str
    dtype: str
    quantization: str
    """The schemes of the layers; empty for a plain model."""
    kv_cache_dtype: str
    weights_bytes: int


@dataclass(frozen=True)
class Load:
    """What the engine is doing at one moment."""

    running: int
    waiting: int
    kv_usage: float
    prefix_queries: int
    prefix_hits: int
    preemptions: int


class Answers:
    """The pieces of one submission, as they come; those that came together are handed out together.

    ``left``: choices that the engine still makes.
    """

    def __init__(self, key: int, choices: int) -> None:
        self.key, self.left = key, choices
        self._pieces: list[Piece] = []
        self._error: QtoolError | None = None
        self._came = asyncio.Event()

    def take(self, piece: Piece | QtoolError) -> None:
        """Accept what the engine says."""
        if isinstance(piece, QtoolError):
            self._error = piece
        else:
            self._pieces.append(piece)
            self.left -= piece.ending is not None
        self._came.set()

    async def __aiter__(self) -> AsyncIterator[list[Piece]]:
        """Yield lists of pieces, at most one of each choice.

        Raises: QtoolError, what went wrong in the engine.
        """
        while self.left or self._pieces:
            await self._came.wait()
            self._came.clear()
            if self._error is not None:
                raise self._error
            pieces, self._pieces = self._pieces, []
            if pieces:
                yield _merged(pieces)


def _merged(pieces: list[Piece]) -> list[Piece]:
    """Return ``pieces`` with those of one choice joined: a reader that is slower than the engine
    gets more at a time.
    """
    if len(pieces) == 1:
        return pieces
    merged: dict[int, Piece] = {}
    for piece in pieces:
        add(merged, piece)
    return list(merged.values())


def add(whole: dict[int, Piece], new: Piece) -> Piece:
    """Add ``new`` to what is known of its choice, and return all that is known of it."""
    if old := whole.get(new.choice):
        logprobs, top = old.logprobs + new.logprobs, old.top + new.top
        new = Piece(
            new.choice, old.text + new.text, old.tokens + new.tokens, logprobs, top, new.ending
        )
    whole[new.choice] = new
    return new


class EngineProcess:
    """The server's end. ``on_end`` is called with the reason when the engine ends by itself."""

    def __init__(self, on_end: Callable[[QtoolError], None]) -> None:
        self._on_end = on_end
        self._answers: dict[int, Answers] = {}
        self._loads: dict[int, asyncio.Future[Load]] = {}
        self._keys = itertools.count()
        self._closing = False
        self._error: QtoolError | None = None  # why nothing is answered any more

    async def start(self, options: Mapping[str, Any]) -> Facts:
        """Start the process, load the model and return what the engine says of itself.

        Raises: what `qtool.Engine` raises.
        """
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "qtool.serve.backend.engine_process", str(theirs.fileno())]
        self._process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            start_new_session=True,  # what a terminal sends to a group is for the server
        )
        theirs.close()
        self._reader, self._writer = await asyncio.open_connection(sock=ours)
        self._send(("options", dict(options)))
        try:
            kind, said = await self._receive()
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise await self._death() from error
        if kind == "failed":
            raise from_wire(said)
        self._listening = asyncio.create_task(self._listen())
        facts: Facts = said
        return facts

    def submit(self, submission: Submission) -> Answers:
        """Hand ``submission`` to the engine.

        Whoever stops waiting for its answers must `abandon` them. Raises: ResourceError, when it is
        gone.
        """
        if self._error is not None:
            raise self._error
        key = next(self._keys)
        answers = self._answers[key] = Answers(key, submission.choices)
        self._send(("submit", key, submission))
        return answers

    def abandon(self, answers: Answers) -> None:
        """End what is not complete of ``answers``; nobody waits for it."""
        if self._answers.pop(answers.key, None) and answers.left:
            self._send(("abandon", answers.key))

    def abort(self, rid: str | None = None) -> None:
        """End the submissions of that ``rid``, or all of them: each choice is told so, with what it
        has.
        """
        self._send(("abort", rid))

    def give_up(self, error: QtoolError) -> None:
        """Wait for the engine no longer: whoever waits for answers is told ``error``, now and from
        now on.
        """
        self._error = error
        for answers in self._answers.values():
            answers.take(error)
        for future in self._loads.values():
            if not future.done():
                future.set_exception(TimeoutError())

    async def load(self) -> Load:
        """Ask what the engine is doing. Raises: TimeoutError."""
        if self._error is not None:
            raise TimeoutError
        key = next(self._keys)
        future = self._loads[key] = asyncio.get_running_loop().create_future()
        try:
            self._send(("load", key))
            return await asyncio.wait_for(future, PATIENCE_S)
        finally:
            del self._loads[key]

    async def close(self) -> None:
        """End the process, whatever it does, and wait for it."""
        self._closing = True
        process = getattr(self, "_process", None)
        if process is None:
            return
        if hasattr(self, "_writer"):
            self._writer.close()  # the engine takes the end of the socket for its own
        try:
            await asyncio.to_thread(process.wait, END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            await asyncio.to_thread(process.wait)
        if hasattr(self, "_listening"):
            self._listening.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._listening

    async def _listen(self) -> None:
        try:
            while True:
                kind, said = await self._receive()
                if kind == "load":
                    key, load = said
                    if (future := self._loads.get(key)) and not future.done():
                        future.set_result(load)
                    continue
                for key, piece in said:
                    if answers := self._answers.get(key):
                        answers.take(from_wire(piece) if isinstance(piece, dict) else piece)
        except Exception as error:  # of the connection, or a message that is none
            if not self._closing:
                if not isinstance(error, (asyncio.IncompleteReadError, ConnectionError)):
                    LOG.exception("the engine says what cannot be understood")
                    self._process.kill()
                self.give_up(
                    ResourceError(
                        "E_ENGINE_DIED", "the engine's process ended", hint="the server ends, too"
                    )
                )
                self._on_end(await self._death())

    async def _death(self) -> ResourceError:
        code = await asyncio.to_thread(self._process.wait)
        killed = code == -signal.SIGKILL
        hint = (
            "it was killed, perhaps for memory: lower mem-fraction-static or max-total-tokens"
            if killed
            else "what it printed last says why"
        )
        return ResourceError("E_ENGINE_DIED", f"the engine's process ended with {code}", hint=hint)

    async def _receive(self) -> tuple[str, Any]:
        (size,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
        message: tuple[str, Any] = pickle.loads(await self._reader.readexactly(size))
        return message

    def _send(self, message: tuple[Any, ...]) -> None:
        if self._error is not None:
            return
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        self._writer.write(LENGTH.pack(len(data)) + data)

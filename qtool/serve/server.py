"""Runs a server from start to end: it loads the model, serves requests at an address, drains at a
signal, and ends its processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import queue
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from logging.handlers import QueueHandler, QueueListener
from pathlib import Path
from socket import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from qtool import formats
from qtool.checkpoint import open_checkpoint
from qtool.engine.stopwatch import breakdown
from qtool.errors import QtoolError, one_line
from qtool.memory import memory_error
from qtool.runtime.online import schemes_to_run
from qtool.serve.backend.engine_child import EngineChild
from qtool.serve.host import ServiceHost
from qtool.serve.http.app import make_app
from qtool.serve.http.connection import limited_connection
from qtool.serve.http.cors import allow_origins
from qtool.serve.http.limits import LimitsMiddleware, RequestLimits
from qtool.serve.service import Service, open_service
from qtool.serve.settings import BACKLOG, KEEP_ALIVE_S, ServeSettings
from qtool.terminal import EscapingFormatter

LOG = logging.getLogger("qtool.serve")
MAX_LINES = 10_000  # of the log that wait to be written
ACCEPT_S = 0.3  # to refuse clients that have just connected
ENGINE_S = 3.0  # for the engine to abort requests: one of its steps may be long
LAST_WORDS_S = 2.0  # for clients to read the end of their replies
MAPPED_BYTES = 256 << 10  # allocations from this size on are mapped
TRIM_S = 10.0  # between trims of the heap
ARENAS = 2  # heaps for threads: each keeps the most memory that it once needed
_M_MMAP_THRESHOLD = -3  # malloc.h
_M_ARENA_MAX = -8
OWN_FILES = 256  # open files besides connections


def serve(
    settings: ServeSettings,
    child: EngineChild,
    address: socket,
    *,
    on_ready: Callable[[Service], None],
) -> None:
    """Serve until a signal ends it.

    Args:
        settings: what is served, and how.
        child: the engine's process, started with the same settings.
        address: the socket on which the server listens.
        on_ready: called once the model has answered.
    Raises: ResourceError, when the engine dies; what `qtool.Engine` raises for a model that cannot
        be served.
    """
    _keep_heap_small()
    _check_quantization(settings)
    limits = RequestLimits()
    connections = max(_file_limit() - OWN_FILES, OWN_FILES // 4)
    limits = replace(limits, connections=min(limits.connections, connections))
    with _log_on_the_side(settings.log_level):
        _warn_of_strangers(settings)
        with asyncio.Runner(loop_factory=uvicorn.Config("").get_loop_factory()) as runner:
            runner.run(_serve(settings, child, limits, address, on_ready))


@contextlib.contextmanager
def _log_on_the_side(level: str) -> Iterator[None]:
    """Write the log in a thread: a full disk or a pipe that is not read costs lines of the log, and
    delays no request.
    """
    lines: queue.Queue[logging.LogRecord] = queue.Queue(MAX_LINES)
    listener = QueueListener(lines, logging.StreamHandler(sys.stderr))
    handler = _Dropping(lines)
    handler.setFormatter(EscapingFormatter())
    logging.getLogger().addHandler(handler)
    logging.getLogger("qtool").setLevel(level.upper())
    listener.start()
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        listener.stop()


class _Dropping(QueueHandler):
    """Drops records that the queue has no room for."""

    def enqueue(self, record: logging.LogRecord) -> None:
        """Put ``record`` into the queue, if there is room."""
        with contextlib.suppress(queue.Full):
            self.queue.put_nowait(record)


def _warn_of_strangers(settings: ServeSettings) -> None:
    if not settings.is_local and not settings.api_key:
        LOG.warning(
            "anybody who can reach port %d of %s can use the model: --api-key asks for a key, "
            "--host 127.0.0.1 stays on this machine",
            settings.port,
            "any address of this machine"
            if settings.host in ("", "0.0.0.0", "::")
            else settings.host,
        )


def _keep_heap_small() -> None:
    """Make malloc map large buffers, such as bodies: when freed they go back to the system, even if
    small objects were allocated after them.
    """
    with contextlib.suppress(AttributeError):  # not glibc
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, MAPPED_BYTES)
        library.mallopt(_M_ARENA_MAX, ARENAS)


async def _trim_heap() -> None:
    """Give free memory of the heap back to the system, every `TRIM_S` seconds."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", int)  # not glibc
    while True:
        await asyncio.sleep(TRIM_S)
        await asyncio.to_thread(trim, 0)


def _check_quantization(settings: ServeSettings) -> None:
    """Raise: UsageError, without waiting for the engine's process, when the flags contradict the
    checkpoint in a folder.
    """
    path = Path(settings.model_path)
    name = settings.quantization
    if name is not None and path.exists():
        checkpoint = open_checkpoint(path)
        schemes_to_run(checkpoint, formats.detect(checkpoint), name)


async def _serve(
    settings: ServeSettings,
    child: EngineChild,
    limits: RequestLimits,
    address: socket,
    on_ready: Callable[[Service], None],
) -> None:
    host = ServiceHost(settings)
    app = make_app(host)
    config = uvicorn.Config(
        allow_origins(LimitsMiddleware(app, host, limits), settings.origins),
        http=limited_connection(limits),  # type: ignore[arg-type]
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",  # what clients do wrong is their affair
        access_log=False,
        server_header=False,
        # X-Forwarded-For is trusted only if uvicorn's variable names the proxies
        proxy_headers="FORWARDED_ALLOW_IPS" in os.environ,
        timeout_keep_alive=KEEP_ALIVE_S,
        backlog=BACKLOG,
    )
    server = _Server(config, host)
    with server.signals_taken():
        running = asyncio.create_task(_run_service(app, child, host, server, on_ready))
        try:
            await server.serve(sockets=[address])
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            host.threads.close()
    if server.failure is not None and not server.was_asked_to_end:
        raise server.failure


async def _run_service(
    app: FastAPI,
    child: EngineChild,
    host: ServiceHost,
    server: _Server,
    on_ready: Callable[[Service], None],
) -> None:
    """Load the model and let ``host`` serve it, until the task is cancelled."""
    try:
        # takes long, so it runs while the engine loads; the result is cached
        await asyncio.to_thread(app.openapi)
        async with open_service(
            host.settings, child, host.metrics, host.threads, server.fail
        ) as service:
            gc.collect()
            gc.freeze()  # the collector need not scan what lives as long as the server
            host.set_service(service)
            _log_start(time.monotonic() - child.start_time_s, service.info.start_seconds)
            _announce(service, on_ready)
            await _trim_heap()
    except QtoolError as error:
        server.fail(error)
    except Exception as error:
        server.fail(memory_error(error, "the server") or _bug(error))


def _bug(error: Exception) -> QtoolError:
    """Log ``error`` with its traceback, and return it as a bug of qtool."""
    LOG.error("the server did not start", exc_info=error)
    message = f"the server did not start: {type(error).__name__}: {one_line(error)}"
    return QtoolError("E_BUG", message)


def _log_start(whole_s: float, parts: Mapping[str, float]) -> None:
    """Log how long the start took: the engine's ``parts`` in seconds, and the rest."""
    rest = whole_s - sum(parts.values())
    LOG.info("started in %.1f s: %s", whole_s, breakdown({**parts, "rest": rest}))


def _announce(service: Service, on_ready: Callable[[Service], None]) -> None:
    try:
        on_ready(service)
    except Exception:  # a closed stdout, say
        LOG.exception("the server is ready, and cannot print that")


class _Server(uvicorn.Server):
    """uvicorn's server, but it gives running requests time to finish, and then aborts them."""

    def __init__(self, config: uvicorn.Config, host: ServiceHost) -> None:
        super().__init__(config)
        self._host = host
        self._signals = 0
        self.failure: QtoolError | None = None
        """Why the server ends though nobody asked it to."""
        self._hurry = asyncio.Event()

    def fail(self, error: QtoolError) -> None:
        """End the server because of ``error``."""
        self.failure = self.failure or error
        self.should_exit = True

    @property
    def was_asked_to_end(self) -> bool:
        """Whether a signal came."""
        return self._signals > 0

    @contextlib.contextmanager
    def signals_taken(self) -> Iterator[None]:
        """Handle signals until the very end, and then restore the earlier handlers: a server that
        was asked to end has done its work.
        """
        before = {
            number: signal.signal(number, self.handle_exit)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        """Leave them to `signals_taken`, which lasts longer."""
        return contextlib.nullcontext()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal; at the second end what runs; at the third leave."""
        self._signals += 1
        self.should_exit = True
        running = self._host.current.slots_in_use
        if self._signals == 1 and running:
            LOG.warning(
                "ending: %d answers are on their way and have %g s; another signal ends them now",
                running,
                self._host.settings.drain_timeout_s,
            )
        self.force_exit = self._signals > 2
        if self._signals > 1:
            asyncio.get_running_loop().call_soon_threadsafe(self._hurry.set)

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """Stop taking requests, wait for those that run, and after the drain's time end them."""
        self._host.current.drain()
        ending = asyncio.create_task(self._end_what_runs())
        try:
            await asyncio.sleep(ACCEPT_S)
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end_what_runs(self) -> None:
        """After the drain's time abort the requests in the engine, then fail those that still wait
        for it, then cancel all other work, and at last close the connections.
        """
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._hurry.wait(), self._host.settings.drain_timeout_s)
        self._host.current.abort_all()
        await asyncio.sleep(ENGINE_S)
        self._host.current.fail_all()
        await asyncio.sleep(LAST_WORDS_S / 2)
        for task in self.server_state.tasks:
            task.cancel()
        await asyncio.sleep(LAST_WORDS_S / 2)
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def _file_limit() -> int:
    """Return how many files the process may have open, after asking for as many as the system
    allows it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return wanted if soft == resource.RLIM_INFINITY else soft

"""The engine's end of the socket that `engine_client` holds the other end of."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib.util
import itertools
import logging
import os
import queue
import signal
import socket
import sys
import threading
from collections import Counter
from typing import TYPE_CHECKING, NoReturn, cast

from qtool.checkpoint.temporary import remove_temporary_folders
from qtool.devices import AUTO, create_cuda_context
from qtool.engine.config import EngineConfig
from qtool.engine.outputs import CompletionOutput, Output
from qtool.engine.stopwatch import Stopwatch
from qtool.errors import QtoolError, ResourceError, one_line
from qtool.imports import skip_unused
from qtool.memory import memory_error, no_collection
from qtool.serve.backend.messages import (
    LENGTH,
    Abort,
    Cancel,
    EngineInfo,
    EngineStats,
    Failed,
    FlushCache,
    FromEngine,
    GetStats,
    KeyedOutput,
    Outputs,
    Ready,
    Start,
    Stats,
    Submission,
    Submit,
    ToEngine,
    WireError,
    decode_to_engine,
    encode,
    wire_error,
)
from qtool.terminal import EscapingFormatter, guard_streams

if TYPE_CHECKING:  # torch is loaded once the socket is served
    import torch
    from torch import nn

    from qtool.engine.encoding import EncodeRequest
    from qtool.engine.engine import Engine
    from qtool.engine.requests import GenerateRequest, Request

MAX_LOGPROBS = 1024  # in one message, unless a single output has more
LOG = logging.getLogger("qtool.serve")


class EngineServer:
    """Serves the socket: one thread receives messages, one handles them, and one sends what the
    engine's loop delivers.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[FromEngine | KeyedOutput] = queue.SimpleQueue()
        self._submitted: dict[int, tuple[str, list[Request]]] = {}
        """By key: the rid of each submission, and the engine's requests for it."""
        self.has_answered = threading.Event()
        """Set once a submission has ended."""
        for name, run in (("qtool-inbox", self._receive_all), ("qtool-outbox", self._send_all)):
            threading.Thread(target=run, name=name, daemon=True).start()

    def receive(self) -> ToEngine:
        """Return the next message."""
        return self._inbox.get()

    def send(self, payload: FromEngine | KeyedOutput) -> None:
        """Send ``payload``, from any thread."""
        self._outbox.put(payload)

    def serve(self, engine: Engine) -> NoReturn:
        """Do what the server asks for."""
        while True:
            match self.receive():
                case Submit(key, submission):
                    self._submit(engine, key, submission)
                case Cancel(key):
                    engine.cancel(self._submitted.pop(key, ("", []))[1])
                case Abort(rid):
                    self._abort(engine, rid)
                case FlushCache():
                    engine.flush_cache()
                case GetStats(key):
                    self.send(Stats(key, _stats(engine)))

    def _submit(self, engine: Engine, key: int, submission: Submission) -> None:
        import torch

        def deliver(output: Output) -> None:  # in the loop's thread
            if isinstance(output, CompletionOutput):
                self.send(KeyedOutput(key, output))
                is_last = output.finish is not None
            elif isinstance(output.error, torch.AcceleratorError):
                LOG.error("the device failed: %s", one_line(output.error))
                os._exit(1)  # the device does nothing more for this process
            else:
                self.send(KeyedOutput(key, _wire_error(output.error)))
                is_last = True
            if is_last:
                self._forget(key)
                self.has_answered.set()

        try:
            if submission.grammar is not None and engine.compiler is not None:
                engine.compiler.take(*submission.grammar)
            given = _engine_request(engine, key, submission)
            self._submitted[key] = submission.rid, engine.submit(given, deliver)
            self._forget(key)  # it may have ended already
        except Exception as error:
            self.send(KeyedOutput(key, _wire_error(error)))

    def _abort(self, engine: Engine, rid: str | None) -> None:
        for name, requests in list(self._submitted.values()):
            if rid in (None, name):
                engine.cancel(requests)

    def _forget(self, key: int) -> None:
        """Drop the requests of ``key`` once all have ended."""
        _, requests = self._submitted.get(key, ("", []))
        if all(request.done for request in requests):
            self._submitted.pop(key, None)

    def _receive_all(self) -> None:
        try:
            with self._connection.makefile("rb") as file:
                while len(head := file.read(LENGTH.size)) == LENGTH.size:
                    self._inbox.put(decode_to_engine(file.read(LENGTH.unpack(head)[0])))
        finally:
            # the server is gone or closed the socket: the process ends, which frees the device
            remove_temporary_folders()
            os._exit(0)

    def _send_all(self) -> None:
        try:
            while True:
                for message in _grouped(self._waiting_payloads()):
                    self._connection.sendall(encode(message))
        except OSError:
            pass  # the server is gone
        except Exception:
            LOG.exception("the engine cannot send its outputs")
        finally:
            os._exit(1)

    def _waiting_payloads(self) -> list[FromEngine | KeyedOutput]:
        """Wait for a payload, and return all that are there."""
        payloads = [self._outbox.get()]
        with contextlib.suppress(queue.Empty):
            while True:
                payloads.append(self._outbox.get_nowait())
        return payloads


def _engine_request(
    engine: Engine, key: int, submission: Submission
) -> GenerateRequest | EncodeRequest:
    """Return what the engine computes for ``submission``."""
    from qtool.engine.encoding import EncodeRequest
    from qtool.engine.requests import GenerateRequest

    count = len(submission.prompts)
    names = [f"{key}-{number}" for number in range(count)]  # two clients may send the same rid
    if engine.encoding is not None:
        return EncodeRequest(
            input_ids=submission.prompts, rid=names, cache_salt=submission.cache_salt
        )
    return GenerateRequest(
        sampling_params=[submission.params] * count,
        input_ids=submission.prompts,
        stream=submission.stream,
        return_logprob=submission.top_logprobs is not None,
        top_logprobs_num=submission.top_logprobs or 0,
        logprob_start_len=submission.prompt_logprobs_from,
        label_token_ids=submission.label_token_ids,
        cache_salt=submission.cache_salt,
        rid=names,
    )


def _grouped(payloads: list[FromEngine | KeyedOutput]) -> list[FromEngine]:
    """Return messages for ``payloads``. The outputs of one step become one message, or several when
    they have many log probabilities: a large message takes long to decode.
    """
    messages: list[FromEngine] = []
    logprobs = 0
    for payload in payloads:
        if not isinstance(payload, KeyedOutput):
            messages.append(payload)
            continue
        logprobs += _logprob_count(payload)
        if messages and isinstance(messages[-1], Outputs) and logprobs <= MAX_LOGPROBS:
            messages[-1].outputs.append(payload)
        else:
            messages.append(Outputs([payload]))
            logprobs = _logprob_count(payload)
    return messages


def _logprob_count(payload: KeyedOutput) -> int:
    """Return how many tokens with log probabilities ``payload`` has."""
    if not isinstance(payload.output, CompletionOutput):
        return 0
    return len(payload.output.logprobs) + len(payload.output.prompt_logprobs)


def _wire_error(error: Exception) -> WireError:
    if not isinstance(error, QtoolError):
        LOG.error("a request failed: %s: %s", type(error).__name__, one_line(error))
        error = QtoolError(
            "E_BUG", f"the engine failed: {type(error).__name__}", hint="see the server's log"
        )
    return wire_error(error)


def _stats(engine: Engine) -> EngineStats:
    from qtool.engine.attention.pages import PAGE

    scheduler = engine.loop.scheduler
    return EngineStats(
        running=len(scheduler.running),
        waiting=len(scheduler.waiting),
        kv_usage=scheduler.kv_usage,
        prefix_queries=scheduler.prefix_queries,
        prefix_hits=scheduler.prefix_hits,
        preemptions=scheduler.preemptions,
        steps=engine.loop.steps,
        used_tokens=(scheduler.pages.count - scheduler.pages.free) * PAGE,
        tokens_per_s=engine.loop.throughput.tokens_per_s,
        spec=None if engine.loop.spec is None else engine.loop.spec.total,
    )


def _engine_info(engine: Engine, start_seconds: dict[str, float]) -> EngineInfo:
    from qtool.engine.attention.pages import PAGE

    runner = engine.loop.runner
    model = cast("nn.Module", runner.model)
    tensors = itertools.chain(model.parameters(), model.buffers())
    sizes = {_storage_id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}
    return EngineInfo(
        model_path=str(engine.model_folder),
        tokenizer_path=str(
            engine.tokenizer.name_or_path if engine.tokenizer else engine.model_folder
        ),
        tokenizer=engine.tokenizer.backend_tokenizer.to_str() if engine.tokenizer else "",
        eos_ids=engine.eos_ids,
        vocab_size=runner.vocab_size,
        context_length=engine.context_length,
        max_running=runner.limits.max_running,
        max_total_tokens=runner.page_count * PAGE,
        page_size=PAGE,
        device=_device_name(runner.device),
        dtype=str(runner.model.dtype).removeprefix("torch."),
        quantization=_schemes(model),
        kv_cache_dtype=str(runner.cache_dtype).removeprefix("torch."),
        weights_bytes=sum(sizes.values()),
        start_seconds=start_seconds,
        encoding=engine.encoding,
    )


def _storage_id(tensor: torch.Tensor) -> int:
    """Return a number that tensors share only if they share memory; oneDNN's have no address."""
    return id(tensor) if tensor.is_mkldnn else int(tensor.data_ptr())


def _schemes(model: nn.Module) -> str:
    """Return the schemes of the quantized layers, the most frequent first; empty when there is
    none.
    """
    from qtool.runtime.packed import PackedModule

    packed = [module for module in model.modules() if isinstance(module, PackedModule)]
    names = Counter(scheme.name for module in packed for scheme in module.schemes)
    return "; ".join(name for name, _ in names.most_common())


def _device_name(device: torch.device) -> str:
    import torch

    return (
        f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
    )


def _prepare_grammars(engine: Engine, may_begin: threading.Event) -> None:
    """Import what constrained answers need, so that the first of them does not hold up what comes
    behind it.
    """
    may_begin.wait()
    if engine.compiler is None or importlib.util.find_spec("xgrammar") is None:
        return
    with no_collection(keep=True):
        engine.compiler.compile("regex", "a")


def _with_more_gpus(model_path: str, revision: str | None) -> str:
    """Return what to type instead where the model does not fit one GPU."""
    import torch

    from qtool.checkpoint import open_checkpoint, resolve_model
    from qtool.serve.settings import ServeOptions, suggestion

    folder = resolve_model(model_path, revision=revision)
    memory = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None
    return suggestion(
        ServeOptions(model_path=model_path),
        size_bytes=open_checkpoint(folder).size_bytes,
        gpu_bytes=memory,
    )


def main(descriptor: int) -> None:
    """Run the engine at the other end of ``descriptor``, a socket."""
    # a terminal's signals: the server decides when the engine ends
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1)  # the server asks for the stack of an engine that hangs
    server = EngineServer(socket.socket(fileno=descriptor))
    start = server.receive()
    assert isinstance(start, Start)
    _log_to_stderr()
    logging.getLogger("qtool").setLevel(start.log_level)
    logging.captureWarnings(True)
    skip_unused()
    create_cuda_context(str(start.options.get("device") or AUTO))
    try:
        log_time = Stopwatch()
        _redirect_transformers_log()
        with no_collection(keep=True):
            from qtool.engine.engine import Engine
        log_time("imports", "libraries imported")
        engine = Engine(start.model_path, **start.options)
        info = _engine_info(engine, log_time.seconds | engine.start_seconds)
    except Exception as error:
        server.send(Failed(wire_error(_start_error(error, start))))
    else:
        gc.collect()
        # What lives as long as the process is never collected: looking at it would stop all
        # requests for a while.
        gc.freeze()
        server.send(Ready(info))
        threading.Thread(
            target=_prepare_grammars,
            args=(engine, server.has_answered),  # not before: the server waits for an answer
            name="qtool-grammars",
            daemon=True,
        ).start()
        server.serve(engine)
    server.receive()  # nothing comes but the end of the connection


def _log_to_stderr() -> None:
    """Log qtool and the libraries to stderr, escaped: records may quote the model's files."""
    guard_streams()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(EscapingFormatter())
    logging.basicConfig(handlers=[handler])


def _redirect_transformers_log() -> None:
    """Let transformers log through the root handler; its own would escape nothing."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()


def _start_error(error: Exception, start: Start) -> QtoolError:
    """Return what the server reports for ``error``, which stopped the engine from starting."""
    revision = EngineConfig(**start.options).revision  # type: ignore[arg-type]
    if isinstance(error, QtoolError):
        if error.code == "E_KV_CACHE":
            error.hint += f"; or {_with_more_gpus(start.model_path, revision)}"
        return error
    if type(error).__name__ == "OutOfMemoryError":
        return ResourceError(
            "E_DOES_NOT_FIT",
            f"the device has no memory for the weights: {one_line(error)}",
            hint=f"quantize it, or {_with_more_gpus(start.model_path, revision)}",
        )
    no_memory = memory_error(error, "the engine")
    if no_memory is not None:
        return no_memory
    LOG.error("the engine did not start", exc_info=error)
    return QtoolError(
        "E_BUG", f"the engine did not start: {type(error).__name__}: {one_line(error)}"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))

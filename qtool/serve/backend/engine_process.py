"""The engine's end of the socket that `engine_client` holds the other end of."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import itertools
import logging
import operator
import os
import pickle
import queue
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any, NoReturn

from qtool.errors import QtoolError, ResourceError, one_line, to_wire
from qtool.serve.backend.engine_client import LENGTH, Ending, Facts, Load, Piece, Submission

LOG = logging.getLogger("qtool.serve")
NOTHING: tuple[str, Sequence[Any]] = ("", ())


class _Desk:
    """The engine's end: one thread takes in messages, one does what they say, one sends what the
    engine's loop hands it.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._inbox: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._requests: dict[
            int, tuple[str, Sequence[Any]]
        ] = {}  # the rid of each submission, and the engine's requests for it
        for name, run in (("qtool-inbox", self._receive), ("qtool-outbox", self._send)):
            threading.Thread(target=run, name=name, daemon=True).start()

    def next(self) -> tuple[Any, ...]:
        """Return the next message."""
        return self._inbox.get()

    def say(self, kind: str, said: Any) -> None:
        """Send, from any thread."""
        self._outbox.put((kind, said))

    def serve(self, engine: Any) -> NoReturn:
        """Do what the server asks for."""
        while True:
            kind, *said = self.next()
            if kind == "submit":
                self._submit(engine, *said)
            elif kind == "abandon":
                engine.abandon(self._requests.pop(said[0], NOTHING)[1])
            elif kind == "abort":
                for rid, requests in list(self._requests.values()):
                    if said[0] in (None, rid):
                        engine.abandon(requests)
            elif kind == "load":
                self.say("load", (said[0], _load(engine)))

    def _submit(self, engine: Any, key: int, submission: Submission) -> None:
        import torch

        from qtool.engine.engine import Ask

        told: dict[
            int, tuple[int, int]
        ] = {}  # tokens and characters of each choice that the server knows

        def tell(news: tuple[int, Any, bool]) -> None:  # in the thread of the engine's loop
            index, answer, last = news
            # the device does nothing more for this process
            if isinstance(answer, torch.AcceleratorError):
                LOG.error("the device failed: %s", one_line(answer))
                os._exit(1)
            if isinstance(answer, Exception):
                self.say("told", (key, _wire(answer)))
            else:
                self.say("told", (key, _piece(index, answer, *told.get(index, (0, 0)))))
                told[index] = (answer.tokens, len(answer.text))
            if last:
                self._forget(key)

        try:
            if submission.grammar is not None:
                engine.compiler.take(*submission.grammar)
            ask = Ask(
                prompt=None,
                sampling_params=[submission.params]  # type: ignore[list-item]
                * len(submission.prompts),
                input_ids=submission.prompts,
                stream=submission.stream,
                return_logprob=submission.top_logprobs is not None,
                top_logprobs_num=submission.top_logprobs or 0,
                logprob_start_len=submission.prompt_logprobs_from,
                # two clients may send one rid
                rid=[f"{key}-{number}" for number in range(len(submission.prompts))],
            )
            self._requests[key] = submission.rid, engine.submit(ask, tell)
            self._forget(key)  # it may have ended already
        except Exception as error:
            self.say("told", (key, _wire(error)))

    def _forget(self, key: int) -> None:
        if all(request.done for request in self._requests.get(key, NOTHING)[1]):
            self._requests.pop(key, None)

    def _receive(self) -> None:
        try:
            with self._connection.makefile("rb") as file:
                while len(head := file.read(LENGTH.size)) == LENGTH.size:
                    self._inbox.put(pickle.loads(file.read(LENGTH.unpack(head)[0])))
        finally:
            # the server is gone, or wants this: the device's memory goes back with the process
            os._exit(0)

    def _send(self) -> None:
        try:
            while True:
                messages = [self._outbox.get()]
                with contextlib.suppress(queue.Empty):
                    while True:
                        messages.append(self._outbox.get_nowait())
                for kind, group in itertools.groupby(messages, key=operator.itemgetter(0)):
                    said = [said for _, said in group]
                    # what one step told is one message
                    for one in [said] if kind == "told" else said:
                        data = pickle.dumps((kind, one), pickle.HIGHEST_PROTOCOL)
                        self._connection.sendall(LENGTH.pack(len(data)) + data)
        except OSError:
            pass  # the server is gone
        except Exception:
            LOG.exception("the engine cannot tell what it made")
        finally:
            os._exit(1)


def _piece(choice: int, answer: Any, tokens: int, characters: int) -> Piece:
    """Return what ``answer`` has beyond the first so many tokens and characters."""
    request, sequence = answer.request, answer.request.sequence
    start = len(sequence.prompt)
    ending = None
    if answer.reason is not None:
        ending = Ending(
            answer.reason,
            start,
            sequence.cached_tokens,
            answer.first_token_s,
            answer.seconds,
            request.input_logprobs,
            request.input_top,
        )
    return Piece(
        choice,
        answer.text[characters:],
        sequence.tokens[start + tokens : start + answer.tokens],
        request.output_logprobs[tokens : answer.tokens],
        request.output_top[tokens : answer.tokens],
        ending,
    )


def _wire(error: Exception) -> dict[str, object]:
    if not isinstance(error, QtoolError):
        LOG.error("a request failed: %s: %s", type(error).__name__, one_line(error))
        error = QtoolError(
            "E_BUG", f"the engine failed: {type(error).__name__}", hint="its log says more"
        )
    return to_wire(error)


def _load(engine: Any) -> Load:
    scheduler = engine.loop.scheduler
    return Load(
        len(scheduler.running),
        len(scheduler.waiting),
        scheduler.kv_usage,
        scheduler.prefix_queries,
        scheduler.prefix_hits,
        scheduler.preemptions,
    )


def _facts(engine: Any) -> Facts:
    from qtool.engine.attention.pages import PAGE

    runner = engine.loop.runner
    tensors = itertools.chain(runner.model.parameters(), runner.model.buffers())
    pages = next(iter(runner.layers.values()))
    return Facts(
        model_path=str(engine.model_path),
        tokenizer_path=str(
            engine.tokenizer.name_or_path if engine.tokenizer else engine.model_path
        ),
        tokenizer=engine.tokenizer.backend_tokenizer.to_str() if engine.tokenizer else "",
        eos_ids=engine.eos_ids,
        vocab_size=runner.vocab_size,
        context_length=engine.context_length,
        max_running=runner.limits.max_running,
        max_total_tokens=runner.page_count * PAGE,
        device=_device_name(runner.device),
        dtype=str(runner.model.dtype).removeprefix("torch."),
        quantization=_schemes(runner.model),
        kv_cache_dtype=str(pages.k.dtype).removeprefix("torch."),
        weights_bytes=sum(
            {_place(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}.values()
        ),
    )


def _place(tensor: Any) -> int:
    """Return what tells tensors with memory of their own apart; oneDNN's do not say where theirs
    is.
    """
    return id(tensor) if tensor.is_mkldnn else int(tensor.data_ptr())


def _schemes(model: Any) -> str:
    """Return the schemes of the quantized layers, the most frequent first; empty when there is
    none.
    """
    from qtool.runtime.linear import QuantizedLinear

    names = Counter(
        module.spec.scheme.name for module in model.modules() if isinstance(module, QuantizedLinear)
    )
    return "; ".join(name for name, _ in names.most_common())


def _device_name(device: Any) -> str:
    import torch

    return (
        f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
    )


def _prepare_grammars(engine: Any) -> None:
    """Import what constrained answers need, so that the first of them does not hold up what comes
    behind it.
    """
    if engine.compiler is None or importlib.util.find_spec("xgrammar") is None:
        return
    gc.disable()
    try:
        engine.compiler.compile("regex", "a")
        gc.freeze()
    finally:
        gc.enable()


def _with_more_gpus(options: dict[str, Any]) -> str:
    """Return what to type instead where the model does not fit one GPU."""
    import torch

    from qtool.checkpoint import open_checkpoint, resolve_model
    from qtool.serve.settings import ServeOptions, suggestion

    size = open_checkpoint(
        resolve_model(options["model_path"], revision=options.get("revision"))
    ).size_bytes
    memory = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None
    given = ServeOptions(model_path=options["model_path"])
    return suggestion(given, size_bytes=size, gpu_bytes=memory)


def main(descriptor: int) -> None:
    """Run the engine at the other end of ``descriptor``, a socket."""
    # of a terminal or a whole group: the server decides when the end has come
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):
        signal.signal(number, signal.SIG_IGN)
    desk = _Desk(socket.socket(fileno=descriptor))
    _, options = desk.next()
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s: %(message)s")
    logging.getLogger("qtool").setLevel(options.pop("log_level"))
    logging.captureWarnings(True)
    try:
        from qtool.engine.engine import Engine

        engine = Engine(**options)
        facts = _facts(engine)
    except QtoolError as error:
        if error.code == "E_KV_CACHE":
            error.hint += f"; or {_with_more_gpus(options)}"
        desk.say("failed", to_wire(error))
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            message = f"the device has no memory for the weights: {one_line(error)}"
            desk.say(
                "failed",
                to_wire(
                    ResourceError(
                        "E_DOES_NOT_FIT",
                        message,
                        hint=f"quantize it, or {_with_more_gpus(options)}",
                    )
                ),
            )
            desk.next()
        LOG.exception("the engine did not start")
        desk.say(
            "failed",
            to_wire(
                QtoolError(
                    "E_BUG", f"the engine did not start: {type(error).__name__}: {one_line(error)}"
                )
            ),
        )
    else:
        gc.collect()
        # what lives as long as the process is not looked at again: a collection would stop all
        # requests for a while
        gc.freeze()
        desk.say("ready", facts)
        threading.Thread(
            target=_prepare_grammars, args=(engine,), name="qtool-grammars", daemon=True
        ).start()
        desk.serve(engine)
    desk.next()  # nothing comes but the end of the connection


if __name__ == "__main__":
    main(int(sys.argv[1]))

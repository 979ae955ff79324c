"""The loop of the engine: one thread owns the device, launches a step, and reads the one before it
while that runs.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from qtool.engine import scheduler
from qtool.engine.detokenizer import FinishReason, TextStream
from qtool.engine.grammar import Constraint
from qtool.engine.kv_cache import Pages
from qtool.engine.model_runner import InFlightStep, Runner
from qtool.engine.sampler import Logprobs
from qtool.engine.sampling_batch import History, RowRequest
from qtool.engine.sampling_params import SamplingParams
from qtool.errors import QtoolError, ResourceError, UsageError, one_line
from qtool.runtime.kernels import current

LOG = logging.getLogger("qtool.engine")
JOIN_TIMEOUT_S = 30.0
# as SGLang has it: the natural logarithm, the token, and its text, which is left out
TokenLogprob = tuple[float | None, int, None]


@dataclass(eq=False)
class Request:
    """One completion on its way.

    The loop's thread calls ``deliver`` with an `Answer` or an error, and whether that is the last.
    """

    id: str
    group: str
    """The rid of the call it belongs to."""
    sequence: scheduler.SequenceState
    params: SamplingParams
    seed: int
    text: TextStream
    stream: bool
    history: History | None
    """What penalties count."""
    constraint: Constraint | None
    """The grammar of the text."""
    top_logprobs: int | None
    """Alternatives; None: no log probabilities."""
    prompt_logprobs_from: int | None
    """The first token of the prompt whose log probability is wanted."""
    deliver: Callable[[Answer | Exception, bool], object] = lambda answer, last: None
    done: bool = False
    began: float = field(default_factory=time.monotonic)
    first_token_s: float | None = None
    """Since it began, until its first token was read."""
    written: str = ""
    """The text so far."""
    output_logprobs: list[TokenLogprob] = field(default_factory=list)
    output_top: list[list[TokenLogprob]] = field(default_factory=list)
    input_logprobs: list[TokenLogprob] = field(default_factory=list)
    input_top: list[list[TokenLogprob] | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.prompt_logprobs_from is not None:  # nothing says how likely the first one was
            self.input_logprobs.append(
                (None, self.sequence.prompt[self.prompt_logprobs_from], None)
            )
            self.input_top.append(None)

    @property
    def next_prompt_place(self) -> int:
        """The token of the prompt whose log probability comes next."""
        return (self.prompt_logprobs_from or 0) + len(self.input_logprobs)

    def answer(self, reason: FinishReason | None) -> Answer:
        """Say how far it is."""
        self.written += self.text.take()
        tokens = len(self.sequence.tokens) - len(self.sequence.prompt)
        return Answer(
            self, tokens, self.written, reason, time.monotonic() - self.began, self.first_token_s
        )


@dataclass(frozen=True)
class Answer:
    """How far a request was at some moment: lists of the request only grow, so `result` may be made
    in any thread, later.

    seconds: since the request was made. first_token_s: from then to its first token, None when
        there is none.
    """

    request: Request
    tokens: int
    text: str
    reason: FinishReason | None
    seconds: float
    first_token_s: float | None

    def result(self) -> dict[str, Any]:
        """Return the dictionary that SGLang returns for a request."""
        request, sequence = self.request, self.request.sequence
        meta: dict[str, Any] = {
            "id": request.id,
            "finish_reason": self.reason,
            "prompt_tokens": len(sequence.prompt),
            "completion_tokens": self.tokens,
            "cached_tokens": sequence.cached_tokens,
        }
        if request.top_logprobs is not None:
            meta |= {
                "input_token_logprobs": list(request.input_logprobs),
                "output_token_logprobs": request.output_logprobs[: self.tokens],
            }
            if request.top_logprobs:
                meta |= {
                    "input_top_logprobs": list(request.input_top),
                    "output_top_logprobs": request.output_top[: self.tokens],
                }
        if self.reason is not None:
            meta["e2e_latency"] = self.seconds
        start = len(sequence.prompt)
        return {
            "text": self.text,
            "output_ids": sequence.tokens[start : start + self.tokens],
            "meta_info": meta,
        }


class Loop:
    """Takes requests, schedules, launches, reads, tells; each request ends exactly once, whatever
    goes wrong.

    ``overlap``: a step is launched before the tokens of the one before it are read. A CPU has
        nothing to overlap.
    """

    def __init__(self, runner: Runner, *, overlap: bool) -> None:
        limits = runner.limits
        self.runner, self.overlap = runner, overlap
        self.scheduler = scheduler.Scheduler(
            Pages(runner.page_count), limits.max_running, limits.token_budget, limits.context_length
        )
        self.requests: dict[str, Request] = {}
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._in_flight: InFlightStep | None = None
        self._stopping = False
        self._ended = False
        # between the last look into the inbox and those who put something in
        self._ending = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="qtool-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Let ``request`` take its turn. Raises: ResourceError, when the engine was shut down."""
        with self._ending:
            if self._ended:
                raise _stopped()
            self._inbox.put(lambda: self._admit(request))

    def abort(self, rid: str) -> None:
        """End the requests of the call ``rid``, or the one of that id, if they still run; their
        pages are free before the next step.
        """
        self._inbox.put(
            lambda: self._abort(
                [
                    request
                    for request in self.requests.values()
                    if rid in (request.id, request.group)
                ]
            )
        )

    def abandon(self, request: Request) -> None:
        """End ``request``, for which nobody waits any more."""
        self._inbox.put(lambda: self._abort([request]))

    def stop(self) -> None:
        """End all requests and the thread."""
        self._inbox.put(self._stop)
        # which may collect the garbage that an engine has become
        if threading.current_thread() is not self._thread:
            self._thread.join(JOIN_TIMEOUT_S)

    def _run(self) -> None:
        try:
            with torch.inference_mode(), current(self.runner.device):
                while not self._stopping:
                    try:
                        self._turn()
                    # a fault of this program: whoever waits is told, and the next are served
                    except Exception as error:
                        LOG.exception("the engine's loop failed")
                        self._in_flight = None
                        for request in list(self.requests.values()):
                            self._fail(request, error)
        finally:
            with self._ending:
                self._ended = True
            self._stopping = True
            while not self._inbox.empty():
                self._inbox.get()()
            for request in list(self.requests.values()):
                self._fail(request, _stopped())

    def _turn(self) -> None:
        """Launch a step, and read the one before it."""
        while not self._inbox.empty() or (
            not self.requests and self._in_flight is None and not self._stopping
        ):
            self._inbox.get()()
        before, self._in_flight = self._in_flight, None
        if before is not None and not self.overlap:
            self._read(before)
            before = None
        step = self.scheduler.schedule()
        if step is not None:
            self._in_flight = self._launch(step)
        if before is not None:
            self._read(before)

    def _admit(self, request: Request) -> None:
        try:
            if self._stopping:
                raise _stopped()
            if request.id in self.requests:
                raise UsageError(
                    "E_REQUEST_ID",
                    f"a request `{request.id}` is running",
                    hint="give each request an id of its own, or none",
                )
            self.scheduler.add(request.sequence)
        except QtoolError as error:
            self._tell(request, error, last=True)
            return
        request.sequence.owner = request
        self.requests[request.id] = request

    def _abort(self, requests: list[Request]) -> None:
        for request in requests:
            self._end(request, {"type": "abort", "message": "the request was aborted"})

    def _stop(self) -> None:
        self._stopping = True
        self._abort(list(self.requests.values()))

    def _launch(self, step: scheduler.Step) -> InFlightStep | None:
        """Start ``step``.

        One that raises fails its own requests; one without memory only the newest, and the others
        are computed again.
        """
        rows, prompts = [], []
        for position, chunk in enumerate(step.chunks):
            request: Request = chunk.sequence.owner
            if chunk.samples:
                rows.append(_row(request, chunk))
            first = request.prompt_logprobs_from
            if (
                first is not None
                and chunk.start + chunk.count > first
                and chunk.start < len(chunk.sequence.prompt) - 1
            ):
                prompts.append((position, request.top_logprobs or 0))
        try:
            return self.runner.launch(step, rows, prompts)
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            message = f"the device has no memory for the request: {one_line(error)}"
            self._fail(
                self.scheduler.rollback(step).owner,
                ResourceError("E_OUT_OF_MEMORY", message, hint="lower mem_fraction_static"),
            )
        except Exception as error:
            LOG.exception("a step failed")
            for chunk in step.chunks:
                self._fail(chunk.sequence.owner, error)
        return None

    def _read(self, launched: InFlightStep) -> None:
        """Wait for a step, and tell its requests what it made."""
        try:
            tokens = launched.wait()
        except Exception as error:  # of the device: whatever was launched since is lost too
            lost = [
                chunk.sequence
                for one in (launched, self._in_flight)
                if one
                for chunk in one.step.chunks
            ]
            self._in_flight = None
            LOG.exception("a step failed on the device")
            for sequence in lost:
                self._fail(sequence.owner, error)
            return
        sampling = [chunk.sequence for chunk in launched.step.chunks if chunk.samples]
        for sequence, token in zip(sampling, tokens, strict=True):
            if token < 0:
                hint = "`qtool inspect --deep` looks for weights that are not finite"
                self._fail(
                    sequence.owner,
                    ResourceError("E_NOT_FINITE", "the model's logits are not finite", hint=hint),
                )
        for position, logprobs in launched.prompts.items():
            _note_prompt(launched.step.chunks[position], logprobs)
        self.scheduler.commit(launched.step, tokens)
        found = dict(zip(launched.logprob_rows, itertools.count()))
        for row, (sequence, token) in enumerate(zip(sampling, tokens, strict=True)):
            if sequence.state == "finished":
                continue
            request: Request = sequence.owner
            if launched.logprobs is not None and row in found:
                one, top = _logprobs_at(
                    launched.logprobs, found[row], token, request.top_logprobs or 0
                )
                request.output_logprobs.append(one)
                request.output_top.append(top)
            try:
                self._hand_over(request, token)
            except QtoolError as error:
                self._fail(request, error)
            except Exception as error:  # of a tokenizer, say
                LOG.exception("the text of a request failed")
                self._fail(request, error)

    def _hand_over(self, request: Request, token: int) -> None:
        if request.first_token_s is None:
            request.first_token_s = time.monotonic() - request.began
        if request.history is not None:
            request.history.append(token)
        complete = request.constraint is not None and request.constraint.accept(token)
        reason = request.text.push(token)
        if complete and (reason is None or reason["type"] == "length"):
            reason = {"type": "stop"}
        if reason is not None:
            self._end(request, reason)
        elif request.stream:
            self._tell(request, request.answer(None), last=False)

    def _end(self, request: Request, reason: FinishReason) -> None:
        if self._forget(request):
            self.scheduler.finish(request.sequence)
            request.written += request.text.finish(reason)
            self._tell(request, request.answer(reason), last=True)

    def _fail(self, request: Request, error: Exception) -> None:
        if self._forget(request):
            self.scheduler.fail(request.sequence)
            self._tell(request, error, last=True)

    def _forget(self, request: Request) -> bool:
        """Return whether ``request`` was still running; another of its id stays."""
        if self.requests.get(request.id) is not request:
            return False
        del self.requests[request.id]
        return True

    @staticmethod
    def _tell(request: Request, answer: Answer | Exception, *, last: bool) -> None:
        request.done |= last
        try:
            request.deliver(answer, last)
        except Exception:  # whoever asked is gone
            LOG.info("nobody takes the answer to %s", request.id)


def _stopped() -> ResourceError:
    return ResourceError("E_ENGINE_STOPPED", "the engine was shut down", hint="make another one")


def _row(request: Request, chunk: scheduler.Chunk) -> RowRequest:
    """Return how to sample after ``chunk``."""
    position = chunk.start + chunk.count - len(chunk.sequence.prompt)
    wanted = request.top_logprobs is not None
    mask = request.constraint.mask if request.constraint is not None else None
    return RowRequest(
        request.params,
        request.seed,
        position,
        request.history,
        request.text.end_ids,
        wanted,
        request.top_logprobs or 0,
        mask,
    )


def _note_prompt(chunk: scheduler.Chunk, logprobs: Logprobs) -> None:
    """Keep the log probabilities of the prompt's tokens that follow those of ``chunk``; after a
    preemption some are known.
    """
    request: Request = chunk.sequence.owner
    for place in range(
        request.next_prompt_place, min(chunk.start + chunk.count + 1, len(chunk.sequence.prompt))
    ):
        one, top = _logprobs_at(
            logprobs,
            place - chunk.start - 1,
            chunk.sequence.prompt[place],
            request.top_logprobs or 0,
        )
        request.input_logprobs.append(one)
        request.input_top.append(top)


def _logprobs_at(
    logprobs: Logprobs, row: int, token: int, top: int
) -> tuple[TokenLogprob, list[TokenLogprob]]:
    """Return what ``logprobs``, on the host, say of ``token`` and of the ``top`` most likely tokens
    of a row.
    """
    best = zip(logprobs.top[row, :top].tolist(), logprobs.top_ids[row, :top].tolist(), strict=True)
    return (float(logprobs.chosen[row]), token, None), [(value, id, None) for value, id in best]

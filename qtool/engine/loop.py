"""The engine's loop: one thread owns the device, launches a step, and reads the step before it
while that runs.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qtool.engine.in_flight import InFlightStep
from qtool.engine.kv_cache import Pages
from qtool.engine.model_runner import Runner
from qtool.engine.outputs import CompletionError, FinishReason, Output, TokenLogprob
from qtool.engine.requests import Request
from qtool.engine.sampler import Logprobs
from qtool.engine.sampling_batch import RowRequest
from qtool.engine.scheduler import Scheduler
from qtool.engine.speculation import MtpDrafts, SpecMeter
from qtool.engine.state_snapshots import StateSnapshots
from qtool.engine.step import Chunk, Gain, SequenceState, Step
from qtool.engine.throughput import Throughput
from qtool.errors import QtoolError, ResourceError, UsageError, one_line
from qtool.runtime.compiling import log_compiles
from qtool.runtime.kernels import current

LOG = logging.getLogger("qtool.engine")
JOIN_TIMEOUT_S = 30.0


class Loop:
    """Takes requests, schedules and launches steps, reads their tokens and delivers outputs.

    Each request ends exactly once, whatever goes wrong.

    Args:
        runner: runs the steps.
        overlap: launch a step before the tokens of the step before it are read. A CPU has nothing
            to overlap.
    """

    def __init__(self, runner: Runner, *, overlap: bool) -> None:
        limits = runner.limits
        self.runner = runner
        self.overlap = overlap
        self.scheduler = Scheduler(
            Pages(runner.page_count),
            limits.max_running,
            limits.token_budget,
            limits.context_length,
            propose=_propose if limits.drafts else None,
            lookahead=limits.lookahead,
            snapshots=StateSnapshots(limits.snapshots) if runner.geometry.states else None,
            keeps_latents=runner.keeps_latents,
        )
        self.spec = SpecMeter() if limits.drafts else None
        """What came of drafts; None where there are none."""
        self.throughput = Throughput()
        self.requests: dict[str, Request] = {}
        self.steps = 0
        """Steps launched so far: what a watchdog looks at."""
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._in_flight: InFlightStep | None = None
        self._stopping = False
        self._ended = False
        # held between the last look into the inbox and those who put something in
        self._ending = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="qtool-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queue ``request``. Raises: ResourceError, when the engine was shut down."""
        with self._ending:
            if self._ended:
                raise _stopped()
            self._inbox.put(lambda: self._add(request))

    def abort(self, rid: str) -> None:
        """End the requests of the call ``rid``, or the one with that id, if they still run; their
        pages are free before the next step.
        """
        self._inbox.put(lambda: self._abort(self._named(rid)))

    def cancel(self, requests: Sequence[Request]) -> None:
        """End ``requests``, whose outputs nobody reads any more."""
        self._inbox.put(lambda: self._abort(requests))

    def flush_cache(self) -> None:
        """Let no request after this call find pages of those before it."""
        self._inbox.put(self.scheduler.forget_all)

    def stop(self) -> None:
        """End all requests and the thread."""
        self._inbox.put(self._stop)
        # the garbage collector may run this in the loop's own thread
        if threading.current_thread() is not self._thread:
            self._thread.join(JOIN_TIMEOUT_S)

    def _run(self) -> None:
        try:
            with torch.inference_mode(), current(self.runner.device):
                log_compiles(self.runner.device)
                while not self._stopping:
                    self._turn_safely()
        finally:
            with self._ending:
                self._ended = True
            self._stopping = True
            while not self._inbox.empty():
                self._inbox.get()()
            self._fail_all(_stopped())

    def _turn_safely(self) -> None:
        """Do a turn; a bug in it fails all requests, and the loop goes on."""
        try:
            self._turn()
        except Exception as error:
            LOG.exception("the engine's loop failed")
            self._in_flight = None
            self._fail_all(error)

    def _turn(self) -> None:
        """Launch a step, and read the one before it."""
        self._handle_inbox()
        before = self._in_flight
        self._in_flight = None
        if before is not None and not self.overlap:
            self._read(before)
            before = None
        step = self.scheduler.schedule()
        if step is not None:
            self._in_flight = self._launch(step)
            self.steps += 1
        if before is not None:
            self._read(before)

    def _handle_inbox(self) -> None:
        """Do what other threads asked for; wait for it when there is nothing to compute."""
        while not self._inbox.empty() or self._is_idle():
            self._inbox.get()()

    def _is_idle(self) -> bool:
        return not self.requests and self._in_flight is None and not self._stopping

    def _add(self, request: Request) -> None:
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
            self._deliver_error(request, error)
            return
        request.sequence.owner = request
        self.requests[request.id] = request

    def _named(self, rid: str) -> list[Request]:
        """Return the running requests with that id or of that call."""
        return [request for request in self.requests.values() if rid in (request.id, request.group)]

    def _abort(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._end(request, {"type": "abort", "message": "the request was aborted"})

    def _stop(self) -> None:
        self._stopping = True
        self._abort(list(self.requests.values()))

    def _launch(self, step: Step) -> InFlightStep | None:
        """Start ``step``.

        A step that raises fails its own requests. One that lacks memory fails only the newest
        of them, and the others are computed again.
        """
        for chunk in step.chunks:
            request = _request(chunk.sequence)
            if request.queue_s is None:
                request.queue_s = time.monotonic() - request.began
        rows = [row for chunk in step.chunks if chunk.samples for row in _rows(chunk)]
        prompts = [
            (position, _request(chunk.sequence).top_logprobs or 0)
            for position, chunk in enumerate(step.chunks)
            if _wants_prompt_logprobs(chunk)
        ]
        try:
            return self.runner.launch(step, rows, prompts)
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            message = f"the device has no memory for the request: {one_line(error)}"
            newest = self.scheduler.rollback(step)
            self._fail(
                _request(newest),
                ResourceError("E_OUT_OF_MEMORY", message, hint="lower mem_fraction_static"),
            )
        except Exception as error:
            LOG.exception("a step failed")
            self._fail_step(step, error)
        return None

    def _read(self, in_flight: InFlightStep) -> None:
        """Wait for a step, and deliver what its requests gained."""
        try:
            tokens = in_flight.wait()
        except Exception as error:
            LOG.exception("a step failed on the device")
            self._fail_in_flight(in_flight, error)
            return
        step = in_flight.step
        gained = step.gained(tokens)
        if min(tokens, default=0) < 0:
            self._fail_not_finite(gained)
        for position, logprobs in in_flight.prompts.items():
            _add_prompt_logprobs(step.chunks[position], logprobs)
        self.scheduler.commit(gained)
        if in_flight.vectors is not None:
            self._end_encoded(in_flight.vectors, gained)
            return
        if in_flight.logprobs is not None:
            _add_logprobs(in_flight.logprobs, in_flight.logprob_rows, gained)
        self.throughput.note(sum(len(its) for _, its in gained))
        if self.spec is not None:
            _count_drafts(self.spec, gained)
        if in_flight.drafts is not None:
            _keep_drafts(in_flight.drafts, gained)
        for chunk, gain in gained:
            if chunk.sequence.state != "finished":
                self._advance_safely(_request(chunk.sequence), gain)
        if self.spec is not None:
            self.spec.log(at_once=not self.requests)

    def _end_encoded(self, vectors: Tensor, gained: Sequence[Gain]) -> None:
        """End the requests whose prompts were encoded to ``vectors`` [S, N]."""
        for (chunk, _), vector in zip(gained, vectors.numpy(), strict=True):
            if chunk.sequence.state != "finished":
                request = _request(chunk.sequence)
                request.vector = vector.astype("<f4").tobytes()
                self._end(request, {"type": "length", "length": 0})

    def _fail_in_flight(self, in_flight: InFlightStep, error: Exception) -> None:
        """Fail a step that the device failed, and what was launched since, which is lost too."""
        later = self._in_flight
        self._in_flight = None
        self._fail_step(in_flight.step, error)
        if later is not None:
            self._fail_step(later.step, error)

    def _advance_safely(self, request: Request, tokens: Sequence[int]) -> None:
        """Advance ``request``; an error of its text or grammar fails it alone."""
        try:
            self._advance(request, tokens)
        except QtoolError as error:
            self._fail(request, error)
        except Exception as error:  # of a tokenizer, say
            LOG.exception("the text of a request failed")
            self._fail(request, error)

    def _advance(self, request: Request, tokens: Sequence[int]) -> None:
        """Add ``tokens``, and deliver them, or end the request with one of them."""
        for number, token in enumerate(tokens, start=1):
            reason = request.advance(token)
            if reason is not None:
                request.drop(len(tokens) - number)
                self._end(request, reason)
                return
        if request.stream:
            self._deliver(request, request.take_output())

    def _end(self, request: Request, reason: FinishReason) -> None:
        if self._remove(request):
            self.scheduler.finish(request.sequence)
            request.done = True
            self._deliver(request, request.take_output(reason))

    def _fail(self, request: Request, error: Exception) -> None:
        if self._remove(request):
            self.scheduler.fail(request.sequence)
            self._deliver_error(request, error)

    def _fail_step(self, step: Step, error: Exception) -> None:
        for chunk in step.chunks:
            self._fail(_request(chunk.sequence), error)

    def _fail_all(self, error: Exception) -> None:
        for request in list(self.requests.values()):
            self._fail(request, error)

    def _fail_not_finite(self, gained: Sequence[Gain]) -> None:
        """Fail the requests whose logits were not finite: their token is -1."""
        hint = "`qtool inspect --deep` looks for weights that are not finite"
        for chunk, tokens in gained:
            if tokens[-1] < 0:
                error = ResourceError(
                    "E_NOT_FINITE", "the model's logits are not finite", hint=hint
                )
                self._fail(_request(chunk.sequence), error)

    def _remove(self, request: Request) -> bool:
        """Return whether ``request`` was still running; another one with its id stays."""
        if self.requests.get(request.id) is not request:
            return False
        del self.requests[request.id]
        return True

    def _deliver_error(self, request: Request, error: Exception) -> None:
        request.done = True
        self._deliver(request, CompletionError(request.index, error))

    @staticmethod
    def _deliver(request: Request, output: Output) -> None:
        try:
            request.deliver(output)
        except Exception:  # an event loop that was closed, say
            LOG.info("the caller of %s is gone", request.id)


def _stopped() -> ResourceError:
    return ResourceError("E_ENGINE_STOPPED", "the engine was shut down", hint="make another one")


def _request(sequence: SequenceState) -> Request:
    """Return the request that ``sequence`` belongs to."""
    assert isinstance(sequence.owner, Request)
    return sequence.owner


def _propose(sequence: SequenceState, room: int) -> Sequence[int]:
    """Return at most ``room`` tokens that may follow those of ``sequence``, as far as its grammar
    is known to let them, and more after them.
    """
    request = _request(sequence)
    drafts = () if request.drafter is None else request.drafter.propose(sequence.tokens, room)
    if request.constraint is None:
        return drafts
    request.masks = request.constraint.masks_along(drafts)
    return drafts[: len(request.masks) - 1]


def _rows(chunk: Chunk) -> list[RowRequest]:
    """Return how to sample after ``chunk``, which samples: before its drafts, and after each."""
    request = _request(chunk.sequence)
    drafts = chunk.drafts
    constraint = request.constraint
    masks: Sequence[NDArray[np.int32] | None] = [None] * chunk.sampled
    if constraint is not None:
        masks = request.masks[: chunk.sampled] if drafts else [constraint.mask]
    first = chunk.start + chunk.count - len(drafts) - len(chunk.sequence.prompt)
    return [
        RowRequest(
            request.params,
            request.seed,
            first + number,
            history=request.history,
            drafts=drafts[:number],
            end_ids=request.text.end_ids,
            logprobs=request.top_logprobs is not None,
            top_logprobs=request.top_logprobs or 0,
            labels=request.labels,
            mask=mask,
        )
        for number, mask in enumerate(masks)
    ]


def _keep_drafts(drafts: Tensor, gained: Sequence[Gain]) -> None:
    """Keep ``drafts`` [S, D], which may follow what the S sequences now have."""
    for (chunk, _), row in zip(gained, drafts.tolist(), strict=True):
        drafter = _request(chunk.sequence).drafter
        assert isinstance(drafter, MtpDrafts)
        drafter.keep(row, len(chunk.sequence.tokens))


def _count_drafts(meter: SpecMeter, gained: Sequence[Gain]) -> None:
    """Count the steps of sequences that decode; the last token of a prompt may have drafts, too."""
    for chunk, tokens in gained:
        sequence = chunk.sequence
        decodes = bool(chunk.drafts) or chunk.start >= len(sequence.prompt)
        if sequence.state != "finished" and decodes:
            proposed = len(chunk.drafts)
            correct = len(tokens) - 1
            meter.note(proposed, correct)
            counts = _request(sequence).spec
            if counts is not None:
                counts.note(proposed, correct)


def _wants_prompt_logprobs(chunk: Chunk) -> bool:
    """Return whether tokens of the prompt follow those of ``chunk`` whose log probabilities are
    wanted.
    """
    first = _request(chunk.sequence).prompt_logprobs_from
    if first is None or chunk.start + chunk.count <= first:
        return False
    return chunk.start < len(chunk.sequence.prompt) - 1


def _add_prompt_logprobs(chunk: Chunk, logprobs: Logprobs) -> None:
    """Keep the log probabilities of the prompt's tokens that follow those of ``chunk``; after a
    preemption some are known.
    """
    request = _request(chunk.sequence)
    prompt = chunk.sequence.prompt
    end = min(chunk.start + chunk.count + 1, len(prompt))
    for position in range(request.next_prompt_position, end):
        row = position - chunk.start - 1
        request.prompt_logprobs.append(
            _logprob_at(logprobs, row, prompt[position], request.top_logprobs or 0)
        )


def _add_logprobs(logprobs: Logprobs, rows: Sequence[int], gained: Sequence[Gain]) -> None:
    """Keep the log probabilities of the tokens just ``gained``.

    ``rows``: which of the tokens sampled the rows of ``logprobs`` belong to.
    """
    numbers = {row: number for number, row in enumerate(rows)}
    row = 0
    for chunk, tokens in gained:
        if chunk.sequence.state != "finished" and row in numbers:
            request = _request(chunk.sequence)
            request.new_logprobs += [
                _logprob_at(logprobs, number, token, request.top_logprobs or 0, len(request.labels))
                for number, token in enumerate(tokens, start=numbers[row])
            ]
        row += chunk.sampled


def _logprob_at(
    logprobs: Logprobs, row: int, token: int, top: int, labels: int = 0
) -> TokenLogprob:
    """Return what ``logprobs``, on the host, have for ``token``, the ``top`` most likely tokens of
    a row and its ``labels``.
    """
    values = logprobs.top[row, :top].tolist()
    best = tuple(zip(values, logprobs.top_ids[row, :top].tolist(), strict=True))
    chosen, *others = logprobs.chosen[row, : 1 + labels].tolist()
    return TokenLogprob(chosen, token, best, tuple(others))

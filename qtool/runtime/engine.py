"""Requests in, tokens out: a loop that keeps one step on its way while it reads the one before; and the `Engine` of Python users, as SGLang's."""

from __future__ import annotations

import asyncio
import atexit
import itertools
import logging
import os
import queue
import random
import threading
import time
import uuid
import warnings
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch

from qtool.checkpoint import Checkpoint, open_checkpoint, resolve_model
from qtool.errors import CheckpointRefused, QtoolError, ResourceError, UsageError, one_line
from qtool.formats import Layout
from qtool.runtime import scheduler
from qtool.runtime.cache import Pages
from qtool.runtime.detokenizer import FinishReason, TextStream
from qtool.runtime.load import cache_scales, device_named, materialize, plan_load
from qtool.runtime.runner import Launched, Limits, Runner
from qtool.runtime.sampler import MAX_TOP_LOGPROBS, History, Logprobs, RowRequest, SamplingParams

LOG = logging.getLogger("qtool.engine")
Result = dict[str, Any]
Deliver = Callable[[Result | Exception, bool], None]  # what there is to say of a request, and whether it is the last
Answer = tuple[int, Result | Exception, bool]  # the same, after the index of the request among those of a call
COMPILE = ("off", "decode", "all")
KV_DTYPES = ("auto", "fp8_e4m3")
PROMPT_CHUNK = 256  # tokens a step of a prompt whose log probabilities are wanted: each takes a row of logits
MAX_RUNNING = {"cpu": 32, "cuda": 256}
TOKEN_BUDGET = {"cpu": 2048, "cuda": 8192}
CONTEXT = 8  # tokens of the prompt that the text continues
DEFAULT_CONTEXT = 4096  # of models that do not say
PATIENCE = 30.0  # seconds for the loop to end


@dataclass(eq=False)
class Request:
    """One completion on its way."""

    id: str
    sequence: scheduler.Sequence
    params: SamplingParams
    seed: int
    text: TextStream
    stream: bool
    history: History | None  # what penalties count
    end_ids: Sequence[int]  # what must not come before min_new_tokens
    top_logprobs: int | None  # alternatives; None: no log probabilities
    prompt_logprobs_from: int | None  # the first token of the prompt whose log probability is wanted
    deliver: Deliver = lambda result, last: None  # called by the loop's thread
    done: bool = False
    began: float = field(default_factory=time.monotonic)
    output_logprobs: list[tuple[float, int, None]] = field(default_factory=list)
    output_top: list[list[tuple[float, int, None]]] = field(default_factory=list)
    input_logprobs: list[tuple[float, int, None]] = field(default_factory=list)
    input_top: list[list[tuple[float, int, None]]] = field(default_factory=list)

    @property
    def output_ids(self) -> list[int]:
        """The tokens generated so far."""
        return self.sequence.tokens[len(self.sequence.prompt) :]

    def result(self, finish_reason: FinishReason | None) -> Result:
        """Return the dictionary that SGLang returns for a request."""
        meta: dict[str, Any] = {
            "id": self.id,
            "finish_reason": finish_reason,
            "prompt_tokens": len(self.sequence.prompt),
            "completion_tokens": len(self.sequence.tokens) - len(self.sequence.prompt),
            "cached_tokens": self.sequence.cached_tokens,
        }
        if self.top_logprobs is not None:
            meta |= {"output_token_logprobs": list(self.output_logprobs), "input_token_logprobs": list(self.input_logprobs)}
            if self.top_logprobs:
                meta |= {"output_top_logprobs": list(self.output_top), "input_top_logprobs": list(self.input_top)}
        if finish_reason is not None:
            meta["e2e_latency"] = time.monotonic() - self.began
        return {"text": self.text.text, "output_ids": self.output_ids, "meta_info": meta}


class Loop:
    """The thread that owns the device: takes requests, schedules, launches, reads, tells.

    ``overlap``: a step is launched before the tokens of the one before it are read. A CPU has nothing to overlap.
    """

    def __init__(self, runner: Runner, *, overlap: bool) -> None:
        limits = runner.limits
        self.runner, self.overlap = runner, overlap
        self.scheduler = scheduler.Scheduler(Pages(runner.page_count), limits.max_running, limits.token_budget, limits.context_length)
        self.requests: dict[str, Request] = {}
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._flying: Launched | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="qtool-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Let ``request`` take its turn; what becomes of it comes through its ``deliver``."""
        if not self._thread.is_alive():
            raise ResourceError("E_ENGINE_STOPPED", "the engine was shut down", hint="make another one")
        self._inbox.put(partial(self._admit, request))

    def abort(self, id: str) -> None:
        """End the request ``id``, if there still is one; its pages are free before the next step."""
        self._inbox.put(partial(self._abort, id))

    def stop(self) -> None:
        """End all requests and the thread."""
        if self._thread.is_alive():
            self._inbox.put(self._stop)
            self._thread.join(PATIENCE)

    def _run(self) -> None:
        with torch.inference_mode(), self.runner.on_device():
            while not self._stopping:
                try:
                    self._turn()
                except Exception as error:  # a fault of this program: whoever waits is told, and the others are served on
                    LOG.exception("the engine's loop failed")
                    self._flying = None
                    for request in list(self.requests.values()):
                        self._fail(request, error)

    def _turn(self) -> None:
        """Launch a step, and read the one before it."""
        while not self._inbox.empty() or (not self.requests and self._flying is None and not self._stopping):
            self._inbox.get()()
        before, self._flying = self._flying, None
        if before is not None and not self.overlap:
            self._read(before)
            before = None
        step = self.scheduler.schedule()
        if step is not None:
            self._flying = self._launch(step)
        if before is not None:
            self._read(before)

    def _admit(self, request: Request) -> None:
        try:
            if request.id in self.requests:
                raise UsageError("E_REQUEST_ID", f"a request `{request.id}` is running", hint="give each request an id of its own, or none")
            self.scheduler.add(request.sequence)
        except QtoolError as error:
            request.done = True
            request.deliver(error, True)
            return
        request.sequence.owner = request
        self.requests[request.id] = request

    def _abort(self, id: str) -> None:
        if request := self.requests.get(id):
            self._end(request, {"type": "abort", "message": "the request was aborted"})

    def _stop(self) -> None:
        self._stopping = True
        for id in list(self.requests):
            self._abort(id)

    def _launch(self, step: scheduler.Step) -> Launched | None:
        """Start ``step``. One that raises fails its own requests; one without memory only the newest, and the others are computed again."""
        rows, prompts = [], []
        for position, chunk in enumerate(step.chunks):
            request: Request = chunk.sequence.owner
            if chunk.samples:
                rows.append(self._row(request, chunk))
            if (
                request.prompt_logprobs_from is not None
                and chunk.start + chunk.count > request.prompt_logprobs_from
                and chunk.start < len(chunk.sequence.prompt) - 1
            ):
                prompts.append((position, request.top_logprobs or 0))
        try:
            return self.runner.launch(step, rows, prompts)
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            message = f"the device has no memory for the request: {one_line(error)}"
            self._fail(self.scheduler.undo(step).owner, ResourceError("E_OUT_OF_MEMORY", message, hint="lower --mem-fraction-static"))
        except Exception as error:
            LOG.exception("a step failed")
            for chunk in step.chunks:
                self._fail(chunk.sequence.owner, error)
        return None

    @staticmethod
    def _row(request: Request, chunk: scheduler.Chunk) -> RowRequest:
        position = chunk.start + chunk.count - len(chunk.sequence.prompt)
        wanted = request.top_logprobs is not None
        return RowRequest(request.params, request.seed, position, request.history, request.end_ids, wanted, request.top_logprobs or 0)

    def _read(self, launched: Launched) -> None:
        """Wait for a step, and tell its requests what it made."""
        try:
            tokens = launched.wait()
        except Exception as error:  # of the device: whatever was launched since is lost too
            lost = [chunk.sequence for one in (launched, self._flying) if one for chunk in one.step.chunks]
            self._flying = None
            LOG.exception("a step failed on the device")
            for sequence in lost:
                self._fail(sequence.owner, error)
            return
        sampling = [chunk.sequence for chunk in launched.step.chunks if chunk.samples]
        for sequence, token in zip(sampling, tokens, strict=True):
            if token < 0:
                hint = "`qtool inspect --deep` looks for weights that are not finite"
                self._fail(sequence.owner, ResourceError("E_NOT_FINITE", "the model's logits are not finite", hint=hint))
        for position, logprobs in launched.prompts.items():
            self._note_prompt(launched.step.chunks[position], logprobs)
        self.scheduler.took(launched.step, tokens)
        found = dict(zip(launched.logprob_rows, itertools.count()))
        for row, (sequence, token) in enumerate(zip(sampling, tokens, strict=True)):
            if sequence.state != "finished":
                request: Request = sequence.owner
                if launched.logprobs is not None and row in found:
                    one, top = _logprobs_at(launched.logprobs, found[row], token, request.top_logprobs or 0)
                    request.output_logprobs.append(one)
                    request.output_top.append(top)
                self._hand_over(request, token)

    def _hand_over(self, request: Request, token: int) -> None:
        if request.history is not None:
            request.history.append(token)
        reason = request.text.push(token)
        if reason is not None:
            self._end(request, reason)
        elif request.stream:
            request.deliver(request.result(None), False)

    @staticmethod
    def _note_prompt(chunk: scheduler.Chunk, logprobs: Logprobs) -> None:
        """Keep the log probabilities of the prompt's tokens after those of ``chunk``."""
        request: Request = chunk.sequence.owner
        first = max(request.prompt_logprobs_from or 0, 1)  # nothing says how likely the first token was
        for row in range(chunk.count):
            place = chunk.start + row + 1
            if first <= place < len(chunk.sequence.prompt) and place - first == len(request.input_logprobs):  # after a preemption some are known
                one, top = _logprobs_at(logprobs, row, chunk.sequence.prompt[place], request.top_logprobs or 0)
                request.input_logprobs.append(one)
                request.input_top.append(top)

    def _end(self, request: Request, reason: FinishReason) -> None:
        if self.requests.pop(request.id, None) is not None:
            self.scheduler.finish(request.sequence)
            request.text.finish(reason)
            request.done = True
            request.deliver(request.result(reason), True)

    def _fail(self, request: Request, error: Exception) -> None:
        if self.requests.pop(request.id, None) is not None:
            self.scheduler.fail(request.sequence)
            request.done = True
            request.deliver(error, True)


def _logprobs_at(logprobs: Logprobs, row: int, token: int, top: int) -> tuple[tuple[float, int, None], list[tuple[float, int, None]]]:
    """Return what ``logprobs``, on the host, say of ``token`` and of the ``top`` most likely tokens of a row, as SGLang's triples."""
    best = zip(logprobs.top[row, :top].tolist(), logprobs.top_ids[row, :top].tolist(), strict=True)
    return (float(logprobs.chosen[row]), token, None), [(value, id, None) for value, id in best]


class Engine:
    """A model that answers requests, many at a time: `sglang.Engine` with our quantized layers.

    Args:
        model_path: a folder, or a name on the Hub.
        tokenizer_path: where the tokenizer is, if not there. skip_tokenizer_init: prompts are ``input_ids``, and results have no text.
        device, dtype, quantization, revision: as `qtool.load` takes them.
        kv_cache_dtype: ``auto``, 8 bits where the checkpoint has scales for it, or ``fp8_e4m3``.
        mem_fraction_static: share of the GPU's memory that weights and KV cache take.
        context_length: tokens of prompt and answer together, if fewer than the model's.
        max_running_requests: sequences that are computed at once; others wait.
        max_total_tokens: the size of the KV cache, if not as much as fits.
        chunked_prefill_size: tokens of a step; longer prompts are computed in parts.
        disable_cuda_graph, disable_radix_cache, disable_overlap_schedule: do without CUDA graphs, reuse of common prefixes, a step ahead.
        compile: run decoder layers that are not fused by qtool's own kernels through `torch.compile`, in decode steps or in all; starts take longer.
        random_seed: makes requests without a seed of their own repeat from one engine to the next.
    Raises: CheckpointRefused, UsageError, ResourceError.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        tokenizer_path: str | os.PathLike[str] | None = None,
        skip_tokenizer_init: bool = False,
        device: str | None = None,
        dtype: str | torch.dtype = "auto",
        quantization: str | None = None,
        kv_cache_dtype: str = "auto",
        mem_fraction_static: float = 0.85,
        context_length: int | None = None,
        max_running_requests: int | None = None,
        max_total_tokens: int | None = None,
        chunked_prefill_size: int | None = None,
        disable_cuda_graph: bool = False,
        disable_radix_cache: bool = False,
        disable_overlap_schedule: bool = False,
        compile: Literal["off", "decode", "all"] = "off",
        random_seed: int | None = None,
        revision: str | None = None,
    ) -> None:
        if not 0 < mem_fraction_static < 1:
            raise UsageError("E_FRACTION", f"mem_fraction_static is {mem_fraction_static}", hint="a number between 0 and 1")
        if compile not in COMPILE:
            raise UsageError("E_COMPILE", f"compile is `{compile}`", hint=f"one of {', '.join(COMPILE)}")
        where = device_named(device)
        checkpoint = open_checkpoint(resolve_model(os.fspath(model_path), revision=revision))
        plan = plan_load(checkpoint, where, quantization, dtype)
        limits = _limits(plan.skeleton.config, where, context_length, max_running_requests, chunked_prefill_size)
        scales = _cache_scales(checkpoint, plan.layout, kv_cache_dtype)
        self.tokenizer = None if skip_tokenizer_init else _tokenizer(tokenizer_path or checkpoint.path)
        began = time.monotonic()
        model = materialize(plan)
        LOG.info("weights loaded in %.1f s", time.monotonic() - began)
        self._use_prefix = not disable_radix_cache
        self._eos_ids = _eos_ids(model, self.tokenizer)
        self.context_length, self.model_path = limits.context_length, checkpoint.path
        self._draw = None if random_seed is None else random.Random(random_seed)
        runner = Runner(
            model,
            where,
            limits,
            static_share=mem_fraction_static,
            max_tokens=max_total_tokens,
            cache_scales=scales,
            cuda_graphs=not disable_cuda_graph,
            compiled=compile,
        )
        self.loop = Loop(runner, overlap=where.type == "cuda" and not disable_overlap_schedule)
        atexit.register(self.shutdown)

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        return_logprob: bool = False,
        logprob_start_len: int = -1,
        top_logprobs_num: int = 0,
        stream: bool = False,
        rid: str | Sequence[str] | None = None,
    ) -> Any:
        """Return what SGLang's ``Engine.generate`` does.

        For one prompt a dictionary with ``text``, ``output_ids`` and ``meta_info``; for several prompts, or ``n`` above 1, a list of them; with
        ``stream`` an iterator of such dictionaries, each with all there is so far, and an ``index`` where there are several.

        Args:
            prompt, input_ids: one or several, as text or tokens.
            sampling_params: fields of `SamplingParams`, for all or one for each prompt.
            return_logprob: ``meta_info`` gets natural logarithms of the model's own probabilities, before temperature and penalties, as
                ``(logprob, token, None)``: ``output_token_logprobs``, ``input_token_logprobs`` from token ``logprob_start_len`` of the prompt on
                (-1: none of it), and for each the ``top_logprobs_num`` most likely.
        Raises: UsageError for what cannot be asked; what went wrong in a step.
        """
        asked = self._asked(prompt, sampling_params, input_ids, return_logprob, logprob_start_len, top_logprobs_num, stream, rid)
        answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        requests = self._submit(asked, answers.put)
        if stream:
            return self._stream(requests, asked.single, answers)
        try:
            results = _in_order(answers.get() for _ in requests)
        finally:
            self._abandon(requests)
        return results[0] if asked.single else results

    async def async_generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        return_logprob: bool = False,
        logprob_start_len: int = -1,
        top_logprobs_num: int = 0,
        stream: bool = False,
        rid: str | Sequence[str] | None = None,
    ) -> Any:
        """Do as `generate`; with ``stream`` awaiting it gives an asynchronous iterator. Whoever cancels it, or leaves the iterator, aborts."""
        run = asyncio.get_running_loop()
        asked = await run.run_in_executor(
            None, self._asked, prompt, sampling_params, input_ids, return_logprob, logprob_start_len, top_logprobs_num, stream, rid
        )
        answers: asyncio.Queue[Answer] = asyncio.Queue()
        requests = self._submit(asked, lambda answer: run.call_soon_threadsafe(answers.put_nowait, answer))
        if stream:
            return self._async_stream(requests, asked.single, answers)
        try:
            results = _in_order([await answers.get() for _ in requests])
        finally:
            self._abandon(requests)
        return results[0] if asked.single else results

    def abort(self, rid: str) -> None:
        """End the request ``rid``: its result says so, and its memory is free before the next step."""
        self.loop.abort(rid)

    def shutdown(self) -> None:
        """Abort what runs, and give the device's memory back."""
        atexit.unregister(self.shutdown)
        self.loop.stop()
        self.loop.runner.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _stream(self, requests: Sequence[Request], single: bool, answers: queue.SimpleQueue[Answer]) -> Iterator[Result]:
        left = len(requests)
        try:
            while left:
                index, result, last = answers.get()
                left -= last
                yield _numbered(result, None if single else index)
        finally:
            self._abandon(requests)

    async def _async_stream(self, requests: Sequence[Request], single: bool, answers: asyncio.Queue[Answer]) -> AsyncIterator[Result]:
        left = len(requests)
        try:
            while left:
                index, result, last = await answers.get()
                left -= last
                yield _numbered(result, None if single else index)
        finally:
            self._abandon(requests)

    def _asked(
        self,
        prompt: Any,
        sampling_params: Any,
        input_ids: Any,
        return_logprob: bool,
        logprob_start_len: int,
        top_logprobs_num: int,
        stream: bool,
        rid: Any,
    ) -> Asked:
        """Return what was asked, checked, prompts as tokens."""
        if (prompt is None) == (input_ids is None):
            raise UsageError("E_PROMPT", "give either prompt or input_ids", hint="one of them, and not both")
        single = isinstance(prompt, str) if prompt is not None else bool(input_ids) and isinstance(input_ids[0], int)
        given = [prompt if prompt is not None else input_ids] if single else list(prompt if prompt is not None else input_ids)
        if not given:
            raise UsageError("E_PROMPT", "there is no prompt", hint="give one, or a list of them")
        if not 0 <= top_logprobs_num <= MAX_TOP_LOGPROBS:
            raise UsageError("E_LOGPROBS", f"top_logprobs_num is {top_logprobs_num}", hint=f"0 to {MAX_TOP_LOGPROBS}")
        prompts = self._tokens(given) if prompt is not None else [self._checked(ids) for ids in given]
        many = sampling_params if isinstance(sampling_params, (list, tuple)) else [sampling_params or {}] * len(given)
        ids = rid if isinstance(rid, (list, tuple)) else [rid] * len(given) if len(given) == 1 else [None] * len(given)
        if len(many) != len(given) or len(ids) != len(given):
            raise UsageError("E_PROMPT", f"{len(given)} prompts, {len(many)} sampling_params", hint="give one for all, or one for each prompt")
        requests = []
        for tokens, values, name in zip(prompts, many, ids, strict=True):
            params = values if isinstance(values, SamplingParams) else SamplingParams.from_dict(values)
            params.check_vocabulary(self.loop.runner.vocab_size)
            if params.stop_strings and self.tokenizer is None:
                raise UsageError("E_SAMPLING", "stop strings need a tokenizer, and skip_tokenizer_init left it out", hint="use stop_token_ids")
            if params.sampling_seed is None and self._draw is not None:
                params = replace(params, sampling_seed=self._draw.getrandbits(63))
            for number in range(params.n):
                id = f"{name or uuid.uuid4().hex}" + (f"-{number}" if params.n > 1 else "")
                requests.append(self._request(id, tokens, params, number, return_logprob, logprob_start_len, top_logprobs_num, stream))
            single &= params.n == 1
        return Asked(requests, single)

    def _request(
        self, id: str, tokens: list[int], params: SamplingParams, number: int, return_logprob: bool, logprob_start_len: int, top: int, stream: bool
    ) -> Request:
        room = max(self.context_length - len(tokens), 1)
        most = room if params.max_new_tokens is None else min(params.max_new_tokens, room)
        from_prompt = logprob_start_len if return_logprob and 0 <= logprob_start_len < len(tokens) - 1 else None
        sequence = scheduler.Sequence(tokens, most, waits_for_tokens=params.penalizes, use_prefix=self._use_prefix and from_prompt is None)
        if from_prompt is not None:
            sequence.max_chunk = PROMPT_CHUNK
        return Request(
            id=id,
            sequence=sequence,
            params=params,
            seed=params.row_seed(number),
            text=TextStream(
                self.tokenizer and self.tokenizer.backend_tokenizer, params, self._eos_ids, max_new_tokens=most, context=tokens[-CONTEXT:]
            ),
            stream=stream,
            history=History.of(params, tokens),
            end_ids=() if params.ignore_eos and not params.stop_ids else [*params.stop_ids, *(() if params.ignore_eos else self._eos_ids)],
            top_logprobs=top if return_logprob else None,
            prompt_logprobs_from=from_prompt,
        )

    def _tokens(self, prompts: Sequence[Any]) -> list[list[int]]:
        if self.tokenizer is None:
            raise UsageError("E_PROMPT", "a text prompt needs a tokenizer, and skip_tokenizer_init left it out", hint="give input_ids")
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise UsageError("E_PROMPT", "a prompt is no text", hint="give text, or a list of texts, or tokens as input_ids")
        return [self.tokenizer(prompt)["input_ids"] for prompt in prompts]

    def _checked(self, ids: Any) -> list[int]:
        vocab_size = self.loop.runner.vocab_size
        if not isinstance(ids, (list, tuple)) or not all(type(token) is int and 0 <= token < vocab_size for token in ids):
            raise UsageError("E_PROMPT", "input_ids hold something that is no token of the model", hint=f"whole numbers from 0 to {vocab_size - 1}")
        return list(ids)

    def _submit(self, asked: Asked, put: Callable[[Answer], object]) -> list[Request]:
        for index, request in enumerate(asked.requests):
            request.deliver = partial(_deliver, put, index)
        for request in asked.requests:
            self.loop.submit(request)
        return asked.requests

    def _abandon(self, requests: Sequence[Request]) -> None:
        """Abort what nobody waits for any more."""
        for request in requests:
            if not request.done:
                self.loop.abort(request.id)


@dataclass
class Asked:
    """The requests of one call; ``single``: its result is not a list."""

    requests: list[Request]
    single: bool


def _deliver(put: Callable[[Answer], object], index: int, result: Result | Exception, last: bool) -> None:
    put((index, result, last))


def _in_order(answers: Iterable[Answer]) -> list[Result]:
    """Return the results by index. Raises: the first error among them."""
    return [_numbered(result, None) for _, result, _ in sorted(answers, key=lambda answer: answer[0])]


def _numbered(result: Result | Exception, index: int | None) -> Result:
    if isinstance(result, Exception):
        raise result
    return result if index is None else {**result, "index": index}


def _limits(config: Any, device: torch.device, context_length: int | None, max_running: int | None, budget: int | None) -> Limits:
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or context_length or DEFAULT_CONTEXT
    if context_length is not None and not 0 < context_length <= longest:
        raise UsageError("E_CONTEXT", f"context_length is {context_length}, and the model knows {longest} positions", hint=f"1 to {longest}")
    for name, number in (("max_running_requests", max_running), ("chunked_prefill_size", budget)):
        if number is not None and number < 1:
            raise UsageError("E_LIMIT", f"{name} is {number}", hint="at least 1")
    return Limits(max_running or MAX_RUNNING[device.type], budget or TOKEN_BUDGET[device.type], context_length or longest)


def _cache_scales(checkpoint: Checkpoint, layout: Layout | None, kv_cache_dtype: str) -> dict[int, tuple[float, float]] | None:
    """Return the scales of the KV cache by layer where it is kept in 8 bits; layers without have 1. None: it is kept in 16 bits."""
    if kv_cache_dtype not in KV_DTYPES:
        raise UsageError("E_KV_DTYPE", f"unknown kv_cache_dtype `{kv_cache_dtype}`", hint=f"one of {', '.join(KV_DTYPES)}")
    scales = cache_scales(checkpoint) if layout and layout.kv_cache else {}
    if kv_cache_dtype == "auto" and not scales:
        return None
    if not scales:
        warnings.warn("the checkpoint has no scales for an 8-bit KV cache: 1.0 is used, and quality may suffer", stacklevel=3)
    return scales


def _tokenizer(path: str | os.PathLike[str]) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # whatever a file from outside makes of it
        hint = "--tokenizer-path names another folder; skip_tokenizer_init takes input_ids"
        raise CheckpointRefused("E_TOKENIZER", f"{path} has no tokenizer that loads ({one_line(error)})", hint=hint) from error
    if not tokenizer.is_fast:
        raise CheckpointRefused("E_TOKENIZER", f"{path} has no tokenizer.json", hint="save the tokenizer again with a recent transformers")
    return tokenizer


def _eos_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    configured = model.generation_config.eos_token_id if model.generation_config is not None else model.config.eos_token_id
    ids = configured if isinstance(configured, (list, tuple)) else [configured]
    return tuple({id for id in [*ids, tokenizer and tokenizer.eos_token_id] if isinstance(id, int)})

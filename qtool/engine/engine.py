"""`Engine`: a model that answers requests, many at a time, for Python users; arguments and results
are SGLang's.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import random
import time
import uuid
import warnings
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from qtool.checkpoint import Checkpoint, open_checkpoint, resolve_model
from qtool.engine.attention.pages import PAGE
from qtool.engine.config import EngineConfig
from qtool.engine.detokenizer import TextStream
from qtool.engine.grammar import Compiler, Constraint
from qtool.engine.loop import Answer, Loop, Request
from qtool.engine.model_runner import Runner
from qtool.engine.sampling_batch import History
from qtool.engine.sampling_params import MAX_TOP_LOGPROBS, SamplingParams
from qtool.engine.scheduler import Limits, SequenceState
from qtool.errors import CheckpointRefused, QtoolError, UsageError
from qtool.formats import Layout
from qtool.options import make_options
from qtool.runtime.devices import device_named
from qtool.runtime.load import cache_scales, materialize
from qtool.runtime.load_plan import plan_load

LOG = logging.getLogger("qtool.engine")
Result = dict[str, Any]
# which request of a call, what there is to say of it, and whether it is the last
Told = tuple[int, Answer | Exception, bool]
KV_DTYPES = ("auto", "fp8_e4m3")
MAX_RUNNING = {"cpu": 32, "cuda": 256}
TOKEN_BUDGET = {"cpu": 2048, "cuda": 8192}
CONTEXT = 8  # tokens of the prompt that the text continues
DEFAULT_SHARE = 0.85
DEFAULT_CONTEXT = 4096  # of models that do not say


class Engine:
    """A model that answers requests, many at a time: `sglang.Engine` with our quantized layers.

    Args:
        model_path: a folder, or a name on the Hub.
        options: the fields of `EngineConfig`.
    Raises: CheckpointRefused, UsageError, ResourceError.
    """

    def __init__(self, model_path: str | os.PathLike[str], **options: object) -> None:
        config = make_options(EngineConfig, options)
        device = device_named(config.device)
        checkpoint = open_checkpoint(resolve_model(os.fspath(model_path), revision=config.revision))
        plan = plan_load(checkpoint, device, config.quantization, config.dtype or "auto")
        limits = _limits(plan.skeleton.config, device, config)
        scales = _cache_scales(checkpoint, plan.layout, config.kv_cache_dtype or "auto")
        self.tokenizer = None
        if not config.skip_tokenizer_init:
            self.tokenizer = _tokenizer(config.tokenizer_path or checkpoint.path)
        began = time.monotonic()
        model = materialize(plan)
        LOG.info("weights loaded in %.1f s", time.monotonic() - began)
        self._use_prefix = not config.disable_radix_cache
        self.eos_ids = _eos_ids(model, self.tokenizer)
        self.context_length = limits.context_length
        self.model_path = checkpoint.path
        self._draw = None
        if config.random_seed is not None:
            self._draw = random.Random(config.random_seed)
        share = config.mem_fraction_static
        runner = Runner(
            model,
            device,
            limits,
            static_share=DEFAULT_SHARE if share is None else share,
            max_tokens=config.max_total_tokens,
            cache_scales=scales,
            cuda_graphs=not config.disable_cuda_graph,
            compiled=config.compile,
        )
        # of grammars
        self.compiler = None
        if self.tokenizer is not None:
            self.compiler = Compiler(
                self.tokenizer.backend_tokenizer, runner.vocab_size, self.eos_ids
            )
        overlap = device.type == "cuda" and not config.disable_overlap_schedule
        self.loop = Loop(runner, overlap=overlap)
        # also when nobody has it any more, and when the interpreter ends
        self._end = weakref.finalize(self, _close, self.loop)

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        *,
        stream: bool = False,
        **options: Any,
    ) -> Any:
        """Return what SGLang's ``Engine.generate`` does.

        For one prompt a dictionary with ``text``, ``output_ids`` and ``meta_info``; for several
        prompts, or ``n`` above 1, a list of them; with ``stream`` an iterator of such dictionaries,
        each with all there is so far, and an ``index`` where there are several.

        Args:
            prompt, input_ids: one or several, as text or tokens.
            sampling_params: fields of `SamplingParams`, for all or one for each prompt.
            options: fields of `Ask`.
        Raises: UsageError for what cannot be asked; what went wrong in a step.
        """
        requests, single = self._requests(
            Ask(prompt, sampling_params, input_ids, stream, **options)
        )
        if stream:
            return self._stream(requests, single)
        told: queue.SimpleQueue[Told] = queue.SimpleQueue()
        try:
            self._start(requests, told.put)
            results = _in_order(told.get() for _ in requests)
        finally:
            self.abandon(requests)
        return results[0] if single else results

    async def async_generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        *,
        stream: bool = False,
        **options: Any,
    ) -> Any:
        """Do as `generate`; with ``stream`` awaiting it gives an asynchronous iterator.

        Whoever cancels it, or leaves the iterator, aborts.
        """
        loop = asyncio.get_running_loop()
        requests, single = await loop.run_in_executor(
            None, self._requests, Ask(prompt, sampling_params, input_ids, stream, **options)
        )
        if stream:
            return self._async_stream(requests, single)
        told: asyncio.Queue[Told] = asyncio.Queue()
        try:
            self._start(requests, lambda one: loop.call_soon_threadsafe(told.put_nowait, one))
            results = _in_order([await told.get() for _ in requests])
        finally:
            self.abandon(requests)
        return results[0] if single else results

    def submit(self, ask: Ask, tell: Callable[[Told], object]) -> list[Request]:
        """Start what ``ask`` means, and return its requests; the loop's thread calls ``tell`` with
        all there is to say of them.

        Raises: UsageError for what cannot be asked; nothing has been started then.
        """
        requests, _ = self._requests(ask)
        self._start(requests, tell)
        return requests

    def abandon(self, requests: Sequence[Request]) -> None:
        """End those of ``requests`` that run, for nobody waits for them any more: their memory is
        free before the next step.
        """
        for request in requests:
            if not request.done:
                self.loop.abandon(request)

    def abort(self, rid: str) -> None:
        """End the requests of the call with that ``rid``: their results say so, and their memory is
        free before the next step.
        """
        self.loop.abort(rid)

    def shutdown(self) -> None:
        """Abort what runs, and give the device's memory back."""
        self._end()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _stream(self, requests: Sequence[Request], single: bool) -> Iterator[Result]:
        told: queue.SimpleQueue[Told] = queue.SimpleQueue()
        left = len(requests)
        try:
            self._start(requests, told.put)
            while left:
                index, answer, last = told.get()
                left -= last
                yield _result(answer, None if single else index)
        finally:
            self.abandon(requests)

    async def _async_stream(
        self, requests: Sequence[Request], single: bool
    ) -> AsyncIterator[Result]:
        loop = asyncio.get_running_loop()
        told: asyncio.Queue[Told] = asyncio.Queue()
        left = len(requests)
        try:
            self._start(requests, lambda one: loop.call_soon_threadsafe(told.put_nowait, one))
            while left:
                index, answer, last = await told.get()
                left -= last
                yield _result(answer, None if single else index)
        finally:
            self.abandon(requests)

    def _requests(self, ask: Ask) -> tuple[list[Request], bool]:
        """Return the requests that ``ask`` means, and whether its result is not a list."""
        prompts, single = self._prompts(ask)
        params = (
            ask.sampling_params
            if isinstance(ask.sampling_params, (list, tuple))
            else [ask.sampling_params or {}] * len(prompts)
        )
        if isinstance(ask.rid, (list, tuple)):
            names = list(ask.rid)
        elif ask.rid is not None and len(prompts) > 1:
            raise UsageError(
                "E_REQUEST_ID", f"one rid for {len(prompts)} prompts", hint="give a list of them"
            )
        else:
            names = [ask.rid or uuid.uuid4().hex for _ in prompts]
        if not len(params) == len(names) == len(prompts):
            message = f"{len(prompts)} prompts, {len(params)} sampling_params, {len(names)} ids"
            raise UsageError("E_PROMPT", message, hint="give one for all, or one for each prompt")
        requests = []
        for tokens, values, name in zip(prompts, params, names, strict=True):
            one = values if isinstance(values, SamplingParams) else SamplingParams.from_dict(values)
            one.check_vocabulary(self.loop.runner.vocab_size)
            if one.stop_strings and self.tokenizer is None:
                raise UsageError(
                    "E_SAMPLING",
                    "stop strings need a tokenizer, and skip_tokenizer_init left it out",
                    hint="use stop_token_ids",
                )
            if one.sampling_seed is None and self._draw is not None:
                one = replace(one, sampling_seed=self._draw.getrandbits(63))
            requests += [
                self._request(
                    f"{name}-{number}" if one.n > 1 else str(name),
                    str(name),
                    tokens,
                    one,
                    number,
                    ask,
                )
                for number in range(one.n)
            ]
            single &= one.n == 1
        return requests, single

    def _request(
        self, id: str, group: str, tokens: list[int], params: SamplingParams, number: int, ask: Ask
    ) -> Request:
        room = self.context_length - len(tokens)
        if params.max_new_tokens is None:  # to the end of what the cache holds, too
            room = min(room, self.loop.runner.page_count * PAGE - len(tokens) + 1)
        most = max(1, room if params.max_new_tokens is None else min(params.max_new_tokens, room))
        first = (
            ask.logprob_start_len
            if ask.return_logprob and 0 <= ask.logprob_start_len < len(tokens)
            else None
        )
        sequence = SequenceState(
            tokens,
            most,
            waits_for_tokens=params.waits_for_tokens,
            use_prefix=self._use_prefix and first is None,
            needs_logits=first is not None,
        )
        tokenizer = self.tokenizer and self.tokenizer.backend_tokenizer
        text = TextStream(
            tokenizer, params, self.eos_ids, max_new_tokens=most, context=tokens[-CONTEXT:]
        )
        return Request(
            id=id,
            group=group,
            sequence=sequence,
            params=params,
            seed=params.row_seed(number),
            text=text,
            stream=ask.stream,
            history=History.of(params, tokens),
            constraint=Constraint.of(params, self.compiler, text.end_ids),
            top_logprobs=ask.top_logprobs_num if ask.return_logprob else None,
            prompt_logprobs_from=first,
        )

    def _prompts(self, ask: Ask) -> tuple[list[list[int]], bool]:
        """Return the prompts as tokens, and whether there is one that is not in a list."""
        if (ask.prompt is None) == (ask.input_ids is None):
            raise UsageError(
                "E_PROMPT", "give either prompt or input_ids", hint="one of them, and not both"
            )
        given: Any = ask.input_ids if ask.prompt is None else ask.prompt
        given = given.tolist() if hasattr(given, "tolist") else given  # of NumPy or torch
        if not isinstance(given, (str, list, tuple)):
            raise UsageError(
                "E_PROMPT",
                f"a prompt is a {type(given).__name__}",
                hint="give text, or a list of texts, or tokens as input_ids",
            )
        single = isinstance(given, str) or (
            ask.prompt is None and bool(given) and isinstance(given[0], int)
        )
        prompts: list[Any] = [given] if single else list(given)
        if not prompts:
            raise UsageError("E_PROMPT", "there is no prompt", hint="give one, or a list of them")
        if ask.prompt is not None:
            if self.tokenizer is None:
                raise UsageError(
                    "E_PROMPT",
                    "a text prompt needs a tokenizer, and skip_tokenizer_init left it out",
                    hint="give input_ids",
                )
            if not all(isinstance(prompt, str) for prompt in prompts):
                raise UsageError(
                    "E_PROMPT",
                    "a prompt is no text",
                    hint="give text, or a list of texts, or tokens as input_ids",
                )
            try:
                prompts = [self.tokenizer(prompt, verbose=False)["input_ids"] for prompt in prompts]
            except (TypeError, UnicodeError) as error:
                raise UsageError(
                    "E_PROMPT",
                    "a prompt is no valid Unicode",
                    hint="it has half of a surrogate pair",
                ) from error
        vocab_size = self.loop.runner.vocab_size
        for ids in prompts:
            if not isinstance(ids, (list, tuple)) or not all(
                type(token) is int and 0 <= token < vocab_size for token in ids
            ):
                message = "a prompt has something that is no token of the model"
                raise UsageError(
                    "E_PROMPT", message, hint=f"tokens are whole numbers from 0 to {vocab_size - 1}"
                )
        return [list(ids) for ids in prompts], single

    def _start(self, requests: Sequence[Request], tell: Callable[[Told], object]) -> None:
        for index, request in enumerate(requests):
            request.deliver = lambda answer, last, index=index: tell(  # type: ignore[misc]
                (index, answer, last)
            )
            self.loop.submit(request)


@dataclass(frozen=True)
class Ask:
    """What a call of `Engine.generate` asks for.

    return_logprob: ``meta_info`` gets natural logarithms of the model's own probabilities, before
        temperature and penalties, as
    ``(logprob, token, None)``: ``output_token_logprobs``, and ``input_token_logprobs`` from token
    ``logprob_start_len`` of the prompt on (-1: none of it), whose first is None; and for each the
    ``top_logprobs_num`` most likely. rid: names of the requests, one for each prompt, for
    `Engine.abort`.
    """

    prompt: str | Sequence[str] | None
    sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None
    input_ids: Sequence[int] | Sequence[Sequence[int]] | None
    stream: bool
    return_logprob: bool = False
    logprob_start_len: int = -1
    top_logprobs_num: int = 0
    rid: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        if (
            not isinstance(self.top_logprobs_num, int)
            or not 0 <= self.top_logprobs_num <= MAX_TOP_LOGPROBS
        ):
            raise UsageError(
                "E_LOGPROBS",
                f"top_logprobs_num is {self.top_logprobs_num}",
                hint=f"0 to {MAX_TOP_LOGPROBS}",
            )


def _close(loop: Loop) -> None:
    loop.stop()
    loop.runner.close()


def _in_order(told: Iterable[Told]) -> list[Result]:
    """Return the results by index. Raises: the first error that is told."""
    results: dict[int, Result] = {}
    for index, answer, _ in told:
        results[index] = _result(answer, None)
    return [results[index] for index in sorted(results)]


def _result(answer: Answer | Exception, index: int | None) -> Result:
    if isinstance(answer, Exception):
        raise answer
    return answer.result() if index is None else {**answer.result(), "index": index}


def _limits(model_config: Any, device: torch.device, config: EngineConfig) -> Limits:
    context_length = config.context_length
    longest = (
        getattr(model_config.get_text_config(), "max_position_embeddings", None)
        or context_length
        or DEFAULT_CONTEXT
    )
    if context_length is not None and context_length > longest:
        raise UsageError(
            "E_CONTEXT",
            f"context_length is {context_length}, and the model knows {longest} positions",
            hint=f"1 to {longest}",
        )
    return Limits(
        config.max_running_requests or MAX_RUNNING[device.type],
        config.chunked_prefill_size or TOKEN_BUDGET[device.type],
        context_length or longest,
    )


def _cache_scales(
    checkpoint: Checkpoint, layout: Layout | None, kv_cache_dtype: str
) -> dict[int, tuple[float, float]] | None:
    """Return the scales of the KV cache by layer where it is kept in 8 bits; layers without have 1.

    None: it is kept in 16 bits.
    """
    if kv_cache_dtype not in KV_DTYPES:
        raise UsageError(
            "E_KV_DTYPE",
            f"unknown kv_cache_dtype `{kv_cache_dtype}`",
            hint=f"one of {', '.join(KV_DTYPES)}",
        )
    scales = cache_scales(checkpoint) if layout and layout.kv_cache else {}
    if kv_cache_dtype == "auto" and not scales:
        return None
    if not scales:
        warnings.warn(
            "the checkpoint has no scales for an 8-bit KV cache: 1.0 is used, and quality may "
            "suffer",
            stacklevel=3,
        )
    return scales


def _tokenizer(path: str | os.PathLike[str]) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(os.fspath(path)))
    except QtoolError:
        raise
    except Exception as error:  # whatever a file from outside makes of it
        hint = "tokenizer_path names another folder; skip_tokenizer_init takes input_ids"
        raise CheckpointRefused(
            "E_TOKENIZER", f"{path} has no tokenizer that loads ({type(error).__name__})", hint=hint
        ) from error
    if not tokenizer.is_fast:
        raise CheckpointRefused(
            "E_TOKENIZER",
            f"{path} has no tokenizer.json",
            hint="save the tokenizer again with a recent transformers",
        )
    return tokenizer


def _eos_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    configured = (
        model.generation_config.eos_token_id
        if model.generation_config is not None
        else model.config.eos_token_id
    )
    ids = configured if isinstance(configured, (list, tuple)) else [configured]
    return tuple({id for id in [*ids, tokenizer and tokenizer.eos_token_id] if isinstance(id, int)})

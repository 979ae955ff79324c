"""`Engine`: a model that answers requests, many at a time, for Python users; arguments and results
are SGLang's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import random
import warnings
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from typing import Any, Self

from qtool.checkpoint import open_checkpoint, resolve_model
from qtool.engine.attention.pages import PAGE
from qtool.engine.config import EngineConfig
from qtool.engine.encoder_runner import EncoderRunner
from qtool.engine.encoding import (
    Encoded,
    EncodeRequest,
    encode_requests,
    encoded,
)
from qtool.engine.grammar import Compiler
from qtool.engine.loop import Loop
from qtool.engine.model_runner import Runner
from qtool.engine.outputs import CompletionError, CompletionOutput, Output
from qtool.engine.requests import (
    Deliver,
    GenerateRequest,
    Request,
    RequestParser,
    SamplingFields,
)
from qtool.engine.results import CompletionResult, Result
from qtool.engine.scoring import ScoringMethods
from qtool.engine.sglang_names import check_other, engine_options
from qtool.engine.start import decide_start, eos_ids_of, plan_engine
from qtool.engine.stopwatch import Stopwatch
from qtool.engine.vectors import check_dimensions
from qtool.memory import no_collection
from qtool.options import keywords_of, make_options
from qtool.runtime.compiling import hash_compiler, warn_of_version
from qtool.runtime.load import materialize
from qtool.runtime.load_plan import LoadPlan

DEFAULT_SHARE = 0.85


class Engine(ScoringMethods):
    """A model that answers requests, many at a time: `sglang.Engine` with our quantized layers.

    Args:
        model_path: a folder, or a name on the Hub.
        options: the fields of `EngineConfig`, and arguments of SGLang's that ask for nothing more.
    Raises: CheckpointRefused, UsageError, ResourceError.
    """

    @keywords_of(EngineConfig)
    def __init__(self, model_path: str | os.PathLike[str], **options: object) -> None:
        known = [each.name for each in fields(EngineConfig)]
        config = make_options(EngineConfig, engine_options(options, known))
        checkpoint = open_checkpoint(resolve_model(os.fspath(model_path), revision=config.revision))
        log_time = Stopwatch()
        with no_collection():
            plan = plan_engine(checkpoint, config)
        log_time("plan", "layers planned")
        self._open(plan, config, log_time)

    @classmethod
    def from_plan(cls, plan: LoadPlan, config: EngineConfig) -> Self:
        """Return an engine of what was planned already.

        Args:
            plan: what each layer becomes. The engine changes its skeleton: plan again to load it
                once more.
            config: all but the device, the dtype, the quantization and the revision, which the plan
                has.
        Raises: CheckpointRefused, UsageError, ResourceError.
        """
        engine = cls.__new__(cls)
        engine._open(plan, config, Stopwatch())
        return engine

    def _open(self, plan: LoadPlan, config: EngineConfig, log_time: Stopwatch) -> None:
        """Load the weights and start the loop."""
        device = plan.device
        with no_collection():
            start = decide_start(plan, config)
        warn_of_version(device)
        hash_compiler(device)
        self.tokenizer = start.tokenizer
        log_time("tokenizer", "tokenizer loaded")
        model = materialize(plan)
        log_time("weights", "weights loaded")
        self.eos_ids = eos_ids_of(model, self.tokenizer)
        self.context_length = start.limits.context_length
        self.encoding = plan.encoding
        """What it returns for a text; None if it continues it."""
        self.model_path = plan.checkpoint.source
        self.model_folder = plan.checkpoint.path
        """Where its config and its tokenizer are; of a GGUF file a temporary folder."""
        self.config = config
        share = config.mem_fraction_static
        runner_class = Runner if plan.encoding is None else partial(EncoderRunner, plan.encoding)
        runner = runner_class(
            model,
            device,
            start.limits,
            static_share=DEFAULT_SHARE if share is None else share,
            max_tokens=config.max_total_tokens,
            cache_scales=start.cache_scales,
            cuda_graphs=not config.disable_cuda_graph,
            compiled=config.compile,
            log_time=log_time,
        )
        cache_tokens = runner.page_count * PAGE
        if cache_tokens < self.context_length:
            warnings.warn(
                f"the KV cache holds {cache_tokens:,} tokens, less than the context length of "
                f"{self.context_length:,}: longer requests are refused",
                stacklevel=3,
            )
        use_prefix = not config.disable_radix_cache and runner.keeps_prefixes
        # of grammars
        self.compiler = None
        if self.tokenizer is not None and self.encoding is None:
            self.compiler = Compiler(
                self.tokenizer.backend_tokenizer, runner.vocab_size, self.eos_ids
            )
        # drafts follow the tokens of the step before
        overlap = not config.disable_overlap_schedule and config.speculation is None
        overlap = overlap and device.type == "cuda"
        self.loop = Loop(runner, overlap=overlap)
        self._parser = RequestParser(
            tokenizer=self.tokenizer,
            compiler=self.compiler,
            eos_ids=self.eos_ids,
            vocab_size=runner.vocab_size,
            context_length=self.context_length,
            cache_tokens=cache_tokens,
            use_prefix=use_prefix,
            seeds=None if config.random_seed is None else random.Random(config.random_seed),
            speculation=config.speculation,
            encoding=self.encoding,
        )
        # runs also when the engine is garbage, and when the interpreter ends
        self._end = weakref.finalize(self, _close, self.loop)
        self.start_seconds = log_time.seconds
        """How long each part of the start took, by the name of the part."""

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: SamplingFields | Sequence[SamplingFields] | None = None,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        *,
        stream: bool = False,
        return_logprob: bool | Sequence[bool] | None = False,
        logprob_start_len: int | Sequence[int] | None = -1,
        top_logprobs_num: int | Sequence[int] | None = 0,
        rid: str | Sequence[str] | None = None,
        **other: object,
    ) -> Any:
        """Return what SGLang's ``Engine.generate`` does.

        For one prompt a dictionary with ``text``, ``output_ids`` and ``meta_info``; for several
        prompts, or ``n`` above 1, a list of them; with ``stream`` an iterator of such dictionaries,
        each with all there is so far, and an ``index`` where there are several.

        Args:
            prompt: one or several texts.
            sampling_params: fields of `SamplingParams`, for all prompts or one for each.
            input_ids: tokens in place of ``prompt``.
            stream: return results while they grow.
            return_logprob: put natural logarithms of the model's own probabilities, before
                temperature and penalties, into ``meta_info``: ``output_token_logprobs`` and
                ``input_token_logprobs``, each ``(logprob, token, None)``.
            logprob_start_len: the token of the prompt where ``input_token_logprobs`` begins, with
                None for its logarithm; -1: nowhere.
            top_logprobs_num: how many of the most likely tokens to return for each token.
            rid: names of the requests, one for each prompt, for `abort`.
            other: further arguments of SGLang's, whose values ask for nothing.
        Raises: UsageError, for invalid arguments; the error that ended a request.
        """
        given = GenerateRequest(
            prompt=prompt,
            sampling_params=sampling_params,
            input_ids=input_ids,
            stream=stream,
            return_logprob=return_logprob,
            logprob_start_len=logprob_start_len,
            top_logprobs_num=top_logprobs_num,
            rid=rid,
        )
        _check_arguments(other)
        requests, single = self._parser.parse(given)
        if stream:
            return self._stream(requests, single)
        results = [CompletionResult(request) for request in requests]
        for output in self._outputs(requests):
            results[output.index].add(output)
        return _whole(results, single)

    async def async_generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: SamplingFields | Sequence[SamplingFields] | None = None,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        *,
        stream: bool = False,
        return_logprob: bool | Sequence[bool] | None = False,
        logprob_start_len: int | Sequence[int] | None = -1,
        top_logprobs_num: int | Sequence[int] | None = 0,
        rid: str | Sequence[str] | None = None,
        **other: object,
    ) -> Any:
        """Do as `generate`; with ``stream`` awaiting it gives an asynchronous iterator.

        Cancelling it, or leaving the iterator, aborts the requests.
        """
        given = GenerateRequest(
            prompt=prompt,
            sampling_params=sampling_params,
            input_ids=input_ids,
            stream=stream,
            return_logprob=return_logprob,
            logprob_start_len=logprob_start_len,
            top_logprobs_num=top_logprobs_num,
            rid=rid,
        )
        _check_arguments(other)
        loop = asyncio.get_running_loop()
        requests, single = await loop.run_in_executor(None, self._parser.parse, given)
        if stream:
            return self._async_stream(requests, single)
        results = [CompletionResult(request) for request in requests]
        async for output in self._async_outputs(requests):
            results[output.index].add(output)
        return _whole(results, single)

    def encode(
        self,
        prompt: str | Sequence[str] | None = None,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        *,
        dimensions: int | None = None,
        rid: str | Sequence[str] | None = None,
        **other: object,
    ) -> Any:
        """Return what SGLang's ``Engine.encode`` does: for one text a dictionary with ``embedding``
        and ``meta_info``, for several a list of them. The embedding of a reranker is its score.

        Args:
            prompt: one or several texts; of a reranker, query and document as the model reads them.
            input_ids: tokens in place of ``prompt``.
            dimensions: numbers of each embedding, where the checkpoint says that it may be cut.
            rid: names of the requests, one for each text, for `abort`.
            other: further arguments of SGLang's, whose values ask for nothing.
        Raises: UsageError, for invalid arguments; the error that ended a request.
        """
        requests, single = self._encode_requests(prompt, input_ids, dimensions, rid, other)
        outputs = {output.index: output for output in self._outputs(requests)}
        return self._encoded(requests, outputs, dimensions, single)

    async def async_encode(
        self,
        prompt: str | Sequence[str] | None = None,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        *,
        dimensions: int | None = None,
        rid: str | Sequence[str] | None = None,
        **other: object,
    ) -> Any:
        """Do as `encode`. Cancelling it aborts the requests."""
        loop = asyncio.get_running_loop()
        requests, single = await loop.run_in_executor(
            None, self._encode_requests, prompt, input_ids, dimensions, rid, other
        )
        outputs = {output.index: output async for output in self._async_outputs(requests)}
        return self._encoded(requests, outputs, dimensions, single)

    def _encode_requests(
        self,
        prompt: str | Sequence[str] | None,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None,
        dimensions: int | None,
        rid: str | Sequence[str] | None,
        other: Mapping[str, object],
    ) -> tuple[list[Request], bool]:
        """Return the requests for the arguments of `encode`, and whether they are for one text."""
        for name, value in other.items():
            known = ["prompt", "input_ids", "dimensions", "rid"]
            check_other(name, value, known, what="argument")
        requests, single = encode_requests(self._parser, EncodeRequest(prompt, input_ids, rid))
        if self.encoding is not None:
            check_dimensions(self.encoding, dimensions)
        return requests, single

    def _encoded(
        self,
        requests: Sequence[Request],
        outputs: Mapping[int, CompletionOutput],
        dimensions: int | None,
        single: bool,
    ) -> Encoded | list[Encoded]:
        assert self.encoding is not None
        results = [
            encoded(self.encoding, request, outputs[request.index], dimensions)
            for request in requests
        ]
        return results[0] if single else results

    def submit(self, given: GenerateRequest | EncodeRequest, deliver: Deliver) -> list[Request]:
        """Start the requests for ``given``, and return them; the loop's thread calls ``deliver``
        with each output or error.

        Raises: UsageError, for an invalid request; nothing has been started then.
        """
        if isinstance(given, EncodeRequest):
            requests, _ = encode_requests(self._parser, given)
        else:
            requests, _ = self._parser.parse(given)
        self._start(requests, deliver)
        return requests

    def cancel(self, requests: Sequence[Request]) -> None:
        """End those of ``requests`` that run, whose outputs nobody reads any more: their memory is
        free before the next step.
        """
        running = [request for request in requests if not request.done]
        if running:
            self.loop.cancel(running)

    def abort(self, rid: str) -> None:
        """End the requests of the call named ``rid``: their results say so, and their memory is
        free before the next step.
        """
        self.loop.abort(rid)

    def flush_cache(self) -> None:
        """Let no request after this call start with what an earlier one has left in the cache."""
        self.loop.flush_cache()

    def get_server_info(self) -> dict[str, object]:
        """Return the options of the engine, its limits, and what it is doing."""
        scheduler = self.loop.scheduler
        return {
            **asdict(self.config),
            "model_path": str(self.model_path),
            "context_length": self.context_length,
            "max_total_num_tokens": self.loop.runner.page_count * PAGE,
            "internal_states": [
                {"running": len(scheduler.running), "waiting": len(scheduler.waiting)}
            ],
        }

    def shutdown(self) -> None:
        """Abort what runs, and give the device's memory back."""
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _stream(self, requests: Sequence[Request], single: bool) -> Iterator[Result]:
        results = [CompletionResult(request, with_index=not single) for request in requests]
        with contextlib.closing(self._outputs(requests)) as outputs:
            for output in outputs:
                results[output.index].add(output)
                yield results[output.index].to_dict()

    async def _async_stream(
        self, requests: Sequence[Request], single: bool
    ) -> AsyncIterator[Result]:
        results = [CompletionResult(request, with_index=not single) for request in requests]
        async with contextlib.aclosing(self._async_outputs(requests)) as outputs:
            async for output in outputs:
                results[output.index].add(output)
                yield results[output.index].to_dict()

    def _outputs(self, requests: Sequence[Request]) -> Generator[CompletionOutput, None, None]:
        """Start ``requests`` and yield their outputs. Raises: the first error that ends one."""
        outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
        running = len(requests)
        try:
            self._start(requests, outputs.put)
            while running:
                output = _checked(outputs.get())
                running -= output.finish is not None
                yield output
        finally:
            self.cancel(requests)

    async def _async_outputs(
        self, requests: Sequence[Request]
    ) -> AsyncGenerator[CompletionOutput, None]:
        """Do as `_outputs`, without blocking the event loop."""
        loop = asyncio.get_running_loop()
        outputs: asyncio.Queue[Output] = asyncio.Queue()
        running = len(requests)
        try:
            self._start(requests, lambda one: loop.call_soon_threadsafe(outputs.put_nowait, one))
            while running:
                output = _checked(await outputs.get())
                running -= output.finish is not None
                yield output
        finally:
            self.cancel(requests)

    def _start(self, requests: Sequence[Request], deliver: Deliver) -> None:
        for request in requests:
            request.deliver = deliver
            self.loop.submit(request)


def _check_arguments(other: Mapping[str, object]) -> None:
    """Raise UsageError for an argument of `Engine.generate` that asks for what is not offered."""
    for name, value in other.items():
        known = [each.name for each in fields(GenerateRequest)]
        check_other(name, value, known, what="argument")


def _checked(output: Output) -> CompletionOutput:
    if isinstance(output, CompletionError):
        raise output.error
    return output


def _whole(results: Sequence[CompletionResult], single: bool) -> Result | list[Result]:
    """Return the dictionaries of complete requests; ``single``: that of the only one."""
    whole = [result.to_dict() for result in results]
    return whole[0] if single else whole


def _close(loop: Loop) -> None:
    loop.stop()
    loop.runner.close()

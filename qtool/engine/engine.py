"""`Engine`: a model that answers requests, many at a time, for Python users; arguments and results
are SGLang's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import random
import time
import warnings
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, Self, cast

import torch

from qtool.checkpoint import Checkpoint, open_checkpoint, resolve_model
from qtool.engine.attention.pages import PAGE
from qtool.engine.config import EngineConfig
from qtool.engine.grammar import Compiler
from qtool.engine.loop import Loop
from qtool.engine.model_runner import Runner
from qtool.engine.outputs import CompletionError, CompletionOutput, Output
from qtool.engine.requests import (
    Deliver,
    GenerateRequest,
    PromptTokenizer,
    Request,
    RequestParser,
    SamplingFields,
)
from qtool.engine.requirements import check_by_name, check_speculation
from qtool.engine.results import CompletionResult, Result
from qtool.engine.scheduler import Limits
from qtool.engine.sglang_names import check_other, engine_options
from qtool.errors import CheckpointRefused, QtoolError, UsageError
from qtool.formats import Layout
from qtool.options import keywords_of, make_options
from qtool.runtime.causal_lm import CausalLM, ModelConfig
from qtool.runtime.devices import device_named
from qtool.runtime.load import cache_scales, materialize
from qtool.runtime.load_plan import LoadPlan, plan_load

LOG = logging.getLogger("qtool.engine")
KV_DTYPES = ("auto", "fp8_e4m3", "fp8")  # the last is vLLM's name of the one before it
MAX_RUNNING = {"cpu": 32, "cuda": 256}
TOKEN_BUDGET = {"cpu": 2048, "cuda": 8192}
DEFAULT_SHARE = 0.85
DEFAULT_CONTEXT = 4096  # of models whose config does not have it


class Engine:
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
        device = device_named(config.device)
        checkpoint = open_checkpoint(resolve_model(os.fspath(model_path), revision=config.revision))
        dtype = config.dtype or "auto"
        plan = plan_load(checkpoint, device, config.quantization, dtype, mtp=config.uses_mtp)
        self._open(plan, config)

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
        engine._open(plan, config)
        return engine

    def _open(self, plan: LoadPlan, config: EngineConfig) -> None:
        """Load the weights and start the loop."""
        checkpoint, device = plan.checkpoint, plan.device
        check_by_name(plan)
        check_speculation(plan, config.speculation)
        limits = _limits(plan.skeleton.config, device, config)
        scales = _cache_scales(checkpoint, plan.layout, config.kv_cache_dtype or "auto")
        self.tokenizer = None
        if not config.skip_tokenizer_init:
            self.tokenizer = _tokenizer(config.tokenizer_path or checkpoint.path)
        began = time.monotonic()
        model = materialize(plan)
        LOG.info("weights loaded in %.1f s", time.monotonic() - began)
        self.eos_ids = _eos_ids(model, self.tokenizer)
        self.context_length = limits.context_length
        self.model_path = checkpoint.path
        self.config = config
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
        cache_tokens = runner.page_count * PAGE
        if cache_tokens < self.context_length:
            warnings.warn(
                f"the KV cache holds {cache_tokens:,} tokens, less than the context length of "
                f"{self.context_length:,}: longer requests are refused",
                stacklevel=3,
            )
        use_prefix = not config.disable_radix_cache
        if runner.geometry.states and use_prefix:
            LOG.info("no prefix cache: layers of this model keep a state for each sequence")
            use_prefix = False
        # of grammars
        self.compiler = None
        if self.tokenizer is not None:
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
        )
        # runs also when the engine is garbage, and when the interpreter ends
        self._end = weakref.finalize(self, _close, self.loop)

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

    def submit(self, given: GenerateRequest, deliver: Deliver) -> list[Request]:
        """Start the requests for ``given``, and return them; the loop's thread calls ``deliver``
        with each output or error.

        Raises: UsageError, for an invalid request; nothing has been started then.
        """
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


def _limits(model_config: ModelConfig, device: torch.device, config: EngineConfig) -> Limits:
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
        drafts=0 if config.speculation is None else config.speculation.drafts,
        lookahead=0 if config.speculation is None else config.speculation.lookahead,
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


def _tokenizer(path: str | os.PathLike[str]) -> PromptTokenizer:
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
    return cast(PromptTokenizer, tokenizer)


def _eos_ids(model: CausalLM, tokenizer: PromptTokenizer | None) -> tuple[int, ...]:
    """Return the end tokens of the model and of the tokenizer, without -1 and ids beyond the
    vocabulary.
    """
    config = model.config if model.generation_config is None else model.generation_config
    configured = config.eos_token_id
    ids: list[int | None] = (
        list(configured) if isinstance(configured, (list, tuple)) else [configured]
    )
    if tokenizer is not None:
        ids.append(tokenizer.eos_token_id)
    size = model.get_output_embeddings().out_features
    return tuple({each for each in ids if isinstance(each, int) and 0 <= each < size})

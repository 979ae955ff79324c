"""SGLang's own routes: `POST /generate`, whose replies are the dictionaries of
`Engine.generate`.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from msgspec import UNSET
from msgspec.structs import replace
from starlette.responses import Response

from qtool.engine.outputs import CompletionOutput, TokenLogprob, merge
from qtool.engine.sampling_params import SamplingParams
from qtool.errors import UsageError
from qtool.serve.api.answering import DONE, Reply, answer, event, reply_bytes
from qtool.serve.api.fields import PromptInput, as_prompts, is_single
from qtool.serve.api.prompt import tokenize_prompts
from qtool.serve.api.protocol import GenerateRequest, NativeSampling
from qtool.serve.api.replies import Account, finite, log_request, without_text
from qtool.serve.api.schemas import Generation, GenerationChunk, GenerationFacts, NativeLogprob
from qtool.serve.backend.engine_client import OutputStream
from qtool.serve.backend.messages import Submission
from qtool.serve.service import Service
from qtool.serve.turns import current_origin


async def generate(service: Service, body: GenerateRequest) -> Response:
    """Answer ``body``. Raises: UsageError, Busy."""
    account = Account("generate", service.metrics, streamed=bool(body.stream))
    given = _given_prompt(body)
    prompts = as_prompts(given)
    sampling = body.sampling_params or NativeSampling()
    params = await service.threads.run(
        current_origin().body_bytes, _sampling_params, service, sampling
    )
    with service.acquire(len(prompts) * params.n) as slot:
        tokens = await tokenize_prompts(service, prompts)
        log_request(prompts, params, service.settings)
        submission = Submission(
            tokens,
            params,
            stream=bool(body.stream),
            rid=body.rid or service.new_id("gen"),
            top_logprobs=(body.top_logprobs_num or 0) if body.return_logprob else None,
            prompt_logprobs_from=-1 if body.logprob_start_len is None else body.logprob_start_len,
            grammar=await service.compiled(params),
        )
        account.expect(submission.prompts)
        reply = _GenerationReply(
            service,
            body,
            submission,
            account,
            is_list=not is_single(given) or params.n > 1,
            no_tokens=sampling.max_new_tokens == 0,
        )
        return await answer(service, slot, submission, reply, sampling.max_new_tokens)


def _given_prompt(body: GenerateRequest) -> PromptInput:
    """Return the text or tokens of ``body``. Raises: UsageError, if there are both or none."""
    if body.text is not None and body.input_ids is None:
        return body.text
    if body.input_ids is not None and body.text is None:
        return body.input_ids
    raise UsageError("E_PROMPT", "give either text or input_ids", hint="one of them, and not both")


def _sampling_params(service: Service, sampling: NativeSampling) -> SamplingParams:
    values = {**service.defaults, **sampling.model_dump(exclude_none=True)}
    if sampling.max_new_tokens == 0:  # the engine generates at least one
        values["max_new_tokens"] = 1
    return SamplingParams.from_dict(values)


@dataclass(frozen=True)
class _Logprobs:
    """Log probabilities as ``meta_info`` shows them."""

    tokens: list[NativeLogprob]
    top: list[list[NativeLogprob] | None]


class _GenerationReply(Reply):
    """The reply to one request."""

    def __init__(
        self,
        service: Service,
        body: GenerateRequest,
        submission: Submission,
        account: Account,
        *,
        is_list: bool,
        no_tokens: bool,
    ) -> None:
        self._vocabulary = service.vocabulary
        self._threads = service.threads
        self._body = body
        self._submission = submission
        self._account = account
        self._is_list = is_list
        self._no_tokens = no_tokens
        """Whether the text and tokens of the answer are left out."""

    def whole(self, outputs: list[CompletionOutput]) -> Generation | list[Generation]:
        """Return the dictionary of the choice, or of each."""
        generations = []
        for output in map(self._note, outputs):
            meta_info = self._meta_info(output)
            generations.append(Generation(output.text, output.token_ids, meta_info))
        return generations if self._is_list else generations[0]

    def close(self) -> None:
        """Record what the request used."""
        self._account.close(self._submission.rid)

    async def events(self, stream: OutputStream) -> AsyncGenerator[bytes, None]:
        """Yield all of a choice so far, whenever it gains something."""
        so_far: dict[int, CompletionOutput] = {}
        async for outputs in stream:
            for output in map(self._note, outputs):
                before = so_far.get(output.index)
                whole = output if before is None else merge([before, output])
                so_far[output.index] = whole
                size = reply_bytes([whole], self._submission)
                yield await self._threads.run(size, self._event, whole)
        yield DONE

    def _event(self, output: CompletionOutput) -> bytes:
        return event(
            GenerationChunk(
                output.text,
                output.token_ids,
                self._meta_info(output),
                index=output.index if self._is_list else UNSET,
            )
        )

    def _note(self, output: CompletionOutput) -> CompletionOutput:
        """Count ``output``, and return it as the client gets it."""
        output = without_text(output) if self._no_tokens else output
        self._account.note(output, self._submission.params.n)
        return output

    def _meta_info(self, output: CompletionOutput) -> GenerationFacts:
        """Return ``meta_info`` for a choice, of which ``output`` is all there is so far."""
        rid = self._submission.rid
        prompt = self._submission.prompts[output.index // self._submission.params.n]
        finish = output.finish
        meta = GenerationFacts(
            id=f"{rid}-{output.index}" if self._is_list else rid,
            finish_reason=None if finish is None else finish.reason,
            prompt_tokens=len(prompt),
            completion_tokens=len(output.token_ids),
        )
        if self._body.return_logprob:
            shown = self._show(output.logprobs)
            meta.output_token_logprobs = shown.tokens
            meta.output_top_logprobs = shown.top if self._body.top_logprobs_num else UNSET
        if finish is not None:
            meta.cached_tokens = finish.cached_tokens
            meta.e2e_latency = finish.latency_s
        if finish is not None and finish.spec is not None:
            meta = replace(meta, **finish.spec.facts())
        if finish is not None and self._body.return_logprob:
            shown = self._show(finish.prompt_logprobs)
            meta.input_token_logprobs = shown.tokens
            meta.input_top_logprobs = shown.top if self._body.top_logprobs_num else UNSET
        return meta

    def _show(self, logprobs: list[TokenLogprob]) -> _Logprobs:
        top: list[list[NativeLogprob] | None] = []
        if self._body.top_logprobs_num:
            top = [
                None if one.top is None else list(itertools.starmap(self._show_one, one.top))
                for one in logprobs
            ]
        return _Logprobs([self._show_one(one.logprob, one.token_id) for one in logprobs], top)

    def _show_one(self, logprob: float | None, token: int) -> NativeLogprob:
        text = None
        if self._body.return_text_in_logprobs:
            text = self._vocabulary.text_of(token)
        return finite(logprob), token, text

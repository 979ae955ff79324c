"""SGLang's own routes: `POST /generate`, whose replies are the dictionaries of
`Engine.generate`.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from msgspec import UNSET
from msgspec.structs import replace
from starlette.responses import Response

from qtool.engine.outputs import CompletionOutput, TokenLogprob, merge
from qtool.engine.sampling_params import SamplingParams
from qtool.errors import UsageError
from qtool.serve.api.answering import DONE, Reply, answer_all, event, reply_bytes
from qtool.serve.api.fields import PromptInput, as_prompts, is_single
from qtool.serve.api.prompt import tokenize_prompts
from qtool.serve.api.protocol import GenerateRequest, NativeSampling, one_salt
from qtool.serve.api.replies import Account, finite, log_request, without_text
from qtool.serve.api.schemas import Generation, GenerationChunk, GenerationFacts, NativeLogprob
from qtool.serve.backend.engine_client import OutputStream
from qtool.serve.backend.messages import Submission
from qtool.serve.service import Service
from qtool.serve.turns import current_origin, name_request

PER_PROMPT = (
    *("sampling_params", "rid", "cache_salt", "extra_key"),
    *("return_logprob", "logprob_start_len", "top_logprobs_num"),
)


async def generate(service: Service, body: GenerateRequest) -> Response:
    """Answer ``body``. Raises: UsageError, Busy."""
    account = Account("generate", service.metrics, streamed=bool(body.stream))
    given = _given_prompt(body)
    prompts = as_prompts(given)
    each = _options(body, len(prompts))
    rids = [options.rid or service.new_id("gen-") for options in each]
    name_request(rids[0])
    params = await service.threads.run(
        current_origin().body_bytes, _all_params, service, [one.sampling for one in each]
    )
    with service.acquire(len(prompts) * params[0].n) as slot:
        tokens = await tokenize_prompts(service, prompts)
        log_request(prompts, params[0], service.settings)
        groups = [tokens] if len(each) == 1 else [[one] for one in tokens]
        submissions = [
            Submission(
                group,
                its,
                stream=bool(body.stream),
                rid=rid,
                top_logprobs=options.top_logprobs,
                prompt_logprobs_from=options.prompt_logprobs_from,
                cache_salt=options.salt,
                grammar=await service.compiled(its),
            )
            for group, its, options, rid in zip(groups, params, each, rids, strict=True)
        ]
        account.expect(tokens)
        reply = _GenerationReply(
            service,
            body,
            submissions,
            each,
            account,
            is_list=not is_single(given) or params[0].n > 1,
        )
        limits = [options.sampling.max_new_tokens for options in each]
        return await answer_all(service, slot, submissions, reply, limits)


@dataclass(frozen=True)
class _Options:
    """What is asked for one prompt, or for all."""

    sampling: NativeSampling
    rid: str | None
    salt: str
    top_logprobs: int | None
    prompt_logprobs_from: int


def _options(body: GenerateRequest, count: int) -> list[_Options]:
    """Return the options of each of ``count`` prompts, or those of all where ``body`` has no lists.

    Raises: UsageError, for a list of another length.
    """
    given = {name: getattr(body, name) for name in PER_PROMPT}
    lists = {name: value for name, value in given.items() if isinstance(value, list)}
    for name, value in lists.items():
        if len(value) != count:
            message = f"{count} prompts and {len(value)} values of {name}"
            raise UsageError("E_PROMPT", message, hint="give one for all, or one for each prompt")
    each = []
    for number in range(count if lists else 1):
        own = given | {name: value[number] for name, value in lists.items()}
        start = own["logprob_start_len"]
        each.append(
            _Options(
                own["sampling_params"] or NativeSampling(),
                own["rid"],
                one_salt(own["cache_salt"], own["extra_key"]),
                (own["top_logprobs_num"] or 0) if own["return_logprob"] else None,
                -1 if start is None else start,
            )
        )
    return each


def _all_params(service: Service, each: Sequence[NativeSampling]) -> list[SamplingParams]:
    """Return the parameters of each prompt. Raises: UsageError, if their ``n`` differ."""
    params = [_sampling_params(service, one) for one in each]
    if len({one.n for one in params}) > 1:
        raise UsageError(
            "E_SAMPLING",
            "n differs among the prompts",
            hint="as in SGLang, all prompts of a request have as many completions",
        )
    return params


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
        submissions: Sequence[Submission],
        each: Sequence[_Options],
        account: Account,
        *,
        is_list: bool,
    ) -> None:
        self._vocabulary = service.vocabulary
        self._threads = service.threads
        self._body = body
        self._submissions = submissions
        self._account = account
        self._is_list = is_list
        self._n = submissions[0].params.n
        self._no_tokens = [options.sampling.max_new_tokens == 0 for options in each]
        """Of each submission, whether the text and tokens of its answers are left out."""
        self._prompt_tokens = [len(tokens) for one in submissions for tokens in one.prompts]

    def _number_of(self, index: int) -> int:
        """Return which submission computes the completion ``index``."""
        return index // self._n if len(self._submissions) > 1 else 0

    def whole(self, outputs: list[CompletionOutput]) -> Generation | list[Generation]:
        """Return the dictionary of the choice, or of each."""
        generations = []
        for output in map(self._note, outputs):
            meta_info = self._meta_info(output)
            generations.append(Generation(output.text, output.token_ids, meta_info))
        return generations if self._is_list else generations[0]

    def waiting(self) -> bytes:
        """Return nothing: SGLang's benchmark reads every line as an event."""
        return b""

    def close(self) -> None:
        """Record what the request used."""
        self._account.close("+".join(submission.rid for submission in self._submissions[:8]))

    async def events(self, stream: OutputStream) -> AsyncGenerator[bytes, None]:
        """Yield all of a choice so far, whenever it gains something."""
        so_far: dict[int, CompletionOutput] = {}
        async for outputs in stream:
            for output in map(self._note, outputs):
                before = so_far.get(output.index)
                whole = output if before is None else merge([before, output])
                so_far[output.index] = whole
                size = reply_bytes([whole], self._submissions[self._number_of(whole.index)])
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
        if self._no_tokens[self._number_of(output.index)]:
            output = without_text(output)
        self._account.note(output, self._n)
        return output

    def _meta_info(self, output: CompletionOutput) -> GenerationFacts:
        """Return ``meta_info`` for a choice, of which ``output`` is all there is so far."""
        submission = self._submissions[self._number_of(output.index)]
        finish = output.finish
        meta = GenerationFacts(
            id=self._id_of(output.index, submission),
            finish_reason=None if finish is None else finish.reason,
            prompt_tokens=self._prompt_tokens[output.index // self._n],
            completion_tokens=len(output.token_ids),
        )
        top = submission.top_logprobs
        if top is not None:
            shown = self._show(output.logprobs, top)
            meta.output_token_logprobs = shown.tokens
            meta.output_top_logprobs = shown.top if top else UNSET
        if finish is not None:
            meta.cached_tokens = finish.cached_tokens
            meta.e2e_latency = finish.latency_s
        if finish is not None and finish.spec is not None:
            meta = replace(meta, **finish.spec.facts())
        if finish is not None and top is not None:
            shown = self._show(output.prompt_logprobs, top)
            meta.input_token_logprobs = shown.tokens
            meta.input_top_logprobs = shown.top if top else UNSET
        return meta

    def _id_of(self, index: int, submission: Submission) -> str:
        if len(self._submissions) > 1:  # each prompt has an id of its own
            return submission.rid if self._n == 1 else f"{submission.rid}-{index % self._n}"
        return f"{submission.rid}-{index}" if self._is_list else submission.rid

    def _show(self, logprobs: list[TokenLogprob], count: int) -> _Logprobs:
        top: list[list[NativeLogprob] | None] = []
        if count:
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

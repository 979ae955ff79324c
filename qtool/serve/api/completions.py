"""`POST /v1/completions`: prompts as text or tokens, continued."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import cast

from starlette.responses import Response

from qtool.engine.outputs import CompletionOutput
from qtool.errors import UsageError
from qtool.serve.api.answering import DONE, Reply, answer, event, reply_bytes
from qtool.serve.api.fields import PromptOrTokens, as_prompts
from qtool.serve.api.prompt import tokenize_prompts
from qtool.serve.api.protocol import CompletionRequest
from qtool.serve.api.replies import (
    Account,
    StreamUsage,
    completion_logprobs,
    finish_reason,
    log_request,
    prompt_offsets,
    without_text,
)
from qtool.serve.api.sampling import sampling_params
from qtool.serve.api.schemas import (
    Completion,
    CompletionChoice,
    CompletionChunk,
    CompletionChunkChoice,
    CompletionLogprobs,
    Usage,
)
from qtool.serve.backend.engine_client import OutputStream
from qtool.serve.backend.messages import Submission
from qtool.serve.prompts.vocabulary import Offsets
from qtool.serve.service import Service
from qtool.serve.turns import current_origin, name_request

DEFAULT_MAX_TOKENS = 16  # OpenAI's


async def complete(service: Service, body: CompletionRequest) -> Response:
    """Answer ``body``. Raises: UsageError, ModelNotFound, Busy."""
    rid = name_request(body.rid or service.new_id("cmpl-"))
    account = Account("completion", service.metrics, streamed=bool(body.stream))
    service.check_model(body.model)
    _check_options(body)
    max_tokens = body.max_tokens
    if max_tokens is None:
        max_tokens = cast(int, service.defaults.get("max_new_tokens", DEFAULT_MAX_TOKENS))
    params = await service.threads.run(
        current_origin().body_bytes,
        sampling_params,
        body,
        service.defaults,
        max(max_tokens, 1),
    )
    chosen = params.n
    if body.best_of is not None:
        params = replace(params, n=body.best_of)
    by_likelihood = params.n > chosen
    prompts = as_prompts(body.prompt)
    with service.acquire(len(prompts) * params.n) as slot:
        special = body.add_special_tokens is not False
        tokens = await tokenize_prompts(service, prompts, add_special_tokens=special)
        log_request(prompts, params, service.settings)
        submission = Submission(
            tokens,
            params,
            stream=bool(body.stream),
            rid=rid,
            top_logprobs=0 if by_likelihood and body.logprobs is None else body.logprobs,
            prompt_logprobs_from=0 if body.echo and body.logprobs is not None else -1,
            cache_salt=body.salt,
            grammar=await service.compiled(params),
        )
        account.expect(submission.prompts)
        echoed = await _echoed(service, prompts) if body.echo else [""] * len(prompts)
        reply = _CompletionReply(service, body, submission, account, echoed, chosen)
        return await answer(service, slot, submission, reply, body.max_tokens)


async def _echoed(service: Service, prompts: Sequence[PromptOrTokens]) -> Sequence[str]:
    """Return the text of each of ``prompts``, to be repeated in the reply."""
    if any(isinstance(prompt, str) for prompt in prompts):  # then all are
        return cast(Sequence[str], prompts)
    return await service.vocabulary.decode(cast(Sequence[Sequence[int]], prompts))


def _check_options(body: CompletionRequest) -> None:
    """Raise: UsageError, for options that are not supported."""
    best_of, n = body.best_of, body.n or 1
    if best_of is not None and best_of < n:
        message = f"best_of is {best_of}, and n is {n}"
        raise UsageError("E_BEST_OF", message, hint="n of best_of are returned")
    if best_of is not None and best_of > n and body.stream:
        message = "the best of several texts is known when all have ended: it cannot be streamed"
        raise UsageError("E_BEST_OF", message, hint="leave out stream or best_of")


class _CompletionReply(Reply):
    """The reply to one request."""

    def __init__(
        self,
        service: Service,
        body: CompletionRequest,
        submission: Submission,
        account: Account,
        echoed: Sequence[str],
        chosen: int,
    ) -> None:
        self._chosen = chosen
        """How many of the texts for each prompt are returned."""
        self._threads = service.threads
        self._vocabulary = service.vocabulary
        self._has_logprobs = body.logprobs is not None
        self._repeats_logprobs = self._has_logprobs and bool(body.echo)
        """Whether those of the prompt are returned, too."""
        self._submission = submission
        self._account = account
        self._each = submission.params.n
        self._no_tokens = body.max_tokens == 0
        """Whether the text and tokens of the answer are left out."""
        self._echoed = echoed
        """The text to repeat before each prompt's choices."""
        self._model = body.model or service.settings.name
        self._created = int(time.time())
        self._stream_usage = StreamUsage(body.stream_options, account)
        self._offsets: dict[int, Offsets] = {}
        """By choice."""

    def whole(self, outputs: list[CompletionOutput]) -> Completion:
        """Return the reply as one object."""
        return Completion(
            id=self._submission.rid,
            object="text_completion",
            created=self._created,
            model=self._model,
            choices=[
                self._whole_choice(index, output)
                for index, output in enumerate(self._choose([*map(self._note, outputs)]))
            ],
            usage=self._account.usage(),
        )

    def _choose(self, outputs: list[CompletionOutput]) -> list[CompletionOutput]:
        """Return the likeliest texts of each prompt, by the mean of their log probabilities."""
        if self._chosen == self._each:
            return outputs
        starts = range(0, len(outputs), self._each)
        groups = [outputs[start : start + self._each] for start in starts]
        best = [sorted(group, key=_likelihood, reverse=True)[: self._chosen] for group in groups]
        return list(itertools.chain.from_iterable(best))

    def close(self) -> None:
        """Record what the request used."""
        self._account.close(self._submission.rid)

    async def events(self, stream: OutputStream) -> AsyncGenerator[bytes, None]:
        """Yield the reply as events: the text of each choice, why it ended, and the usage."""
        async for outputs in stream:
            noted = [self._note(output) for output in outputs]
            if self._repeats_logprobs and any(output.prompt_logprobs for output in noted):
                size = reply_bytes(noted, self._submission)
                events = await self._threads.run(size, self._chunks, noted)
            else:
                events = self._chunks(noted)
            if events:
                yield events
        if self._stream_usage.at_end:
            yield event(self._chunk(usage=self._account.usage()))
        yield DONE

    def _note(self, output: CompletionOutput) -> CompletionOutput:
        """Count ``output``, and return it as the client gets it."""
        output = without_text(output) if self._no_tokens else output
        self._account.note(output, self._each)
        return output

    def _whole_choice(self, index: int, output: CompletionOutput) -> CompletionChoice:
        assert output.finish is not None
        return CompletionChoice(
            index=index,
            text=self._echoed[output.index // self._each] + output.text,
            logprobs=self._whole_logprobs(output),
            finish_reason=finish_reason(output.finish),
            matched_stop=output.finish.reason.get("matched"),
        )

    def _whole_logprobs(self, output: CompletionOutput) -> CompletionLogprobs | None:
        if not self._has_logprobs:
            return None
        before = self._begin_offsets(output.index)
        after = self._add_offsets(output)
        logprobs = [*output.prompt_logprobs, *output.logprobs]
        return completion_logprobs(logprobs, self._vocabulary, [*before, *after])

    def _begin_offsets(self, index: int) -> list[int]:
        """Return where the tokens of the prompt begin that choice ``index`` repeats with their log
        probabilities, if it does; the offsets of its own tokens go on from there.
        """
        prompt = index // self._each
        before, self._offsets[index] = prompt_offsets(
            self._submission.prompts[prompt] if self._repeats_logprobs else [],
            self._echoed[prompt],
            self._vocabulary,
        )
        return before

    def _chunk(
        self, *choices: CompletionChunkChoice, usage: Usage | None = None
    ) -> CompletionChunk:
        return CompletionChunk(
            id=self._submission.rid,
            object="text_completion",
            created=self._created,
            model=self._model,
            choices=list(choices),
            usage=self._stream_usage.of_chunk() if usage is None else usage,
        )

    def _chunks(self, outputs: Sequence[CompletionOutput]) -> bytes:
        """Return the events of ``outputs``, which are none if there is nothing to show."""
        events = b""
        for output in outputs:
            choice = self._chunk_choice(output)
            if choice is not None:
                events += event(self._chunk(choice))
        return events

    def _chunk_choice(self, output: CompletionOutput) -> CompletionChunkChoice | None:
        """Return what ``output`` adds to its choice; None if that is nothing to show."""
        choice = CompletionChunkChoice(output.index, output.text, logprobs=None, finish_reason=None)
        before: list[int] = []
        if output.index not in self._offsets:
            before = self._begin_offsets(output.index)
            choice.text = self._echoed[output.index // self._each] + output.text
        if self._has_logprobs and (output.logprobs or output.prompt_logprobs):
            logprobs = [*output.prompt_logprobs, *output.logprobs]
            offsets = [*before, *self._add_offsets(output)]
            choice.logprobs = completion_logprobs(logprobs, self._vocabulary, offsets)
        if output.finish is not None:
            choice.finish_reason = finish_reason(output.finish)
            choice.matched_stop = output.finish.reason.get("matched")
        is_empty = not choice.text and choice.logprobs is None and output.finish is None
        return None if is_empty else choice

    def _add_offsets(self, output: CompletionOutput) -> list[int]:
        offsets = self._offsets[output.index]
        skip = self._submission.params.skip_special_tokens
        return [offsets.add(token, skip_special_tokens=skip) for token in output.token_ids]


def _likelihood(output: CompletionOutput) -> float:
    """Return the mean log probability of the tokens of ``output``."""
    logprobs = [one.logprob or 0.0 for one in output.logprobs]
    return sum(logprobs) / len(logprobs) if logprobs else -math.inf

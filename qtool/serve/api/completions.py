"""`POST /v1/completions`: prompts as text or tokens, continued."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator
from typing import Any, cast

from starlette.responses import Response

from qtool.engine.outputs import CompletionOutput
from qtool.errors import UsageError
from qtool.serve.api.answering import DONE, answer, event
from qtool.serve.api.protocol import CompletionRequest
from qtool.serve.api.replies import (
    Account,
    completion_logprobs,
    finish_reason,
    log_request,
    prompt_offsets,
    without_text,
)
from qtool.serve.api.sampling import sampling_params
from qtool.serve.backend.engine_client import OutputStream
from qtool.serve.backend.messages import Submission
from qtool.serve.prompts.vocabulary import Offsets
from qtool.serve.service import Service

DEFAULT_MAX_TOKENS = 16  # OpenAI's


async def complete(service: Service, body: CompletionRequest) -> Response:
    """Answer ``body``. Raises: UsageError, ModelNotFound, Busy."""
    account = Account("completion", service.metrics, streamed=bool(body.stream))
    service.check_model(body.model)
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise UsageError(
            "E_BEST_OF", "best_of beyond n is not offered", hint="leave it out, and choose among n"
        )
    if body.echo and body.stream and body.logprobs is not None:
        raise UsageError("E_ECHO", "echo with logprobs cannot be streamed", hint="leave out stream")
    default = cast(int, service.defaults.get("max_new_tokens", DEFAULT_MAX_TOKENS))
    asked = default if body.max_tokens is None else body.max_tokens
    params = sampling_params(body, service.defaults, max(asked, 1))
    prompts: list[Any] = (
        body.prompt
        if isinstance(body.prompt, list) and not isinstance(body.prompt[0], int)
        else [body.prompt]
    )
    with service.acquire(len(prompts) * params.n) as slot:
        special = body.add_special_tokens is not False
        tokens = [
            await service.vocabulary.encode(one, add_special_tokens=special)
            if isinstance(one, str)
            else one
            for one in prompts
        ]
        log_request(prompts, params, service.settings)
        submission = Submission(
            tokens,
            params,
            stream=bool(body.stream),
            rid=body.rid or service.new_id("cmpl"),
            top_logprobs=body.logprobs,
            prompt_logprobs_from=0 if body.echo and body.logprobs is not None else -1,
            grammar=await service.compiled(params),
        )
        echoed = (
            [one if isinstance(one, str) else service.vocabulary.decode(one) for one in prompts]
            if body.echo
            else [""] * len(prompts)
        )
        reply = _Completion(service, body, submission, account, echoed, nothing=asked == 0)
        return await answer(service, slot, submission, reply, body.max_tokens)


class _Completion:
    """The reply to one request.

    ``echoed``: the text to repeat before each prompt's choices. ``nothing``: no token is wanted,
    though one is made.
    """

    def __init__(
        self,
        service: Service,
        body: CompletionRequest,
        submission: Submission,
        account: Account,
        echoed: list[str],
        *,
        nothing: bool,
    ) -> None:
        self._service, self._body, self._submission, self._account = (
            service,
            body,
            submission,
            account,
        )
        self._echoed, self._each, self._nothing = echoed, submission.params.n, nothing
        self._model, self._created = body.model or service.settings.name, int(time.time())

    def whole(self, outputs: list[CompletionOutput]) -> dict[str, Any]:
        """Return the reply as one object."""
        choices = []
        for output in outputs:
            output = without_text(output) if self._nothing else output
            assert output.finish is not None
            self._account.note(output, self._each)
            choices.append(
                {
                    "index": output.index,
                    "text": self._echoed[output.index // self._each] + output.text,
                    "logprobs": self._logprobs(output),
                    "finish_reason": finish_reason(output.finish),
                    "matched_stop": output.finish.reason.get("matched"),
                }
            )
        return self._head() | {"choices": choices, "usage": self._account.usage()}

    def close(self) -> None:
        """Write down what the request used."""
        self._account.close(self._submission.rid)

    async def events(self, stream: OutputStream) -> AsyncGenerator[bytes, None]:
        """Yield the reply as events: what each choice gets, why it ends, and at last the usage."""
        body, vocabulary = self._body, self._service.vocabulary
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        head = json.dumps(self._head(), ensure_ascii=False, separators=(",", ":"))[:-1]
        tail = ',"usage":null}\n\n' if with_usage else "}\n\n"
        encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
        offsets: dict[int, Offsets] = {}
        skip = self._submission.params.skip_special_tokens
        async for outputs in stream:
            lines = []
            for output in outputs:
                output = without_text(output) if self._nothing else output
                self._account.note(output, self._each)
                index, text, finish = output.index, output.text, output.finish
                if index not in offsets:
                    text, offsets[index] = (
                        self._echoed[index // self._each] + text,
                        Offsets(vocabulary, 0),
                    )
                logprobs = "null"
                if body.logprobs is not None and output.logprobs:
                    begins = [
                        offsets[index].add(token, skip_special_tokens=skip)
                        for token in output.token_ids
                    ]
                    logprobs = encode(completion_logprobs(output.logprobs, vocabulary, begins))
                if not (text or finish or logprobs != "null"):
                    continue
                reason = (
                    f'"{finish_reason(finish)}",'
                    f'"matched_stop":{encode(finish.reason.get("matched"))}'
                    if finish
                    else "null"
                )
                choice = (
                    f'{{"index":{index},"text":{encode(text)},"logprobs":{logprobs},'
                    f'"finish_reason":{reason}}}'
                )
                lines.append(f'data: {head},"choices":[{choice}]{tail}')
            if lines:
                yield "".join(lines).encode()
        if with_usage:
            yield event(self._head() | {"choices": [], "usage": self._account.usage()})
        yield DONE

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._submission.rid,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
        }

    def _logprobs(self, output: CompletionOutput) -> dict[str, object] | None:
        if self._body.logprobs is None:
            return None
        assert output.finish is not None
        vocabulary, skip, prompt = (
            self._service.vocabulary,
            self._submission.params.skip_special_tokens,
            output.index // self._each,
        )
        before, offsets = prompt_offsets(
            self._submission.prompts[prompt] if self._body.echo else [],
            self._echoed[prompt],
            vocabulary,
        )
        after = [offsets.add(token, skip_special_tokens=skip) for token in output.token_ids]
        logprobs = [*output.finish.prompt_logprobs, *output.logprobs]
        return completion_logprobs(logprobs, vocabulary, [*before, *after])

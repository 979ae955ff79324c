"""SGLang's own routes: `POST /generate`, whose replies are the dictionaries of
`Engine.generate`.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import Response

from qtool.engine.outputs import CompletionOutput, TokenLogprob, merge
from qtool.engine.sampling_params import SamplingParams
from qtool.errors import UsageError
from qtool.serve.api.answering import DONE, answer, event
from qtool.serve.api.protocol import GenerateRequest
from qtool.serve.api.replies import Account, finite, log_request, without_text
from qtool.serve.backend.engine_client import OutputStream
from qtool.serve.backend.messages import Submission
from qtool.serve.service import Service


async def generate(service: Service, body: GenerateRequest) -> Response:
    """Answer ``body``. Raises: UsageError, Busy."""
    account = Account("generate", service.metrics, streamed=bool(body.stream))
    if (body.text is None) == (body.input_ids is None):
        raise UsageError(
            "E_PROMPT", "give either text or input_ids", hint="one of them, and not both"
        )
    given: Any = body.text if body.input_ids is None else body.input_ids
    single = isinstance(given, str) or isinstance(given[0], int)
    prompts: list[Any] = [given] if single else given
    values = (
        {} if body.sampling_params is None else body.sampling_params.model_dump(exclude_none=True)
    )
    nothing = values.get("max_new_tokens") == 0
    params = SamplingParams.from_dict(
        {**service.defaults, **values} | ({"max_new_tokens": 1} if nothing else {})
    )
    with service.acquire(len(prompts) * params.n) as slot:
        tokens = [
            await service.vocabulary.encode(one) if isinstance(one, str) else one for one in prompts
        ]
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
        reply = _Generation(
            service, body, submission, account, alone=single and params.n == 1, nothing=nothing
        )
        return await answer(service, slot, submission, reply, values.get("max_new_tokens"))


class _Generation:
    """The reply to one request.

    ``alone``: it is no list. ``nothing``: no token is wanted, though one was made.
    """

    def __init__(
        self,
        service: Service,
        body: GenerateRequest,
        submission: Submission,
        account: Account,
        *,
        alone: bool,
        nothing: bool,
    ) -> None:
        self._service, self._body, self._submission, self._account = (
            service,
            body,
            submission,
            account,
        )
        self.alone, self._nothing = alone, nothing

    def whole(self, outputs: list[CompletionOutput]) -> object:
        """Return the dictionary of the choice, or of each."""
        results = []
        for output in outputs:
            output = without_text(output) if self._nothing else output
            self._account.note(output, self._submission.params.n)
            results.append(self.result(output))
        return results[0] if self.alone else results

    def result(self, output: CompletionOutput) -> dict[str, object]:
        """Return the dictionary for a choice, of which ``output`` is all there is so far."""
        rid = self._submission.rid
        prompt = self._submission.prompts[output.index // self._submission.params.n]
        finish = output.finish
        meta: dict[str, object] = {
            "id": rid if self.alone else f"{rid}-{output.index}",
            "finish_reason": None if finish is None else finish.reason,
            "prompt_tokens": len(prompt),
            "completion_tokens": len(output.token_ids),
        }
        if finish is not None:
            meta |= {"cached_tokens": finish.cached_tokens, "e2e_latency": finish.latency_s}
        if self._body.return_logprob:
            meta |= self._logprobs("output", output.logprobs)
        if self._body.return_logprob and finish is not None:
            meta |= self._logprobs("input", finish.prompt_logprobs)
        return {"text": output.text, "output_ids": output.token_ids, "meta_info": meta}

    def close(self) -> None:
        """Write down what the request used."""
        self._account.close(self._submission.rid)

    async def events(self, stream: OutputStream) -> AsyncGenerator[bytes, None]:
        """Yield each choice with all it has so far, whenever it gets more."""
        whole: dict[int, CompletionOutput] = {}
        async for outputs in stream:
            for output in outputs:
                output = without_text(output) if self._nothing else output
                self._account.note(output, self._submission.params.n)
                before = whole.get(output.index)
                so_far = output if before is None else merge([before, output])
                whole[output.index] = so_far
                result = self.result(so_far)
                yield event(result if self.alone else {**result, "index": output.index})
        yield DONE

    def _logprobs(self, kind: str, logprobs: list[TokenLogprob]) -> dict[str, object]:
        """Return the entries of ``meta_info`` for tokens of that kind, "input" or "output"."""
        shown: dict[str, object] = {
            f"{kind}_token_logprobs": [self._shown(one.logprob, one.token_id) for one in logprobs]
        }
        if self._body.top_logprobs_num:
            shown[f"{kind}_top_logprobs"] = [
                None if one.top is None else list(itertools.starmap(self._shown, one.top))
                for one in logprobs
            ]
        return shown

    def _shown(self, logprob: float | None, token: int) -> tuple[float | None, int, str | None]:
        text = None
        if self._body.return_text_in_logprobs:
            text = self._service.vocabulary.text_of(token)
        return finite(logprob), token, text

"""SGLang's own routes: `POST /generate`, whose replies are the dictionaries of
`Engine.generate`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import Response

from qtool.engine.sampling_params import SamplingParams
from qtool.errors import UsageError
from qtool.serve.api.answering import DONE, answer, event
from qtool.serve.api.protocol import GenerateRequest
from qtool.serve.api.replies import Account, finite, log_request, without_answer
from qtool.serve.backend.engine_client import Answers, Logprob, Piece, Submission, add
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
    with service.admit(len(prompts) * params.n) as ticket:
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
        return await answer(service, ticket, submission, reply, values.get("max_new_tokens"))


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

    def whole(self, pieces: list[Piece]) -> object:
        """Return the dictionary of the choice, or of each."""
        results = []
        for piece in pieces:
            piece = without_answer(piece) if self._nothing else piece
            self._account.note(piece, self._submission.params.n)
            results.append(self.result(piece))
        return results[0] if self.alone else results

    def result(self, piece: Piece) -> dict[str, Any]:
        """Return the dictionary for a choice, of which ``piece`` is all there is so far."""
        params, rid = self._submission.params, self._submission.rid
        prompt = self._submission.prompts[piece.choice // params.n]
        meta: dict[str, Any] = {
            "id": rid if self.alone else f"{rid}-{piece.choice}",
            "finish_reason": piece.ending and piece.ending.reason,
            "prompt_tokens": len(prompt),
            "completion_tokens": len(piece.tokens),
        }
        if (ending := piece.ending) is not None:
            meta |= {"cached_tokens": ending.cached_tokens, "e2e_latency": ending.seconds}
        if self._body.return_logprob:
            meta["output_token_logprobs"] = self._shown(piece.logprobs)
            if self._body.top_logprobs_num:
                meta["output_top_logprobs"] = [self._shown(one) for one in piece.top]
            if ending is not None:
                meta["input_token_logprobs"] = self._shown(ending.input_logprobs)
                if self._body.top_logprobs_num:
                    meta["input_top_logprobs"] = [
                        None if one is None else self._shown(one) for one in ending.input_top
                    ]
        return {"text": piece.text, "output_ids": piece.tokens, "meta_info": meta}

    def close(self) -> None:
        """Write down what the request used."""
        self._account.close(self._submission.rid)

    async def events(self, answers: Answers) -> AsyncGenerator[bytes, None]:
        """Yield each choice with all it has so far, whenever it gets more."""
        whole: dict[int, Piece] = {}
        async for pieces in answers:
            for piece in pieces:
                piece = without_answer(piece) if self._nothing else piece
                self._account.note(piece, self._submission.params.n)
                result = self.result(add(whole, piece))
                yield event(result if self.alone else {**result, "index": piece.choice})
        yield DONE

    def _shown(self, logprobs: list[Logprob]) -> list[tuple[float | None, int, str | None]]:
        text_of = self._service.vocabulary.text_of
        return [
            (finite(value), token, text_of(token) if self._body.return_text_in_logprobs else None)
            for value, token, _ in logprobs
        ]

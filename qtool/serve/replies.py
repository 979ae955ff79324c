"""What the routes for text share: sampling parameters from a request, log probabilities as OpenAI shows them, streams of events, the log."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from qtool.errors import QtoolError, ResourceError, UsageError
from qtool.runtime.sampling_params import ANY_JSON_OBJECT, SamplingParams
from qtool.serve.engine_client import Ending, Logprob, Piece
from qtool.serve.metrics import Metrics
from qtool.serve.protocol import ErrorDetail, ErrorReply, Sampling
from qtool.serve.service import Busy, Ticket
from qtool.serve.settings import Settings
from qtool.serve.vocabulary import Offsets, Vocabulary

LOG = logging.getLogger("qtool.serve")
LEAST_LOGPROB = -9999.0  # JSON has no infinity
SAME_NAME = (  # fields of a request that SamplingParams knows by the same name
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "logit_bias",
    "n",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "skip_special_tokens",
    "spaces_between_special_tokens",
)
DONE = b"data: [DONE]\n\n"


def sampling_params(request: Sampling, defaults: Mapping[str, Any], max_new_tokens: int | None, forced_schema: Any = None) -> SamplingParams:
    """Return what ``request`` asks of the sampler: its own fields, then the model's defaults, then OpenAI's.

    ``forced_schema``: a JSON schema that the answer must satisfy because of its tools. Raises: UsageError.
    """
    values: dict[str, Any] = {"max_new_tokens": None, **defaults}
    given = {name: getattr(request, name) for name in SAME_NAME}
    given |= {"sampling_seed": request.seed, "min_new_tokens": request.min_tokens, "max_new_tokens": max_new_tokens}
    given["no_stop_trim"] = request.no_stop_trim or request.include_stop_str_in_output
    given |= _constraint(request, forced_schema)
    if given["top_k"] == 0:
        given["top_k"] = -1  # what vLLM means by it
    values |= {name: value for name, value in given.items() if value is not None}
    return SamplingParams.from_dict(values)


def _constraint(request: Sampling, forced_schema: Any) -> dict[str, str]:
    """Return the constraint that ``request`` names, under the name of SamplingParams."""
    found: list[tuple[str, str]] = [(name, value) for name in ("regex", "ebnf", "json_schema") if (value := getattr(request, name)) is not None]
    if form := request.response_format:
        if form.type == "json_object":
            found.append(("json_schema", ANY_JSON_OBJECT))
        elif form.type == "json_schema":
            if form.json_schema is None or form.json_schema.schema_ is None:
                raise UsageError("E_GRAMMAR", "response_format says json_schema and has none", hint="give json_schema: {name, schema}")
            found.append(("json_schema", json.dumps(form.json_schema.schema_)))
        elif form.type == "structural_tag":
            found.append(("structural_tag", form.model_dump_json(exclude_none=True)))
    if others := request.structured_outputs:
        if others.json_ is not None:
            found.append(("json_schema", others.json_ if isinstance(others.json_, str) else json.dumps(others.json_)))
        if others.choice is not None:
            found.append(("ebnf", "root ::= " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in others.choice)))
        if others.json_object:
            found.append(("json_schema", ANY_JSON_OBJECT))
        found += [
            (theirs, value)
            for theirs, value in (("regex", others.regex), ("ebnf", others.grammar), ("structural_tag", others.structural_tag))
            if value
        ]
    if forced_schema is not None:
        found.append(("json_schema", json.dumps(forced_schema)))
    if len(found) > 1:
        names = ", ".join(name for name, _ in found)
        raise UsageError("E_GRAMMAR", f"the answer is constrained {len(found)} times ({names})", hint="one of them: tool_choice counts too")
    return dict(found)


def chat_logprobs(piece: Piece, vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the log probabilities of ``piece`` as chats have them."""
    content = []
    for position, (logprob, token, _) in enumerate(piece.logprobs):
        top = piece.top[position] if position < len(piece.top) else []
        content.append(_told(logprob, token, vocabulary) | {"top_logprobs": [_told(value, other, vocabulary) for value, other, _ in top]})
    return {"content": content, "refusal": None}


def _told(logprob: float | None, token: int, vocabulary: Vocabulary) -> dict[str, Any]:
    return {"token": vocabulary.text_of(token), "logprob": finite(logprob), "bytes": list(vocabulary.bytes_of(token))}


def finite(logprob: float | None) -> float | None:
    """Return ``logprob`` as JSON can hold it."""
    return None if logprob is None else max(logprob, LEAST_LOGPROB)


def completion_logprobs(
    logprobs: Sequence[Logprob], top: Sequence[Sequence[Logprob] | None], vocabulary: Vocabulary, offsets: Sequence[int]
) -> dict[str, Any]:
    """Return log probabilities as completions have them; the most likely tokens always have the chosen one among them."""
    name = vocabulary.label_of
    best = [
        None if others is None else {name(token): finite(value) for value, token, _ in reversed((*others, chosen))}  # of one name the likeliest stays
        for chosen, others in zip(logprobs, top, strict=True)
    ]
    values = [finite(value) for value, *_ in logprobs]
    return {"tokens": [name(token) for _, token, _ in logprobs], "token_logprobs": values, "top_logprobs": best, "text_offset": list(offsets)}


def prompt_offsets(tokens: Sequence[int], text: str, vocabulary: Vocabulary) -> tuple[list[int], Offsets]:
    """Return where the ``tokens`` of a prompt begin in its ``text``, and the place where what follows goes on.

    Counted from the end: a tokenizer may have put tokens, or a space, in front that are not in the text.
    """
    length = len(b"".join(map(vocabulary.bytes_of, tokens)).decode(errors="replace"))
    offsets = Offsets(vocabulary, len(text) - length)
    return [offsets.add(token) for token in tokens], offsets


def without_answer(piece: Piece) -> Piece:
    """Return ``piece`` as it is told when no token is wanted, though the engine makes one."""
    ending = piece.ending
    if ending is not None and ending.reason["type"] != "abort":
        ending = ending._replace(reason={"type": "length", "length": 0})
    return Piece(piece.choice, "", [], [], [], ending)


def finish_reason(ending: Ending) -> str:
    """Return why a choice ended, in OpenAI's words; ``abort`` when the server or somebody else ended it."""
    return str(ending.reason["type"])


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """Return OpenAI's count of tokens."""
    total = prompt_tokens + completion_tokens
    details = {"cached_tokens": cached_tokens}
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total, "prompt_tokens_details": details}


class Account:
    """What one request used, and how long it took: for its usage, the metrics and the log."""

    def __init__(self, kind: str, metrics: Metrics, *, streamed: bool) -> None:
        self._kind, self._metrics, self._streamed = kind, metrics, streamed
        self._began = time.monotonic()
        self._last: dict[int, float] = {}
        self._tokens: dict[int, int] = {}
        self._prompts: dict[int, tuple[int, int]] = {}  # by prompt: its tokens, and those found in the cache
        self._reasons: dict[int, str] = {}

    def note(self, piece: Piece, choices_each: int) -> None:
        """Count ``piece``; a prompt counts once, however many choices it has."""
        now = time.monotonic()
        count = len(piece.tokens)
        if count:
            last = self._last.get(piece.choice)
            if last is None and self._streamed:
                self._metrics.first_token(now - self._began)
                count_after, last = count - 1, now
            else:
                count_after = count
            if self._streamed and count_after and last is not None and last < now:
                self._metrics.tokens(count_after, now - last)
            self._last[piece.choice] = now
            self._tokens[piece.choice] = self._tokens.get(piece.choice, 0) + count
        if piece.ending is not None:
            ending = piece.ending
            prompt, number = divmod(piece.choice, choices_each)
            if number == 0:  # what it found in the cache: the others may have found it there because of the first
                self._prompts[prompt] = (ending.prompt_tokens, ending.cached_tokens)
            self._reasons[piece.choice] = reason = finish_reason(ending)
            if not self._streamed and ending.first_token_s is not None:
                self._metrics.first_token(ending.first_token_s)
            self._metrics.ended(reason, 0 if number else ending.prompt_tokens, self._tokens.get(piece.choice, 0), now - self._began)

    def usage(self) -> dict[str, Any]:
        """Return OpenAI's count of tokens of the whole request."""
        prompts = self._prompts.values()
        return usage(sum(size for size, _ in prompts), sum(self._tokens.values()), sum(cached for _, cached in prompts))

    def close(self, request_id: str) -> None:
        """Count what was left before its end, and write the line of the log: no text."""
        seconds = time.monotonic() - self._began
        for choice in self._tokens.keys() - self._reasons.keys():
            self._metrics.ended("abort", 0, self._tokens[choice], seconds)
        used = self.usage()
        LOG.info(
            "%s %s: %d prompt tokens (%d cached), %d generated, %.2f s, %s",
            self._kind,
            request_id,
            used["prompt_tokens"],
            used["prompt_tokens_details"]["cached_tokens"],
            used["completion_tokens"],
            seconds,
            "+".join(sorted(set(self._reasons.values()))) or "left",
        )


def log_request(prompts: object, params: SamplingParams, settings: Settings) -> None:
    """Write what is asked for to the log, if the server is to show it."""
    if settings.log_requests:
        LOG.info("request: %s, %s", json.dumps(prompts, ensure_ascii=False), params)


def event(data: object) -> bytes:
    """Return ``data`` as a server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """A response of server-sent events. Whatever ends it, ``ticket`` is given back: a client that leaves frees its pages."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], ticket: Ticket) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._ticket = events, ticket

    @classmethod
    async def started(cls, events: AsyncGenerator[bytes, None], ticket: Ticket) -> EventStream:
        """Return the stream once its first event is there, so that an error before it has a status of its own."""
        first = await anext(events)

        async def whole() -> AsyncGenerator[bytes, None]:
            try:
                yield first
                async for more in events:
                    yield more
            except (QtoolError, Busy) as error:
                yield event(error_reply(error)[1].model_dump())
                yield DONE
            finally:
                await events.aclose()

        return cls(whole(), ticket)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end or the client is gone."""
        sending = asyncio.create_task(self._send(send))
        watching = asyncio.create_task(gone(receive))
        try:
            await asyncio.wait({sending, watching}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for task in (sending, watching):
                task.cancel()
            await asyncio.gather(sending, watching, return_exceptions=True)
            with contextlib.suppress(RuntimeError):
                await self._events.aclose()
            self._ticket.close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for some in self._events:
            await send({"type": "http.response.body", "body": some, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def gone(receive: Receive) -> None:
    """Return when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def error_reply(error: Exception) -> tuple[int, ErrorReply]:
    """Return status and body for ``error``, in OpenAI's shape."""
    if isinstance(error, Busy):
        kind = "rate_limit_error" if error.status == 429 else "service_unavailable_error"
        return error.status, ErrorReply(error=ErrorDetail(message=error.message, type=kind, code=error.code))
    if isinstance(error, LookupError):
        return 404, ErrorReply(error=ErrorDetail(message=str(error.args[0]), type="invalid_request_error", param="model", code="model_not_found"))
    assert isinstance(error, QtoolError)
    message = f"{error.message}; {error.hint}" if error.hint else error.message
    if isinstance(error, ResourceError):
        return 503, ErrorReply(error=ErrorDetail(message=message, type="service_unavailable_error", code=_code(error)))
    if error.exit_code in (2, 3):
        return 400, ErrorReply(error=ErrorDetail(message=message, type="invalid_request_error", code=_code(error)))
    return 500, ErrorReply(error=ErrorDetail(message=message, type="server_error", code=_code(error)))


def _code(error: QtoolError) -> str:
    return {"E_TOO_LONG": "context_length_exceeded"}.get(error.code, error.code.removeprefix("E_").lower())


def json_reply(content: object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return a response of JSON."""
    return JSONResponse(content, status_code=status, headers=dict(headers) if headers else None)

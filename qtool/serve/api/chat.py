"""`POST /v1/chat/completions`: messages through the model's template, tools, and answers whole or
streamed.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator

from msgspec import UNSET
from starlette.responses import Response

from qtool.engine.outputs import CompletionOutput
from qtool.engine.sampling_params import SamplingParams
from qtool.errors import UsageError
from qtool.serve.api.answer_reader import AnswerForm, AnswerReader, form_of, read_whole
from qtool.serve.api.answering import DONE, answer, event
from qtool.serve.api.prompt import render_prompt
from qtool.serve.api.protocol import ChatRequest
from qtool.serve.api.replies import (
    Account,
    StreamUsage,
    chat_logprobs,
    finish_reason,
    log_request,
)
from qtool.serve.api.sampling import sampling_params
from qtool.serve.api.schemas import (
    Answer,
    CalledPart,
    CallPart,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Delta,
    FinishReason,
    Usage,
)
from qtool.serve.api.tools import deltas
from qtool.serve.api.tools.choice import Choice, choose, schema_for
from qtool.serve.api.tools.deltas import CallDelta
from qtool.serve.backend.engine_client import OutputStream
from qtool.serve.backend.messages import Submission
from qtool.serve.service import Service
from qtool.serve.turns import current_origin


async def chat(service: Service, body: ChatRequest) -> Response:
    """Answer ``body``. Raises: UsageError, ModelNotFound, Busy."""
    account = Account("chat", service.metrics, streamed=bool(body.stream))
    service.check_model(body.model)
    if body.top_logprobs and not body.logprobs:
        raise UsageError(
            "E_LOGPROBS",
            "top_logprobs is set, and logprobs is not",
            hint="set logprobs to true, too",
        )
    max_tokens = body.max_completion_tokens
    if max_tokens is None:
        max_tokens = body.max_tokens
    choice, params = await service.threads.run(
        current_origin().body_bytes, _choice_and_params, service, body, max_tokens
    )
    with service.acquire(params.n) as slot:
        text, prompt = await render_prompt(service, choice.tools, body)
        log_request(text, params, service.settings)
        submission = Submission(
            [prompt],
            params,
            stream=bool(body.stream),
            rid=body.rid or service.new_id("chatcmpl"),
            top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            grammar=await service.compiled(params),
        )
        account.expect(submission.prompts)
        form = form_of(service, body, choice, text)
        reply = _ChatReply(service, body, submission.rid, account, form)
        return await answer(service, slot, submission, reply, max_tokens)


def _choice_and_params(
    service: Service, body: ChatRequest, max_tokens: int | None
) -> tuple[Choice, SamplingParams]:
    choice = choose(body.tools, body.tool_choice)
    forced = schema_for(choice, parallel=body.parallel_tool_calls is not False)
    return choice, sampling_params(body, service.defaults, max_tokens, forced)


class _ChatReply:
    """The reply to one request."""

    def __init__(
        self, service: Service, body: ChatRequest, rid: str, account: Account, form: AnswerForm
    ) -> None:
        self._service = service
        self._body = body
        self._id = rid
        self._account = account
        self._form = form
        self._model = body.model or service.settings.name
        self._created = int(time.time())
        self._stream_usage = StreamUsage(body.stream_options, account)
        self._readers: dict[int, AnswerReader] = {}
        """Of a streamed reply, by choice."""

    def whole(self, outputs: list[CompletionOutput]) -> ChatCompletion:
        """Return the reply as one object."""
        for output in outputs:
            self._account.note(output, len(outputs))
        return ChatCompletion(
            id=self._id,
            object="chat.completion",
            created=self._created,
            model=self._model,
            choices=[self._whole_choice(output) for output in outputs],
            usage=self._account.usage(),
        )

    def close(self) -> None:
        """Record what the request used."""
        self._account.close(self._id)

    async def events(self, stream: OutputStream) -> AsyncGenerator[bytes, None]:
        """Yield the reply as events: the role of each choice, its text and calls, why it ended, and
        at last the usage.
        """
        each = self._body.n or 1
        async for outputs in stream:
            events = []
            for output in outputs:
                self._account.note(output, each)
                events += [event(self._chunk(choice)) for choice in self._chunk_choices(output)]
            if events:
                yield b"".join(events)
        if self._stream_usage.at_end:
            yield event(self._chunk(usage=self._account.usage()))
        yield DONE

    def _whole_choice(self, output: CompletionOutput) -> ChatChoice:
        assert output.finish is not None
        whole = read_whole(self._form, output.text)
        message = Answer(
            role="assistant",
            content=whole.content,
            reasoning_content=whole.reasoning,
            reasoning=whole.reasoning,
        )
        reason: FinishReason = finish_reason(output.finish)
        if whole.calls:
            message.tool_calls = whole.calls
            reason = "tool_calls" if reason == "stop" else reason
        return ChatChoice(
            index=output.index,
            message=message,
            logprobs=self._logprobs(output),
            finish_reason=reason,
            matched_stop=output.finish.reason.get("matched"),
        )

    def _chunk(self, *choices: ChatChunkChoice, usage: Usage | None = None) -> ChatChunk:
        return ChatChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._model,
            choices=list(choices),
            usage=self._stream_usage.of_chunk() if usage is None else usage,
        )

    def _chunk_choices(self, output: CompletionOutput) -> Iterator[ChatChunkChoice]:
        """Yield what ``output`` adds to its choice: a role, deltas, the reason for its end."""
        index = output.index
        if index not in self._readers:
            self._readers[index] = AnswerReader(self._form)
            yield _chunk_choice(index, Delta(role="assistant", content=""))
        reader = self._readers[index]
        for number, delta in enumerate(self._deltas(output, reader)):
            logprobs = self._logprobs(output) if number == 0 else None
            yield _chunk_choice(index, delta, logprobs)
        if output.finish is not None:
            reason: FinishReason = finish_reason(output.finish)
            if reader.called and reason == "stop":
                reason = "tool_calls"
            yield ChatChunkChoice(
                index,
                Delta(),
                logprobs=None,
                finish_reason=reason,
                matched_stop=output.finish.reason.get("matched"),
            )

    def _deltas(self, output: CompletionOutput, reader: AnswerReader) -> list[Delta]:
        found = _delta_parts(reader.push(output.text))
        if output.finish is not None:
            found += _delta_parts(reader.finish())
        return found or ([Delta()] if self._body.logprobs and output.logprobs else [])

    def _logprobs(self, output: CompletionOutput) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        return chat_logprobs(output, self._service.vocabulary)


def _chunk_choice(
    index: int, delta: Delta, logprobs: ChatLogprobs | None = None
) -> ChatChunkChoice:
    return ChatChunkChoice(index, delta, logprobs, finish_reason=None)


def _delta_parts(delta: deltas.Delta) -> list[Delta]:
    """Return ``delta`` as OpenAI's, each with one thing: reasoning, content or a piece of a
    call.
    """
    found = []
    if delta.reasoning:
        found.append(Delta(reasoning_content=delta.reasoning, reasoning=delta.reasoning))
    if delta.content:
        found.append(Delta(content=delta.content))
    return found + [Delta(tool_calls=[_call_part(call)]) for call in delta.calls]


def _call_part(call: CallDelta) -> CallPart:
    function = CalledPart(name=call.name or UNSET, arguments=call.arguments)
    if call.id is None:
        return CallPart(index=call.index, function=function)
    return CallPart(index=call.index, id=call.id, type="function", function=function)

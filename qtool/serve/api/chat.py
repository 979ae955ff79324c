"""`POST /v1/chat/completions`: messages through the model's template, tools, and answers whole or
as they come.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response

from qtool.errors import UsageError
from qtool.serve.api import tools
from qtool.serve.api.answering import DONE, answer, event
from qtool.serve.api.protocol import ChatRequest, Message, TokenizeRequest, Tool
from qtool.serve.api.replies import Account, chat_logprobs, finish_reason, log_request
from qtool.serve.api.sampling import sampling_params
from qtool.serve.backend.engine_client import Answers, Piece, Submission
from qtool.serve.service import Service


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
    choice = tools.choose(
        tool_dicts(body.tools),
        body.tool_choice.model_dump()
        if isinstance(body.tool_choice, BaseModel)
        else body.tool_choice,
    )
    forced = tools.schema_for(choice, parallel=body.parallel_tool_calls is not False)
    wanted = (
        body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    )
    params = sampling_params(body, service.defaults, wanted, forced)
    with service.admit(params.n) as ticket:
        text, prompt = await prompt_of(service, body.messages, choice.tools, body)
        log_request(text, params, service.settings)
        submission = Submission(
            [prompt],
            params,
            stream=bool(body.stream),
            rid=body.rid or service.new_id("chatcmpl"),
            top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            grammar=await service.compiled(params),
        )
        reply = _Chat(service, body, submission.rid, account, choice)
        return await answer(service, ticket, submission, reply, wanted)


def tool_dicts(given: Sequence[Tool] | None) -> list[dict[str, Any]]:
    """Return tools as plain data, for templates and parsers."""
    return [tool.model_dump(exclude_none=True) for tool in given or ()]


async def prompt_of(
    service: Service,
    messages: Sequence[Message],
    given: Sequence[Mapping[str, Any]],
    body: ChatRequest | TokenizeRequest,
) -> tuple[str, list[int]]:
    """Return the prompt for ``messages`` as text and tokens; ``body`` has the options of the
    template. Raises: UsageError.
    """
    kwargs = dict(body.chat_template_kwargs or {})
    if isinstance(body, ChatRequest) and body.reasoning_effort is not None:
        kwargs.setdefault("reasoning_effort", body.reasoning_effort)
    continued = bool(body.continue_final_message)
    turns = [message.model_dump(exclude_none=True) for message in messages]
    # OpenAI's later name for the system, which few templates know
    if "developer" not in (service.templates.text or ""):
        turns = [
            {**turn, "role": "system"} if turn["role"] == "developer" else turn for turn in turns
        ]
    text = await service.templates.render(
        tools.for_template(turns),
        tools=list(given) or None,
        documents=body.documents if isinstance(body, ChatRequest) else None,
        add_generation_prompt=not continued
        if body.add_generation_prompt is None
        else body.add_generation_prompt,
        continue_final_message=continued,
        kwargs=kwargs,
    )
    return text, await service.vocabulary.encode(text, add_special_tokens=False)


class _Chat:
    """The reply to one request."""

    def __init__(
        self, service: Service, body: ChatRequest, id: str, account: Account, choice: tools.Choice
    ) -> None:
        self._service, self._body, self._id, self._account = service, body, id, account
        self._choice = choice
        self._model, self._created = body.model or service.settings.name, int(time.time())

    def whole(self, pieces: list[Piece]) -> dict[str, Any]:
        """Return the reply as one object."""
        choices = []
        for piece in pieces:
            assert piece.ending is not None
            self._account.note(piece, len(pieces))
            message: dict[str, Any] = {"role": "assistant", "content": piece.text, "refusal": None}
            reason = finish_reason(piece.ending)
            if parser := tools.parser_for(self._choice, self._service.tool_style):
                deltas = [parser.push(piece.text), parser.finish()]
                content, calls = tools.fold(deltas)
                # what a limit cut off is no answer
                message["content"] = None if self._choice.mode == "required" else content
                if calls:
                    message["tool_calls"] = calls
                    reason = "tool_calls" if reason == "stop" else reason
            logprobs = (
                chat_logprobs(piece, self._service.vocabulary) if self._body.logprobs else None
            )
            matched = piece.ending.reason.get("matched")
            choices.append(
                {
                    "index": piece.choice,
                    "message": message,
                    "logprobs": logprobs,
                    "finish_reason": reason,
                    "matched_stop": matched,
                }
            )
        return self._head("chat.completion") | {"choices": choices, "usage": self._account.usage()}

    def close(self) -> None:
        """Write down what the request used."""
        self._account.close(self._id)

    async def events(self, answers: Answers) -> AsyncGenerator[bytes, None]:
        """Yield the reply as events: the role of each choice, what it gets, why it ends, and at
        last the usage.
        """
        vocabulary, logprobs = self._service.vocabulary, self._body.logprobs
        with_usage = bool(self._body.stream_options and self._body.stream_options.include_usage)
        head = json.dumps(
            self._head("chat.completion.chunk"), ensure_ascii=False, separators=(",", ":")
        )[:-1]
        tail = ',"usage":null}\n\n' if with_usage else "}\n\n"
        parsers: dict[int, tools.ToolParser | None] = {}
        encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
        n = self._body.n or 1
        async for pieces in answers:
            lines = []
            for piece in pieces:
                self._account.note(piece, n)
                index, ending = piece.choice, piece.ending
                start = f'data: {head},"choices":[{{"index":{index},"delta":'
                if index not in parsers:
                    parsers[index] = tools.parser_for(self._choice, self._service.tool_style)
                    lines.append(
                        f'{start}{{"role":"assistant","content":""}},"logprobs":null,'
                        f'"finish_reason":null}}]{tail}'
                    )
                parser = parsers[index]
                deltas: list[dict[str, Any]] = []
                if parser is None:
                    deltas = (
                        [{"content": piece.text}]
                        if piece.text or (logprobs and piece.logprobs)
                        else []
                    )
                else:
                    deltas = self._deltas(parser.push(piece.text)) + (
                        self._deltas(parser.finish()) if ending else []
                    )
                    if not deltas and logprobs and piece.logprobs:
                        deltas = [{}]
                for number, delta in enumerate(deltas):
                    shown = (
                        encode(chat_logprobs(piece, vocabulary))
                        if logprobs and number == 0
                        else "null"
                    )
                    lines.append(
                        f'{start}{encode(delta)},"logprobs":{shown},"finish_reason":null}}]{tail}'
                    )
                if ending is not None:
                    reason = finish_reason(ending)
                    if parser is not None and parser.called and reason == "stop":
                        reason = "tool_calls"
                    matched = encode(ending.reason.get("matched"))
                    lines.append(
                        f'{start}{{}},"logprobs":null,"finish_reason":"{reason}",'
                        f'"matched_stop":{matched}}}]{tail}'
                    )
            if lines:
                yield "".join(lines).encode()
        if with_usage:
            yield event(
                self._head("chat.completion.chunk")
                | {"choices": [], "usage": self._account.usage()}
            )
        yield DONE

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _deltas(self, delta: tools.Delta) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (
            [{"content": delta.content}]
            if delta.content and self._choice.mode != "required"
            else []
        )
        for call in delta.calls:
            begun = {"id": call.id, "type": "function"} if call.id else {}
            function = (
                {"name": call.name, "arguments": call.arguments}
                if call.name
                else {"arguments": call.arguments}
            )
            found.append({"tool_calls": [{"index": call.index, **begun, "function": function}]})
        return found

"""`POST /v1/chat/completions`: messages through the model's template, tools, and answers whole or
as they come.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import Response

from qtool.engine.outputs import CompletionOutput
from qtool.errors import UsageError
from qtool.serve.api.answering import DONE, answer, event
from qtool.serve.api.prompt import render_prompt
from qtool.serve.api.protocol import ChatRequest
from qtool.serve.api.replies import Account, chat_logprobs, finish_reason, log_request
from qtool.serve.api.sampling import sampling_params
from qtool.serve.api.tools.choice import Choice, choose, schema_for
from qtool.serve.api.tools.deltas import Delta, ToolParser, fold
from qtool.serve.api.tools.parsers import parser_for
from qtool.serve.backend.engine_client import OutputStream
from qtool.serve.backend.messages import Submission
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
    choice = choose(body.tools, body.tool_choice)
    forced = schema_for(choice, parallel=body.parallel_tool_calls is not False)
    wanted = (
        body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    )
    params = sampling_params(body, service.defaults, wanted, forced)
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
        reply = _Chat(service, body, submission.rid, account, choice)
        return await answer(service, slot, submission, reply, wanted)


class _Chat:
    """The reply to one request."""

    def __init__(
        self, service: Service, body: ChatRequest, id: str, account: Account, choice: Choice
    ) -> None:
        self._service, self._body, self._id, self._account = service, body, id, account
        self._choice = choice
        self._model, self._created = body.model or service.settings.name, int(time.time())

    def whole(self, outputs: list[CompletionOutput]) -> dict[str, Any]:
        """Return the reply as one object."""
        choices = []
        for output in outputs:
            assert output.finish is not None
            self._account.note(output, len(outputs))
            message: dict[str, Any] = {"role": "assistant", "content": output.text, "refusal": None}
            reason = finish_reason(output.finish)
            if parser := parser_for(self._choice, self._service.tool_style):
                deltas = [parser.push(output.text), parser.finish()]
                content, calls = fold(deltas)
                # what a limit cut off is no answer
                message["content"] = None if self._choice.mode == "required" else content
                if calls:
                    message["tool_calls"] = calls
                    reason = "tool_calls" if reason == "stop" else reason
            logprobs = (
                chat_logprobs(output, self._service.vocabulary) if self._body.logprobs else None
            )
            matched = output.finish.reason.get("matched")
            choices.append(
                {
                    "index": output.index,
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

    async def events(self, stream: OutputStream) -> AsyncGenerator[bytes, None]:
        """Yield the reply as events: the role of each choice, what it gets, why it ends, and at
        last the usage.
        """
        vocabulary, logprobs = self._service.vocabulary, self._body.logprobs
        with_usage = bool(self._body.stream_options and self._body.stream_options.include_usage)
        head = json.dumps(
            self._head("chat.completion.chunk"), ensure_ascii=False, separators=(",", ":")
        )[:-1]
        tail = ',"usage":null}\n\n' if with_usage else "}\n\n"
        parsers: dict[int, ToolParser | None] = {}
        encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
        n = self._body.n or 1
        async for outputs in stream:
            lines = []
            for output in outputs:
                self._account.note(output, n)
                index, finish = output.index, output.finish
                start = f'data: {head},"choices":[{{"index":{index},"delta":'
                if index not in parsers:
                    parsers[index] = parser_for(self._choice, self._service.tool_style)
                    lines.append(
                        f'{start}{{"role":"assistant","content":""}},"logprobs":null,'
                        f'"finish_reason":null}}]{tail}'
                    )
                parser = parsers[index]
                deltas: list[dict[str, Any]] = []
                if parser is None:
                    deltas = (
                        [{"content": output.text}]
                        if output.text or (logprobs and output.logprobs)
                        else []
                    )
                else:
                    deltas = self._deltas(parser.push(output.text)) + (
                        self._deltas(parser.finish()) if finish else []
                    )
                    if not deltas and logprobs and output.logprobs:
                        deltas = [{}]
                for number, delta in enumerate(deltas):
                    shown = (
                        encode(chat_logprobs(output, vocabulary))
                        if logprobs and number == 0
                        else "null"
                    )
                    lines.append(
                        f'{start}{encode(delta)},"logprobs":{shown},"finish_reason":null}}]{tail}'
                    )
                if finish is not None:
                    reason = finish_reason(finish)
                    if parser is not None and parser.called and reason == "stop":
                        reason = "tool_calls"
                    matched = encode(finish.reason.get("matched"))
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

    def _deltas(self, delta: Delta) -> list[dict[str, Any]]:
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

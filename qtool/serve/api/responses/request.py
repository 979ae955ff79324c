"""A request to `POST /v1/responses` as a chat."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from qtool.serve.api.conversation import Conversation, note_unread
from qtool.serve.api.other_fields import log_once
from qtool.serve.api.protocol import ChatRequest, JsonSchema, ResponseFormat, SamplingFields
from qtool.serve.api.responses.protocol import (
    CallOutputItem,
    CustomCallItem,
    FunctionCallItem,
    Item,
    ItemText,
    MessageItem,
    OutputPart,
    ReasoningItem,
    ResponsesRequest,
    TextFormat,
    ToolsItem,
)
from qtool.serve.api.responses.tools import ToolTable, function_name
from qtool.serve.api.sealed_thoughts import unseal

LOGPROBS = "message.output_text.logprobs"
SEALED_THOUGHTS = "reasoning.encrypted_content"


@dataclass(frozen=True)
class Translation:
    """A request as a chat."""

    chat: ChatRequest

    tools: ToolTable
    """What the functions of the chat are called by the client."""


def translate(body: ResponsesRequest, rid: str, template: str | None = None) -> Translation:
    """Return ``body`` as a chat with the id ``rid`` for ``template``. Raises: UsageError."""
    items: Sequence[Item] = [] if isinstance(body.input, str) else body.input
    more = [tool for item in items if isinstance(item, ToolsItem) for tool in item.tools]
    table = ToolTable([*(body.tools or ()), *more])
    conversation = Conversation(template)
    conversation.instruct(body.instructions or "")
    if isinstance(body.input, str):
        conversation.ask(body.input)
    for item in items:
        _add_item(conversation, item)
    has_logprobs = LOGPROBS in (body.include or ()) or bool(body.top_logprobs)
    fields = {name: getattr(body, name) for name in SamplingFields.model_fields}
    chat = ChatRequest.model_construct(
        **fields,
        model=body.model,
        messages=conversation.messages(),
        max_tokens=body.max_output_tokens,
        logprobs=has_logprobs,
        top_logprobs=body.top_logprobs,
        tools=table.functions or None,
        tool_choice=table.choice(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=_response_format(body.text.format if body.text else None),
        reasoning_effort=body.reasoning.effort if body.reasoning else None,
        chat_template_kwargs=body.chat_template_kwargs,
        stream=body.stream,
        rid=rid,
        cache_salt=body.cache_salt,
        extra_key=body.extra_key,
    )
    return Translation(chat, table)


def _add_item(conversation: Conversation, item: Item) -> None:
    match item:
        case MessageItem():
            _add_message(conversation, item)
        case ReasoningItem():
            conversation.answer(thoughts=_thoughts(item))
        case FunctionCallItem():
            name = function_name(item.name, item.namespace)
            conversation.call(item.call_id, name, item.arguments)
        case CustomCallItem():
            name = function_name(item.name, item.namespace)
            arguments = json.dumps({"input": item.input}, ensure_ascii=False)
            conversation.call(item.call_id, name, arguments)
        case CallOutputItem():
            conversation.result(item.call_id, _output_text(item.output))
        case ToolsItem():
            pass
        case _:
            log_once("items of type `%s` in `input` are left out", item.type)


def _add_message(conversation: Conversation, item: MessageItem) -> None:
    text = item.content if isinstance(item.content, str) else _join(item.content)
    match item.role:
        case "user":
            conversation.ask(text)
        case "assistant":
            conversation.answer(text)
        case _:
            conversation.instruct(text)


def _thoughts(item: ReasoningItem) -> str:
    """Return thoughts as they were, or else their summary."""
    if item.content:
        return _join(item.content)
    if item.encrypted_content:
        thoughts = unseal(item.encrypted_content)
        if thoughts is not None:
            return thoughts
        log_once("`%s` of another server cannot be read, and is left out", "encrypted_content")
    return _join(item.summary or ())


def _join(texts: Sequence[ItemText]) -> str:
    return "\n".join(text.shown for text in texts)


def _output_text(output: str | Sequence[OutputPart]) -> str:
    if isinstance(output, str):
        return output
    return "\n".join(note_unread(part.type) if part.text is None else part.text for part in output)


def _response_format(form: TextFormat | None) -> ResponseFormat | None:
    if form is None:
        return None
    schema = JsonSchema.model_construct(schema_=form.schema_)
    return ResponseFormat.model_construct(type=form.type, json_schema=schema)

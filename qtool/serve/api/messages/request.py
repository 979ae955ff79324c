"""A request of Anthropic's as a chat."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Literal

from qtool.errors import UsageError
from qtool.serve.api.conversation import Conversation, function_tool, note_unread
from qtool.serve.api.fields import Json
from qtool.serve.api.messages.protocol import (
    Block,
    InputMessage,
    MessagesRequest,
    RedactedThinkingBlock,
    ResultBlock,
    TextBlock,
    ThinkingBlock,
    ToolChoice,
    ToolDefinition,
    ToolResultBlock,
    ToolUseBlock,
)
from qtool.serve.api.other_fields import log_once, log_without_effect
from qtool.serve.api.protocol import (
    ChatRequest,
    FunctionName,
    JsonSchema,
    NamedTool,
    ResponseFormat,
)
from qtool.serve.api.sealed_thoughts import unseal

# Claude Code's, in front of the system prompt: it may change with every request, and a prompt that
# begins otherwise is not found in the prefix cache
BILLING = "x-anthropic-billing-header:"
MODES: dict[str, Literal["auto", "required", "none"]] = {
    "auto": "auto",
    "any": "required",
    "none": "none",
}


def chat_request(body: MessagesRequest, rid: str, template: str | None = None) -> ChatRequest:
    """Return ``body`` as a chat with the id ``rid`` for ``template``. Raises: UsageError."""
    choice = body.tool_choice
    return ChatRequest.model_construct(
        model=body.model,
        messages=_conversation(body, template).messages(),
        max_tokens=body.max_tokens,
        tools=[
            function_tool(tool.name or "", tool.description, tool.input_schema, tool.strict)
            for tool in body.tools or ()
            if tool.is_own
        ]
        or None,
        tool_choice=_tool_choice(choice, body.tools or ()),
        parallel_tool_calls=not (choice and choice.disable_parallel_tool_use),
        response_format=_response_format(body),
        chat_template_kwargs=_template_kwargs(body),
        reasoning_effort=body.output_config.effort if body.output_config else None,
        continue_final_message=_is_begun(body.messages[-1]),
        stop=body.stop_sequences or None,
        stream=body.stream,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        rid=rid,
        cache_salt=body.cache_salt,
        extra_key=body.extra_key,
    )


def _conversation(body: MessagesRequest, template: str | None) -> Conversation:
    conversation = Conversation(template)
    conversation.instruct(_system_text(body.system))
    for message in body.messages:
        if message.role == "system":
            conversation.instruct(_system_text(message.content))
        else:
            _add_turn(conversation, message)
    return conversation


def _system_text(system: str | Sequence[object] | None) -> str:
    """Return the text of instructions, without the header that is meant for Anthropic."""
    if system is None or isinstance(system, str):
        return "" if system is None or system.startswith(BILLING) else system
    texts = [block.text for block in system if isinstance(block, TextBlock)]
    return "\n".join(text for text in texts if not text.startswith(BILLING))


def _add_turn(conversation: Conversation, message: InputMessage) -> None:
    """Add the blocks of ``message`` in their order, neighbouring texts as one."""
    add_text = conversation.answer if message.role == "assistant" else conversation.ask
    if isinstance(message.content, str):
        add_text(message.content)
        return
    texts: list[str] = []
    for block in message.content:
        if isinstance(block, TextBlock):
            texts.append(block.text)
            continue
        if texts:
            add_text("\n".join(texts))
            texts.clear()
        _add_block(conversation, block)
    if texts:
        add_text("\n".join(texts))


def _add_block(conversation: Conversation, block: Block) -> None:
    match block:
        case ThinkingBlock():
            thoughts = block.thinking or unseal(block.signature or "") or ""
            conversation.answer(thoughts=thoughts)
        case RedactedThinkingBlock():
            log_once("requests have blocks of type `%s`, which are left out", block.type)
        case ToolUseBlock():
            arguments = json.dumps(block.input, ensure_ascii=False)
            conversation.call(block.id, block.name, arguments)
        case ToolResultBlock():
            conversation.result(block.tool_use_id, _result_text(block))


def _result_text(block: ToolResultBlock) -> str:
    content = block.content
    text = content if isinstance(content, str) else "\n".join(map(_result_part, content or ()))
    return text or ("the tool failed" if block.is_error else "")


def _result_part(part: ResultBlock) -> str:
    if part.text is not None:
        return part.text
    if part.type == "tool_reference":
        return f"the tool {part.tool_name} is there now"
    return note_unread(part.type)


def _is_begun(message: InputMessage) -> bool:
    """Whether ``message``, the last one, is the beginning of the answer."""
    if message.role != "assistant":
        return False
    if isinstance(message.content, str):
        return bool(message.content)
    return bool(message.content) and isinstance(message.content[-1], TextBlock)


def _tool_choice(
    choice: ToolChoice | None, tools: Iterable[ToolDefinition]
) -> Literal["none", "auto", "required"] | NamedTool | None:
    not_run = {tool.name: tool.type for tool in tools if not tool.is_own}
    for kind in not_run.values():
        log_once("tools of type `%s` are left out: this server runs no tools", kind or "")
    if choice is None or choice.type != "tool":
        return None if choice is None else MODES[choice.type]
    if choice.name is None:
        raise UsageError(
            "E_TOOLS", "tool_choice is of type `tool` and has no name", hint="give tool_choice.name"
        )
    if choice.name in not_run:
        raise UsageError(
            "E_TOOLS",
            f"tool_choice names `{choice.name}`, a tool of type `{not_run[choice.name]}`, and this "
            "server runs no tools",
            hint="define a tool with an input_schema, and run it yourself",
        )
    function = FunctionName.model_construct(name=choice.name)
    return NamedTool.model_construct(type="function", function=function)


def _response_format(body: MessagesRequest) -> ResponseFormat | None:
    form = (body.output_config and body.output_config.format) or body.output_format
    if form is None:
        return None
    schema = JsonSchema.model_construct(schema_=form.schema_)
    return ResponseFormat.model_construct(type="json_schema", json_schema=schema)


def _template_kwargs(body: MessagesRequest) -> Json | None:
    """Return the variables of the chat template; templates have one of two by which they turn
    thinking on or off. What is adaptive or not said is left to them.
    """
    if body.thinking is None or body.thinking.type not in ("enabled", "disabled"):
        return body.chat_template_kwargs
    if body.thinking.budget_tokens is not None:
        log_without_effect("thinking.budget_tokens")
    thinks = body.thinking.type == "enabled"
    variables: Json = {"enable_thinking": thinks, "thinking": thinks}
    return variables | (body.chat_template_kwargs or {})

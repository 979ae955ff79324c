"""Prompts as tokens; those of chats are made of messages and tools by the chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence

from qtool.serve.api.fields import Json, PromptOrTokens
from qtool.serve.api.protocol import (
    ChatRequest,
    FunctionCall,
    Message,
    TextPart,
    TokenizeRequest,
    Tool,
    ToolCall,
)
from qtool.serve.service import Service


async def render_prompt(
    service: Service, tools: Sequence[Tool], body: ChatRequest | TokenizeRequest
) -> tuple[str, list[int]]:
    """Return the prompt for the messages of ``body`` as text and tokens.

    Args:
        tools: the tools to show to the model, which may be fewer than those of ``body``.
    Raises: UsageError.
    """
    documents = None
    kwargs = dict(body.chat_template_kwargs or {})
    if isinstance(body, ChatRequest):
        documents = body.documents
        if body.reasoning_effort is not None:
            kwargs.setdefault("reasoning_effort", body.reasoning_effort)
    continued = bool(body.continue_final_message)
    generate = body.add_generation_prompt
    text = await service.templates.render(
        [template_message(message, service.templates.text) for message in body.messages or ()],
        tools=[tool.model_dump(exclude_none=True) for tool in tools] or None,
        documents=documents,
        add_generation_prompt=not continued if generate is None else generate,
        continue_final_message=continued,
        kwargs=kwargs,
    )
    return text, await service.vocabulary.encode(text, add_special_tokens=False)


async def tokenize_prompts(
    service: Service, prompts: Sequence[PromptOrTokens], *, add_special_tokens: bool = True
) -> list[list[int]]:
    """Return the tokens of each of ``prompts``. Raises: UsageError."""
    return [
        await service.vocabulary.encode(prompt, add_special_tokens=add_special_tokens)
        if isinstance(prompt, str)
        else prompt
        for prompt in prompts
    ]


def template_message(message: Message, template: str | None = None) -> Json:
    """Return ``message`` in the form that chat templates expect, which is the form of vLLM.

    Arguments of calls are mappings; anything but a JSON object becomes an empty one, because
    templates fail on it and a conversation with one broken call could not go on. Content is a
    string, with text parts joined by line breaks. Fields without a value are left out, because
    templates ask whether ``tool_calls`` is there.
    """
    turn: Json = message.model_dump(exclude_none=True, exclude={"tool_calls"})
    # `developer` is OpenAI's later name for `system`, which few templates know
    if message.role == "developer" and "developer" not in (template or ""):
        turn["role"] = "system"
    turn["content"] = _join_content(message.content)
    if message.tool_calls:
        turn["tool_calls"] = [_template_call(call) for call in message.tool_calls]
    return turn


def _join_content(content: str | list[TextPart] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.text or part.refusal or "" for part in content)


def _template_call(call: ToolCall) -> Json:
    fields: Json = call.model_dump(exclude_none=True, exclude={"function"})
    function = {"name": call.function.name, "arguments": _parse_arguments(call.function)}
    return {**fields, "function": function}


def _parse_arguments(call: FunctionCall) -> Json:
    arguments: object = call.arguments
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return {}
    return arguments if isinstance(arguments, dict) else {}

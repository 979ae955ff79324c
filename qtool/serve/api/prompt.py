"""Prompts as tokens; those of chats are made of messages and tools by the chat template."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import cast

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
from qtool.serve.turns import current_origin

SHORT_IDS = "alphanumeric strings with length 9"  # in templates that refuse other ids of calls


async def render_prompt(
    service: Service, tools: Sequence[Tool], body: ChatRequest | TokenizeRequest
) -> tuple[str, list[int]]:
    """Return the prompt for the messages of ``body`` as text and tokens.

    Args:
        tools: the tools to show to the model, which may be fewer than those of ``body``.
    Raises: UsageError.
    """
    kwargs = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        kwargs.setdefault("reasoning_effort", body.reasoning_effort)
    if body.reasoning_effort == "none":  # the two names that templates have for it
        kwargs.setdefault("enable_thinking", False)
        kwargs.setdefault("thinking", False)
    continued = bool(body.continue_final_message)
    generate = body.add_generation_prompt
    messages, shown_tools = await service.threads.run(
        current_origin().body_bytes, _for_template, body, tools, service.templates.text
    )
    text = await service.templates.render(
        messages,
        tools=shown_tools or None,
        documents=body.documents,
        add_generation_prompt=not continued if generate is None else generate,
        continue_final_message=continued,
        kwargs=kwargs,
    )
    [tokens] = await service.vocabulary.encode([text], add_special_tokens=False)
    return text, tokens


def _for_template(
    body: ChatRequest | TokenizeRequest, tools: Sequence[Tool], template: str | None
) -> tuple[list[Json], list[Json]]:
    """Return the messages of ``body``, and ``tools``, in the form that chat templates expect."""
    return (
        [template_message(message, template) for message in body.messages or ()],
        [tool.model_dump(exclude_none=True) for tool in tools],
    )


async def tokenize_prompts(
    service: Service, prompts: Sequence[PromptOrTokens], *, add_special_tokens: bool = True
) -> list[list[int]]:
    """Return the tokens of each of ``prompts``. Raises: UsageError."""
    if any(isinstance(prompt, str) for prompt in prompts):  # then all are, by `fields.Prompt`
        texts = cast(Sequence[str], prompts)
        return await service.vocabulary.encode(texts, add_special_tokens=add_special_tokens)
    return cast(list[list[int]], list(prompts))


def template_message(message: Message, template: str | None = None) -> Json:
    """Return ``message`` in the form that chat templates expect, which is the form of vLLM.

    Arguments of calls are mappings; anything but a JSON object becomes an empty one, because
    templates fail on it and a conversation with one broken call could not go on. Content is a
    string, with text parts joined by line breaks. Fields without a value are left out, because
    templates ask whether ``tool_calls`` is there.
    """
    turn: Json = message.model_dump(exclude_none=True, exclude={"tool_calls"})
    if message.reasoning is not None:
        turn.setdefault("reasoning_content", message.reasoning)
    turn["content"] = join_content(message.content)
    if "message.thinking" in (template or "") and "reasoning_content" in turn:
        _name_thinking(turn, has_calls=bool(message.tool_calls))
    # `developer` is OpenAI's later name for `system`, which few templates know
    if message.role == "developer" and "developer" not in (template or ""):
        turn["role"] = "system"
    if message.tool_calls:
        turn["tool_calls"] = [_template_call(call) for call in message.tool_calls]
    if SHORT_IDS in (template or ""):
        _shorten_ids(turn)
    return turn


def _shorten_ids(turn: Json) -> None:
    """Give calls ids of nine letters or digits, which templates of Mistral ask for."""
    calls = cast(list[Json], turn.get("tool_calls", []))
    for fields, name in [(turn, "tool_call_id"), *((call, "id") for call in calls)]:
        call_id = fields.get(name)
        if isinstance(call_id, str) and not re.fullmatch(r"[a-zA-Z0-9]{9}", call_id):
            fields[name] = hashlib.sha256(call_id.encode()).hexdigest()[:9]


def _name_thinking(turn: Json, *, has_calls: bool) -> None:
    """Give thoughts the name of gpt-oss' template, which takes no content beside them in a message
    with calls: it is the end of the thoughts then.
    """
    thoughts = str(turn["reasoning_content"])
    if has_calls and turn["content"]:
        thoughts = f"{thoughts}\n{turn['content']}"
        turn["content"] = ""
    turn["thinking"] = thoughts


def join_content(content: str | list[TextPart] | None) -> str:
    """Return content as one text."""
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

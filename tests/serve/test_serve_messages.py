"""Anthropic's messages: what its official client asks for is what it gets, in this process with an
engine that answers as told; the prompts that conversations become.
"""

from __future__ import annotations

import json

import anthropic
import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.in_process import CONTEXT, ScriptedServer

from qtool.errors import ResourceError
from qtool.serve.api import answering
from qtool.serve.api.conversation import Conversation
from qtool.serve.api.messages import reply
from qtool.serve.api.messages.protocol import MessagesRequest
from qtool.serve.api.messages.reply import tool_input
from qtool.serve.api.messages.request import chat_request
from qtool.serve.api.prompt import template_message
from qtool.serve.api.sealed_thoughts import seal, unseal

KEY = "a-key"
WEATHER = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
HELLO = [{"role": "user", "content": "Hello"}]
THOUGHT = "<think>Hm, 2 + 2.</think>It is 4."
CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Zürich"}}</tool_call>'


@pytest.fixture(scope="module")
def server(tiny_model, tmp_path_factory):
    server = ScriptedServer(tiny_model, tmp_path_factory.mktemp("scripted"), api_key=KEY)
    yield server
    server.close()


@pytest.fixture(scope="module")
def with_client(server):
    """A function that runs another with a client; ``answers`` are those of the engine."""

    def run(work, *answers, key=KEY, reason=None):
        async def ask():
            transport = httpx2.ASGITransport(server.app, raise_app_exceptions=False)
            async with anthropic.AsyncAnthropic(
                base_url="http://localhost",
                api_key=key,
                max_retries=0,
                http_client=httpx2.AsyncClient(transport=transport),
            ) as client:
                return await work(client)

        return server.run(ask(), *answers, reason=reason)

    return run


@pytest.fixture(scope="module")
def ask(with_client):
    """A function that asks twice, whole and streamed, and returns both messages."""

    def ask(text, reason=None, **options):
        given = {"model": "claude", "max_tokens": 64, "messages": HELLO, **options}

        async def both(client):
            whole = await client.messages.create(**given)
            async with client.messages.stream(**given) as stream:
                return whole, await stream.get_final_message()

        return with_client(both, text, text, reason=reason)

    return ask


def alike(messages):
    """What both have, without their ids."""
    whole, streamed = (message.to_dict() for message in messages)
    for message in (whole, streamed):
        message.pop("id")
        for block in message["content"]:
            block.pop("id", None)
            block.pop("parsed_output", None)
    assert whole == {name: streamed[name] for name in whole}
    return messages[0]


def test_text_is_the_same_whole_and_streamed(ask):
    message = alike(ask("Hello there"))
    assert [block.to_dict() for block in message.content] == [
        {"type": "text", "text": "Hello there"}
    ]
    assert (message.model, message.stop_reason, message.stop_sequence) == (
        "claude",
        "end_turn",
        None,
    )
    usage = message.usage
    assert (usage.cache_read_input_tokens, usage.output_tokens) == (2, 11)
    assert usage.input_tokens > 2


@pytest.mark.parametrize(
    "reason, options, expected",
    [
        ({"type": "stop", "matched": "END"}, {"stop_sequences": ["END"]}, ("stop_sequence", "END")),
        ({"type": "length", "length": 64}, {}, ("max_tokens", None)),
        (
            {"type": "length", "length": 9},
            {"max_tokens": CONTEXT},
            ("model_context_window_exceeded", None),
        ),
    ],
)
def test_an_answer_says_why_it_ended(ask, reason, options, expected):
    message = alike(ask("Hello", reason, **options))
    assert (message.stop_reason, message.stop_sequence) == expected
    assert message.id.startswith("msg_")


def test_thoughts_are_a_block_that_keeps_its_signature_and_returns_to_the_template(ask, server):
    for display, shown in (("summarized", "Hm, 2 + 2."), ("omitted", "")):
        thinking = {"type": "adaptive", "display": display}
        message = alike(ask(THOUGHT, thinking=thinking))
        thoughts, text = message.content
        assert (thoughts.thinking, text.text) == (shown, "It is 4.")
        history = [*HELLO, {"role": "assistant", "content": message.content}, *HELLO]
        ask("Yes.", messages=history, thinking=thinking)
        assert "[assistant]<think>Hm, 2 + 2.</think>It is 4." in server.last_prompt()


def test_a_call_is_a_block(ask):
    message = alike(ask(f"Let me see.\n{CALL}", tools=[WEATHER]))
    text, call = message.content
    assert (text.text, call.name, call.input) == ("Let me see.", "get_weather", {"city": "Zürich"})
    assert message.stop_reason == "tool_use"


def test_an_agent_calls_twice_and_ends(with_client):
    async def loop(client):
        messages, results = list(HELLO), []
        while True:
            async with client.messages.stream(
                model="claude", max_tokens=64, messages=messages, tools=[WEATHER]
            ) as stream:
                answer = await stream.get_final_message()
            messages.append({"role": "assistant", "content": answer.content})
            if answer.stop_reason != "tool_use":
                return results, answer.content[-1].text
            calls = [block for block in answer.content if block.type == "tool_use"]
            results += [call.input["city"] for call in calls]
            messages.append(
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
                        for call in calls
                    ],
                }
            )

    assert with_client(loop, CALL, f"<think>So?</think>{CALL}", "It is sunny.") == (
        ["Zürich", "Zürich"],
        "It is sunny.",
    )


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"messages": []}, anthropic.BadRequestError, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]},
         anthropic.BadRequestError, "images are not offered"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]},
         anthropic.BadRequestError, "`document`"),
        ({"messages": [{"role": "user", "content": "hi " * CONTEXT}]},
         anthropic.BadRequestError, "prompt is too long: "),
        ({"extra_body": {"mcp_servers": [{"url": "x"}]}}, anthropic.BadRequestError, "mcp_servers"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}],
          "tool_choice": {"type": "tool", "name": "web_search"}},
         anthropic.BadRequestError, "web_search_20250305"),
        ({"key": "other"}, anthropic.AuthenticationError, "x-api-key"),
    ],
    ids=["empty", "image", "document", "long", "field", "server tool", "key"],
)  # fmt: skip
def test_what_is_wrong_is_an_exception_of_its_own(with_client, options, error, words):
    key = options.pop("key", KEY)

    async def create(client):
        await client.messages.create(
            **{"model": "claude", "max_tokens": 8, "messages": HELLO, **options}
        )

    with pytest.raises(error, match=words) as caught:
        with_client(create, key=key)
    assert caught.value.body["type"] == "error"
    assert set(caught.value.body["error"]) == {"type", "message"}


def test_a_stream_that_waits_has_begun_and_pings(with_client, server, monkeypatch):
    monkeypatch.setattr(answering, "COMMENT_S", 0.02)
    monkeypatch.setattr(reply, "FIRST_EVENT_S", 0.01)
    monkeypatch.setattr(server.engine, "delay_s", 0.1)

    async def read(client):
        async with client.messages.with_streaming_response.create(
            model="m", max_tokens=8, messages=HELLO, stream=True
        ) as response:
            return [line async for line in response.iter_lines() if line.startswith("event: ")]

    started, *events = with_client(read, "Hello")
    waited = events[: events.index("event: content_block_start")]
    assert started == "event: message_start" and waited[:2] == ["event: ping"] * 2


def test_an_error_in_a_stream_is_an_event(with_client):
    async def read(client):
        async with client.messages.stream(model="m", max_tokens=8, messages=HELLO) as stream:
            await stream.get_final_message()

    with pytest.raises(anthropic.APIStatusError, match="it ended") as caught:
        with_client(read, ResourceError("E_DRAINING", "it ended"))
    assert caught.value.body["error"]["type"] == "overloaded_error"


def test_tokens_are_counted_as_they_are_prompted(with_client, ask, server):
    async def count(client):
        return await client.messages.count_tokens(
            model="claude", messages=HELLO, system="Be short.", tools=[WEATHER]
        )

    counted = with_client(count).input_tokens
    ask("Hello", system="Be short.", tools=[WEATHER])
    assert counted == len(server.engine.submissions[-1].prompts[0])


def test_the_model_is_shown_as_anthropic_shows_it(with_client):
    async def find(client):
        return (await client.models.list()).data

    [model] = with_client(find)
    assert (model.type, model.display_name) == ("model", model.id)
    assert model.created_at.tzinfo is not None
    assert model.max_input_tokens > 100


# What a conversation becomes


def turns_of(messages, **fields):
    """The roles and texts of the chat that ``messages`` become."""
    body = MessagesRequest.model_validate({"messages": messages, **fields})
    return [(turn.role, turn.content) for turn in chat_request(body, "a").messages]


def test_a_document_of_plain_text_is_text():
    source = {"type": "text", "media_type": "text/plain", "data": "A list."}
    document = {"type": "document", "source": source, "title": "Notes"}
    asked = {"type": "text", "text": "What is it?"}
    [turn] = turns_of([{"role": "user", "content": [document, asked]}])
    assert turn == ("user", "Notes\nA list.\nWhat is it?")
    for other in (
        document | {"citations": {"enabled": True}},
        document | {"source": {"type": "base64", "media_type": "application/pdf", "data": "AA"}},
    ):
        with pytest.raises(ValueError, match="`document` are not offered"):
            turns_of([{"role": "user", "content": [other, asked]}])


CLAUDE_CODE = {  # as version 2.1 sends it
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2; cch=12ab;"},
        {"type": "text", "text": "You are an agent.", "cache_control": {"type": "ephemeral"}},
    ],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "system",
            "content": [{"type": "text", "text": "Environment"}],
            "output_config": {"effort": "medium"},
        },
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "", "signature": seal("Hm.")},
                {"type": "tool_use", "id": "1", "name": "Read", "input": {"path": "x.png"}},
                {"type": "tool_use", "id": "2", "name": "Bash", "input": {}},
            ],
        },
        {"role": "system", "content": "Reminder"},
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "1",
                    "content": [{"type": "image", "source": {"data": ""}}],
                },
                {"type": "tool_result", "tool_use_id": "2", "is_error": True},
                {"type": "text", "text": "Go on."},
            ],
        },
    ],
    "max_tokens": 128000,
    "thinking": {"type": "adaptive", "display": "omitted"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "output_config": {"effort": "medium"},
    "metadata": {"user_id": "a"},
}


def test_instructions_anywhere_become_part_of_the_turn_before():
    body = dict(CLAUDE_CODE)
    assert turns_of(**body) == [
        ("system", "You are an agent."),
        ("user", "a\nb\n\nEnvironment"),
        ("assistant", ""),
        ("tool", "(image: this model reads only text)\n\nReminder"),
        ("tool", "the tool failed"),
        ("user", "Go on."),
    ]
    chat = chat_request(MessagesRequest.model_validate(body), "a")
    answer = chat.messages[2]
    assert answer.reasoning_content == "Hm."
    assert [call.function.arguments for call in answer.tool_calls] == ['{"path": "x.png"}', "{}"]
    assert [turn.name for turn in chat.messages[3:5]] == ["Read", "Bash"]
    assert chat.reasoning_effort == "medium" and chat.chat_template_kwargs is None


def test_a_longer_conversation_begins_like_the_shorter_one():
    shorter = [*HELLO, {"role": "assistant", "content": "a"}, {"role": "system", "content": "b"}]
    assert turns_of(shorter)[-1] == ("user", "b")
    assert turns_of([*shorter, *HELLO])[-1] == ("user", "b\n\nHello")


def test_text_after_a_result_joins_it_where_the_template_would_refuse_a_turn():
    body = MessagesRequest.model_validate(CLAUDE_CODE)
    strict = "{{ raise_exception('roles must alternate user/assistant') }}"
    assert [turn.role for turn in chat_request(body, "a", strict).messages[-2:]] == ["tool", "tool"]
    assert chat_request(body, "a", strict).messages[-1].content == "the tool failed\n\nGo on."


def test_ids_of_calls_are_short_where_the_template_asks_for_it():
    strict = "{{ raise_exception('IDs should be alphanumeric strings with length 9!') }}"
    body = MessagesRequest.model_validate(CLAUDE_CODE)
    turns = [template_message(turn, strict) for turn in chat_request(body, "a").messages]
    ids = [call["id"] for call in turns[2]["tool_calls"]]
    assert [turn["tool_call_id"] for turn in turns[3:5]] == ids and {len(one) for one in ids} == {9}


def test_tools_have_what_templates_ask_for():
    body = {"messages": HELLO, "tools": [{"name": "f", "input_schema": {"type": "object"}}]}
    [tool] = chat_request(MessagesRequest.model_validate(body), "a").tools
    assert tool.function.description == ""
    assert tool.function.parameters == {"type": "object", "properties": {}}


def test_the_beginning_of_an_answer_is_continued():
    begun = [*HELLO, {"role": "assistant", "content": "It is"}]
    body = MessagesRequest.model_validate({"messages": begun})
    assert chat_request(body, "a").continue_final_message
    called = {"type": "tool_use", "id": "1", "name": "f", "input": {}}
    body = MessagesRequest.model_validate(
        {"messages": [*HELLO, {"role": "assistant", "content": [called]}]}
    )
    assert not chat_request(body, "a").continue_final_message


@pytest.mark.parametrize("kind, value", [("enabled", True), ("disabled", False)])
def test_thinking_is_a_variable_of_the_template(kind, value):
    body = MessagesRequest.model_validate(
        {
            "messages": HELLO,
            "thinking": {"type": kind, "budget_tokens": 1024},
            "chat_template_kwargs": {"thinking": 5},
        }
    )
    variables = chat_request(body, "a").chat_template_kwargs
    assert variables == {"enable_thinking": value, "thinking": 5}


@pytest.mark.parametrize(
    "choice, expected",
    [
        (None, None),
        ({"type": "auto", "disable_parallel_tool_use": True}, "auto"),
        ({"type": "any"}, "required"),
        ({"type": "none"}, "none"),
    ],
)
def test_a_tool_choice_is_said_in_openais_words(choice, expected):
    body = MessagesRequest.model_validate(
        {"messages": HELLO, "tools": [WEATHER, {"type": "bash_20250124", "name": "bash"}]}
        | ({"tool_choice": choice} if choice else {})
    )
    chat = chat_request(body, "a")
    assert chat.tool_choice == expected
    assert [tool.function.name for tool in chat.tools] == ["get_weather"]
    assert chat.parallel_tool_calls is not bool(choice and "disable_parallel_tool_use" in choice)


@given(st.text())
def test_sealed_thoughts_are_read_again_and_others_are_not(text):
    readable = text.encode(errors="replace").decode()
    assert unseal(seal(readable)) == readable
    assert unseal(text) is None or text.startswith("qtool:")


def test_arguments_that_are_no_object_are_not_lost():
    assert tool_input('{"a": 1}') == tool_input(json.dumps('{"a": 1}')) == {"a": 1}
    assert tool_input("") == {}
    assert tool_input('{"a": ') == {"INVALID_JSON": '{"a": '}
    assert tool_input("null") == {"INVALID_JSON": "null"}


def test_many_pieces_of_a_turn_are_joined_once():
    conversation = Conversation()
    for _ in range(4096):
        conversation.ask("a" * 2000)
    [turn] = conversation.messages()
    assert len(turn.content) == 4096 * 2002 - 2

"""OpenAI's responses: what its official client asks for is what it gets, in this process with an
engine that answers as told; what requests become, and how custom tools are called.
"""

from __future__ import annotations

import json
import warnings

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from support.in_process import CONTEXT, ScriptedServer

from qtool.errors import ResourceError
from qtool.serve.api import answering
from qtool.serve.api.responses import reply
from qtool.serve.api.responses.custom_input import CustomInput
from qtool.serve.api.responses.protocol import ResponsesRequest
from qtool.serve.api.responses.request import translate

WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}
PATCH = {
    "type": "custom",
    "name": "apply_patch",
    "description": "Edit files.",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: hunk+"},
}
AGENTS = {
    "type": "namespace",
    "name": "multi_agent_v1",
    "description": "Agents.",
    "tools": [{"type": "function", "name": "wait", "parameters": {"type": "object"}}],
}
TOOLS = [WEATHER, PATCH, AGENTS, {"type": "web_search", "search_context_size": "low"}]
HELLO = [{"role": "user", "content": "Hello"}]
SEALED = "reasoning.encrypted_content"


def call(name, **arguments):
    """A call as the model writes it."""
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


@pytest.fixture(scope="module")
def server(tiny_model, tmp_path_factory):
    server = ScriptedServer(tiny_model, tmp_path_factory.mktemp("scripted"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def with_client(server):
    """A function that runs another with a client; ``answers`` are those of the engine."""

    def run(work, *answers, reason=None):
        async def ask():
            transport = httpx.ASGITransport(server.app, raise_app_exceptions=False)
            async with openai.AsyncOpenAI(
                base_url="http://localhost/v1",
                api_key="none",
                max_retries=0,
                http_client=httpx.AsyncClient(transport=transport),
            ) as client:
                return await work(client)

        return server.run(ask(), *answers, reason=reason)

    return run


@pytest.fixture(scope="module")
def ask(with_client):
    """A function that asks twice, and returns the whole response and the events of the streamed
    one.
    """

    def ask(text, reason=None, **options):
        given = {"model": "gpt", "input": "Hello", **options}

        async def both(client):
            whole = await client.responses.create(**given)
            async with client.responses.stream(**given) as stream:
                return whole, [event async for event in stream]

        whole, events = with_client(both, text, text, reason=reason)
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert plain(events[-1].response) == plain(whole)
        return whole, events

    return ask


def plain(response):
    """What a response has, without ids and times."""
    found = response.to_dict()
    assert found["store"] is False
    for item in found["output"]:
        for name in ("id", "call_id", "parsed_arguments"):
            item.pop(name, None)
        for part in item.get("content") or ():
            part.pop("parsed", None)
    return {name: value for name, value in found.items() if name not in ("id", "created_at")}


def kinds(events):
    """The types of events, repeated ones once."""
    names = [event.type.removeprefix("response.") for event in events]
    return [name for name, before in zip(names, ["", *names], strict=False) if name != before]


def test_text_is_the_same_whole_and_streamed_in_openais_order(ask):
    response, events = ask("Hello there", instructions="Be kind.", metadata={"a": "b"})
    assert (response.output_text, response.status) == ("Hello there", "completed")
    assert (response.instructions, response.metadata) == ("Be kind.", {"a": "b"})
    assert kinds(events) == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *("output_text.delta", "output_text.done", "content_part.done", "output_item.done"),
        "completed",
    ]
    usage = response.usage
    assert (usage.input_tokens_details.cached_tokens, usage.output_tokens) == (2, 11)
    assert usage.total_tokens == usage.input_tokens + 11


def test_an_answer_that_is_cut_off_is_incomplete(ask):
    response, events = ask("Hello", {"type": "length", "length": 9})
    assert (response.status, events[-1].type) == ("incomplete", "response.incomplete")
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[0].status == "incomplete"
    response, _ = ask("Hello", {"type": "abort"})
    assert (response.status, response.incomplete_details.reason) == ("incomplete", None)


def test_thoughts_are_an_item_and_return_to_the_template(ask, server):
    response, events = ask("<think>Hm, 2 + 2.</think>It is 4.", include=[SEALED])
    thoughts, message = response.output
    assert (thoughts.content[0].text, message.content[0].text) == ("Hm, 2 + 2.", "It is 4.")
    assert kinds(events)[2:8] == [
        *("output_item.added", "content_part.added", "reasoning_text.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done"),
    ]
    sent = thoughts.to_dict()
    for left in ({**sent, "content": None}, {**sent, "encrypted_content": None}):
        ask("Yes.", input=[*HELLO, left, message.to_dict(), *HELLO])
        assert "[assistant]<think>Hm, 2 + 2.</think>It is 4." in server.last_prompt()


def test_without_being_asked_thoughts_are_not_sealed(ask):
    response, _ = ask("<think>Hm.</think>4")
    assert response.output[0].encrypted_content is None


def test_tools_are_called_as_the_client_defined_them(ask, server):
    text = "\n".join(
        [
            "I call.",
            call("get_weather", city="Zürich"),
            call("apply_patch", input='*** "a"\n'),
            call("multi_agent_v1__wait"),
            call("nobody"),
        ]
    )
    response, events = ask(text, tools=TOOLS)
    message, weather, patch, wait, nobody = response.output
    assert message.content[0].text == "I call."
    assert (weather.name, json.loads(weather.arguments)) == ("get_weather", {"city": "Zürich"})
    assert (patch.type, patch.name, patch.input) == (
        "custom_tool_call",
        "apply_patch",
        '*** "a"\n',
    )
    assert (wait.namespace, wait.name, nobody.name) == ("multi_agent_v1", "wait", "nobody")
    assert "custom_tool_call_input.delta" in kinds(events)
    assert "get_weather apply_patch multi_agent_v1__wait [" in server.last_prompt()
    assert response.tools[3].to_dict() == TOOLS[3]


def test_an_agent_calls_twice_and_ends(with_client, server):
    async def loop(client):
        items, inputs = list(HELLO), []
        while True:
            async with client.responses.stream(model="gpt", input=items, tools=TOOLS) as stream:
                response = await stream.get_final_response()
            items += [item.to_dict() for item in response.output]
            calls = [item for item in response.output if item.type.endswith("_call")]
            if not calls:
                return inputs, response.output_text
            for one in calls:
                inputs.append(one.arguments if one.type == "function_call" else one.input)
                items.append({"type": f"{one.type}_output", "call_id": one.call_id, "output": "ok"})

    answers = (call("get_weather", city="Rome"), call("apply_patch", input="+"), "It is sunny.")
    assert with_client(loop, *answers) == (['{"city": "Rome"}', "+"], "It is sunny.")
    assert server.last_prompt().count("[tool]ok") == 2


class Answer(BaseModel):
    city: str


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_has_the_id_of_its_request(with_client, stream):
    async def read(client):
        made = await client.responses.with_raw_response.create(
            model="m", input=HELLO, stream=stream
        )
        response = made.parse()
        if stream:
            response = [event async for event in response][-1].response
        return made.request_id, made.headers["request-id"], response.id

    (only,) = {*with_client(read, "Hello")}
    assert only.startswith("resp_")


def test_input_tokens_are_counted_as_they_are_prompted(with_client, ask, server):
    async def count(client):
        return await client.responses.input_tokens.count(
            model="m", input=HELLO, instructions="Be short.", tools=[WEATHER]
        )

    counted = with_client(count)
    assert counted.object == "response.input_tokens"
    ask("Hello", instructions="Be short.", tools=[WEATHER])
    assert counted.input_tokens == len(server.engine.submissions[-1].prompts[0])


@pytest.mark.slow
def test_a_schema_constrains_the_answer(with_client, server):
    async def parse(client):
        return await client.responses.parse(model="gpt", input="Hello", text_format=Answer)

    assert with_client(parse, '{"city": "Rome"}').output_parsed == Answer(city="Rome")
    kind, schema, *_ = server.engine.submissions[-1].grammar
    assert kind == "json_schema" and json.loads(schema)["required"] == ["city"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [None, "structural_tag", "json_schema"])
def test_calls_of_strict_tools_are_held_to_their_schemas(ask, server, kind):
    form = {"type": "json_schema", "name": "a", "schema": Answer.model_json_schema()}
    options = {"extra_body": {"text": {"format": form}}} if kind == "json_schema" else {}
    ask("Hello", tools=[WEATHER | {"strict": kind is not None}], **options)
    grammar = server.engine.submissions[-1].grammar
    assert (grammar and grammar[0]) == kind


@pytest.mark.parametrize("thoughts", ["", "<think>Hm.</think>"])
def test_a_message_has_the_log_probabilities_of_its_tokens(ask, server, thoughts):
    made, events = ask(f"{thoughts}Hello", include=["message.output_text.logprobs"], top_logprobs=2)
    assert server.engine.submissions[-1].top_logprobs == 2
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert sum(len(delta.logprobs) for delta in deltas) == len("Hello")
    for response in (made, events[-1].response):
        assert len(response.output[-1].content[0].logprobs) == len("Hello")


@pytest.mark.parametrize(
    "options, code, words",
    [
        ({"previous_response_id": "a"}, "unsupported_parameter", "previous_response_id"),
        ({"conversation": "a"}, "unsupported_parameter", "conversation"),
        ({"background": True}, "unsupported_parameter", "background"),
        ({"prompt": {"id": "a"}}, "unsupported_parameter", "prompt"),
        ({"extra_body": {"max_tokens": 5}}, "unsupported_parameter", "max_output_tokens"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "value_error", "a schema"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "value_error",
         "no text"),
        ({"truncation": "auto"}, "literal_error", "truncation"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "value_error", "item_reference"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
         "content_not_supported", "images"),
        ({"input": [{"type": "function_call", "name": "a"}]}, "missing_required_parameter",
         "call_id"),
        ({"input": "hi " * CONTEXT}, "context_length_exceeded", ""),
        ({"tools": TOOLS, "tool_choice": {"type": "web_search_preview"}}, "tools", "web_search"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "b"}}, "tools", "'b'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)  # fmt: skip
def test_what_is_wrong_is_refused_by_name(with_client, options, code, words):
    async def create(client):
        await client.responses.create(**{"model": "gpt", "input": "Hello", **options})

    with pytest.raises(openai.BadRequestError) as caught:
        with_client(create)
    assert caught.value.code == code
    assert words in caught.value.message


def test_a_stream_that_waits_has_begun_and_says_so(with_client, server, monkeypatch):
    monkeypatch.setattr(answering, "COMMENT_S", 0.02)
    monkeypatch.setattr(reply, "FIRST_EVENT_S", 0.01)
    monkeypatch.setattr(server.engine, "delay_s", 0.1)

    async def read(client):
        async with client.responses.stream(model="gpt", input="Hello") as stream:
            return [event.type.removeprefix("response.") async for event in stream]

    created, *events = with_client(read, "Hello")
    waited = events[: events.index("output_item.added")]
    assert created == "created" and set(waited) == {"in_progress"} and len(waited) > 1


def test_an_error_in_a_stream_is_a_failed_response(with_client):
    async def read(client):
        stream = await client.responses.create(model="gpt", input="Hello", stream=True)
        return [event async for event in stream]

    *_, last = with_client(read, ResourceError("E_DRAINING", "it ended"))
    assert (last.type, last.response.status) == ("response.failed", "failed")
    assert last.response.error.message == "it ended"


# What a request becomes


def chat_of(**fields):
    return translate(ResponsesRequest.model_validate(fields), "a")


CODEX = {  # as version 0.171 sends it
    "model": "gpt",
    "stream": True,
    "input": [
        {
            "type": "message",
            "id": "msg_1",
            "role": "developer",
            "content": [{"type": "input_text", "text": "You are an agent."}],
        },
        {
            "type": "message",
            "role": "developer",
            "content": [{"type": "input_text", "text": "Skills"}],
        },
        {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "Environment"}],
        },
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAAA"},
        {
            "type": "function_call",
            "name": "wait",
            "namespace": "multi_agent_v1",
            "arguments": "{}",
            "call_id": "1",
        },
        {
            "type": "custom_tool_call",
            "status": "completed",
            "call_id": "2",
            "name": "apply_patch",
            "input": "*** é",
        },
        {"type": "web_search_call", "status": "completed", "action": {"type": "search"}},
        {
            "type": "function_call_output",
            "call_id": "1",
            "output": [
                {"type": "input_text", "text": "seen"},
                {"type": "input_image", "image_url": "data:"},
            ],
        },
        {"type": "custom_tool_call_output", "call_id": "2", "output": "done"},
    ],
    "tools": TOOLS,
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "reasoning": {"effort": "high", "summary": "auto"},
    "store": False,
    "include": [SEALED],
    "prompt_cache_key": "a",
    "client_metadata": {"turn_id": "a"},
    "text": {"verbosity": "low"},
}


def test_what_codex_sends_becomes_a_chat():
    chat = chat_of(**CODEX).chat
    assert [(turn.role, turn.content) for turn in chat.messages] == [
        ("system", "You are an agent.\n\nSkills"),
        ("user", "Environment\n\nHello"),
        ("assistant", ""),
        ("tool", "seen\n(input_image: this model reads only text)"),
        ("tool", "done"),
    ]
    calls = chat.messages[2].tool_calls
    assert [(one.function.name, one.function.arguments) for one in calls] == [
        ("multi_agent_v1__wait", "{}"),
        ("apply_patch", '{"input": "*** é"}'),
    ]
    assert [tool.function.name for tool in chat.tools] == [
        *("get_weather", "apply_patch", "multi_agent_v1__wait"),
    ]
    assert "start: hunk+" in chat.tools[1].function.description
    assert chat.reasoning_effort == "high"


def test_tools_may_come_with_the_input():
    item = {"type": "additional_tools", "role": "developer", "tools": [WEATHER]}
    assert len(chat_of(input=[item, *HELLO]).tools.functions) == 1


@pytest.mark.parametrize(
    "choice, names",
    [
        ({"type": "function", "name": "wait", "namespace": "multi_agent_v1"},
         ["multi_agent_v1__wait"]),
        ({"type": "custom", "name": "apply_patch"}, ["apply_patch"]),
    ],
)  # fmt: skip
def test_a_choice_names_the_function_that_stands_for_the_tool(choice, names):
    chat = chat_of(input="a", tools=TOOLS, tool_choice=choice).chat
    assert [chat.tool_choice.function.name] == names
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [choice]}
    chat = chat_of(input="a", tools=TOOLS, tool_choice=allowed).chat
    chosen = chat.tool_choice.allowed_tools
    assert chosen.mode == "required" and [one.function.name for one in chosen.tools] == names


def unwrapped(pieces):
    reader = CustomInput()
    return "".join([*map(reader.push, pieces), reader.finish()])


@given(st.text(), st.booleans(), st.integers(1, 9))
def test_the_input_of_a_custom_tool_is_read_in_any_pieces(text, ascii_only, size):
    arguments = json.dumps({"input": text}, ensure_ascii=ascii_only)
    pieces = [arguments[start : start + size] for start in range(0, len(arguments), size)]
    assert unwrapped(pieces) == text


@pytest.mark.parametrize(
    "arguments, text",
    [
        ('{"patch": "a\\n"}', "a\n"),
        ('"a"', "a"),
        ("*** Begin", "*** Begin"),
        ('{"input": "a', "a"),
        ('{"input": "a\n\tb"}', "a\n\tb"),
        (r'{"input": "\ud83d and so on, \uzzzz"}', r"\ud83d and so on, \uzzzz"),
        ('{"a": 1, "b": 2}', '{"a": 1, "b": 2}'),
    ],
)
def test_other_arguments_of_a_custom_tool_are_not_lost(arguments, text):
    assert unwrapped([arguments]) == unwrapped(arguments) == text


def test_a_body_for_the_reference_is_strict_json(tiny_model, tmp_path):
    server = ScriptedServer(tiny_model, tmp_path, reference="http://127.0.0.1:9")
    deep = b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}"

    async def send():
        transport = httpx.ASGITransport(server.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            for body in (deep, b'{"a":"\\ud800"}', b'{"a":1,"a":2}', b"[]", b""):
                headers = {"content-type": "application/json"}
                path = "/reference/v1/completions"
                response = await client.post(path, content=body, headers=headers)
                assert response.status_code == 400, (body[:20], response.text)
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # e.g. two operations of one name
                assert (await client.get("/openapi.json")).status_code == 200

    server.run(send())
    server.close()

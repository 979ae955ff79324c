"""A server from outside: starting, what it says, and its end."""

from __future__ import annotations

import json
import os

import anthropic
import httpx
import openai
import pytest

from qtool.serve.ready import client_lines
from qtool.serve.settings import ServeSettings

pytestmark = pytest.mark.xdist_group("serve")  # one server for all


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process runs all tests")
def test_tests_that_share_a_server_are_in_one_process(request):
    assert request.node.nodeid.endswith("@serve"), "pytest-xdist needs another pytest, see make"


def test_a_served_model_answers_a_chat(served):
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "def add(a, b):"}],
        "max_tokens": 8,
        "min_tokens": 8,
        "temperature": 0,
    }
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 8


CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
CITIES = {"Paris", "Rome"}
ASKED = [{"role": "user", "content": "Hello"}]


def test_an_agent_of_openai_calls_twice_and_ends(served):
    tool = {"type": "function", "name": "weather", "parameters": CITY, "strict": False}
    items, cities = list(ASKED), []
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        named = {"type": "function", "name": "weather"}
        for choice, limit in ((named, 200), (named, 200), ("none", 16)):
            with client.responses.stream(
                model="tiny",
                input=items,
                tools=[tool],
                tool_choice=choice,
                max_output_tokens=limit,
                include=["message.output_text.logprobs"],
            ) as stream:
                *_, last = stream
            items += [item.to_dict() for item in last.response.output]
            for call in last.response.output:
                if call.type == "function_call" and call.status == "completed":
                    cities.append(json.loads(call.arguments)["city"])
                    output = {"type": "function_call_output", "call_id": call.call_id}
                    items.append({**output, "output": "sunny"})
    assert set(cities) <= CITIES and len(cities) == 2
    usage = last.response.usage
    [message] = last.response.output
    assert usage.input_tokens > 20 and len(message.content[0].logprobs) == usage.output_tokens


def test_an_agent_of_anthropic_calls_twice_and_ends(served):
    tool = {"name": "weather", "input_schema": CITY}
    messages, cities = list(ASKED), []
    with anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0) as client:
        named = {"type": "tool", "name": "weather"}
        for choice, limit in ((named, 200), (named, 200), ({"type": "none"}, 8)):
            with client.messages.stream(
                model="tiny", messages=messages, tools=[tool], tool_choice=choice, max_tokens=limit
            ) as stream:
                answer = stream.get_final_message()
            messages.append({"role": "assistant", "content": answer.content})
            calls = [block for block in answer.content if block.type == "tool_use"]
            cities += [call.input["city"] for call in calls]
            results = [
                {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
                for call in calls
            ]
            messages += [{"role": "user", "content": results}] if results else []
        with pytest.raises(anthropic.NotFoundError, match="`tiny` is served"):
            client.messages.create(model="claude", messages=ASKED, max_tokens=1)
    assert set(cities) <= CITIES and len(cities) == 2
    assert answer.stop_reason in ("end_turn", "max_tokens")
    assert answer.usage.input_tokens + answer.usage.cache_read_input_tokens > 20


def test_a_ready_server_says_how_clients_find_it(served):
    said = served.out.read_text()
    assert f"OPENAI_BASE_URL={served.url}/v1 OPENAI_API_KEY=none" in said
    assert f"ANTHROPIC_BASE_URL={served.url} ANTHROPIC_AUTH_TOKEN=none" in said
    assert "ANTHROPIC_MODEL=tiny" in said  # no other name is answered
    assert (
        f'codex -m tiny -c model_provider=qtool -c \'model_providers.qtool={{name="qtool", base_url="{served.url}/v1"}}\''
        in said
    )


def test_a_key_stays_a_variable_in_what_clients_are_told():
    lines = client_lines(ServeSettings(model_path="a b", api_key="secret"))
    assert "secret" not in lines and lines.count("QTOOL_API_KEY") == 3
    assert "ANTHROPIC_MODEL" not in lines and "codex -m 'a b'" in lines


def test_the_server_itself_needs_no_torch(run_python):
    assert (
        run_python(
            "import sys, qtool.serve.server; print(sorted({'torch', 'transformers', 'xgrammar'} "
            "& set(sys.modules)))"
        )
        == "[]"
    )

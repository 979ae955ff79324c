"""What /openapi.json promises is kept, whatever is sent: schemathesis makes requests from it that
are right, and others that are wrong.
"""

from __future__ import annotations

import json

import httpx
import msgspec
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from qtool.serve.api import schemas
from qtool.serve.api.messages import schemas as message_schemas
from qtool.serve.api.responses import schemas as response_schemas
from qtool.serve.api.responses.schemas import ResponseEvent

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("serve")]  # one server for all
MOST_TOKENS = 4
LIMITS = {
    "/v1/chat/completions": "max_tokens",
    "/v1/completions": "max_tokens",
    "/v1/messages": "max_tokens",
    "/v1/responses": "max_output_tokens",
}
CHAT = {
    "messages": [{"role": "user", "content": "def add(a, b):"}],
    "max_tokens": 4,
    "logprobs": True,
    "top_logprobs": 2,
}
MESSAGES = {"messages": [{"role": "user", "content": "def add(a, b):"}], "max_tokens": 4}
RESPONSES = {
    "input": "def add(a, b):",
    "max_output_tokens": 4,
    "tools": [{"type": "web_search"}],
    "include": ["message.output_text.logprobs"],
    "top_logprobs": 2,
}
DONE = {"/v1/chat/completions", "/v1/completions", "/generate"}  # whose streams end with [DONE]
COMPLETION = {"prompt": "def add(a, b):", "max_tokens": 4, "logprobs": 2, "n": 2}
GENERATION = {
    "text": "def add(a, b):",
    "sampling_params": {"max_new_tokens": 4},
    "return_logprob": True,
    "top_logprobs_num": 2,
}


def keep_short(case: schemathesis.Case) -> None:
    """Let a request that is right ask for few tokens; one that is wrong stays wrong."""
    if not isinstance(case.body, dict):
        return
    if name := LIMITS.get(case.path):
        asked = case.body.get(name)
        if asked is None or (type(asked) is int and asked > MOST_TOKENS):
            case.body = {**case.body, name: MOST_TOKENS}
    elif case.path == "/generate" and isinstance(
        params := case.body.get("sampling_params") or {}, dict
    ):
        asked = params.get("max_new_tokens")
        if asked is None or (type(asked) is int and asked > MOST_TOKENS):
            case.body = {**case.body, "sampling_params": {**params, "max_new_tokens": MOST_TOKENS}}


@pytest.mark.exhaustive
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_every_answer_is_one_that_was_promised(served, mode):
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) > 12
    for operation in operations:

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=15 if operation.body else 3,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        )
        def check(case):
            keep_short(case)
            # values that fit the schema may still not fit the model: a prompt that is too long, a
            # name that is not the model's; an empty value that fits no schema asks for nothing
            excluded = [positive_data_acceptance, negative_data_rejection]
            case.call_and_validate(excluded_checks=excluded, timeout=60)

        if mode is GenerationMode.POSITIVE or operation.body:  # without a body nothing can be wrong
            check()


@pytest.mark.parametrize(
    ("path", "body", "whole", "chunk"),
    [
        ("/v1/chat/completions", CHAT, schemas.ChatCompletion, schemas.ChatChunk),
        ("/v1/completions", COMPLETION, schemas.Completion, schemas.CompletionChunk),
        ("/generate", GENERATION, schemas.Generation, schemas.GenerationChunk),
        ("/v1/responses", RESPONSES, response_schemas.ResponseObject, ResponseEvent),
        ("/v1/messages", MESSAGES, message_schemas.AnthropicMessage, message_schemas.MessageEvent),
    ],
)
def test_answers_and_events_hold_no_more_and_no_less_than_promised(
    served, path, body, whole, chunk
):
    answer = httpx.post(served.url + path, json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    said = msgspec.convert(answer.json(), whole)
    assert json.loads(msgspec.json.encode(said)) == answer.json()
    streamed = httpx.post(served.url + path, json={**body, "stream": True}, timeout=60)
    lines = [line for line in streamed.text.split("\n") if line.startswith("data: ")]
    events = [line.removeprefix("data: ") for line in lines]
    if path in DONE:
        assert events.pop() == "[DONE]"
    for event in events:
        said = msgspec.json.decode(event, type=chunk)
        assert json.loads(msgspec.json.encode(said)) == json.loads(event)


def test_the_schema_tells_of_no_status_that_is_never_sent(served):
    paths = httpx.get(f"{served.url}/openapi.json").json()["paths"]
    assert {path for path in paths if "422" in str(paths[path])} == set()
    assert "/v1/chat/completions" in paths

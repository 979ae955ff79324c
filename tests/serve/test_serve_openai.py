"""The official `openai` client against a served, quantized model: what it asks for is what it gets,
and what is wrong is an exception of its own.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from typing import Literal

import httpx
import jsonschema_rs
import openai
import pytest
from pydantic import BaseModel, Field, ValidationError
from support.server import start_server
from tokenizers import Tokenizer, decoders, models

from qtool.errors import UsageError
from qtool.serve.api.protocol import ChatRequest, CompletionRequest
from qtool.serve.api.replies import prompt_offsets
from qtool.serve.api.validation import describe_invalid_body
from qtool.serve.prompts.vocabulary import Vocabulary
from qtool.serve.service import MAX_LOGPROBS
from qtool.serve.settings import ServeSettings
from qtool.serve.threads import Threads

pytestmark = pytest.mark.xdist_group("serve")  # one server for all
ASKED = [{"role": "user", "content": "Hello"}]
END = "0"  # the model's end token
UNENDED = {"ignore_eos": True}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Paris", "Rome"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "The time."}}
TOOLS = [WEATHER, CLOCK]
# A template that teaches calls as Hermes does, and has an option.
TEMPLATE = """{% if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Answer <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}
{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m['content'] }}{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if short %}Be short.{% endif %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def client_of(server, **options) -> openai.OpenAI:
    return openai.OpenAI(
        **{
            "base_url": f"{server.url}/v1",
            "api_key": "none",
            "max_retries": 0,
            "timeout": 60,
            **options,
        }
    )


@pytest.fixture(scope="module")
def client(served):
    with client_of(served) as client:
        yield client


@pytest.fixture(scope="module")
def ask(client):
    """A function that asks the shared server in a chat."""

    def ask(**options):
        return client.chat.completions.create(
            **{"model": "tiny", "messages": ASKED, "max_tokens": 16, **options}
        )

    return ask


@pytest.fixture(scope="module")
def complete(client):
    def complete(prompt, **options):
        return client.completions.create(
            **{"model": "tiny", "prompt": prompt, "max_tokens": 12, **options}
        )

    return complete


@pytest.fixture(scope="module")
def tokens_of(served):
    """A function that returns the tokens of a prompt, or of messages through the template."""

    def tokens_of(given, **options):
        body = {"prompt": given} if isinstance(given, str) else {"messages": given}
        return (
            httpx.post(f"{served.url}/tokenize", json={**body, **options})
            .raise_for_status()
            .json()["tokens"]
        )

    return tokens_of


@pytest.fixture(scope="module")
def no_space(served):
    """A bias against tokens that are nothing but space, of which a small model puts as much into
    JSON as it may.
    """
    found = {}
    for start in range(0, 4096, 1024):
        tokens = range(start, start + 1024)
        texts = (
            httpx.post(f"{served.url}/detokenize", json={"tokens": [[token] for token in tokens]})
            .raise_for_status()
            .json()["text"]
        )
        found |= {
            str(token): -100
            for token, text in zip(tokens, texts, strict=True)
            if text and not text.strip()
        }
    return found


@pytest.fixture(scope="module")
def other_model(tmp_path_factory, quantized_model):
    """The model with sampling defaults of its own, which make it greedy, and a template for
    tools.
    """
    folder = shutil.copytree(quantized_model, tmp_path_factory.mktemp("other") / "tiny")
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(
        json.dumps(
            {**config, "do_sample": True, "top_k": 1, "temperature": 0.5, "max_new_tokens": 7}
        )
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory, other_model):
    """A server with a key, a name with a slash, and a place for one request."""
    options = (
        "--served-model-name",
        "org/tiny",
        "--api-key",
        "secret",
        "--max-running-requests",
        1,
        "--max-queued-requests",
        0,
    )
    server = start_server(tmp_path_factory.mktemp("served"), other_model, *options)
    yield server
    assert server.end() == 0


@pytest.fixture(scope="module")
def other_client(other):
    with client_of(other, api_key="secret") as client:
        yield client


def becomes(condition, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def text_of(chunks, index: int = 0) -> str:
    """The text of one choice, put together."""
    return "".join(
        choice.delta.content or ""
        for chunk in chunks
        for choice in chunk.choices
        if choice.index == index
    )


def calls_of(chunks) -> list[dict]:
    """The calls of a streamed answer, put together as clients do."""
    calls: dict[int, dict] = {}
    for piece in (
        call
        for chunk in chunks
        for choice in chunk.choices
        for call in choice.delta.tool_calls or ()
    ):
        if piece.id:
            assert piece.index not in calls and piece.type == "function"
            calls[piece.index] = {"id": piece.id, "name": piece.function.name, "arguments": ""}
        calls[piece.index]["arguments"] += piece.function.arguments
    return [calls[index] for index in sorted(calls)]


def assert_usage(usage, prompt_tokens: int, completion_tokens: int) -> None:
    found = (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens)
    assert found == (prompt_tokens, completion_tokens, prompt_tokens + completion_tokens)
    assert 0 <= usage.prompt_tokens_details.cached_tokens < prompt_tokens


# Chats


def test_a_chat_is_answered(ask, tokens_of):
    before = int(time.time())
    answer = ask(temperature=0)
    assert (
        answer.id.startswith("chatcmpl-")
        and answer.object == "chat.completion"
        and answer.model == "tiny"
    )
    assert before <= answer.created <= time.time()
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert (choice.message.role, choice.message.tool_calls, choice.message.refusal) == (
        "assistant",
        None,
        None,
    )
    assert choice.message.content
    assert_usage(answer.usage, len(tokens_of(ASKED)), 16)


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0}, {"seed": 5}, {"seed": 5, "n": 3}], ids=str
)
def test_a_stream_is_the_answer_in_pieces(ask, tokens_of, sampling):
    # now the prompt is in the cache, as it is for the stream
    whole = [ask(**sampling) for _ in range(2)][1]
    chunks = list(ask(**sampling, stream=True, stream_options={"include_usage": True}))
    *told, last = chunks
    n = sampling.get("n", 1)
    assert [text_of(chunks, index) for index in range(n)] == [
        choice.message.content for choice in whole.choices
    ]
    assert {chunk.id for chunk in chunks} == {last.id} and {chunk.object for chunk in chunks} == {
        "chat.completion.chunk"
    }
    for index in range(n):
        own = [choice for chunk in told for choice in chunk.choices if choice.index == index]
        assert own[0].delta.role == "assistant" and not any(choice.delta.role for choice in own[1:])
        assert [choice.finish_reason for choice in own] == [None] * (len(own) - 1) + ["length"]
    assert all(chunk.usage is None and "usage" in chunk.model_fields_set for chunk in told)
    assert last.choices == [] and last.usage == whole.usage
    assert_usage(last.usage, len(tokens_of(ASKED)), n * 16)  # the prompt counts once


def test_a_stream_has_no_usage_unless_asked(ask):
    chunks = list(ask(temperature=0, stream=True))
    assert all(chunk.choices and "usage" not in chunk.model_fields_set for chunk in chunks)


def test_each_chunk_counts_the_tokens_so_far_if_asked(ask, tokens_of):
    options = {"include_usage": True, "continuous_usage_stats": True}
    *told, last = ask(temperature=0, n=2, stream=True, stream_options=options)
    counts = [chunk.usage.completion_tokens for chunk in told]
    assert counts == sorted(counts) and counts[-1] == last.usage.completion_tokens == 32
    assert counts[0] == 0  # the role comes before the first token
    assert {chunk.usage.prompt_tokens for chunk in told} == {len(tokens_of(ASKED))}


def test_tokens_that_were_computed_before_are_told(ask):
    messages = [{"role": "user", "content": f"The numbers up to {list(range(40))}"}]
    first, again = (ask(messages=messages, n=2).usage for _ in range(2))
    assert first.prompt_tokens == again.prompt_tokens
    # the second choice may have found what the first one left
    assert first.prompt_tokens_details.cached_tokens == 0
    # all whole pages
    assert (
        first.prompt_tokens - 32 < again.prompt_tokens_details.cached_tokens < first.prompt_tokens
    )


def test_choices_of_a_seed_repeat_and_differ(ask):
    first, again, other = (ask(n=3, seed=seed) for seed in (7, 7, 8))
    texts = [
        [choice.message.content for choice in answer.choices] for answer in (first, again, other)
    ]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert texts[0] == texts[1] and len({*texts[0], *texts[2]}) == 6
    assert ask(seed=7).choices[0].message.content == texts[0][0]


def test_log_probabilities_are_the_engines(served, ask, tokens_of):
    native = {
        "input_ids": tokens_of(ASKED),
        "sampling_params": {"temperature": 0, "max_new_tokens": 16},
        "return_logprob": True,
    }
    for _ in range(2):  # the second time the prompt is in the cache, as it is for those that follow
        meta = (
            httpx.post(f"{served.url}/generate", json={**native, "top_logprobs_num": 3})
            .raise_for_status()
            .json()["meta_info"]
        )
    answer = ask(temperature=0, logprobs=True, top_logprobs=3).choices[0]
    told = answer.logprobs.content
    assert [one.logprob for one in told] == pytest.approx(
        [value for value, *_ in meta["output_token_logprobs"]], abs=1e-3
    )
    assert [[other.logprob for other in one.top_logprobs] for one in told] == [
        pytest.approx([value for value, *_ in others], abs=1e-3)
        for others in meta["output_top_logprobs"]
    ]
    for one in told:
        # temperature 0 takes the likeliest
        assert one.token == one.top_logprobs[0].token and one.logprob == one.top_logprobs[0].logprob
        assert [other.logprob for other in one.top_logprobs] == sorted(
            (other.logprob for other in one.top_logprobs), reverse=True
        )
    chunks = list(ask(temperature=0, logprobs=True, top_logprobs=3, stream=True))
    streamed = [
        one
        for chunk in chunks
        for choice in chunk.choices
        if choice.logprobs
        for one in choice.logprobs.content
    ]
    assert [(one.token, one.bytes) for one in streamed] == [(one.token, one.bytes) for one in told]
    assert ask(logprobs=True, temperature=0).choices[0].logprobs.content[0].top_logprobs == []


def test_log_probabilities_need_no_max_tokens(ask):
    n = 64  # so many that the context has more log probabilities than a request may have
    answer = ask(max_tokens=None, n=n, logprobs=True, top_logprobs=20, extra_body=UNENDED)
    limit = MAX_LOGPROBS // (n * 21)
    assert answer.usage.completion_tokens == n * limit < n * 2048
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    with pytest.raises(openai.BadRequestError, match="log probabilities"):
        ask(max_tokens=limit + 1, n=n, logprobs=True, top_logprobs=20)


@pytest.mark.parametrize("stream", [False, True])
def test_bytes_of_tokens_are_the_text(ask, stream):
    answer = ask(logprobs=True, max_tokens=64, extra_body={"regex": "日本é🎉 ok[.]"}, stream=stream)
    choices = [choice for chunk in answer for choice in chunk.choices] if stream else answer.choices
    told = [one for choice in choices if choice.logprobs for one in choice.logprobs.content]
    text = text_of([]) if stream else choices[0].message.content
    text = "".join(choice.delta.content or "" for choice in choices) if stream else text
    assert text == "日本é🎉 ok."
    spelled = b"".join(bytes(one.bytes) for one in told).decode()
    assert spelled.removesuffix("<|endoftext|>") == text
    # characters in several tokens
    assert any("\N{REPLACEMENT CHARACTER}" in one.token for one in told)
    assert choices[-1].finish_reason == "stop"


@pytest.mark.parametrize("stop", ["os\nimport", ["zzz", "os\nimport"]])
def test_a_stop_string_ends_the_text_and_is_not_in_it(ask, stop):
    whole = ask(temperature=0).choices[0].message.content
    (choice,) = ask(temperature=0, stop=stop).choices
    assert choice.message.content == whole.partition("os\nimport")[0] != whole
    assert choice.finish_reason == "stop" and choice.matched_stop == "os\nimport"
    chunks = list(ask(temperature=0, stop=stop, stream=True))
    assert text_of(chunks) == choice.message.content
    assert (
        chunks[-1].choices[0].finish_reason == "stop"
        and chunks[-1].choices[0].matched_stop == "os\nimport"
    )
    kept = (
        ask(temperature=0, stop=stop, extra_body={"include_stop_str_in_output": True})
        .choices[0]
        .message.content
    )
    assert kept == choice.message.content + "os\nimport"


def test_logit_bias_bans_and_forces_tokens(ask, tokens_of):
    likeliest = ask(temperature=0).choices[0].message.content
    assert likeliest.startswith('"""')
    (quotes,), (define,) = tokens_of('"""'), tokens_of("def")
    assert (
        not ask(temperature=0, logit_bias={str(quotes): -100})
        .choices[0]
        .message.content.startswith('"""')
    )
    assert ask(logit_bias={str(define): 100}, max_tokens=4).choices[0].message.content == "def" * 4


def test_how_long_an_answer_is(ask):
    def length(**options) -> tuple[int, str]:
        answer = ask(logit_bias={END: 100}, **options)  # it wants to end at once
        return answer.usage.completion_tokens, answer.choices[0].finish_reason

    assert length() == (1, "stop")
    assert length(extra_body={"min_tokens": 5}) == (6, "stop")
    assert length(extra_body={"ignore_eos": True}) == (16, "length")
    # the newer name wins
    assert length(extra_body={"ignore_eos": True}, max_completion_tokens=3) == (
        3,
        "length",
    )
    assert length(extra_body={"stop_token_ids": [0], "ignore_eos": True}) == (1, "stop")
    assert ask(logit_bias={END: 100}).choices[0].message.content == ""
    assert ask(
        logit_bias={END: 100},
        extra_body={"skip_special_tokens": False, "ignore_eos": True},
        max_tokens=2,
    ).choices[0].message.content == ("<|endoftext|>" * 2)


def test_what_an_answer_needs_not_is_taken(ask):
    penalties = {
        "frequency_penalty": 0.5,
        "presence_penalty": -0.5,
        "extra_body": {"repetition_penalty": 1.1, "min_p": 0.05, "top_k": 50},
    }
    ignored = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "reasoning_effort": "low",
        "verbosity": "low",
    }
    assert (
        ask(**penalties, **ignored, top_p=0.9, modalities=["text"], prompt_cache_key="k")
        .choices[0]
        .message.content
    )
    greedy, penalized = (
        ask(temperature=0, max_tokens=48, frequency_penalty=value).choices[0].message.content
        for value in (0, 2)
    )
    assert greedy != penalized


def test_roles_and_parts_mean_what_they_say(ask, tokens_of):
    system, user = {"role": "system", "content": "Be brief."}, ASKED[0]
    wanted = tokens_of([system, user])
    assert len(wanted) > len(tokens_of([user]))
    # the template knows no developer
    assert tokens_of([{"role": "developer", "content": "Be brief."}, user]) == wanted
    assert (
        tokens_of([{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, user])
        == wanted
    )
    two = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert tokens_of([{"role": "user", "content": two}]) == tokens_of(
        [{"role": "user", "content": "one\ntwo"}]
    )
    answer = ask(
        messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": two}],
        temperature=0,
    )
    assert answer.usage.prompt_tokens == len(
        tokens_of([system, {"role": "user", "content": "one\ntwo"}])
    )


@pytest.mark.parametrize(
    ("part", "what"),
    [
        ({"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}}, "images"),
        ({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}, "audio"),
        ({"type": "video_url", "video_url": {"url": "file:///etc/passwd"}}, "videos"),
        ({"type": "file", "file": {"file_id": "x"}}, "files"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_text_is_refused_by_its_name(ask, part, what):
    with pytest.raises(openai.BadRequestError, match=f"{what} are not offered"):
        ask(messages=[{"role": "user", "content": [{"type": "text", "text": "What is it?"}, part]}])


def test_an_answer_that_was_begun_is_continued(ask, tokens_of):
    begun = [*ASKED, {"role": "assistant", "content": "    return a +"}]
    open_end = {"continue_final_message": True, "add_generation_prompt": False}
    prompt = tokens_of(begun, **open_end)
    assert prompt[-len(tokens_of(" +")) :] == tokens_of(" +")  # it does not end the turn
    answer = ask(messages=begun, extra_body=open_end, temperature=0)
    assert answer.usage.prompt_tokens == len(prompt) < ask(messages=begun).usage.prompt_tokens
    assert ask(
        messages=begun, extra_body={"continue_final_message": True}
    ).usage.prompt_tokens == len(prompt)
    with pytest.raises(openai.BadRequestError, match="exclude each other"):
        ask(
            messages=begun,
            extra_body={"continue_final_message": True, "add_generation_prompt": True},
        )


# Answers that follow a form


class City(BaseModel):
    name: Literal["Paris", "Rome"]
    inhabitants: int = Field(ge=0, le=99)
    tags: list[Literal["old", "large"]] = Field(max_length=2)


def test_an_answer_can_be_an_object_of_a_class(client, no_space):
    answer = client.chat.completions.parse(
        model="tiny", messages=ASKED, response_format=City, max_tokens=200, logit_bias=no_space
    )
    assert isinstance(answer.choices[0].message.parsed, City)
    with client.chat.completions.stream(
        model="tiny", messages=ASKED, response_format=City, max_tokens=200, logit_bias=no_space
    ) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, City)


SCHEMAS = {
    "object": City.model_json_schema(),
    "array": {
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "maximum": 20},
        "minItems": 2,
        "maxItems": 3,
    },
    "enum": {"enum": ["red", 7, None]},
    "any of": {
        "anyOf": [
            {"type": "boolean"},
            {
                "type": "object",
                "properties": {"a": {"const": 1}},
                "required": ["a"],
                "additionalProperties": False,
            },
        ]
    },
    "reference": {
        "$defs": {
            "leaf": {
                "type": "object",
                "properties": {"v": {"type": "boolean"}},
                "required": ["v"],
                "additionalProperties": False,
            }
        },
        **{
            "type": "object",
            "properties": {"left": {"$ref": "#/$defs/leaf"}, "right": {"$ref": "#/$defs/leaf"}},
        },
        **{"required": ["left", "right"], "additionalProperties": False},
    },
    "pattern": {"type": "string", "pattern": "^[a-c]{2,4}-[0-9]{3}$"},
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_an_answer_satisfies_its_schema(ask, no_space, name):
    form = {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": SCHEMAS[name], "strict": True},
    }
    for stream in (False, True):
        answer = ask(response_format=form, max_tokens=200, logit_bias=no_space, stream=stream)
        text = text_of(answer) if stream else answer.choices[0].message.content
        jsonschema_rs.validate(SCHEMAS[name], json.loads(text))


def test_an_answer_can_be_any_object(ask, tokens_of, no_space):
    (end,) = tokens_of("}")
    answer = ask(
        response_format={"type": "json_object"},
        max_tokens=100,
        logit_bias={**no_space, str(end): 100},
    )
    assert isinstance(json.loads(answer.choices[0].message.content), dict)
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    "form",
    [
        {"regex": "(yes|no)"},
        {"ebnf": 'root ::= "yes" | "no"'},
        {"structured_outputs": {"choice": ["yes", "no"]}},
        {"structured_outputs": {"regex": "yes|no"}},
        {"structured_outputs": {"grammar": 'root ::= "yes" | "no"'}},
    ],
    ids=str,
)
def test_an_answer_follows_a_grammar(ask, form):
    answer = ask(extra_body=form, n=4)
    assert {choice.message.content for choice in answer.choices} <= {"yes", "no"}
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}


def test_a_form_that_cannot_be_is_refused(ask):
    with pytest.raises(openai.BadRequestError, match="regex"):
        ask(extra_body={"regex": "(("})
    with pytest.raises(openai.BadRequestError, match="constrained 2 times"):
        ask(extra_body={"regex": "a", "ebnf": 'root ::= "a"'})
    with pytest.raises(openai.BadRequestError, match="has none"):
        ask(response_format={"type": "json_schema", "json_schema": {"name": "x"}})


# Tools


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("choice", ["required", "named", "allowed"])
def test_a_tool_that_must_be_called_is_called(ask, no_space, choice, stream):
    name = {"type": "function", "function": {"name": "get_weather"}}
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [name]}}
    tool_choice = {"required": "required", "named": name, "allowed": allowed}[choice]
    answer = ask(
        tools=TOOLS,
        tool_choice=tool_choice,
        max_tokens=300,
        parallel_tool_calls=False,
        logit_bias=no_space,
        stream=stream,
    )
    if stream:
        chunks = list(answer)
        assert text_of(chunks) == "" and chunks[-1].choices[0].finish_reason == "tool_calls"
        (call,) = calls_of(chunks)
    else:
        (only,) = answer.choices
        assert only.message.content is None and only.finish_reason == "tool_calls"
        (made,) = only.message.tool_calls
        assert made.type == "function"
        call = {"id": made.id, "name": made.function.name, "arguments": made.function.arguments}
    assert call["id"].startswith("call_") and call["name"] in ("get_weather", "clock")
    arguments = json.loads(call["arguments"])
    if choice != "required":
        assert call["name"] == "get_weather"
    if call["name"] == "get_weather":
        jsonschema_rs.validate(WEATHER["function"]["parameters"], arguments)


def test_no_tool_is_called_that_must_not_be(ask):
    spelled = r'<tool_call>\{"name": "clock", "arguments": \{\}\}</tool_call>'
    (choice,) = ask(
        tools=TOOLS, tool_choice="none", extra_body={"regex": spelled}, max_tokens=100
    ).choices
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (
        spelled.replace("\\", ""),
        None,
        "stop",
    )
    with pytest.raises(openai.BadRequestError, match=r"not among the tools.*did you mean `clock`"):
        ask(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "clok"}})
    with pytest.raises(openai.BadRequestError, match="no tools"):
        ask(tool_choice="required")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_calls_that_a_model_makes_itself_are_found(other_client, stream):
    spelled = (
        r"<think>\nI should ask\.\n</think>\n\n"
        r'Let me see\. <tool_call>\n\{"name": "get_weather", '
        r'"arguments": \{"city": "Paris", "days": 2\}\}\n</tool_call>'
        r'<tool_call>\n\{"name": "clock", "arguments": \{\}\}\n</tool_call>'
    )
    options = {
        "model": "org/tiny",
        "messages": ASKED,
        "tools": TOOLS,
        "max_tokens": 200,
        "extra_body": {"regex": spelled},
    }
    answer = other_client.chat.completions.create(**options, stream=stream)
    if stream:
        chunks = list(answer)
        thoughts = "".join(
            choice.delta.reasoning_content or "" for chunk in chunks for choice in chunk.choices
        )
        content, reason, calls = (
            text_of(chunks),
            chunks[-1].choices[0].finish_reason,
            calls_of(chunks),
        )
    else:
        (only,) = answer.choices
        content, reason = only.message.content, only.finish_reason
        thoughts = only.message.reasoning_content
        assert only.message.reasoning == thoughts
        assert 8 < answer.usage.completion_tokens_details.reasoning_tokens < 30
        calls = [
            {"id": call.id, "name": call.function.name, "arguments": call.function.arguments}
            for call in only.message.tool_calls
        ]
    assert (thoughts, content, reason) == ("I should ask.", "Let me see.", "tool_calls")
    assert [(call["name"], json.loads(call["arguments"])) for call in calls] == [
        ("get_weather", {"city": "Paris", "days": 2}),
        ("clock", {}),
    ]
    assert len({call["id"] for call in calls}) == 2


def test_a_grammar_and_stop_strings_hold_the_answer_and_not_the_thoughts(other_client):
    begun = {"role": "assistant", "content": "<think>Let me"}  # and the thoughts go on
    choice = other_client.chat.completions.create(
        model="org/tiny",
        messages=[*ASKED, begun],
        max_tokens=12,
        stop=["e", "a", " "],
        extra_body={
            "regex": "[0-9]{4}",
            "continue_final_message": True,
            "add_generation_prompt": False,
        },
    )
    (only,) = choice.choices
    assert (only.message.content, only.finish_reason) == (None, "length")
    assert only.message.reasoning_content
    details = choice.usage.completion_tokens_details
    assert details.reasoning_tokens == choice.usage.completion_tokens == 12


def test_results_of_tools_go_back_into_the_chat(other_client, no_space):
    options = {"model": "org/tiny", "tools": TOOLS, "max_tokens": 150, "logit_bias": no_space}
    name = {"type": "function", "function": {"name": "get_weather"}}
    called = (
        other_client.chat.completions.create(**options, messages=ASKED, tool_choice=name)
        .choices[0]
        .message
    )
    result = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "sunny"}
    options["max_tokens"] = 8
    for message in (called, called.model_dump(), called.model_dump(exclude_none=True)):
        answer = other_client.chat.completions.create(**options, messages=[*ASKED, message, result])
        assert answer.choices[0].finish_reason in ("stop", "length")
    short = other_client.chat.completions.create(**options, messages=ASKED)
    # the template shows the call and its result
    assert answer.usage.prompt_tokens > short.usage.prompt_tokens + 10


def test_options_reach_the_template(other_client):
    def size(**options) -> int:
        return other_client.chat.completions.create(
            model="org/tiny", messages=ASKED, max_tokens=1, **options
        ).usage.prompt_tokens

    assert (
        size(extra_body={"chat_template_kwargs": {"short": True}})
        > size()
        == size(extra_body={"chat_template_kwargs": {"short": False}})
    )
    with pytest.raises(openai.BadRequestError, match="messages"):
        size(extra_body={"chat_template_kwargs": {"messages": []}})


@pytest.mark.parametrize(
    "choice", ["none", "auto", {"type": "function", "function": {"name": "clock"}}]
)
def test_tokens_of_a_chat_are_those_of_its_prompt(other, other_client, choice):
    chat = {"messages": ASKED, "tools": TOOLS, "tool_choice": choice}
    asked = {"model": "org/tiny", "max_tokens": 1, **chat}
    headers = {"authorization": "Bearer secret"}
    counted = httpx.post(f"{other.url}/tokenize", json=chat, headers=headers).json()["count"]
    assert counted == other_client.chat.completions.create(**asked).usage.prompt_tokens


# Completions

PROMPT = "class Tree:\n    def __init__(self"  # the likeliest continuation is so by far


def test_prompts_of_every_kind_are_continued(complete, tokens_of):
    tokens = tokens_of(PROMPT)
    complete(PROMPT)  # now it is in the cache, as for those that follow
    answers = [complete(prompt, temperature=0) for prompt in (PROMPT, [PROMPT], tokens, [tokens])]
    assert len({answer.choices[0].text for answer in answers}) == 1
    for answer in answers:
        assert (
            answer.id.startswith("cmpl-")
            and answer.object == "text_completion"
            and answer.model == "tiny"
        )
        assert [
            (choice.index, choice.finish_reason, choice.logprobs) for choice in answer.choices
        ] == [(0, "length", None)]
        assert_usage(answer.usage, len(tokens), 12)


def test_choices_of_several_prompts_come_in_order(complete, tokens_of):
    prompts = ["import os", "class Tree:", "for i in range("]
    answer = complete(prompts, n=2, echo=True, max_tokens=4, seed=3)
    assert [choice.index for choice in answer.choices] == list(range(6))
    for index, choice in enumerate(answer.choices):
        assert choice.text.startswith(prompts[index // 2])
    assert_usage(answer.usage, sum(len(tokens_of(prompt)) for prompt in prompts), 24)
    texts = dict.fromkeys(range(6), "")
    for chunk in complete(prompts, n=2, echo=True, max_tokens=4, seed=3, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert all(texts[index].startswith(prompts[index // 2]) for index in range(6))


def test_a_continuation_is_streamed(complete):
    options = {"temperature": 0, "logprobs": 2}
    whole = [complete(PROMPT, **options) for _ in range(2)][1]
    *told, last = complete(PROMPT, **options, stream=True, stream_options={"include_usage": True})
    assert (
        "".join(choice.text for chunk in told for choice in chunk.choices) == whole.choices[0].text
    )
    assert (
        last.choices == []
        and last.usage == whole.usage
        and all(chunk.usage is None for chunk in told)
    )
    reasons = [choice.finish_reason for chunk in told for choice in chunk.choices]
    assert reasons == [None] * (len(reasons) - 1) + ["length"]
    pieces = [choice.logprobs for chunk in told for choice in chunk.choices if choice.logprobs]
    for name in ("tokens", "text_offset", "token_logprobs"):
        assert [value for piece in pieces for value in getattr(piece, name)] == getattr(
            whole.choices[0].logprobs, name
        )


@pytest.mark.parametrize("count", range(6))
def test_log_probabilities_of_a_continuation(complete, count):
    told = complete(PROMPT, logprobs=count, seed=2).choices[0].logprobs
    assert [
        len(one) for one in (told.tokens, told.token_logprobs, told.top_logprobs, told.text_offset)
    ] == [12] * 4
    for token, value, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        # the one that was drawn is always there
        assert count <= len(top) <= count + 1 and top[token] == value <= 0
        assert sum(other > value for other in top.values()) == len(top) - 1 or count


@pytest.mark.parametrize(
    "prompt", [PROMPT, 'x = "日本é🎉", 5', "<|im_start|>user\nhello<|im_end|>\n"]
)
@pytest.mark.parametrize("most", [0, 1, 6])
def test_a_prompt_is_repeated_with_its_log_probabilities(complete, tokens_of, prompt, most):
    tokens = tokens_of(prompt)
    answer = complete(prompt, echo=True, max_tokens=most, logprobs=1, temperature=0)
    (choice,) = answer.choices
    told = choice.logprobs
    assert (
        choice.text.startswith(prompt)
        and (choice.text == prompt) == (most == 0)
        and choice.finish_reason == "length"
    )
    assert_usage(answer.usage, len(tokens), most)
    assert [
        len(one) for one in (told.tokens, told.token_logprobs, told.top_logprobs, told.text_offset)
    ] == [len(tokens) + most] * 4
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
    assert all(value <= 0 for value in told.token_logprobs[1:])
    ends = [*told.text_offset[1:], len(choice.text)]
    for token, start, end in zip(told.tokens, told.text_offset, ends, strict=True):
        if token.startswith("bytes:"):  # a part of a character
            assert "\\x" in token and end - start <= 1
        elif "bytes:" not in told.tokens[max(told.tokens.index(token) - 1, 0)]:
            assert choice.text[start:end] == token
    assert (
        complete(tokens, echo=True, max_tokens=most, temperature=0).choices[0].text == choice.text
    )


@pytest.mark.parametrize("most", [0, 4])
def test_a_prompt_is_repeated_in_a_stream_as_it_is_whole(complete, most):
    options = {"echo": True, "max_tokens": most, "logprobs": 2, "temperature": 0}
    prompts = [PROMPT, "import os"]
    whole = complete(prompts, **options)
    pieces = {choice.index: [] for choice in whole.choices}
    for chunk in complete(prompts, **options, stream=True):
        for choice in chunk.choices:
            pieces[choice.index].append(choice)
    for choice in whole.choices:
        own = pieces[choice.index]
        assert "".join(piece.text for piece in own) == choice.text
        for name in ("tokens", "text_offset"):
            told = [one for piece in own if piece.logprobs for one in getattr(piece.logprobs, name)]
            assert told == getattr(choice.logprobs, name)
        assert own[0].logprobs.token_logprobs[0] is None


def test_the_likeliest_of_several_texts_are_returned(complete):
    options = {"logprobs": 0, "seed": 3, "max_tokens": 6}
    prompts = [PROMPT, "import os"]
    every = complete(prompts, n=6, **options)

    def likelihood(choice):
        values = choice.logprobs.token_logprobs
        return sum(values) / len(values)

    best = complete(prompts, n=2, best_of=6, **options)
    assert [choice.index for choice in best.choices] == list(range(4))
    for number in range(2):
        group = sorted(every.choices[6 * number :][:6], key=likelihood, reverse=True)
        told = best.choices[2 * number :][:2]
        assert [one.text for one in told] == [one.text for one in group[:2]]
    assert best.usage.completion_tokens == every.usage.completion_tokens
    alone = complete(PROMPT, best_of=6, seed=3, max_tokens=6).choices
    assert len(alone) == 1 and alone[0].logprobs is None


def test_what_a_tokenizer_puts_in_front_is_not_in_the_text():
    names = ["<s>", "</s>", "<0xC3>", "<0xA9>", "\N{LOWER ONE EIGHTH BLOCK}", "a", "b"]
    tokenizer = Tokenizer(
        models.BPE({name: number for number, name in enumerate(names)}, [], byte_fallback=True)
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    steps = [
        decoders.Replace("\N{LOWER ONE EIGHTH BLOCK}", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    tokenizer.decoder = decoders.Sequence(steps)
    vocabulary = Vocabulary(tokenizer.to_str(), 100, Threads())
    prompt = [0, 4, 5, 2, 3, 6]  # a space in front, as SentencePiece has it
    assert asyncio.run(vocabulary.decode([prompt], skip_special_tokens=True)) == ["aéb"]
    told, rest = prompt_offsets(prompt, "aéb", vocabulary)
    assert told == [0, 0, 0, 1, 1, 2]
    assert [rest.add(token, skip_special_tokens=True) for token in (4, 1, 5, 2, 3, 6)] == [
        3,
        4,
        4,
        5,
        5,
        6,
    ]
    assert [vocabulary.label_of(token) for token in (0, 2, 4, 99)] == [
        "<s>",
        "bytes:\\xc3",
        " ",
        "",
    ]


def test_log_probabilities_of_a_prompt_are_the_engines(served, complete, tokens_of):
    told = complete(PROMPT, echo=True, max_tokens=0, logprobs=0).choices[0].logprobs
    body = {
        "text": PROMPT,
        "sampling_params": {"max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    meta = httpx.post(f"{served.url}/generate", json=body).raise_for_status().json()["meta_info"]
    assert [token for _, token, _ in meta["input_token_logprobs"]] == tokens_of(PROMPT)
    assert told.token_logprobs[1:] == pytest.approx(
        [value for value, *_ in meta["input_token_logprobs"][1:]], abs=1e-3
    )


def test_a_continuation_stops_and_repeats(complete):
    assert complete(PROMPT, seed=4).choices[0].text == complete(PROMPT, seed=4).choices[0].text
    whole = complete(PROMPT, temperature=0, max_tokens=32).choices[0].text
    stop = whole[5:8]
    (choice,) = complete(PROMPT, temperature=0, max_tokens=32, stop=[stop]).choices
    assert (
        choice.text == whole.partition(stop)[0]
        and choice.finish_reason == "stop"
        and choice.matched_stop == stop
    )
    assert complete(PROMPT, logit_bias={END: 100}).choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"best_of": 3, "n": 4}, "best_of"),
        ({"best_of": 3, "stream": True}, "streamed"),
        ({"logprobs": 21}, "logprobs"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_continuation_cannot_have_is_refused(complete, options, says):
    with pytest.raises(openai.BadRequestError, match=says):
        complete(PROMPT, **options)


# Models, errors, defaults, many at once


def test_models_are_listed_and_found(client, other_client):
    for one, name in ((client, "tiny"), (other_client, "org/tiny")):
        (model,) = one.models.list().data
        assert (model.id, model.object, model.owned_by) == (
            name,
            "model",
            "qtool",
        ) and model.created <= time.time()
        assert one.models.retrieve(name) == model
        with pytest.raises(openai.NotFoundError, match=name) as caught:
            one.models.retrieve("org/none")
        assert caught.value.code == "model_not_found"


def test_errors_are_typed(client, ask, complete):
    for call in (lambda: ask(model="gpt-5"), lambda: complete("x", model="gpt-5")):
        with pytest.raises(openai.NotFoundError, match=r"`gpt-5`.*`tiny`") as missing:
            call()
        assert (missing.value.code, missing.value.param, missing.value.type) == (
            "model_not_found",
            "model",
            "invalid_request_error",
        )
    with pytest.raises(openai.BadRequestError, match="temperature") as hot:
        ask(temperature=-1)
    assert (hot.value.param, hot.value.type) == (
        "temperature",
        "invalid_request_error",
    ) and hot.value.code
    longer = "longer than the model's context length"
    for call, words in (
        (lambda: ask(messages=[{"role": "user", "content": "word " * 3000}]), longer),
        (lambda: ask(messages=[{"role": "user", "content": "word " * 300_000}]), longer),
        (lambda: complete(PROMPT, max_tokens=5000), "Requested token count exceeds the model's"),
    ):
        with pytest.raises(openai.BadRequestError, match=words) as long:
            call()
        assert long.value.code == "context_length_exceeded"
        assert "This model's maximum context length is 2048 tokens" in long.value.message
    with pytest.raises(openai.BadRequestError, match="top_logprobs"):
        ask(top_logprobs=2)
    for path in ("/images/generations", "/audio/speech"):
        with pytest.raises(openai.NotFoundError) as none:
            client.post(path, body={}, cast_to=object)
        assert set(none.value.body) == {"message", "type", "param", "code"}


def test_an_unknown_field_is_answered_with_the_nearest(ask):
    with pytest.raises(
        openai.BadRequestError, match=r"`tempreature`.*did you mean `temperature`"
    ) as unknown:
        ask(extra_body={"tempreature": 1})
    assert (unknown.value.param, unknown.value.code) == ("tempreature", "unknown_parameter")


def test_fields_of_other_servers_are_taken_and_logged_once(ask, served):
    other = {"vllm_xargs": {"a": 1}, "of_nobody": [1], "functions": None, "stop_regex": ""}
    assert ask(extra_body=other).choices and ask(extra_body=other).choices
    for name in ("vllm_xargs", "of_nobody"):
        assert served.said().count(f"`{name}`") == 1
    assert "functions" not in served.said()


@pytest.mark.parametrize(
    "fields",
    [
        *({"stop": value} for value in ("", [], [""])),
        {"max_tokens": 16.0, "seed": 3.0, "stop_token_ids": [0.0]},
        {"response_format": {}, "tool_choice": {}, "tools": [], "rid": "", "top_logprobs": False},
        {"functions": [], "audio": None, "lora_path": "", "truncate_prompt_tokens": -1},
        {"messages": [{"role": "user", "content": "a", "id": 5, "opts": {"visible": False}}]},
        {"messages": [{"role": "assistant", "content": "x", "audio": {"id": "y"}}]},
    ],
    ids=str,
)
def test_what_asks_for_nothing_is_left_out(fields):
    body = ChatRequest.model_validate({"messages": ASKED, **fields})
    assert not body.stop and body.response_format is body.tool_choice is body.rid is None
    assert not body.model_extra and body.messages[0].model_extra is None


def test_strict_fields_refuses_whatever_would_be_ignored():
    message = {**ASKED[0], "id": 5}
    for fields in ({"user": "me"}, {"of_nobody": 1}, {"messages": [message]}):
        with pytest.raises(ValidationError, match="extra_forbidden"):
            ChatRequest.model_validate({"messages": ASKED, **fields}, extra="forbid")
    nothing = {"messages": [{**ASKED[0], "id": None}], "functions": []}
    assert ChatRequest.model_validate(nothing, extra="forbid").messages[0].content == "Hello"


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        (
            {"messages": ASKED, "stream_options": {"include_usge": True}},
            "did you mean `include_usage`",
            "stream_options.include_usge",
        ),
        ({"mesages": ASKED}, "did you mean `messages`", "mesages"),
        ({}, "`messages` is missing", "messages"),
        ({"messages": [{"role": "robot"}]}, "'assistant'", "messages[0].role"),
        ({"messages": ASKED, "stop": 5}, "a valid string, or Input should be a valid list", "stop"),
        (
            {"messages": ASKED, "tool_choice": {"type": "function", "function": {"nam": "x"}}},
            "is missing",
            "tool_choice.function.name",
        ),
        (
            {
                "messages": ASKED,
                "response_format": {"type": "json_schema", "json_schema": {"schem": {"a": 1}}},
            },
            "`schema`",
            "response_format.json_schema.schem",
        ),
        ({"messages": ASKED, "maxTokens": 5}, "did you mean `max_tokens`", "maxTokens"),
        ({"messages": ASKED, "audio": {"voice": "alloy"}}, "not offered", "audio"),
        ({"prompt": "a", "suffix": "b"}, "not offered", "suffix"),
        (
            {"messages": ASKED, "structured_outputs": {"grammar": ""}},
            "at least 1",
            "structured_outputs.grammar",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "no text",
            "messages[0].content[0]",
        ),
        ({"prompt": [1, -1]}, "whole numbers", "prompt"),
        ([], "an object", None),
    ],
    ids=str,
)
def test_a_refusal_names_the_field(body, message, param):
    request = CompletionRequest if "prompt" in body else ChatRequest
    with pytest.raises(ValidationError) as caught:
        request.model_validate(body)
    told = describe_invalid_body(
        [{**error, "loc": ("body", *error["loc"])} for error in caught.value.errors()], request
    )
    assert message in told.message and told.param == param


def test_a_key_is_asked_for(other, other_client):
    for key in ("wrong", "none"):
        with (
            client_of(other, api_key=key) as stranger,
            pytest.raises(openai.AuthenticationError) as refused,
        ):
            stranger.chat.completions.create(model="org/tiny", messages=ASKED)
        assert refused.value.code == "invalid_api_key" and set(refused.value.body) == {
            "message",
            "type",
            "param",
            "code",
        }
    assert (
        other_client.completions.create(
            model="org/tiny", prompt=PROMPT, max_tokens=1
        ).usage.completion_tokens
        == 1
    )
    for path in ("/health", "/metrics"):
        assert httpx.get(other.url + path).status_code == 200
    assert httpx.get(f"{other.url}/get_server_info").status_code == 401


def test_pages_of_other_origins_may_call_a_server_with_a_key(other, served):
    asks = {
        "origin": "http://localhost:3000",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    preflight = httpx.options(f"{other.url}/v1/chat/completions", headers=asks)
    assert preflight.status_code == 200
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    for answer in (
        preflight,
        httpx.get(f"{other.url}/health", headers=asks),
        httpx.get(f"{other.url}/v1/models", headers=asks),  # 401, which the page can read
    ):
        assert answer.headers["access-control-allow-origin"] == "*"
    closed = httpx.options(f"{served.url}/v1/chat/completions", headers=asks)
    assert closed.status_code == 405 and "access-control-allow-origin" not in closed.headers


@pytest.mark.parametrize(
    ("given", "origins"),
    [
        ("https://App.Example:8443/", ("https://app.example:8443",)),
        ("*", ("*",)),
        ("http://a:3000, https://b/", ("http://a:3000", "https://b")),
        ('["http://a", "*"]', ("http://a", "*")),
        ("", ()),
        ("localhost:3000", None),
    ],
)
def test_origins_are_written_with_commas_or_as_json(given, origins):
    if origins is None:
        with pytest.raises(UsageError, match="localhost:3000"):
            ServeSettings(model_path="", allowed_origins=given)
    else:
        assert ServeSettings(model_path="", allowed_origins=given).origins == origins


def test_what_is_too_many_is_told_to_come_back(other_client):
    options = {"model": "org/tiny", "messages": ASKED, "extra_body": {"ignore_eos": True}}
    with other_client.chat.completions.create(**options, max_tokens=1500, stream=True) as running:
        next(iter(running))
        with pytest.raises(openai.RateLimitError) as refused:
            other_client.chat.completions.create(**options, max_tokens=1)
        assert int(refused.value.response.headers["retry-after"]) > 0
        assert (refused.value.code, refused.value.type) == ("queue_full", "rate_limit_error")
    patient = other_client.with_options(max_retries=5)
    assert patient.chat.completions.create(**options, max_tokens=1).usage.completion_tokens == 1
    with pytest.raises(openai.BadRequestError, match="2 completions"):
        other_client.chat.completions.create(**options, n=2)


def test_defaults_are_the_requests_then_the_models(other_client):
    def texts(**options) -> set[str]:
        return {
            other_client.completions.create(model="org/tiny", prompt=PROMPT, **options)
            .choices[0]
            .text
            for _ in range(4)
        }

    assert len(texts()) == 1  # top_k 1, of generation_config.json
    assert len(texts(temperature=2, extra_body={"top_k": -1})) > 1
    assert (
        other_client.completions.create(
            model="org/tiny", prompt=PROMPT, logit_bias={END: -100}
        ).usage.completion_tokens
        == 7
    )
    assert (
        other_client.completions.create(
            model="org/tiny", prompt=PROMPT, logit_bias={END: -100}, max_tokens=9
        ).usage.completion_tokens
        == 9
    )


def test_many_streams_at_once_and_one_that_is_left(served):
    async def read(client, number: int) -> int:
        options = {
            "max_tokens": 40,
            "seed": number,
            "extra_body": {"ignore_eos": True},
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        messages = [{"role": "user", "content": f"Tell me about {number}."}]
        async with await client.chat.completions.create(
            model="tiny", messages=messages, **options
        ) as stream:
            tokens = 0
            async for chunk in stream:
                if number == 7 and chunk.choices and chunk.choices[0].delta.content:
                    return -1
                tokens = chunk.usage.completion_tokens if chunk.usage else tokens
        return tokens

    async def read_all() -> list[int]:
        async with openai.AsyncOpenAI(
            base_url=f"{served.url}/v1", api_key="none", max_retries=0
        ) as client:
            return await asyncio.gather(*(read(client, number) for number in range(12)))

    def load() -> dict:
        return (
            httpx.get(f"{served.url}/get_server_info")
            .raise_for_status()
            .json()["internal_states"][0]
        )

    assert asyncio.run(read_all()) == [40] * 7 + [-1] + [40] * 4
    assert becomes(lambda: load()["running"] == load()["waiting"] == 0)
    assert "Traceback" not in served.said()

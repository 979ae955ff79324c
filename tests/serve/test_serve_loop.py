"""Nothing holds up the event loop, whatever a client sends or asks for within the limits."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
from support.in_process import application

from qtool.engine.outputs import CompletionOutput, FinishInfo, TokenLogprob
from qtool.serve.api.fields import MAX_PARTS
from qtool.serve.backend.engine_client import OutputStream
from qtool.serve.backend.messages import Submission

MOST_S = 0.1
MOST_OF_ALL_S = 0.3  # of all threads: one that keeps the GIL, and those that need none
CONTEXT = 1 << 20
MILLION = 1 << 20
CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"
HELLO = [{"role": "user", "content": "a"}]
OBJECTS = [{"b": {"c": 1}}] * 21_000
FLOATS = [0.12345678] * 650_000
PARTS = [{"role": "user", "content": [{"type": "text", "text": "a"}] * MAX_PARTS}] * 4
CALLS = [{"id": "a", "type": "function", "function": {"name": "a", "arguments": '{"a": 1}'}}] * 100
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": f"f{number}",
            "parameters": {"type": "object", "properties": {f"p{j}": {} for j in range(150)}},
        },
    }
    for number in range(128)
]
BODIES: dict[str, tuple[str, object]] = {
    "a million tokens to decode": ("/detokenize", {"tokens": [300] * (MILLION - 20)}),
    "tokens that the model lacks": ("/detokenize", {"tokens": [300] * 10**6 + [10**7]}),
    "a text to encode": ("/tokenize", {"prompt": "def f(x):\n" * 50_000}),
    "a text of one word": ("/tokenize", {"prompt": "a" * 300_000}),
    "texts to encode": ("/tokenize", {"prompt": ["a b c " * 50] * 1000}),
    "a prompt of tokens": (COMPLETION, {"prompt": [300] * (CONTEXT - 100), "max_tokens": 1}),
    "lists of tokens, echoed": (
        COMPLETION,
        {"prompt": [[300] * 2000] * 500, "max_tokens": 1, "echo": True},
    ),
    "a prompt, with log probabilities": (
        COMPLETION,
        {"prompt": [300] * 100_000, "max_tokens": 1, "echo": True, "logprobs": 1},
    ),
    "an answer with log probabilities": (
        CHAT,
        {"messages": HELLO, "max_tokens": 6000, "logprobs": True, "top_logprobs": 20},
    ),
    "a stream with log probabilities": (
        "/generate",
        {
            "text": "a",
            "sampling_params": {"max_new_tokens": 3000},
            "return_logprob": True,
            "top_logprobs_num": 20,
            "stream": True,
        },
    ),
    "a chat stream with log probabilities": (
        CHAT,
        {
            "messages": HELLO,
            "max_tokens": 3000,
            "logprobs": True,
            "top_logprobs": 20,
            "stream": True,
        },
    ),
    "escapes": (COMPLETION, {"prompt": "\n" * 1_000_000, "max_tokens": 1}),
    "parts": (CHAT, {"messages": PARTS, "max_tokens": 1}),
    "messages": (CHAT, {"messages": HELLO * 4096, "max_tokens": 1}),
    "a message of 8 MB": (CHAT, {"messages": [{"role": "user", "content": "a " * 4_190_000}]}),
    "calls": (CHAT, {"messages": [{"role": "assistant", "tool_calls": CALLS}] * 90}),
    "objects": (CHAT, {"messages": HELLO, "metadata": {"a": OBJECTS}, "max_tokens": 1}),
    "objects for the template": (CHAT, {"messages": HELLO, "chat_template_kwargs": {"a": OBJECTS}}),
    "numbers for the template": (
        CHAT,
        {"messages": HELLO, "chat_template_kwargs": {"a": FLOATS[:650_000]}},
    ),
    "documents": (CHAT, {"messages": HELLO, "documents": [{"a": OBJECTS[:5]}] * 4000}),
    "tools": (CHAT, {"messages": HELLO, "tools": TOOLS, "max_tokens": 1}),
    "tools, one required": (CHAT, {"messages": HELLO, "tools": TOOLS, "tool_choice": "required"}),
    "too many tools": (CHAT, {"messages": HELLO, "tools": TOOLS[:1] * 5000}),
    "a schema": (
        CHAT,
        {
            "messages": HELLO,
            "response_format": {"type": "json_schema", "json_schema": {"schema": {"a": OBJECTS}}},
        },
    ),
    "a schema of numbers": (
        CHAT,
        {"messages": HELLO, "structured_outputs": {"json": {"enum": FLOATS}}},
    ),
    "structures": (
        CHAT,
        {
            "messages": HELLO,
            "response_format": {
                "type": "structural_tag",
                "structures": [{"a": OBJECTS[:4]}] * 4000,
                "triggers": ["a"] * 4000,
            },
        },
    ),
    "biases": (COMPLETION, {"prompt": "a", "logit_bias": {str(i): 1 for i in range(65_000)}}),
    "stop strings": (COMPLETION, {"prompt": "a", "stop": ["a"] * (1 << 17)}),
    "stop tokens": (COMPLETION, {"prompt": "a", "stop_token_ids": [1] * MILLION}),
    "too many prompts": (COMPLETION, {"prompt": ["a"] * 130_000}),
    "floats for tokens": (COMPLETION, {"prompt": FLOATS}),
    "parts without text": (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text"}] * MAX_PARTS}] * 4},
    ),
    "unknown fields": (CHAT, {"messages": HELLO, **{f"x{i}": 1 for i in range(60_000)}}),
    "a request that a response repeats": (
        "/v1/responses",
        {"input": "a", "stream": True, "max_output_tokens": 2, "metadata": {"a": "b" * 7_900_000}},
    ),
    "tools that a response repeats": (
        "/v1/responses",
        {"input": "a", "tools": [one["function"] | {"type": "function"} for one in TOOLS]},
    ),
    "items": ("/v1/responses", {"input": [{"role": "user", "content": "a b " * 100}] * 4000}),
    "blocks of messages": ("/v1/messages", {"messages": PARTS}),
    "sealed thoughts": (
        "/v1/messages",
        {
            "messages": [
                {
                    "role": "assistant",
                    "content": [
                        {
                            "type": "thinking",
                            "thinking": "",
                            "signature": "qtool:" + "QUFB" * 1_900_000,
                        }
                    ],
                }
            ]
        },
    ),
    "half of a pair": (COMPLETION, '{"prompt": "' + "a" * 8_000_000 + '\\ud800"}'),
    "a key that is there twice": (COMPLETION, '{"prompt": [' + "300," * 10**6 + '1],"n":1,"n":1}'),
    "deep": (CHAT, {"messages": HELLO, "metadata": {"a": json.loads("[" * 200 + "]" * 200)}}),
    "too deep": (CHAT, "[" * 4_000_000),
    "quotes": (CHAT, '"' * 8_000_000),
    "backslashes": (CHAT, '"' + "\\" * 8_000_000),
    "too many values": (CHAT, "[" + "{}," * 2_000_000),
}


class Engine:
    """Stands in for the engine's process: every answer is as long as it may be."""

    error = None

    def submit(self, submission: Submission) -> OutputStream:
        stream = OutputStream(0, submission.completions)
        count = submission.params.max_new_tokens or 1
        top = submission.top_logprobs
        likely = None if top is None else TokenLogprob(-1.0, 300, tuple([(-1.0, 300)] * top))
        for index in range(submission.completions):
            prompt = len(submission.prompts[index]) if submission.prompt_logprobs_from >= 0 else 0
            if submission.stream:
                for _ in range(count - 1):
                    given = [] if likely is None else [likely]
                    stream.put(CompletionOutput(index, "a", [300], given, None))
            last = 1 if submission.stream else count
            finish = FinishInfo(
                {"type": "length", "length": count},
                len(submission.prompts[index]),
                0,
                0.1,
                0.1,
            )
            given = [] if likely is None else [likely] * last
            before = [] if likely is None else [likely] * prompt
            stream.put(CompletionOutput(index, "a" * last, [300] * last, given, finish, before))
        return stream

    def cancel(self, stream: OutputStream) -> None:
        pass


@contextlib.asynccontextmanager
async def serving(folder) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application in this process, with everything but the engine."""
    async with application(folder, Engine(), context_length=CONTEXT) as app:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            yield client


class Lag:
    """The most CPU time between two turns of the event loop; other processes do not count."""

    def __init__(self) -> None:
        self.own_s = 0.0
        """Of the event loop's thread."""
        self.all_s = 0.0
        """Of all threads."""

    async def watch(self) -> None:
        """Look every few milliseconds, until it is cancelled."""
        while True:
            own, everything = time.thread_time(), time.process_time()
            await asyncio.sleep(0.002)
            self.own_s = max(self.own_s, time.thread_time() - own)
            self.all_s = max(self.all_s, time.process_time() - everything)


@pytest.fixture(scope="module")
def look(tiny_model) -> Iterator:
    """A function that sends a body, and returns the status and the lag meanwhile."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(work):
        return asyncio.run_coroutine_threadsafe(work, loop).result(120)

    async def send(client, path: str, body: bytes) -> tuple[int, Lag]:
        lag = Lag()
        watching = asyncio.create_task(lag.watch())
        await asyncio.sleep(0)
        answer = await client.post(
            path, content=body, headers={"content-type": "application/json"}, timeout=100
        )
        watching.cancel()
        return answer.status_code, lag

    context = serving(tiny_model)
    client = run(context.__aenter__())
    gc.collect()
    gc.freeze()  # as the server does; the bodies above are many objects
    yield lambda path, body: run(send(client, path, body))
    run(context.__aexit__(None, None, None))
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", BODIES)
def test_nothing_holds_up_the_event_loop(look, name):
    path, given = BODIES[name]
    body = given if isinstance(given, str) else json.dumps(given, separators=(",", ":"))
    status, lag = look(path, body.encode())
    print(f"LAG {name}: {status} {lag.own_s * 1000:.0f} ms, {lag.all_s * 1000:.0f} ms of all")
    assert status < 500
    assert lag.own_s < MOST_S
    assert lag.all_s < MOST_OF_ALL_S

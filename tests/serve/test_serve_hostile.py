"""Requests that are wrong, huge or slow: each gets its refusal soon, costs no memory, and disturbs
nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import http.client
import json
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import psutil
import pytest
import uvicorn
from support.server import Server

from qtool.serve.host import ServiceHost
from qtool.serve.http.connection import limited_connection
from qtool.serve.http.limits import LimitsMiddleware, RequestLimits
from qtool.serve.settings import ServeSettings

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("serve")]  # one server for all
SOON_S = 5.0  # 1 s is what a machine with nothing else to do needs at most
GROWTH_BYTES = 320 << 20  # the engine keeps 128 MB of grammars, the server 64 MB
DEEP = 100_000
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
GOOD = {
    "model": "tiny",
    "prompt": "def add(a, b):\n",
    "max_tokens": 48,
    "min_tokens": 48,
    "temperature": 0,
    "stream": True,
}


def chat(**fields: object) -> dict[str, object]:
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 4,
        **fields,
    }


def completion(**fields: object) -> dict[str, object]:
    return {"model": "tiny", "prompt": "a", "max_tokens": 4, **fields}


def schema(value: object) -> dict[str, object]:
    return {
        "response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": value}}
    }


def tools(parameters: object) -> dict[str, object]:
    return {"tools": [{"type": "function", "function": {"name": "f", "parameters": parameters}}]}


def raw(body: dict[str, object], old: str, new: str) -> str:
    """Return ``body`` as JSON with a piece of text in it replaced, for what Python would
    not write.
    """
    text = json.dumps(body)
    assert old in text
    return text.replace(old, new)


def deep(**body: object) -> str:
    return raw(chat(**body), '"DEEP"', '{"a":' * DEEP + "1" + "}" * DEEP)


# path, body, status, and a word of the answer; bodies are made when their test runs
REFUSED: dict[str, tuple[str, Callable[[], object], int, str]] = {
    "a million choices": (CHAT, lambda: chat(n=10**6), 400, "n"),
    "no choice": (CHAT, lambda: chat(n=0), 400, "n"),
    "a hundred thousand stops": (
        CHAT,
        lambda: chat(stop=[f"s{i}" for i in range(10**5)]),
        400,
        "stop",
    ),
    "a stop of a million characters": (CHAT, lambda: chat(stop="a" * 10**6), 400, "stop"),
    "NaN": (CHAT, lambda: chat(temperature=float("nan")), 400, "NaN"),
    "infinity": (CHAT, lambda: chat(top_p=float("inf")), 400, "Infinity"),
    "a float that is infinite": (
        CHAT,
        lambda: raw(chat(temperature="X"), '"X"', "1e999"),
        400,
        "out of range",
    ),
    "a body of brackets": (CHAT, lambda: "[" * DEEP + "]" * DEEP, 400, ""),
    "a body of open brackets": (CHAT, lambda: "[" * DEEP, 400, ""),
    "a deep value": (CHAT, lambda: deep(metadata="DEEP"), 400, ""),
    "deep chat_template_kwargs": (CHAT, lambda: deep(chat_template_kwargs="DEEP"), 400, ""),
    "deep tool parameters": (
        CHAT,
        lambda: deep(tools=[{"type": "function", "function": {"name": "f", "parameters": "DEEP"}}]),
        400,
        "",
    ),
    "a deep schema": (
        CHAT,
        lambda: deep(response_format={"type": "json_schema", "json_schema": {"schema": "DEEP"}}),
        400,
        "",
    ),
    "bad UTF-8": (
        CHAT,
        lambda: b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
        400,
        "",
    ),
    "a surrogate in UTF-8": (
        CHAT,
        lambda: b'{"messages": [{"role": "user", "content": "\xed\xa0\x80"}]}',
        400,
        "",
    ),
    "half of a UTF-8 character": (
        CHAT,
        lambda: b'{"messages": [{"role": "user", "content": "\xe2\x82"}]}',
        400,
        "",
    ),
    "a zero byte": (CHAT, lambda: b"\0", 400, ""),
    "no JSON": (CHAT, lambda: "hello", 400, "JSON"),
    "nothing": (CHAT, lambda: "", 400, ""),
    "a number": (CHAT, lambda: "1", 400, ""),
    "half of JSON": (CHAT, lambda: '{"messages": [', 400, "JSON"),
    "10^12 max_tokens": (CHAT, lambda: chat(max_tokens=10**12), 400, "max"),
    "10^400 max_tokens": (CHAT, lambda: chat(max_tokens=10**400), 400, "max"),
    "10^12 max_tokens of a completion": (
        COMPLETION,
        lambda: completion(max_tokens=10**12),
        400,
        "max",
    ),
    "10^400 max_new_tokens": (
        "/generate",
        lambda: {"text": "a", "sampling_params": {"max_new_tokens": 10**400}},
        400,
        "max",
    ),
    "a number of 5000 digits": (CHAT, lambda: raw(chat(seed="X"), '"X"', "9" * 5000), 400, ""),
    "a number of 4000 digits": (CHAT, lambda: raw(chat(seed="X"), '"X"', "9" * 4000), 400, "seed"),
    "a float of 5000 digits": (
        CHAT,
        lambda: raw(chat(temperature="X"), '"X"', "9" * 5000 + ".5"),
        400,
        "out of range",
    ),
    "half a surrogate pair in a message": (
        CHAT,
        lambda: raw(chat(messages=[{"role": "user", "content": "X"}]), "X", "\\ud800"),
        400,
        "",
    ),
    "half a surrogate pair in a prompt": (
        COMPLETION,
        lambda: raw(completion(prompt="X"), "X", "\\ud800"),
        400,
        "",
    ),
    "half a surrogate pair in a list of prompts": (
        COMPLETION,
        lambda: raw(completion(prompt=["X"]), "X", "\\udfff"),
        400,
        "",
    ),
    "half a surrogate pair in text": ("/generate", lambda: '{"text": "\\ud800"}', 400, ""),
    "half a surrogate pair to tokenize": ("/tokenize", lambda: '{"prompt": "\\ud800"}', 400, ""),
    "half a surrogate pair in a stop": (CHAT, lambda: raw(chat(stop="X"), "X", "\\ud800"), 400, ""),
    "half a surrogate pair as a key": (CHAT, lambda: raw(chat(X=1), "X", "\\ud800"), 400, ""),
    "half a surrogate pair as model": (
        CHAT,
        lambda: raw(chat(model="XX"), "XX", "\\ud800"),
        400,
        "",
    ),
    "half a surrogate pair as rid": (CHAT, lambda: raw(chat(rid="XX"), "XX", "\\ud800"), 400, ""),
    "half a surrogate pair in template arguments": (
        CHAT,
        lambda: raw(chat(chat_template_kwargs={"X": "X"}), "X", "\\ud800"),
        400,
        "",
    ),
    "half a surrogate pair in a schema": (
        CHAT,
        lambda: raw(chat(**schema({"const": "X"})), "X", "\\ud800"),
        400,
        "",
    ),
    "half a surrogate pair in a regex": (
        CHAT,
        lambda: raw(chat(regex="X"), "X", "\\ud800"),
        400,
        "",
    ),
    "a prompt of 7 MB": (
        COMPLETION,
        lambda: completion(prompt="a b " * 1_800_000),
        400,
        "context_length_exceeded",
    ),
    "a message of 7 MB": (
        CHAT,
        lambda: chat(messages=[{"role": "user", "content": "a b " * 1_800_000}]),
        400,
        "context_length_exceeded",
    ),
    "a million tokens": (
        COMPLETION,
        lambda: completion(prompt=[1] * 10**6),
        400,
        "context_length_exceeded",
    ),
    "one token too many": (
        COMPLETION,
        lambda: completion(prompt=[1] * 2045),
        400,
        "context_length_exceeded",
    ),
    "four million tokens": (
        COMPLETION,
        lambda: completion(prompt=[1] * 2_600_000),
        400,
        "too_many_values",
    ),
    "tokens that are none": (COMPLETION, lambda: completion(prompt=[10**6]), 400, "1000000"),
    "negative tokens": (COMPLETION, lambda: completion(prompt=[-1]), 400, "prompt"),
    "huge tokens": (COMPLETION, lambda: completion(prompt=[2**70]), 400, "prompt"),
    "tokens that are true": (COMPLETION, lambda: completion(prompt=[True]), 400, "prompt"),
    "no prompt": (COMPLETION, lambda: completion(prompt=[]), 400, "prompt"),
    "an empty prompt among others": (
        COMPLETION,
        lambda: completion(prompt=[[1], []]),
        400,
        "prompt",
    ),
    "tokens to detokenize that are none": (
        "/detokenize",
        lambda: {"tokens": [10**6]},
        400,
        "1000000",
    ),
    "a bias on 10^5 tokens": (
        CHAT,
        lambda: chat(logit_bias={str(i): 1 for i in range(10**5)}),
        400,
        "",
    ),
    "a bias on 10^4 tokens": (
        CHAT,
        lambda: chat(logit_bias={str(i): 1 for i in range(10**4)}),
        400,
        "logit_bias",
    ),
    "a bias on a token that is none": (
        CHAT,
        lambda: chat(logit_bias={"4000000": 1}),
        400,
        "logit_bias",
    ),
    "a bias on a word": (CHAT, lambda: chat(logit_bias={"hello": 1}), 400, "'hello' is not a"),
    "a huge bias": (CHAT, lambda: chat(logit_bias={"1": 1e308}), 400, "logit_bias"),
    "a stop token that is none": (
        CHAT,
        lambda: chat(stop_token_ids=[10**7]),
        400,
        "stop_token_ids",
    ),
    "log probabilities without end": (
        COMPLETION,
        lambda: completion(n=128, max_tokens=2000, logprobs=20, prompt=[1]),
        400,
        "log prob",
    ),
    "no messages": (CHAT, lambda: chat(messages=[]), 400, "messages"),
    "10^5 messages": (
        CHAT,
        lambda: chat(messages=[{"role": "user", "content": "a"}] * 10**5),
        400,
        "",
    ),
    "5000 messages": (
        CHAT,
        lambda: chat(messages=[{"role": "user", "content": "a"}] * 5000),
        400,
        "messages",
    ),
    "an unknown role": (
        CHAT,
        lambda: chat(messages=[{"role": "root", "content": "a"}]),
        400,
        "role",
    ),
    "10^4 unknown fields": (
        CHAT,
        lambda: chat(**{f"field{i}": 1 for i in range(10**4)}),
        400,
        "field",
    ),
    "10^5 unknown fields": (CHAT, lambda: chat(**{f"field{i}": 1 for i in range(10**5)}), 400, ""),
    "10^6 parts that are none": (
        CHAT,
        lambda: chat(messages=[{"role": "user", "content": [1] * 10**6}]),
        400,
        "content",
    ),
    "4000 parts that are none in each of 250 messages": (
        CHAT,
        lambda: chat(messages=[{"role": "user", "content": [1] * 4000}] * 250),
        400,
        "",
    ),
    "an image": (
        CHAT,
        lambda: chat(
            messages=[
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/"}}],
                }
            ]
        ),
        400,
        "content_not_supported",
    ),
    "a file": (
        CHAT,
        lambda: chat(
            messages=[
                {"role": "user", "content": [{"type": "file", "file": {"file_data": "data:,"}}]}
            ]
        ),
        400,
        "content_not_supported",
    ),
    "a template of its own": (CHAT, lambda: chat(chat_template="{{ 1 }}"), 400, "chat_template"),
    "a template in the arguments of the template": (
        CHAT,
        lambda: chat(chat_template_kwargs={"chat_template": "{{ 1 }}"}),
        400,
        "chat_template",
    ),
    "another model": (CHAT, lambda: chat(model="/etc/passwd"), 404, "model_not_found"),
    "a path as model": (CHAT, lambda: chat(model="../../etc"), 404, "model_not_found"),
    "an adapter": (
        "/generate",
        lambda: {"text": "a", "lora_path": "/etc/passwd"},
        400,
        "lora_path",
    ),
    "an image to generate from": (
        "/generate",
        lambda: {"text": "a", "image_data": "http://127.0.0.1:1/"},
        400,
        "image_data",
    ),
    "a tool's name with markup": (
        CHAT,
        lambda: chat(tools=[{"type": "function", "function": {"name": "<f>"}}]),
        400,
        "name",
    ),
    "a tool's name of a million characters": (
        CHAT,
        lambda: chat(tools=[{"type": "function", "function": {"name": "f" * 10**6}}]),
        400,
        "name",
    ),
    "1000 tools": (
        CHAT,
        lambda: chat(tools=[{"type": "function", "function": {"name": "f"}}] * 1000),
        400,
        "tools",
    ),
    "a regex that is none": (CHAT, lambda: chat(regex="(("), 400, "regex"),
    "a grammar that is none": (CHAT, lambda: chat(ebnf="root ::= "), 400, ""),
    "a grammar without an end": (CHAT, lambda: chat(ebnf="root ::= root"), 400, ""),
    "a regex of a megabyte": (CHAT, lambda: chat(regex="a" * 10**6), 400, "regex"),
    "a rid of a million characters": (CHAT, lambda: chat(rid="r" * 10**6), 400, "rid"),
    "a rid with a line break": (CHAT, lambda: chat(rid="a\nERROR: all is lost"), 400, "rid"),
    "prompts to tokenize of 7 MB": ("/tokenize", lambda: {"prompt": ["a" * 7000] * 1000}, 400, ""),
}
BOMBS: dict[str, Callable[[], dict[str, object]]] = {
    "a regex of many repeats": lambda: {"regex": "(((a{1,99}){1,99}){1,99}){1,99}"},
    "a schema of 10^4 properties": lambda: schema(
        {"type": "object", "properties": {f"p{i}": {} for i in range(10**4)}}
    ),
    "a schema that holds itself": lambda: schema(
        {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}] * 2}}}
    ),
    "a schema with a long string": lambda: schema(
        {"type": "string", "minLength": 10**9, "maxLength": 10**9}
    ),
    "a schema of 80 levels": lambda: schema(_levels(80)),
}
MANY_ALTERNATIVES = {
    "ebnf": "root ::= "
    + " | ".join(f"r{i}" for i in range(2000))
    + "\n"
    + "".join(f"r{i} ::= root root\n" for i in range(2000))
}


def _levels(depth: int) -> dict[str, object]:
    made: dict[str, object] = {"type": "string"}
    for _ in range(depth):
        made = {"type": "object", "properties": {"a": made, "b": {"type": "integer"}}}
    return made


def send(served: Server, path: str, body: object, **headers: str) -> tuple[int, str, float]:
    """Return status and text of the answer to a POST, and the seconds it took."""
    data = (
        body
        if isinstance(body, bytes)
        else (body if isinstance(body, str) else json.dumps(body)).encode()
    )
    began = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    try:
        connection.request("POST", path, data, {"content-type": "application/json", **headers})
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), time.monotonic() - began
    finally:
        connection.close()


def talk(served: Server, data: bytes, *, timeout_s: float = 60) -> bytes:
    """Send bytes on a connection, and return all that comes back until its end."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=timeout_s) as connection:
        connection.sendall(data)
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def resident(served: Server) -> int:
    """Return the bytes that the server and its engine have in memory."""
    own = psutil.Process(served.process.pid)
    size = 0
    for process in [own, *own.children()]:
        with contextlib.suppress(psutil.NoSuchProcess):  # a sandbox that has just ended
            if "qtool.sandbox" not in " ".join(process.cmdline()):
                size += process.memory_info().rss
    return size


def streamed(url: str, body: dict[str, object]) -> str:
    """Return the text of a stream that came to its proper end."""
    text, ended = "", False
    # the environment is not read: pytest changes it for each test, under the feet of this thread
    stream = httpx.stream("POST", f"{url}{COMPLETION}", json=body, timeout=60, trust_env=False)
    with stream as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            ended = ended or line == "data: [DONE]"
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
    assert ended
    return text


@pytest.fixture(scope="module", autouse=True)
def good_client(served) -> Iterator[None]:
    """Somebody who asks for the same text all the while, and gets it every time, while memory stays
    as it is.
    """
    expected = streamed(served.url, GOOD)
    assert expected
    answers: list[str | BaseException] = []
    leave = threading.Event()

    def ask() -> None:
        while not leave.wait(0.05):
            try:
                answers.append(streamed(served.url, GOOD))
            except BaseException as error:
                answers.append(error)

    send(served, CHAT, chat(regex="a"))  # both sandboxes run
    before = resident(served)
    client = threading.Thread(target=ask)
    client.start()
    yield
    leave.set()
    client.join(60)
    assert answers
    assert set(answers) == {expected}
    assert resident(served) - before < GROWTH_BYTES
    assert "Traceback" not in served.said()


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused_at_once(served, name):
    path, body, status, word = REFUSED[name]
    given = body()
    answered, text, seconds = send(served, path, given)
    assert answered == status, text[:300]
    error = json.loads(text)["error"]
    assert word in text
    assert len(text) < 2000  # nobody is sent his own megabytes
    assert error["message"] and error["type"] == "invalid_request_error"
    assert seconds < SOON_S


@pytest.mark.parametrize("depth", [90, 400, 900])
@pytest.mark.parametrize(
    "place", ["metadata", "chat_template_kwargs", "documents", "tools", "schema", "forced"]
)
def test_a_value_that_is_rather_deep_is_no_bug(served, place, depth):
    value: object = 1
    for level in range(depth):
        value = {"properties": value} if level % 2 else [value]
    value = {"properties": value}
    fields = {
        "metadata": {"metadata": value},
        "chat_template_kwargs": {"chat_template_kwargs": value},
        "documents": {"documents": [value]},
        "tools": tools(value),
        "schema": schema(value),
        "forced": {**tools(value), "tool_choice": "required"},
    }[place]
    status, text, _ = send(served, CHAT, chat(**fields))
    assert status in (200, 400), text[:300]


@pytest.mark.parametrize("name", BOMBS)
def test_a_grammar_that_is_too_much_is_refused_or_served(served, name):
    status, text, _ = send(served, CHAT, chat(**BOMBS[name]()))
    assert status in (200, 400), text[:300]


def test_a_grammar_that_was_too_much_is_known_the_next_time(served):
    bomb = chat(**MANY_ALTERNATIVES)
    assert send(served, CHAT, bomb)[0] == 400
    status, text, seconds = send(served, CHAT, bomb)
    assert status == 400
    assert "memory" in text
    assert seconds < 1


@pytest.mark.parametrize("framing", ["content-length", "chunked"])
def test_a_gigabyte_is_refused_before_it_is_sent(served, framing):
    before = resident(served)
    piece, size = b" " * (1 << 20), 1 << 30
    length = (
        f"content-length: {size}" if framing == "content-length" else "transfer-encoding: chunked"
    )
    sent = 0
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as connection:
        connection.sendall(
            (
                f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: "
                f"application/json\r\n{length}\r\n\r\n"
            ).encode()
        )
        with contextlib.suppress(OSError):
            while sent < size and not select.select([connection], [], [], 0)[0]:
                connection.sendall(
                    piece if framing == "content-length" else b"100000\r\n" + piece + b"\r\n"
                )
                sent += len(piece)
        answer = b""
        while b"body_too_large" not in answer:
            more = connection.recv(1 << 16)
            assert more, answer
            answer += more
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert sent < 64 << 20
    assert resident(served) - before < GROWTH_BYTES


def test_a_body_that_waits_for_leave_gets_it_or_a_refusal(served):
    head = (
        f"POST {COMPLETION} HTTP/1.1\r\nhost: localhost\r\ncontent-type: "
        "application/json\r\nexpect: 100-continue\r\nconnection: close\r\n"
    )
    assert talk(served, f"{head}content-length: {1 << 30}\r\n\r\n".encode()).startswith(
        b"HTTP/1.1 413 "
    )
    body = json.dumps(completion()).encode()
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as connection:
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode())
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "kind",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "text/json",
        "",
    ],
)
def test_a_body_that_is_not_called_json_is_refused(served, kind):
    status, text, _ = send(served, CHAT, chat(), **{"content-type": kind})
    assert status == 415
    assert "Content-Type: application/json" in json.loads(text)["error"]["message"]


def test_json_may_name_its_charset(served):
    assert (
        send(
            served, COMPLETION, completion(), **{"content-type": "Application/JSON; charset=utf-8"}
        )[0]
        == 200
    )


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "gzip, gzip"])
def test_a_compressed_body_is_refused(served, encoding):
    status, text, _ = send(
        served, CHAT, gzip.compress(json.dumps(chat()).encode()), **{"content-encoding": encoding}
    )
    assert status == 415
    assert json.loads(text)["error"]["code"] == "unsupported_encoding"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", CHAT),
        ("PUT", CHAT),
        ("DELETE", "/v1/models/tiny"),
        ("PATCH", "/health"),
        ("TRACE", CHAT),
    ],
)
def test_a_wrong_method_is_told_the_right_one(served, method, path):
    answer = httpx.request(method, served.url + path)
    assert answer.status_code == 405
    assert answer.headers["allow"] in ("GET", "POST")
    assert answer.json()["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat",
        "/v2/models",
        "/docs",
        "/redoc",
        "/health/",
        "/v1/images/generations",
        "/page.html",
        "/static/../app.py",
        "//etc/passwd",
        "/v1/models/../../etc/passwd",
        "/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/v1/models//etc/passwd",
        "/v1/models/%00",
        "/v1/models/%ff",
    ],
)
def test_a_path_that_leads_nowhere_is_404(served, path):
    answer = talk(
        served, f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode()
    )
    assert answer.startswith(b"HTTP/1.1 404 "), answer[:300]
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


GENERATE = b"POST /generate HTTP/1.1\r\nhost: localhost\r\n"
HEADS = {
    "no HTTP": b"hello\r\n\r\n",
    "TLS": bytes.fromhex("16030100a5010000a10303") + os.urandom(160),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "zeros": bytes(1000),
    "a version that is none": b"GET / HTTP/9.9\r\nhost: localhost\r\n\r\n",
    "a method that is none": b"GRAB / HTTP/1.1\r\nhost: localhost\r\n\r\n",
    "a length below zero": GENERATE + b"content-length: -1\r\n\r\n",
    "a length of many digits": b"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: "
    + b"9" * 1000
    + b"\r\n\r\n",
    "two lengths": GENERATE + b"content-length: 1\r\ncontent-length: 2\r\n\r\n{}",
    "a length and chunks": GENERATE
    + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "a chunk whose size is none": GENERATE + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
    "a header of a megabyte": b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: "
    + b"a" * (1 << 20)
    + b"\r\n\r\n",
    "10^5 headers": b"GET /health HTTP/1.1\r\nhost: localhost\r\n" + b"x: y\r\n" * 10**5 + b"\r\n",
    "a path of a megabyte": b"GET /" + b"a" * (1 << 20) + b" HTTP/1.1\r\nhost: localhost\r\n\r\n",
    "bytes in the path": b"GET /\xff\xfe HTTP/1.1\r\nhost: localhost\r\n\r\n",
    "a line break in a header": b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: a\rb\r\n\r\n",
}


@pytest.mark.parametrize("name", HEADS)
def test_bytes_that_are_no_request_are_answered_and_hung_up_on(served, name):
    answer = b""
    with socket.create_connection(("127.0.0.1", served.port), timeout=SOON_S) as connection:
        with contextlib.suppress(OSError):  # it does not read all of it
            connection.sendall(HEADS[name])
            connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert not answer or answer.split()[1] in (b"400", b"431", b"413"), answer[:300]


def test_ten_thousand_small_headers_are_too_many_or_harmless(served):
    answer = talk(
        served,
        b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        + b"x: y\r\n" * 10**4
        + b"\r\n",
    )
    assert answer.split()[1] in (b"200", b"431")


def test_trailers_and_crumbs_without_end_are_cut(served):
    head = (
        f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: "
        "application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    ).encode()
    for start, more in (
        (b"1\r\n \r\n0\r\n", b"x: " + b"y" * 1000 + b"\r\n"),
        (b"", b"1;" + b"z" * 1000 + b"\r\n \r\n"),
    ):
        sent, answer = 0, b""
        with socket.create_connection(("127.0.0.1", served.port), timeout=30) as connection:
            with contextlib.suppress(OSError):
                connection.sendall(head + start)
                while sent < 32 << 20 and not select.select([connection], [], [], 0)[0]:
                    connection.sendall(more * 64)
                    sent += 64 * len(more)
            with contextlib.suppress(ConnectionResetError):
                answer = connection.recv(1000)
        assert sent < 16 << 20
        assert answer.startswith(b"HTTP/1.1 400 ") or not answer


def test_an_upgrade_is_not_taken(served):
    upgrade = (
        "connection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-key: "
        "dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n"
    )
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as connection:
        connection.sendall(
            f"GET /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n{upgrade}\r\n".encode()
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 405 ")
    assert "WebSocket" not in served.said()


def test_pages_of_other_sites_get_no_leave(served):
    preflight = {
        "origin": "https://example.com",
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type",
    }
    answers = [
        httpx.options(served.url + CHAT, headers=preflight),
        httpx.get(f"{served.url}/v1/models", headers=preflight),
    ]
    assert [answer.status_code for answer in answers] == [405, 200]
    assert not any(
        name.startswith("access-control") for answer in answers for name in answer.headers
    )


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *(
            (host, 200)
            for host in (
                "localhost",
                "LOCALHOST:30000",
                "127.0.0.1:1",
                "[::1]:30000",
                "192.168.1.7",
                "x.localhost",
                "",
            )
        ),
        *(
            (host, 403)
            for host in (
                "example.com",
                "127.0.0.1.example.com",
                "localhost.example.com:80",
                "[",
                "\xe4",
            )
        ),
    ],
)
def test_a_name_that_was_made_to_lead_here_is_refused(served, host, status):
    """A page on that name would be of the same origin, for the browser of whoever runs the
    server.
    """
    answer = talk(
        served,
        f"GET /v1/models HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode("latin-1"),
    )
    assert answer.split()[1] == str(status).encode()


LONG = "\N{EURO SIGN}x" * (1 << 20)
RESPONSE = {"input": "hi", "max_output_tokens": 4}
LONG_NAMES = {
    "model": (COMPLETION, completion(model=LONG)),
    "model of a chat": (CHAT, chat(model=LONG)),
    "model of a message": ("/v1/messages", chat(model=LONG)),
    "model of embeddings": ("/v1/embeddings", {"input": "x", "model": LONG}),
    "tool": ("/v1/responses", {**RESPONSE, "tool_choice": {"type": "function", "name": LONG}}),
    "effort": ("/v1/responses", {**RESPONSE, "reasoning": {"effort": LONG}}),
    "metadata": ("/v1/responses", {**RESPONSE, "metadata": {"a": LONG}}),
    "role": (CHAT, chat(messages=[{"role": LONG, "content": "x"}])),
    "field": (CHAT, chat(**{LONG: 1}, max_token=3)),
}


@pytest.mark.parametrize("name", LONG_NAMES)
def test_a_long_name_is_refused_and_not_repeated(served, name):
    path, body = LONG_NAMES[name]
    before = len(served.said())
    answer = httpx.post(served.url + path, json=body, timeout=60)
    assert (answer.status_code, len(answer.content) < 4096) == (400, True)
    assert len(served.said()) - before < 4096


@pytest.mark.parametrize(
    "body",
    [
        '{"prompt": "a", "max_tokens": 1, "max_tokens": 3}',
        '{"prompt": "a", "max_tokens": 1, "max\\u005ftokens": 3}',
        '{"prompt": "a", "metadata": {"deep": [{"a:\\"b": 1, "c": {}, "a:\\"b": ":"}]}}',
        '{"prompt": "a", "metadata": {"": 1, "": 1}}',
    ],
)
def test_a_key_that_is_there_twice_is_refused(served, body):
    status, text, _ = send(served, COMPLETION, body)
    assert status == 400
    assert "is there twice" in json.loads(text)["error"]["message"]


@pytest.mark.parametrize("big", ["prompt", "ids", "keys", "escapes"])
def test_a_large_body_stops_nobody(served, big):
    body = {
        "prompt": lambda: json.dumps(completion(prompt="a b " * 1_900_000)),
        "ids": lambda: json.dumps(completion(prompt=[4000] * 10**6)),
        "keys": lambda: json.dumps(
            completion(metadata={f"k{i}": "v" * 100 for i in range(60_000)})
        ),
        "escapes": lambda: raw(completion(user="X"), "X", "\\ud83d\\ude00" * 600_000),
    }[big]()
    gaps: list[float] = []
    done = threading.Event()

    def look() -> None:
        with httpx.Client() as client:
            while not done.is_set():
                began = time.monotonic()
                client.get(f"{served.url}/health", timeout=60)
                gaps.append(time.monotonic() - began)

    watcher = threading.Thread(target=look)
    watcher.start()
    while not gaps:
        time.sleep(0.01)
    send(served, COMPLETION, body)
    done.set()
    watcher.join()
    assert max(gaps) < 2  # of a busy machine; 0.2 s of a quiet one


SLOW = RequestLimits(
    body_bytes=1 << 20,
    held_bytes=3 << 20,
    head_s=0.4,
    body_s=0.6,
    stall_s=0.6,
    linger_s=0.3,
    connections=40,
)


async def echo(scope, receive, send):
    """Answer with the size of the body, or on /much with more than any buffer holds."""
    message = await receive()
    await send(
        {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-type", b"text/plain")],
        }
    )
    if scope["path"] == "/much":
        with contextlib.suppress(asyncio.CancelledError):
            for _ in range(4000):
                await send(
                    {"type": "http.response.body", "body": b"x" * (1 << 16), "more_body": True}
                )
        scope["app"]["left"].set()
        return
    if scope["path"] == "/wait":
        await asyncio.sleep(1.5)
    await send(
        {
            "type": "http.response.body",
            "body": str(len(message["body"])).encode(),
            "more_body": False,
        }
    )


@pytest.fixture
def limited() -> Iterator[tuple[int, threading.Event]]:
    """A server with short deadlines around a small application: its port, and an event when a
    reader of it was given up.
    """
    left = threading.Event()

    async def application(scope, receive, send):
        await echo({**scope, "app": {"left": left}}, receive, send)

    middleware = LimitsMiddleware(application, ServiceHost(ServeSettings(model_path="")), SLOW)
    config = uvicorn.Config(
        middleware,
        http=limited_connection(SLOW),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
    )
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield listening.getsockname()[1], left
        server.should_exit = True
        thread.join(20)


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def everything(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(1 << 16), b""))


@pytest.mark.parametrize(
    "start", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nhost: localhost\r\nx: y\r\n"]
)
def test_a_head_that_does_not_come_is_not_waited_for(limited, start):
    port, _ = limited
    with connect(port) as connection:
        connection.sendall(start)
        assert everything(connection).startswith(b"HTTP/1.1 408 ")


def test_a_head_that_comes_by_the_byte_is_not_waited_for(limited):
    port, _ = limited
    began = time.monotonic()
    with connect(port) as connection, contextlib.suppress(OSError):
        for _ in range(200):
            connection.sendall(b"a")
            time.sleep(0.05)
    assert time.monotonic() - began < 5


def test_line_breaks_after_an_answer_keep_no_connection(limited):
    port, _ = limited
    with connect(port) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
        began = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - began < 5:
                connection.sendall(b"\r\n")
                time.sleep(0.05)
        assert time.monotonic() - began < 5


def test_a_second_request_that_is_late_does_not_cut_the_first(limited):
    port, _ = limited
    with connect(port) as connection:
        connection.sendall(b"GET /wait HTTP/1.1\r\nhost: localhost\r\n\r\nGET / HT")
        answer = b""
        while not answer.endswith(b"0\r\n\r\n"):
            answer += connection.recv(1000)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"408" not in answer


def test_a_body_that_comes_too_slowly_is_not_waited_for(limited):
    port, _ = limited
    with connect(port) as connection:
        connection.sendall(
            b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b"content-length: 100\r\n\r\n{"
        )
        answer = everything(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"body_timeout" in answer


def test_a_reader_that_takes_nothing_is_hung_up_on(limited):
    port, left = limited
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", port))
        connection.sendall(b"GET /much HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert left.wait(20)
        with contextlib.suppress(ConnectionResetError):
            assert len(everything(connection)) < 4000 << 16


def test_a_slow_reader_that_takes_something_gets_it_all(limited):
    port, _ = limited
    with connect(port) as connection:
        connection.sendall(b"GET /much HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        got = 0
        for turn in range(10**6):
            data = connection.recv(1 << 20)
            got += len(data)
            if not data:
                break
            if turn < 20:
                time.sleep(0.1)  # 2 s in all: longer than the deadline for one that takes nothing
    assert got > 4000 << 16


def test_all_bodies_together_are_bounded(limited):
    port, _ = limited
    head = (
        b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"content-length: 1048576\r\n\r\n"
    )
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connect(port)) for _ in range(5)]
        for connection in connections:
            connection.sendall(head + b" " * 1_000_000)
        answers = [everything(connection) for connection in connections]
    assert {answer.split()[1] for answer in answers} == {b"408", b"503"}
    assert all(b"retry-after: 1" in answer for answer in answers if b" 503 " in answer)
    with connect(port) as connection:  # and what they held is given back
        connection.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        assert everything(connection).startswith(b"HTTP/1.1 200 ")


def test_idle_connections_give_way_to_new_ones(limited):
    port, _ = limited
    get = b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n"
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(connect(port))
        for number in range(2 * SLOW.connections):
            connection = stack.enter_context(connect(port))
            if number % 2:
                connection.sendall(get)
                assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        assert everything(first).startswith(b"HTTP/1.1 503 ")


def test_one_client_cannot_have_all_connections(limited):
    port, _ = limited
    wait = b"GET /wait HTTP/1.1\r\nhost: localhost\r\n\r\n"
    with contextlib.ExitStack() as stack:
        for _ in range(SLOW.connections):
            stack.enter_context(connect(port)).sendall(wait)
        time.sleep(0.3)
        assert everything(stack.enter_context(connect(port))).startswith(b"HTTP/1.1 503 ")
        other = socket.create_connection(("127.0.0.1", port), 20, ("127.0.0.2", 0))
        stack.enter_context(other)
        other.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        assert everything(other).startswith(b"HTTP/1.1 200 ")

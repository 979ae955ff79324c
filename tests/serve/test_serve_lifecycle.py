"""Starting, clients that leave or press, and the end: whatever happens, places and pages come back,
and nobody waits for ever.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from support.server import Server, free_port, start_server, wait_until

from qtool.cli.app import app, run
from qtool.errors import QtoolError, UsageError

pytestmark = pytest.mark.slow
SHARED = pytest.mark.xdist_group("serve")  # one server for all tests that use `served`
MARKER = "xyzzy plugh"
LONG = {"prompt": "def add(a, b):\n", "max_tokens": 1500, "ignore_eos": True, "temperature": 0}
DRAIN_S = 1.5
END_S = DRAIN_S + 15.0  # the drain, the engine's and the readers' time, and a busy machine


def doing(server: Server) -> dict[str, float]:
    """Return what the server says that it does."""
    state: dict[str, float] = httpx.get(f"{server.url}/get_server_info", timeout=30).json()[
        "internal_states"
    ][0]
    return state


def is_idle(server: Server) -> bool:
    state = doing(server)
    return not (state["running"] or state["waiting"] or state["places_taken"] or state["kv_usage"])


def request_bytes(path: str, body: dict[str, object]) -> bytes:
    data = json.dumps(body).encode()
    return (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: "
        f"application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    ).encode() + data


def leave_early(port: int, draw: random.Random) -> None:
    """Begin some request, and hang up at some moment: politely, or with a reset."""
    chat = {"messages": [{"role": "user", "content": "word " * draw.choice([1, 200, 1500])}]}
    path, body = draw.choice(
        [
            ("/v1/completions", LONG),
            ("/v1/chat/completions", {**chat, "max_tokens": 300}),
            ("/generate", {"text": "a " * 500}),
        ]
    )
    body = {**body, "stream": draw.random() < 0.6} | (
        {"n": draw.choice([1, 1, 4])} if path != "/generate" else {}
    )
    data = request_bytes(path, body)
    moment = draw.choice(["in the head", "in the body", "at once", "later", "while it reads"])
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        if draw.random() < 0.5:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if moment == "in the head":
            connection.sendall(data[: draw.randrange(40)])
        elif moment == "in the body":
            connection.sendall(data[: -draw.randrange(1, 20)])
        else:
            connection.sendall(data)
        if moment == "later":
            time.sleep(draw.random())
        if moment == "while it reads" and body["stream"]:
            for _ in range(draw.randrange(1, 20)):
                if not connection.recv(1000):
                    break


@SHARED
def test_clients_that_leave_at_any_moment_leave_nothing_behind(served):
    wait_until(lambda: is_idle(served), 20)
    draw = random.Random(0)
    with ThreadPoolExecutor(12) as pool:
        list(
            pool.map(
                lambda seed: leave_early(served.port, random.Random(seed)),
                [draw.random() for _ in range(36)],
            )
        )
    wait_until(lambda: is_idle(served), 10)  # 2 s on a machine that has nothing else to do
    assert "Traceback" not in served.said()
    assert (
        httpx.post(
            f"{served.url}/v1/completions", json={"prompt": "a", "max_tokens": 2}, timeout=30
        ).status_code
        == 200
    )


@SHARED
def test_one_bad_choice_takes_the_others_of_its_request_along(served):
    """What the client was told is an error: nothing of the request goes on."""
    body = {"prompt": "a", "n": 4, "max_tokens": 1500, "ignore_eos": True, "rid": "all-of-it"}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, f"{served.url}/v1/completions", json=body, timeout=60)
        wait_until(lambda: doing(served)["running"] == 4, 10)
        assert httpx.post(f"{served.url}/abort_request", json={"rid": "all-of-it"}).json() == {
            "success": True
        }
        assert {choice["finish_reason"] for choice in answer.result().json()["choices"]} == {
            "abort"
        }
    wait_until(lambda: is_idle(served), 10)


@SHARED
def test_a_reader_that_takes_nothing_disturbs_nobody_and_is_let_go_when_it_leaves(served):
    body = {**LONG, "stream": True, "logprobs": 20, "n": 4}
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", served.port))
        connection.sendall(request_bytes("/v1/completions", body))
        wait_until(lambda: doing(served)["running"] == 4, 10)
        assert (
            httpx.post(
                f"{served.url}/v1/completions", json={"prompt": "a", "max_tokens": 2}, timeout=30
            ).status_code
            == 200
        )
    wait_until(lambda: is_idle(served), 10)


@pytest.fixture
def started(tmp_path, quantized_model) -> Iterator:
    """A function that starts a server of its own; all of them are ended."""
    servers: list[Server] = []

    def start(*arguments: object, model: object = quantized_model, ready: bool = True) -> Server:
        servers.append(
            start_server(
                tmp_path,
                model,
                "--served-model-name",
                "tiny",
                "--drain-timeout",
                DRAIN_S,
                *arguments,
                ready=ready,
            )
        )
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


def family(server: Server) -> list[psutil.Process]:
    """Return the server's children, and theirs."""
    return psutil.Process(server.process.pid).children(recursive=True)


def are_gone(processes: list[psutil.Process]) -> bool:
    return not any(
        process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes
    )


def ask(url: str, body: dict[str, object]) -> str:
    """Return how a request ended, in a word; anything that is no proper end is an error."""
    try:
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            text = answer.read().decode()
    except httpx.ConnectError:
        return "not taken"
    if answer.status_code != 200:
        assert answer.status_code in (429, 503), text
        assert json.loads(text)["error"]["message"]
        assert int(answer.headers["retry-after"]) >= 1
        return str(answer.status_code)
    if not body.get("stream"):
        return str(json.loads(text)["choices"][0]["finish_reason"])
    *events, last = (line.removeprefix("data: ") for line in text.split("\n\n") if line)
    assert last == "[DONE]"
    found = [json.loads(event) for event in events]
    reasons = [
        choice["finish_reason"]
        for event in found
        if "choices" in event
        for choice in event["choices"]
        if choice["finish_reason"]
    ]
    return reasons[-1] if reasons else "error: " + found[-1]["error"]["code"]


def test_at_a_signal_every_request_gets_an_end(started):
    server = started("--max-running-requests", 8)
    with ThreadPoolExecutor(20) as pool:
        asked = [
            pool.submit(ask, server.url, {**LONG, "stream": number % 3 > 0}) for number in range(18)
        ]
        asked.append(pool.submit(ask, server.url, {**LONG, "regex": "(a|b){2000}"}))
        wait_until(lambda: doing(server)["places_taken"] == 19, 20)
        children = family(server)
        assert len(children) >= 2
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(END_S) == 0
        ends = [request.result(10) for request in asked]
    assert set(ends) <= {"abort", "length", "stop", "503", "not taken"}, ends
    assert ends.count("abort") >= 5, ends
    assert are_gone(children)
    assert "Traceback" not in server.said()


def test_a_signal_while_it_loads_ends_it(started):
    server = started("--json", ready=False)
    children = family(server)
    os.kill(server.process.pid, signal.SIGTERM)
    assert server.process.wait(END_S) == 0
    assert json.loads(server.out.read_text())["ready"] is False
    assert are_gone(children)
    assert "Traceback" not in server.said()


def test_without_its_server_nothing_goes_on(started):
    server = started()
    assert (
        httpx.post(
            f"{server.url}/v1/completions",
            json={"prompt": "a", "max_tokens": 2, "regex": "a+"},
            timeout=60,
        ).status_code
        == 200
    )
    children = family(server)
    assert len(children) == 3  # the engine, the template, the grammars
    threading.Thread(
        target=lambda: _ignore(ask, server.url, {**LONG, "stream": True}), daemon=True
    ).start()
    wait_until(lambda: doing(server)["running"] == 1, 10)
    server.process.kill()
    wait_until(lambda: are_gone(children), 10)


def _ignore(function, *arguments) -> None:
    try:
        function(*arguments)
    except Exception:
        return


def test_without_its_engine_a_server_says_so_and_ends(started):
    server = started("--json")
    engine = next(
        child for child in family(server) if "qtool.serve.backend.engine_process" in child.cmdline()
    )
    with ThreadPoolExecutor(4) as pool:
        asked = [
            pool.submit(ask, server.url, {**LONG, "stream": number % 2 == 0}) for number in range(4)
        ]
        wait_until(lambda: doing(server)["running"] == 4, 10)
        engine.kill()
        ends = [request.result(20) for request in asked]
    # a stream of which nothing was sent yet still has a status
    assert set(ends[::2]) <= {"503", "error: engine_died"}
    assert set(ends[1::2]) == {"503"}
    assert server.process.wait(20) == 4
    assert "error[E_ENGINE_DIED]" in server.said()
    assert json.loads(server.out.read_text())["ready"] is True  # the one document
    assert "it was killed" in server.said()


def test_an_engine_that_hangs_is_ended_and_clients_learn_no_paths(tmp_path, quantized_model):
    server = start_server(tmp_path, quantized_model, "--watchdog-timeout", 3)
    try:
        check_what_clients_learn(server, quantized_model)
        engine = next(
            child
            for child in family(server)
            if "qtool.serve.backend.engine_process" in child.cmdline()
        )
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(ask, server.url, {**LONG, "stream": True}) for _ in range(4)]
            wait_until(lambda: doing(server)["running"] == 4, 20)
            engine.suspend()
            for path, status in (("health", 200), ("metrics", 200)):
                began = time.monotonic()
                assert httpx.get(f"{server.url}/{path}", timeout=10).status_code == status
                assert time.monotonic() - began < 2  # of a busy machine; 0.5 s of a quiet one
            wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 503, 20)
            assert {request.result(20) for request in asked} == {"error: engine_hangs"}
        assert server.process.wait(20) == 4
        said = server.said()
        assert "error[E_ENGINE_HANGS]" in said
        assert 'File "' in said and "engine_process.py" in said
        assert not engine.is_running()
    finally:
        server.process.kill()


def check_what_clients_learn(server: Server, folder: Path) -> None:
    """Check the answers about a model that was given by its path."""
    for path in ("v1/models", "get_model_info", "get_server_info", "metrics", "", "openapi.json"):
        answer = httpx.get(f"{server.url}/{path}")
        assert answer.status_code == 200
        assert str(folder.parent) not in answer.text
        without = httpx.head(f"{server.url}/{path}")
        assert (without.status_code, without.content) == (200, b"")
    assert httpx.head(f"{server.url}/v1/completions").status_code == 405
    model = httpx.get(f"{server.url}/v1/models").json()["data"][0]
    assert (model["id"], model["root"]) == (folder.name, folder.name)
    refused = httpx.get(f"{server.url}/v1/models/other")
    assert refused.status_code == 404 and str(folder.parent) not in refused.text
    with socket.create_connection(("127.0.0.1", server.port), 20) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\nHost: localhost\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("key", ["", " ", "a b", "a\n"])
@pytest.mark.parametrize("how", ["option", "variable"])
def test_a_key_that_is_none_is_refused(tiny_model, monkeypatch, key, how):
    if how == "option":
        arguments = ["--api-key", key]
    else:
        monkeypatch.setenv("QTOOL_API_KEY", key)
        arguments = []
    command = ["serve", "--model-path", str(tiny_model), *arguments]
    with pytest.raises(UsageError) as refused:
        app(command, standalone_mode=False)
    assert refused.value.code == "E_API_KEY"


def test_more_than_it_takes_is_told_to_come_back_and_a_second_interrupt_ends_all(started):
    server = started("--max-running-requests", 4, "--max-queued-requests", 4)
    process = psutil.Process(server.process.pid)
    ask(server.url, LONG | {"max_tokens": 8})
    before = sum(one.memory_info().rss for one in [process, *family(server)])
    ends: list[str] = []
    deadline = time.monotonic() + 1.5  # a minute of it is in benchmarks/serve_soak.py

    def press(number: int) -> None:
        while time.monotonic() < deadline:
            ends.append(ask(server.url, {**LONG, "max_tokens": 64, "stream": number % 2 == 0}))
            if ends[-1] == "429":
                time.sleep(0.05)  # a second is what they were asked for

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(press, range(12)))
    assert set(ends) == {"length", "429"}
    assert wait_until(lambda: is_idle(server), 5) < 5
    assert ask(server.url, LONG | {"max_tokens": 8}) == "length"
    assert sum(one.memory_info().rss for one in [process, *family(server)]) - before < 128 << 20
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, server.url, {**LONG, "stream": True}) for _ in range(4)]
        wait_until(lambda: doing(server)["running"] == 4, 10)
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(END_S) == 0
        assert {request.result(10) for request in asked} == {"abort"}
    assert "Traceback" not in server.said()


def serve_command(model: object, *arguments: object) -> list[str]:
    return [
        sys.executable,
        "-m",
        "qtool.cli",
        "serve",
        "--model-path",
        str(model),
        *map(str, arguments),
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--host", "192.0.2.1"], 4, "E_PORT"),
        (["--host", "no.such.host.invalid"], 4, "E_PORT"),
    ],
)
def test_what_cannot_start_ends_with_its_code(tiny_model, arguments, code, words):
    done = subprocess.run(
        serve_command(tiny_model, "--port", free_port(), *arguments),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--context-length", "9999"], "E_CONTEXT"),
        (["--kv-cache-dtype", "fp4"], "E_KV_DTYPE"),
        (["--tokenizer-path", "."], "E_TOKENIZER"),
        (["--chat-template", "none.jinja"], "E_NO_SUCH_FILE"),
    ],
    ids=["context", "kv", "tokenizer", "template"],
)
def test_what_a_run_refuses_before_it_loads_its_dry_run_refuses(tiny_model, arguments, code):
    with pytest.raises(QtoolError) as refused:
        run(["serve", "--model-path", str(tiny_model), "--dry-run", "--device", "cpu", *arguments])
    assert refused.value.code == code


@SHARED
def test_a_port_that_is_taken_is_told_before_anything_loads(served, tiny_model):
    began = time.monotonic()
    done = subprocess.run(
        serve_command(tiny_model, "--port", served.port),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 4
    assert "E_PORT" in done.stderr
    assert "INFO" not in done.stderr  # nor has the engine's process begun
    assert time.monotonic() - began < 30


@pytest.mark.exhaustive
def test_a_model_without_finite_logits_is_not_served(tmp_path, tiny_model):
    from safetensors.torch import load_file, save_file

    broken = Path(
        shutil.copytree(
            tiny_model, tmp_path / "nan", ignore=shutil.ignore_patterns("*.py", "*.jsonl")
        )
    )
    weights = next(broken.glob("*.safetensors"))
    tensors = load_file(weights)
    tensors["model.norm.weight"].fill_(3e38)  # the logits overflow
    save_file(tensors, weights, {"format": "pt"})
    done = subprocess.run(
        serve_command(broken, "--port", free_port()), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 4, done.stderr
    assert "E_NOT_FINITE" in done.stderr
    assert "Traceback" not in done.stderr


def check_openais_defaults(server: Server) -> None:
    """Check that the defaults of the model are not taken: it would be greedy, and end sooner."""
    body = {"prompt": "def add(a, b):\n", "ignore_eos": True}
    answers = [
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json() for _ in range(4)
    ]
    assert len({answer["choices"][0]["text"] for answer in answers}) > 1
    assert {answer["usage"]["completion_tokens"] for answer in answers} == {16}


def talk_about(server: Server, word: str, **headers: str) -> None:
    """Send ``word`` to every route that takes text, in requests that are right and in some that are
    wrong.
    """
    bodies = {
        "/v1/completions": {"prompt": word, "max_tokens": 2},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": word}], "max_tokens": 2},
        "/generate": {"text": word, "sampling_params": {"max_new_tokens": 2}},
        "/tokenize": {"prompt": word},
    }
    for path, body in bodies.items():
        assert (
            httpx.post(server.url + path, json=body, headers=headers, timeout=60).status_code == 200
        )
        for other, status in (({"temperature": word}, 400), ({word: 1}, 200)):
            given = {**body, **other}
            if path == "/generate" and status == 400:
                given = {**body, "sampling_params": other}
            if path == "/tokenize" and status == 400:
                given = {**body, "add_special_tokens": word}
            answer = httpx.post(server.url + path, json=given, headers=headers, timeout=60)
            assert answer.status_code == status
    broken = httpx.post(
        f"{server.url}/v1/completions",
        content=json.dumps({"prompt": word})[:-1],
        headers={"content-type": "application/json", **headers},
    )
    assert broken.status_code == 400


@pytest.fixture
def greedy_model(tmp_path, quantized_model) -> Path:
    """The model with sampling defaults of its own."""
    folder = Path(shutil.copytree(quantized_model, tmp_path / "greedy"))
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(
        json.dumps({**config, "do_sample": True, "top_k": 1, "max_new_tokens": 7})
    )
    return folder


def test_an_open_server_warns_logs_no_prompts_and_ends_at_once_when_nothing_runs(
    started, greedy_model
):
    options = ("--host", "0.0.0.0", "--log-level", "debug", "--sampling-defaults", "openai")
    server = started(*options, model=greedy_model)
    assert "WARNING: anybody who can reach port" in server.said()
    parts = r"started in \d+\.\d s: imports .*, plan .*, tokenizer .*, weights .*, fusing .*, rest "
    wait_until(lambda: re.search(parts, server.said()), 5)
    assert (
        httpx.get(f"{server.url}/v1/models", headers={"host": "somewhere.example"}).status_code
        == 200
    )
    check_openais_defaults(server)
    talk_about(server, MARKER)
    children = family(server)
    with httpx.Client() as idle, socket.create_connection(("127.0.0.1", server.port)) as silent:
        assert idle.get(f"{server.url}/health").status_code == 200
        began = time.monotonic()
        assert server.end(signal.SIGHUP) == 0
        assert time.monotonic() - began < 10
        assert silent.recv(10) == b""
    assert are_gone(children)
    assert MARKER not in server.said() + server.out.read_text()


def test_a_key_is_never_shown_prompts_are_if_asked_for_and_a_log_unread_stops_nobody(
    quantized_model, tmp_path
):
    url = f"http://127.0.0.1:{(port := free_port())}"
    options = ("--api-key", "s3cret", "--log-level", "debug", "--log-requests")
    out = tmp_path / "out"
    with (
        out.open("wb") as output,
        subprocess.Popen(
            serve_command(quantized_model, "--port", port, *options),
            stdout=output,
            stderr=subprocess.PIPE,
        ) as process,
    ):
        server = Server(process, url, str(quantized_model), out, out)
        wait_until(lambda: is_healthy(server), 120)
        keys = {
            "none": {},
            "wrong": {"authorization": "Bearer wrong"},
            "basic": {"authorization": "Basic s3cret"},
            "right": {"authorization": "bearer s3cret"},
        }
        answers = {
            name: httpx.get(f"{url}/v1/models", headers=headers) for name, headers in keys.items()
        }
        assert {name: answer.status_code for name, answer in answers.items()} == {
            "none": 401,
            "wrong": 401,
            "basic": 401,
            "right": 200,
        }
        assert answers["none"].headers["www-authenticate"] == "Bearer"
        assert answers["none"].json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{url}/openapi.json").status_code == 401
        assert httpx.get(f"{url}/health").status_code == 200
        info = httpx.get(f"{url}/get_server_info", headers=keys["right"]).text
        talk_about(server, MARKER, **keys["right"])
        body = {"prompt": "def " * 1500, "max_tokens": 1}
        for _ in range(12):  # more than a pipe holds
            answer = httpx.post(
                f"{url}/v1/completions", json=body, headers=keys["right"], timeout=60
            )
            assert answer.status_code == 200
        process.terminate()
        assert process.stderr is not None
        log = process.stderr.read().decode()
    assert process.returncode == 0
    assert "s3cret" not in info + log + out.read_text()
    assert log.count(MARKER) == 6  # of each route twice
    assert log.count("def " * 1000) == 12 and len(log) > 65536


def is_healthy(server: Server) -> bool:
    assert server.process.poll() is None
    with contextlib.suppress(httpx.ConnectError):
        return httpx.get(f"{server.url}/health").status_code == 200
    return False

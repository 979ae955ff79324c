"""A server under people who leave, press and kill, for longer than tests have time: every line says
what was done, and what must hold is asserted.

python tests/benchmarks/serve_soak.py leave /tmp/tiny-fp8 --clients 1000   # disconnects at random moments: nothing is left 2 s later
python tests/benchmarks/serve_soak.py end /tmp/tiny-fp8 --moments 20       # signals at random moments: in time, no child left, every request ended
python tests/benchmarks/serve_soak.py press /tmp/tiny-fp8 --seconds 60     # four times what it takes: only 200, 429, 503; memory flat
python tests/benchmarks/serve_soak.py stall /tmp/tiny-fp8                  # readers that take nothing: cut after 30 s, the engine's pages free
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (1, 2)]
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "serve"))
from support.server import Server, free_port, start_server  # noqa: E402
from test_serve_lifecycle import (  # noqa: E402
    LONG,
    are_gone,
    ask,
    doing,
    family,
    is_idle,
    leave_early,
    request_bytes,
    serve_command,
    wait_until,
)

DRAIN_S = 2.0
# after the drain: 3 s for the engine, 2 s for readers, 5 s for an engine that does not end by
# itself
LAST_S = 11.0


def memory(server: Server) -> int:
    """Return the megabytes that the server and its engine have."""
    own = psutil.Process(server.process.pid)
    return (
        sum(
            one.memory_info().rss
            for one in [own, *own.children()]
            if "sandbox" not in " ".join(one.cmdline())
        )
        >> 20
    )


def leave(server: Server, clients: int) -> None:
    """Let clients leave at random moments; then look for what they left."""
    before = memory(server)
    with ThreadPoolExecutor(32) as pool:
        list(pool.map(lambda seed: leave_early(server.port, random.Random(seed)), range(clients)))
    seconds = wait_until(lambda: is_idle(server), 30)
    print(
        f"{clients} clients left; idle after {seconds:.2f} s; memory {before} -> {memory(server)} "
        f"MB; {doing(server)}"
    )
    assert seconds < 2
    assert "Traceback" not in server.said()
    assert ask(server.url, {**LONG, "max_tokens": 4}) == "length"
    assert server.end() == 0


def ask_or_miss(url: str, body: dict[str, object], told: list[float]) -> str:
    """Return how a request ended; who connects after the signal may be hung up on without a
    word.
    """
    began = time.monotonic()
    try:
        return ask(url, body)
    except httpx.TransportError:
        if told and began > told[0]:
            return "not taken"
        raise


def end(folder: Path, model: str, moments: int) -> None:
    """Send signals at random moments, to servers that load, idle, or have more to do than
    they can.
    """
    draw = random.Random(0)
    slowest = 0.0
    for moment in range(moments):
        port = free_port()
        log = folder / f"end-{moment}.err"
        command = serve_command(
            model, "--port", port, "--max-running-requests", 16, "--drain-timeout", DRAIN_S
        )
        with log.open("wb") as errors:
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True
            )
        server = Server(process, f"http://127.0.0.1:{port}", model, log, log)
        what = draw.choice(["loading", "idle", "requests", "requests", "prompts", "a long step"])
        ends: Counter[str] = Counter()
        told: list[float] = []
        with ThreadPoolExecutor(48) as pool:
            if what == "loading":
                wait_until(lambda server=server: _listens(server), 60)
                time.sleep(draw.random() * 4)
            else:
                wait_until(lambda server=server: _is_ready(server), 60)
            bodies = [
                {**LONG, "stream": number % 3 > 0, "n": draw.choice([1, 1, 3])}
                for number in range(40)
            ]
            if what == "prompts":
                bodies = [
                    {
                        "prompt": [number + 300] * 1900,
                        "max_tokens": 100,
                        "ignore_eos": True,
                        "stream": number % 2 > 0,
                    }
                    for number in range(40)
                ]
            asked = (
                [pool.submit(ask_or_miss, server.url, body, told) for body in bodies]
                if what not in ("loading", "idle")
                else []
            )
            time.sleep(draw.random() * 2)
            children = family(server)
            if what == "a long step":
                next(
                    child
                    for child in children
                    if "qtool.serve.backend.engine_process" in child.cmdline()
                ).suspend()
            number, to_all, twice = (
                draw.choice([signal.SIGTERM, signal.SIGTERM, signal.SIGINT]),
                draw.random() < 0.5,
                draw.random() < 0.3,
            )
            began = time.monotonic()
            told.append(began)
            for _ in range(1 + twice):
                (os.killpg if to_all else os.kill)(process.pid, number)
                time.sleep(draw.random() / 2)
            code = process.wait(60)
            seconds = time.monotonic() - began
            ends.update(request.result(10) for request in asked)
        wait_until(lambda children=children: are_gone(children), 5)
        slowest = max(slowest, seconds)
        print(
            f"{moment:3}: {what}, {number.name}{' twice' * twice}{' to all' * to_all}: exit "
            f"{code} after {seconds:.1f} s, {dict(ends)}",
            flush=True,
        )
        # the second may come when Python is about to end
        assert code == 0 or (twice and code == -number), log.read_text()
        assert seconds < DRAIN_S + LAST_S
        assert "Traceback" not in log.read_text(), log.read_text()
        assert set(ends) <= {
            "abort",
            "length",
            "stop",
            "503",
            "429",
            "not taken",
            "error: draining",
        }
    print(f"{moments} moments; the slowest end took {slowest:.1f} s")


def _listens(server: Server) -> bool:
    try:
        httpx.get(f"{server.url}/health", timeout=5)
    except httpx.HTTPError:
        return False
    return True


def _is_ready(server: Server) -> bool:
    try:
        return httpx.get(f"{server.url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def press(server: Server, seconds: float, clients: int) -> None:
    """Ask for much more than the server takes, whole and streamed."""
    ends: Counter[str] = Counter()
    deadline = time.monotonic() + seconds

    def client(number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() < deadline:
            how = ask(
                server.url,
                {**LONG, "max_tokens": draw.choice([16, 64, 200]), "stream": draw.random() < 0.5},
            )
            ends[how] += 1
            if how == "429":
                time.sleep(0.2)

    ask(server.url, {**LONG, "max_tokens": 8})
    sizes = [memory(server)]
    with ThreadPoolExecutor(clients) as pool:
        pressing = [pool.submit(client, number) for number in range(clients)]
        while time.monotonic() < deadline:
            time.sleep(seconds / 10)
            sizes.append(memory(server))
        for one in pressing:
            one.result()
    began = time.monotonic()
    assert ask(server.url, {**LONG, "max_tokens": 8}) == "length"
    answered = time.monotonic() - began
    idle = wait_until(lambda: is_idle(server), 30)
    print(
        f"{clients} clients for {seconds:g} s: {dict(ends)}; answers after {answered:.2f} s, idle "
        f"after {idle:.2f} s; MB: {sizes}"
    )
    assert set(ends) <= {"length", "stop", "429", "503"}
    assert answered + idle < 5
    assert sizes[-1] - sizes[1] < 64
    assert server.end() == 0


def stall(server: Server, readers: int) -> None:
    """Ask for much and read nothing, beside somebody who reads."""
    sizes = [memory(server)]
    connections = []
    for _ in range(readers):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(
            request_bytes(
                "/v1/completions",
                {**LONG, "max_tokens": 2000, "stream": True, "logprobs": 20, "n": 4},
            )
        )
        connections.append(connection)
    other: list[str] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            other.append(ask(server.url, {**LONG, "max_tokens": 32, "stream": True}))

    reader = threading.Thread(target=read)
    reader.start()
    began, states = time.monotonic(), []
    while (state := doing(server))["places_taken"] > 1 and time.monotonic() - began < 120:
        states.append(state)
        sizes.append(memory(server))
        time.sleep(1)
    cut = time.monotonic() - began
    done.set()
    reader.join()
    idle = wait_until(lambda: is_idle(server), 10)
    print(
        f"{readers} readers took nothing: cut after {cut:.0f} s, idle {idle:.2f} s later; MB "
        f"{sizes[::5]}; others {Counter(other)}"
    )
    assert set(other) == {"length"}
    assert cut < 100
    assert server.end() == 0


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["leave", "end", "press", "stall"])
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.what == "end":
            return end(folder, given.model, given.moments)
        small = (
            ("--max-running-requests", 8, "--max-queued-requests", 24)
            if given.what == "press"
            else ()
        )
        server = start_server(folder, given.model, *small, "--drain-timeout", DRAIN_S)
        try:
            if given.what == "leave":
                leave(server, given.clients)
            elif given.what == "press":
                press(server, given.seconds, 4 * (8 + 24))
            else:
                stall(server, 4)
        finally:
            if server.process.poll() is None:
                server.process.kill()


if __name__ == "__main__":
    main()

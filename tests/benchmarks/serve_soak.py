"""A server under people who leave, press and kill, for longer than tests have time: every line says
what was done, and what must hold is asserted.

python tests/benchmarks/serve_soak.py leave /tmp/tiny-fp8 --clients 1000   # disconnects at random moments: nothing is left 2 s later
python tests/benchmarks/serve_soak.py end /tmp/tiny-fp8 --moments 20       # signals at random moments: in time, no child left, every request ended
python tests/benchmarks/serve_soak.py press /tmp/tiny-fp8 --seconds 60     # four times what it takes: only 200, 429, 503; memory flat
python tests/benchmarks/serve_soak.py stall /tmp/tiny-fp8                  # readers that take nothing: cut after 30 s, the engine's pages free
python tests/benchmarks/serve_soak.py mixed /tmp/tiny-fp8 --seconds 600    # ten good clients beside hostile ones: what `mixed` says
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import queue
import random
import signal
import socket
import statistics
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
from support.server import Server, free_port, start_server, wait_until  # noqa: E402
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
)
from test_serve_loop import BODIES  # noqa: E402

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


GOOD = 10
BODY = {"prompt": "def add(a, b):\n", "max_tokens": 48, "ignore_eos": True, "temperature": 0}
PAUSE_S = 0.2  # of a client between two requests
WARM_UP = 0.3  # of the time, before memory is looked at
MOST_MB_A_MINUTE = 1.0


def good_client(url: str, number: int, deadline: float) -> list[float]:
    """Ask again and again, and return the seconds of each answer."""
    seconds = []
    transport = httpx.HTTPTransport(local_address=f"127.0.0.{10 + number}")
    with httpx.Client(base_url=url, transport=transport, timeout=120) as client:
        while time.monotonic() < deadline:
            body = {**BODY, "stream": number % 2 == 0}
            if number == 9:
                body |= {"regex": "[a-z ]{40,60}", "ignore_eos": False}
            began = time.monotonic()
            answer = client.post("/v1/completions", json=body)
            seconds.append(time.monotonic() - began)
            assert answer.status_code == 200, answer.text
            assert number % 2 or answer.text.endswith("data: [DONE]\n\n")
            time.sleep(PAUSE_S)
    return seconds


def good_clients(url: str, seconds: float) -> list[float]:
    """Return the seconds of all answers of ten clients, in order."""
    deadline = time.monotonic() + seconds
    with ThreadPoolExecutor(GOOD) as pool:
        asked = [pool.submit(good_client, url, number, deadline) for number in range(GOOD)]
        return sorted(itertools.chain.from_iterable(one.result() for one in asked))


def hostile_client(url: str, kind: str, deadline: float, statuses: queue.Queue[object]) -> None:
    """Send one kind of what good clients do not send, from an address of its own."""
    draw = random.Random(kind)
    port = httpx.URL(url).port
    address = f"127.0.0.{100 + sorted(HOSTILE).index(kind)}"
    transport = httpx.HTTPTransport(local_address=address)
    number = 0
    with httpx.Client(base_url=url, transport=transport, timeout=120) as client:
        while time.monotonic() < deadline:
            number += 1
            time.sleep(HOSTILE[kind])
            match kind:
                case "bodies":
                    path, given = draw.choice(list(BODIES.values()))
                    data = given if isinstance(given, str) else json.dumps(given)
                    headers = {"content-type": "application/json"}
                    with contextlib.suppress(httpx.TransportError):
                        status = client.post(path, content=data.encode(), headers=headers)
                        statuses.put(status.status_code)
                case "grammars":
                    body = {
                        "prompt": "a",
                        "max_tokens": 2,
                        "regex": f"x{number}(a{{1,900}}){{1,900}}",
                    }
                    with socket.create_connection(("127.0.0.1", port), 20, (address, 0)) as gone:
                        gone.sendall(request_bytes("/v1/completions", body))
                        time.sleep(0.05)
                case "leavers":
                    leave_early(port, draw)
                case "readers":
                    body = {**LONG, "max_tokens": 1000, "stream": True, "logprobs": 5}
                    with socket.create_connection(("127.0.0.1", port), 20, (address, 0)) as slow:
                        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                        slow.sendall(request_bytes("/v1/completions", body))
                        for _ in range(20):
                            slow.recv(2048)
                            time.sleep(0.5)
                case "idlers":
                    idle = [
                        socket.create_connection(("127.0.0.1", port), 20, (address, 0))
                        for _ in range(50)
                    ]
                    time.sleep(2)
                    for one in idle:
                        one.close()


HOSTILE = {"bodies": 2.0, "grammars": 0.5, "leavers": 0.3, "readers": 1.0, "idlers": 3.0}
"""What hostile clients do, and the seconds between two of it."""


def megabytes(server: Server) -> dict[str, float]:
    """Return the memory of the server and of its engine."""
    own = psutil.Process(server.process.pid)
    engine = next(one for one in own.children() if "engine_process" in " ".join(one.cmdline()))
    processes = {"server": own, "engine": engine}
    return {name: one.memory_info().rss / (1 << 20) for name, one in processes.items()}


def slope(samples: list[tuple[float, float]]) -> float:
    """Return how much the least-squares line through (seconds, megabytes) rises in a minute."""
    times, sizes = zip(*samples, strict=True)
    return 60 * statistics.linear_regression(times, sizes).slope


def mixed(server: Server, seconds: float) -> None:
    """Serve ten good clients alone, and then beside clients that send hostile bodies, grammars that
    nobody waits for, leave, read slowly, or do nothing.

    No status is 5xx but 503, the good clients' p99 is within twice what it is alone, and memory
    rises by less than 1 MB a minute.
    """
    good_clients(server.url, 5)
    alone = good_clients(server.url, seconds / 5)
    samples: list[tuple[float, dict[str, float]]] = []
    statuses: queue.Queue[object] = multiprocessing.get_context("spawn").Queue()
    began = time.monotonic()
    hostile = [
        multiprocessing.get_context("spawn").Process(
            target=hostile_client, args=(server.url, kind, began + seconds, statuses)
        )
        for kind in HOSTILE
    ]
    for process in hostile:
        process.start()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(good_clients, server.url, seconds)
        while not asked.done():
            time.sleep(1)
            samples.append((time.monotonic() - began, megabytes(server)))
        beside = asked.result()
    seen: Counter[object] = Counter()
    for process in hostile:
        while process.is_alive():
            seen.update(_drained(statuses))
            process.join(1)
    seen.update(_drained(statuses))
    late = [sample for sample in samples if sample[0] > seconds * WARM_UP]
    rises = {
        name: slope([(at, sizes[name]) for at, sizes in late]) for name in ("server", "engine")
    }
    p99 = [one[int(len(one) * 0.99)] for one in (alone, beside)]
    p50 = [statistics.median(one) for one in (alone, beside)]
    print(
        f"{GOOD} good clients: {len(alone)} answers alone, p50 {p50[0]:.3f} s, p99 {p99[0]:.3f} s; "
        f"{len(beside)} beside hostile ones for {seconds:g} s, p50 {p50[1]:.3f} s, p99 "
        f"{p99[1]:.3f} s; hostile bodies: {dict(seen)}; MB a minute: "
        + ", ".join(f"{name} {rise:+.2f}" for name, rise in rises.items())
        + f"; MB: {[{name: round(size) for name, size in one.items()} for _, one in samples[:: max(len(samples) // 10, 1)]]}"
    )
    assert not [status for status in seen if int(str(status)) >= 500 and status != 503]
    assert "Traceback" not in server.said()
    assert wait_until(lambda: is_idle(server), 30) < 30
    assert p99[1] < 2 * p99[0]
    assert all(rise < MOST_MB_A_MINUTE for rise in rises.values())
    assert server.end() == 0


def _drained(statuses: queue.Queue[object]) -> list[object]:
    found = []
    with contextlib.suppress(queue.Empty):
        while True:
            found.append(statuses.get_nowait())
    return found


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["leave", "end", "press", "stall", "mixed"])
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
            elif given.what == "mixed":
                mixed(server, given.seconds)
            else:
                stall(server, 4)
        finally:
            if server.process.poll() is None:
                server.process.kill()


if __name__ == "__main__":
    main()

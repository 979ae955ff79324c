"""A real `qtool serve` for tests: started as a process, waited for, ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PATIENCE_S = 120.0


def free_port() -> int:
    """Return a port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(true: Callable[[], bool], timeout_s: float) -> float:
    """Wait for ``true()``, and return the seconds it took."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < timeout_s, "it took too long"
        time.sleep(0.05)
    return time.monotonic() - began


@dataclass
class Server:
    """A process that serves ``model`` at ``url``; what it says on stderr is in ``log``."""

    process: subprocess.Popen[bytes]
    url: str
    model: str
    log: Path
    out: Path

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def said(self) -> str:
        """Return its log so far."""
        return self.log.read_text(errors="replace")

    def end(self, number: int = signal.SIGTERM, timeout_s: float = 60) -> int:
        """Send a signal, wait, and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


def start_server(folder: Path, model: Path | str, *arguments: object, ready: bool = True) -> Server:
    """Start `qtool serve` for ``model``, with its logs in ``folder``; wait until it is ready, or
    only until it listens.
    """
    port = free_port()
    log, out = folder / f"serve-{port}.err", folder / f"serve-{port}.out"
    command = [
        sys.executable,
        "-m",
        "qtool.cli",
        "serve",
        "--model-path",
        str(model),
        "--port",
        str(port),
        *map(str, arguments),
    ]
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_", "QTOOL_"))
    }
    with log.open("wb") as errors, out.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, env=environment
        )
    server = Server(process, f"http://127.0.0.1:{port}", str(model), log, out)
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=5):
                return server
        except urllib.error.HTTPError:  # it listens, and is loading
            if not ready:
                return server
        except OSError:
            pass
        time.sleep(0.1)
    process.kill()
    process.wait()
    raise RuntimeError(f"the server did not start:\n{server.said()[-3000:]}")

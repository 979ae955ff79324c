"""Serve a checkpoint, ask it one thing over HTTP, and end the server: python examples/serve.py
CHECKPOINT [PROMPT].
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time

import httpx


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    checkpoint, prompt = sys.argv[1], (sys.argv[2:] or ["def add(a, b):\n"])[0]
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [
        sys.executable,
        "-m",
        "qtool.cli",
        "serve",
        "--model-path",
        checkpoint,
        "--port",
        str(port),
        "--log-level",
        "warning",
    ]
    server = subprocess.Popen(command)
    try:
        while server.poll() is None:
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.ConnectError:
                pass  # it does not listen yet
            time.sleep(0.2)
        else:
            sys.exit(server.returncode)  # it said why on stderr
        answer = httpx.post(
            f"{url}/v1/completions",
            json={"prompt": prompt, "max_tokens": 24, "temperature": 0},
            timeout=60,
        )
        answer.raise_for_status()
        print(f"asked over HTTP: {prompt!r}\nanswered: {answer.json()['choices'][0]['text']!r}")
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()

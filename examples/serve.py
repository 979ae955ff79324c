"""Serve a checkpoint, ask it one thing over HTTP, and stop the server.

python examples/serve.py CHECKPOINT [PROMPT]
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
    checkpoint = sys.argv[1]
    prompt = sys.argv[2] if len(sys.argv) > 2 else "with open(path, 'rb') as"
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    qtool = [sys.executable, "-m", "qtool.cli"]
    options = ["--model-path", checkpoint, "--port", str(port), "--log-level", "warning"]
    server = subprocess.Popen([*qtool, "serve", *options])
    try:
        while server.poll() is None:
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.ConnectError:
                pass  # it is not listening yet
            time.sleep(0.2)
        else:
            sys.exit(server.returncode)  # the reason is on stderr
        answer = httpx.post(
            f"{url}/v1/completions",
            json={"prompt": prompt, "max_tokens": 8, "temperature": 0},
            timeout=60,
        )
        answer.raise_for_status()
        print(f"asked over HTTP: {prompt!r}\nanswered: {answer.json()['choices'][0]['text']!r}")
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()

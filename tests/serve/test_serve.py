"""A server from outside: starting, what it says, and its end."""

from __future__ import annotations

import httpx
import pytest

pytestmark = pytest.mark.xdist_group("serve")  # one server for all


def test_a_served_model_answers_a_chat(served):
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "def add(a, b):"}],
        "max_tokens": 8,
        "min_tokens": 8,
        "temperature": 0,
    }
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 8


def test_the_server_itself_needs_no_torch(run_python):
    assert (
        run_python(
            "import sys, qtool.serve.server; print(sorted({'torch', 'transformers', 'xgrammar'} "
            "& set(sys.modules)))"
        )
        == "[]"
    )

"""A server from outside: starting, what it says, and its end."""

from __future__ import annotations

import httpx
import pytest

from qtool.serve.ready import client_lines
from qtool.serve.settings import ServeSettings

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


def test_a_ready_server_says_how_clients_find_it(served):
    said = served.out.read_text()
    assert f"OPENAI_BASE_URL={served.url}/v1 OPENAI_API_KEY=none" in said
    assert f"ANTHROPIC_BASE_URL={served.url} ANTHROPIC_AUTH_TOKEN=none" in said
    assert "ANTHROPIC_MODEL=tiny" in said  # no other name is answered
    assert (
        f'codex -m tiny -c model_provider=qtool -c \'model_providers.qtool={{name="qtool", base_url="{served.url}/v1"}}\''
        in said
    )


def test_a_key_stays_a_variable_in_what_clients_are_told():
    lines = client_lines(ServeSettings(model_path="a b", api_key="secret"))
    assert "secret" not in lines and lines.count("QTOOL_API_KEY") == 3
    assert "ANTHROPIC_MODEL" not in lines and "codex -m 'a b'" in lines


def test_the_server_itself_needs_no_torch(run_python):
    assert (
        run_python(
            "import sys, qtool.serve.server; print(sorted({'torch', 'transformers', 'xgrammar'} "
            "& set(sys.modules)))"
        )
        == "[]"
    )

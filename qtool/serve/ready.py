"""What a server says once it is ready: what is served, where, and how clients find it."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict

from qtool.serve.service import Service
from qtool.serve.settings import ServeSettings
from qtool.sizes import format_size
from qtool.terminal import printable


def ready_text(service: Service) -> str:
    """Return what is served, where, and a command to try it."""
    settings = service.settings
    info = service.info
    size = format_size(info.weights_bytes)
    what = (
        f"{info.quantization or info.dtype}, {size} on {info.device}, "
        f"{info.max_total_tokens:,} tokens of KV cache"
    )
    key = ' -H "Authorization: Bearer $QTOOL_API_KEY"' if settings.api_key else ""
    body: dict[str, object] = {"model": settings.name}
    path, asked = _example(service)
    body |= asked
    clients = service.templates.text and info.encoding is None
    return (
        f"{printable(settings.name)}: {what}\n"
        f"served at {settings.url} (open it in a browser), or\n\n"
        f"    curl {settings.url}{path} -H 'Content-Type: application/json'{key} \\\n        -d "
        f"'{_quoted(body)}'\n{client_lines(settings) if clients else ''}"
    )


def _example(service: Service) -> tuple[str, dict[str, object]]:
    """Return a route and the fields of a request to try."""
    encoding = service.info.encoding
    if encoding is not None and encoding.task == "embed":
        return "/v1/embeddings", {"input": ["Hello"]}
    if encoding is not None:
        return "/v1/rerank", {"query": "greeting", "documents": ["Hello", "Goodbye"]}
    if service.templates.text is None:
        return "/v1/completions", {"prompt": "Hello", "max_tokens": 32}
    messages = [{"role": "user", "content": "Hello"}]
    return "/v1/chat/completions", {"messages": messages, "max_tokens": 32}


def client_lines(settings: ServeSettings) -> str:
    """Return commands that make clients talk to the server."""
    url, name = settings.url, shlex.quote(printable(settings.name))
    key = "$QTOOL_API_KEY" if settings.api_key else "none"
    provider = f'name="qtool", base_url="{url}/v1"'
    if settings.api_key:
        provider += ', env_key="QTOOL_API_KEY"'
    claude = f"ANTHROPIC_BASE_URL={url} ANTHROPIC_AUTH_TOKEN={key}"
    if settings.served_model_name is not None:  # then no other name is answered
        claude += f" ANTHROPIC_MODEL={name} ANTHROPIC_DEFAULT_HAIKU_MODEL={name}"
    return (
        f"    export OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY={key}  # openai\n"
        f"    codex -m {name} -c model_provider=qtool -c 'model_providers.qtool={{{provider}}}'\n"
        f"    {claude} claude\n"
    )


def ready_dict(service: Service) -> dict[str, object]:
    """Return what is served, and where, as plain data."""
    info = {
        name: value
        for name, value in asdict(service.info).items()
        if name not in ("tokenizer", "eos_ids")
    }
    return {"url": service.settings.url, "model": service.settings.name, "ready": True, **info}


def _quoted(body: object) -> str:
    return json.dumps(body, ensure_ascii=False).replace("'", "'\\''")

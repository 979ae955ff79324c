"""The server's application in the process of a test, with everything but the engine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp
from tokenizers import Tokenizer

from qtool.engine.outputs import CompletionOutput, FinishInfo, FinishReason
from qtool.errors import QtoolError
from qtool.serve.backend.engine_client import OutputStream
from qtool.serve.backend.messages import EngineInfo, Submission
from qtool.serve.host import ServiceHost
from qtool.serve.http.app import make_app
from qtool.serve.http.limits import LimitsMiddleware, RequestLimits
from qtool.serve.prompts.grammars import Grammars
from qtool.serve.prompts.templates import Templates
from qtool.serve.prompts.vocabulary import Vocabulary
from qtool.serve.service import Service
from qtool.serve.settings import ServeSettings


class ScriptedEngine:
    """Stands in for the engine's process: it answers with given texts, one after the other, and
    keeps what it was asked.
    """

    error = None

    def __init__(self) -> None:
        self.texts: list[str | QtoolError] = []
        self.reason: FinishReason = {"type": "stop", "matched": 0}
        self.submissions: list[Submission] = []

    def submit(self, submission: Submission) -> OutputStream:
        self.submissions.append(submission)
        stream = OutputStream(0, 1)
        self._writing = asyncio.create_task(self._write(stream, submission, self.texts.pop(0)))
        return stream

    async def _write(
        self, stream: OutputStream, submission: Submission, text: str | QtoolError
    ) -> None:
        shown = text if isinstance(text, str) else "begun"
        size = 3 if submission.stream else len(shown) or 1
        for start in range(0, len(shown), size):
            piece = shown[start : start + size]
            stream.put(CompletionOutput(0, piece, [300] * len(piece), [], None))
            await asyncio.sleep(0)
        if isinstance(text, QtoolError):
            stream.fail(text)
            return
        finish = FinishInfo(self.reason, len(submission.prompts[0]), 2, 0.1, 0.1)
        stream.put(CompletionOutput(0, "", [], [], finish))

    def cancel(self, stream: OutputStream) -> None:
        pass


@contextlib.asynccontextmanager
async def application(
    folder: Path,
    engine: Any,
    *,
    context_length: int,
    tool_style: str | None = None,
    reasoning_style: str | None = None,
    **settings: Any,
) -> AsyncIterator[ASGIApp]:
    """The application that serves the tokenizer and template in ``folder``, and ``engine``."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    info = EngineInfo(
        model_path=str(folder),
        tokenizer_path=str(folder),
        tokenizer=tokenizer.to_str(),
        eos_ids=(),
        vocab_size=tokenizer.get_vocab_size(),
        context_length=context_length,
        max_running=1024,
        max_total_tokens=1 << 20,
        device="cpu",
        dtype="float32",
        quantization="",
        kv_cache_dtype="float32",
        weights_bytes=1,
    )
    given = ServeSettings(model_path=str(folder), max_queued_requests=1024, **settings)
    host = ServiceHost(given)
    templates = await Templates.open(folder, given.chat_template)
    service = Service(
        settings=given,
        metrics=host.metrics,
        engine=engine,
        info=info,
        threads=host.threads,
        vocabulary=Vocabulary(info.tokenizer, context_length, host.threads),
        templates=templates,
        grammars=Grammars(info),
        tool_style=tool_style,
        reasoning_style=reasoning_style,
        defaults={},
    )
    host.set_service(service)
    yield LimitsMiddleware(make_app(host), host, RequestLimits())
    await service.grammars.close()
    await templates.close()
    host.threads.close()

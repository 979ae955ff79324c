"""The server's application in the process of a test, with everything but the engine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from starlette.types import ASGIApp
from tokenizers import Tokenizer

from qtool.engine.outputs import CompletionOutput, FinishInfo, FinishReason, TokenLogprob
from qtool.errors import QtoolError
from qtool.serve.backend.engine_client import OutputStream
from qtool.serve.backend.messages import EngineInfo, Submission
from qtool.serve.host import ServiceHost
from qtool.serve.http.app import make_app
from qtool.serve.http.limits import LimitsMiddleware, RequestLimits
from qtool.serve.prompts.grammars import Grammars
from qtool.serve.prompts.pairs import Pairs
from qtool.serve.prompts.templates import Templates
from qtool.serve.prompts.vocabulary import Vocabulary
from qtool.serve.service import Service
from qtool.serve.settings import ServeSettings

CONTEXT = 4096
T = TypeVar("T")


class ScriptedEngine:
    """Stands in for the engine's process: it answers with given texts, one after the other, and
    keeps what it was asked.
    """

    error = None

    def __init__(self) -> None:
        self.texts: list[str | QtoolError] = []
        self.reason: FinishReason = {"type": "stop", "matched": 0}
        self.submissions: list[Submission] = []
        self.delay_s = 0.0
        """Before an answer."""

    def submit(self, submission: Submission) -> OutputStream:
        self.submissions.append(submission)
        stream = OutputStream(0, 1)
        self._writing = asyncio.create_task(self._write(stream, submission, self.texts.pop(0)))
        return stream

    async def _write(
        self, stream: OutputStream, submission: Submission, text: str | QtoolError
    ) -> None:
        await asyncio.sleep(self.delay_s)
        shown = text if isinstance(text, str) else "begun"
        size = 3 if submission.stream else len(shown) or 1
        thoughts = shown.find("</think>") + len("</think>") if "</think>" in shown else 0
        for start in range(0, len(shown), size):
            piece = shown[start : start + size]
            output = CompletionOutput(0, piece, [300] * len(piece), [], None)
            output.reasoning_tokens = min(max(thoughts - start, 0), len(piece))
            if submission.top_logprobs is not None:
                output.logprobs = [TokenLogprob(-0.5, 300, ())] * len(piece)
            stream.put(output)
            await asyncio.sleep(0)
        if isinstance(text, QtoolError):
            stream.fail(text)
            return
        finish = FinishInfo(self.reason, len(submission.prompts[0]), 2, 0.1, 0.1)
        stream.put(CompletionOutput(0, "", [], [], finish))

    def cancel(self, stream: OutputStream) -> None:
        pass


TEMPLATE = """{% for m in messages %}[{{ m.role }}]{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}
{% endfor %}{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"""


class ScriptedServer:
    """The application for a model that thinks like Qwen3 and calls tools as Hermes does, with a
    `ScriptedEngine`, in an event loop of its own.
    """

    def __init__(self, folder: Path, scratch: Path, **settings: Any) -> None:
        self.engine = ScriptedEngine()
        self._runner = asyncio.Runner()
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        (scratch / "template.jinja").write_text(TEMPLATE)
        self._context = application(
            folder,
            self.engine,
            context_length=CONTEXT,
            tool_style="hermes",
            reasoning_style="qwen3",
            chat_template=scratch / "template.jinja",
            **settings,
        )
        self.app = self._runner.run(self._context.__aenter__())

    def run(
        self,
        work: Coroutine[Any, Any, T],
        *answers: str | QtoolError,
        reason: FinishReason | None = None,
    ) -> T:
        """Return what ``work`` returns, to whose requests the engine gives ``answers``."""
        self.engine.texts = list(answers)
        self.engine.reason = reason or {"type": "stop", "matched": 0}
        return self._runner.run(work)

    def last_prompt(self) -> str:
        """Return the text of the prompt that the engine got last."""
        return self._tokenizer.decode(self.engine.submissions[-1].prompts[0])

    def close(self) -> None:
        """End the application."""
        self._runner.run(self._context.__aexit__(None, None, None))
        self._runner.close()


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
        page_size=16,
        device="cpu",
        dtype="float32",
        quantization="",
        kv_cache_dtype="float32",
        weights_bytes=1,
        start_seconds={},
    )
    given = ServeSettings(model_path=str(folder), max_queued_requests=1024, **settings)
    host = ServiceHost(given)
    templates = await Templates.open(folder, given.chat_template)
    vocabulary = Vocabulary(info.tokenizer, context_length, host.threads)
    service = Service(
        settings=given,
        metrics=host.metrics,
        engine=engine,
        info=info,
        threads=host.threads,
        vocabulary=vocabulary,
        templates=templates,
        grammars=Grammars(info),
        pairs=Pairs(None, templates, vocabulary),
        tool_style=tool_style,
        reasoning_style=reasoning_style,
        defaults={},
    )
    host.set_service(service)
    yield LimitsMiddleware(make_app(host), host, RequestLimits())
    await service.grammars.close()
    await templates.close()
    host.threads.close()

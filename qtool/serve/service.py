"""What the routes call: `Loading`, and then the `Service`, which has the engine, the tokenizer, the
chat template and the queue.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NoReturn, Self

from qtool.checkpoint.encoding import Encoding
from qtool.checkpoint.gguf import find_gguf
from qtool.engine.sampling_params import SamplingParams
from qtool.engine.scores import PairForm
from qtool.errors import QtoolError, ResourceError, UsageError
from qtool.serve.answer_styles import reasoning_style, tool_style
from qtool.serve.backend.engine_child import EngineChild
from qtool.serve.backend.engine_client import EngineProcess, OutputStream, answer_once
from qtool.serve.backend.messages import EngineInfo, EngineStats, Submission
from qtool.serve.metrics import Metrics
from qtool.serve.prompts.grammars import Grammars
from qtool.serve.prompts.pairs import Pairs
from qtool.serve.prompts.templates import Templates
from qtool.serve.prompts.vocabulary import Vocabulary, answer_too_long, prompt_too_long
from qtool.serve.sampling_defaults import sampling_defaults
from qtool.serve.settings import CLIENT_SHARE, ServeSettings
from qtool.serve.threads import Threads
from qtool.serve.turns import current_origin

LOG = logging.getLogger("qtool.serve")
# log probabilities of one request and of all: each is some 150 bytes, here and in the engine
MAX_LOGPROBS = 1 << 17
MAX_LOGPROBS_HELD = 1 << 24

ServedTask = Literal["generate", "embed", "score", "labels"]
SERVED: Mapping[ServedTask, str] = {
    "generate": "generates text",
    "embed": "makes embeddings",
    "score": "scores documents for a query",
    "labels": "gives the probabilities of label_token_ids",
}
ALSO_SERVED: Mapping[ServedTask, ServedTask] = {"generate": "labels", "embed": "score"}
TASK_HINTS: Mapping[tuple[ServedTask, ServedTask | None], str] = {
    ("generate", "embed"): "--is-embedding serves the hidden states of a language model",
    ("generate", None): "serve a reranker or an embedding model, or send label_token_ids",
    ("embed", None): "send texts to /v1/embeddings",
    ("score", None): "send a query and documents to /v1/rerank or /v1/score",
}
"""By what is served, and what was asked for; None for anything else."""


class ModelNotFound(Exception):
    """The request names a model that is not served."""


class Busy(Exception):
    """The server cannot take the request now; the client may try again.

    ``code`` is a key of the table of HTTP statuses, `qtool.serve.http.errors.STATUSES`.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Slot:
    """The share of the server's queue that one request holds.

    Releasing it also cancels what still runs for the request. As a context it is released at the
    end, unless it ``belongs_to_stream``, which goes on.
    """

    def __init__(self, service: Service, completions: int) -> None:
        self._service = service
        self._client = current_origin().client
        self._completions = completions
        self._held = True
        self.stream: OutputStream | None = None
        self.logprobs = 0
        """Log probabilities that the request may hold."""
        self.belongs_to_stream = False
        service.slots_in_use += completions
        service.slots_of[self._client] += completions

    def __enter__(self) -> Slot:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.belongs_to_stream:
            self.release()

    def release(self) -> None:
        """Give the slot back; more than once does nothing more."""
        if self._held:
            self._held = False
            self._service.slots_in_use -= self._completions
            self._service.slots_of[self._client] -= self._completions
            if not self._service.slots_of[self._client]:
                del self._service.slots_of[self._client]
            self._service.logprobs_held -= self.logprobs
            if self.stream is not None:
                self._service.engine.cancel(self.stream)


class Loading:
    """Stands in for the `Service` while the model is loading: it refuses every request."""

    slots_in_use = 0

    def __init__(self) -> None:
        self.draining = False

    def ready(self, task: ServedTask | None = None) -> NoReturn:
        """Raise: Busy."""
        raise _draining() if self.draining else Busy("loading", "the model is still loading")

    async def stats(self, *, timeout_s: float) -> None:
        """Return None: there is no engine yet."""

    def drain(self) -> None:
        """Refuse requests because the server ends."""
        self.draining = True

    def abort_all(self) -> None:
        """Do nothing: no request runs."""

    def fail_all(self) -> None:
        """Do nothing: no request runs."""


@dataclass(eq=False, kw_only=True)
class Service:
    """One served model; `open_service` makes it."""

    settings: ServeSettings
    metrics: Metrics
    engine: EngineProcess
    info: EngineInfo
    threads: Threads
    vocabulary: Vocabulary
    templates: Templates
    grammars: Grammars
    pairs: Pairs
    tool_style: str | None
    """How the model writes tool calls; None if it does not."""
    reasoning_style: str | None
    """How the model marks its thoughts; None if it does not, or they are content."""
    defaults: Mapping[str, object]
    """The model's own sampling parameters."""
    started: int = field(default_factory=lambda: int(time.time()))
    slots_in_use: int = 0
    """Completions that run or wait."""
    slots_of: Counter[str] = field(default_factory=Counter)
    """The same by client."""
    logprobs_held: int = 0
    draining: bool = False
    """No more requests are taken."""
    aborted: bool = False
    """All requests were aborted, and no submission is taken."""

    def ready(self, task: ServedTask | None = None) -> Self:
        """Return the service.

        Raises: Busy, unless it takes requests; UsageError, when the model does not do ``task``.
        """
        if self.draining or self.engine.error is not None:
            raise _draining()
        does = "generate" if self.info.encoding is None else self.info.encoding.task
        if task not in (None, does, ALSO_SERVED.get(does)):
            raise UsageError(
                "E_TASK",
                f"this route {SERVED[task]}, and `{self.settings.name}` {SERVED[does]}",
                hint=TASK_HINTS.get((does, task)) or TASK_HINTS[does, None],
            )
        return self

    async def stats(self, *, timeout_s: float) -> EngineStats | None:
        """Return what the engine is doing; None if it does not answer in time."""
        try:
            return await self.engine.stats(timeout_s=timeout_s)
        except TimeoutError:
            return None

    def drain(self) -> None:
        """Take no more requests."""
        self.draining = True

    def abort_all(self) -> None:
        """End every request with what it has, and let no other begin."""
        self.aborted = True
        self.engine.abort()

    def fail_all(self) -> None:
        """End every request that the engine has not ended."""
        self.engine.fail_all(
            ResourceError(
                "E_DRAINING", "the server ended before the answer was complete", hint="ask again"
            )
        )

    @property
    def most_requests(self) -> int:
        """Completions that may run or wait."""
        return self.info.max_running + self.settings.max_queued_requests

    @property
    def largest_request(self) -> int:
        """Completions of one client that may run or wait."""
        return math.ceil(self.most_requests * CLIENT_SHARE)

    def acquire(self, completions: int) -> Slot:
        """Return a slot for ``completions``.

        Raises: Busy, when the queue is full; UsageError, when they never fit.
        """
        most, most_each = self.most_requests, self.largest_request
        if completions > most_each:
            raise UsageError(
                "E_TOO_MANY",
                f"{completions} completions in one request; the server takes {most_each} at a "
                "time from one client",
                hint="send fewer prompts or a lower n",
            )
        own = self.slots_of[current_origin().client]
        if own + completions > most_each:
            raise Busy(
                "queue_full",
                f"{own} completions of this client run or wait; it may have {most_each}",
            )
        if self.slots_in_use + completions > most:
            raise Busy(
                "queue_full",
                f"{self.slots_in_use} requests run or wait, which is what the server takes",
            )
        return Slot(self, completions)

    def submit(
        self,
        slot: Slot,
        submissions: Sequence[Submission],
        max_tokens: Sequence[int | None],
    ) -> OutputStream:
        """Let the engine work on ``submissions``.

        Args:
            slot: of the request; releasing it cancels the submissions.
            submissions: what the engine computes.
            max_tokens: of each, tokens that must fit into the context after a prompt; None: as many
                as there is room for.
        Raises: UsageError, for an invalid prompt; Busy, when the server is ending.
        """
        if self.aborted:
            raise _draining()
        for submission, most in zip(submissions, max_tokens, strict=True):
            self.check_prompts(submission.prompts, most or 1)
            submission.params.check_vocabulary(self.info.vocab_size)
        context = self.info.context_length
        submissions = [one.within_logprobs(MAX_LOGPROBS, context) for one in submissions]
        self._hold_logprobs(slot, submissions)
        slot.stream = self.engine.submit(*submissions)
        return slot.stream

    async def compiled(self, params: SamplingParams) -> tuple[str, str, str] | None:
        """Return the grammar of ``params``, compiled where it can do no harm; None when there is
        none.
        """
        if params.constraint is None:
            return None
        kind, text = params.constraint
        return kind, text, await self.grammars.compiled(kind, text)

    def new_id(self, prefix: str) -> str:
        """Return a name for a request: ``prefix``, such as ``chatcmpl-``, and digits."""
        return f"{prefix}{uuid.uuid4().hex}"

    def check_model(self, name: str | None) -> None:
        """Raise: ModelNotFound, when ``name`` is not the served model, which was given a name;
        without one any will do, as in SGLang.
        """
        if self.settings.served_model_name is not None:
            self.find_model(name)

    def find_model(self, name: str | None) -> None:
        """Raise: ModelNotFound, when ``name`` is not the served model."""
        if name not in (
            None,
            "",
            "default",
            self.settings.name,
            self.settings.model_path,
            Path(self.settings.model_path).name,
        ):
            raise ModelNotFound(
                f"there is no model `{name[:200]}` here; `{self.settings.name}` is served"
            )

    def check_prompts(self, prompts: Sequence[Sequence[int]], new_tokens: int = 1) -> None:
        """Raise: UsageError, for a prompt that is empty or does not fit with its answer."""
        for prompt in prompts:
            self._check_prompt(prompt, new_tokens)

    def _check_prompt(self, prompt: Sequence[int], new_tokens: int) -> None:
        context = self.info.context_length
        vocab_size = self.info.vocab_size
        if not prompt:
            raise UsageError(
                "E_EMPTY_PROMPT", "the prompt has no tokens", hint="send one token at least"
            )
        answer = self.info.encoding is None
        # the last token is not kept
        most = min(context, self.info.max_total_tokens + answer)
        if len(prompt) > most - answer:
            raise prompt_too_long(f"{len(prompt):,} tokens", most)
        if answer and len(prompt) + new_tokens > most:
            raise answer_too_long(len(prompt), new_tokens, most)
        if max(prompt) >= vocab_size:
            message = f"the prompt has a token {max(prompt)}, and the model knows {vocab_size}"
            hint = f"tokens are whole numbers from 0 to {vocab_size - 1}"
            raise UsageError("E_PROMPT", message, hint=hint)

    def _hold_logprobs(self, slot: Slot, submissions: Sequence[Submission]) -> None:
        """Reserve room for the log probabilities of ``submissions``: kept until they are read, they
        are the largest part of an answer.

        Raises: UsageError, Busy.
        """
        logprobs = sum(one.max_logprobs(self.info.context_length) for one in submissions)
        if logprobs > MAX_LOGPROBS:
            message = (
                f"{logprobs:,} log probabilities in one request; the server gives {MAX_LOGPROBS:,}"
            )
            raise UsageError(
                "E_TOO_MANY", message, hint="lower n, max_tokens or the number of log probabilities"
            )
        if self.logprobs_held + logprobs - slot.logprobs > MAX_LOGPROBS_HELD:
            raise Busy(
                "queue_full",
                "other requests hold as many log probabilities as the server keeps",
            )
        self.logprobs_held += logprobs - slot.logprobs  # those of its last stream are read
        slot.logprobs = logprobs


@asynccontextmanager
async def open_service(
    settings: ServeSettings,
    child: EngineChild,
    metrics: Metrics,
    threads: Threads,
    on_failure: Callable[[QtoolError], None],
) -> AsyncIterator[Service]:
    """Load everything, let the model answer once, and give the service; end all processes after.

    Args:
        settings: what is served, and how.
        child: the engine's process.
        metrics: of this server.
        threads: of this server.
        on_failure: called with the reason when the engine ends by itself.
    Raises: QtoolError.
    """
    async with AsyncExitStack() as stack:
        engine = EngineProcess(child, on_failure, watchdog_timeout_s=settings.watchdog_timeout_s)
        stack.push_async_callback(engine.close)
        templates, info = await _load(settings, engine, stack)
        # loading the tokenizer keeps this process busy, while the engine computes its first answer
        _, vocabulary, defaults = await asyncio.gather(
            answer_once(engine, info),
            asyncio.to_thread(Vocabulary, info.tokenizer, info.context_length, threads),
            sampling_defaults(settings, info),
        )
        grammars = Grammars(info)
        stack.push_async_callback(grammars.close)
        service = Service(
            settings=settings,
            metrics=metrics,
            engine=engine,
            info=info,
            threads=threads,
            vocabulary=vocabulary,
            templates=templates,
            grammars=grammars,
            pairs=Pairs(info.encoding, templates, vocabulary),
            tool_style=tool_style(settings, templates),
            reasoning_style=reasoning_style(settings, templates),
            defaults=defaults,
        )
        yield service


async def check_templates(settings: ServeSettings, folder: Path, encoding: Encoding | None) -> None:
    """Raise what `open_service` raises for the template that makes prompts, without an engine.

    Args:
        settings: what is served, and how.
        folder: of the tokenizer.
        encoding: of the model.
    Raises: QtoolError.
    """
    templates = await Templates.open(folder, settings.chat_template)
    try:
        PairForm.of(encoding, templates.text)
    finally:
        await templates.close()


async def _load(
    settings: ServeSettings, engine: EngineProcess, stack: AsyncExitStack
) -> tuple[Templates, EngineInfo]:
    """Wait for the engine, and open the chat templates meanwhile."""
    starting = asyncio.create_task(engine.wait_ready())
    folder = Path(settings.tokenizer_path or settings.model_path)
    try:
        # a name on the Hub: the engine's process finds it, and may be ended while it does; GGUF: it
        # makes a folder with the tokenizer
        if not (folder / "config.json").is_file() or find_gguf(folder):
            folder = Path((await starting).tokenizer_path)
        templates = await Templates.open(folder, settings.chat_template)
        stack.push_async_callback(templates.close)
        return templates, await starting
    finally:
        starting.cancel()


def _draining() -> Busy:
    return Busy("draining", "the server is ending")

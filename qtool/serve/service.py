"""What stands behind the routes: the engine, the tokenizer, the chat template, who may come in, and
whether the server is ready.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from qtool.engine.sampling_params import SamplingParams
from qtool.errors import QtoolError, ResourceError, UsageError
from qtool.serve.api.tools import styles
from qtool.serve.backend.engine_client import EngineProcess, OutputStream
from qtool.serve.backend.messages import EngineInfo, Submission
from qtool.serve.metrics import Metrics
from qtool.serve.prompts.grammars import Grammars
from qtool.serve.prompts.templates import Templates
from qtool.serve.prompts.vocabulary import Vocabulary
from qtool.serve.settings import ServeSettings

LOG = logging.getLogger("qtool.serve")
WARM_UP_TOKENS = 2
# of a request, of all: each is some 150 bytes, here and in the engine
MAX_LOGPROBS, MAX_LOGPROBS_HELD = (
    1 << 19,
    1 << 24,
)
# of generation_config.json
DEFAULTS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "max_new_tokens",
)


class ModelNotFound(Exception):
    """The request names a model that is not served."""


class Busy(Exception):
    """The server cannot take the request now; the client may come again."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class Slot:
    """The share of the server's queue that one request holds.

    Releasing it also cancels what still runs for the request. As a context it is released at the
    end, unless it ``belongs_to_stream``, which goes on.
    """

    def __init__(self, service: Service, completions: int) -> None:
        self._service = service
        self._completions = completions
        self._held = True
        self.stream: OutputStream | None = None
        self.logprobs = 0
        """Log probabilities that the request may hold."""
        self.belongs_to_stream = False
        service.slots_in_use += completions

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
            self._service.logprobs_held -= self.logprobs
            if self.stream is not None:
                self._service.engine.cancel(self.stream)


class Service:
    """One served model.

    ``state`` goes from loading to ready, then draining; ``failure`` says why it must end.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self.state: Literal["loading", "ready", "draining"] = "loading"
        self.failure: QtoolError | None = None
        self.failed = asyncio.Event()
        self.started = int(time.time())
        self.slots_in_use = self.logprobs_held = 0
        self._aborted = False
        self.engine = EngineProcess(self._ended)
        self.metrics = Metrics(settings.name)
        self.defaults: dict[str, Any] = {}

    info: EngineInfo
    vocabulary: Vocabulary
    templates: Templates
    grammars: Grammars
    tool_style: str | None

    async def start(self) -> None:
        """Load everything, and let the model answer once. Raises: QtoolError."""
        settings = self.settings
        options = {
            **vars(settings.engine_config),
            "model_path": settings.model_path,
            "log_level": settings.log_level.upper(),
        }
        engine = asyncio.create_task(self.engine.start(options))
        folder = Path(settings.tokenizer_path or settings.model_path)
        try:
            # a name on the Hub: the engine's process finds it, and may be ended while it does
            if not folder.is_dir():
                folder = Path((await engine).tokenizer_path)
            self.templates = await Templates.open(folder, settings.chat_template)
            self.info = await engine
        finally:
            engine.cancel()
        self.tool_style = (
            styles.style_named(settings.tool_call_parser)
            if settings.tool_call_parser
            else styles.detect(self.templates.text)
        )
        if self.templates.template is not None and not self.templates.template.accepts_tools:
            LOG.info(
                "the chat template does not show tools to the model: it calls them only if it must"
            )
        self.grammars = Grammars(self.info)
        self.vocabulary = Vocabulary(self.info.tokenizer, self.info.context_length)
        if settings.sampling_defaults == "model":
            self.defaults = await asyncio.to_thread(_generation_config, Path(self.info.model_path))
        await self.warm_up()
        if self.state == "loading":
            self.state = "ready"

    async def close(self) -> None:
        """End the engine and every other process."""
        await self.engine.close()
        if hasattr(self, "templates"):
            await self.templates.close()
        if hasattr(self, "grammars"):
            await self.grammars.close()
        if hasattr(self, "vocabulary"):
            self.vocabulary.close()

    def drain(self) -> None:
        """Take no more requests."""
        self.state = "draining"

    def abort_all(self) -> None:
        """End every request with what it has, and let no other begin."""
        self._aborted = True
        if hasattr(self, "info"):
            self.engine.abort()

    def fail_all(self) -> None:
        """End every request that the engine has not ended."""
        self.engine.fail_all(
            ResourceError(
                "E_DRAINING", "the server ended before the answer was complete", hint="ask again"
            )
        )

    def check_ready(self) -> None:
        """Raise: Busy, unless requests are taken."""
        if self.state == "loading":
            raise Busy(503, "loading", "the model is still loading")
        if self.state == "draining" or self.failure is not None:
            raise Busy(503, "draining", "the server is ending")

    def acquire(self, completions: int) -> Slot:
        """Return a slot for ``completions``.

        Raises: Busy, when the queue is full; UsageError, when they never fit.
        """
        most = self.info.max_running + self.settings.max_queued_requests
        if completions > most:
            raise UsageError(
                "E_TOO_MANY",
                f"{completions} completions in one request; the server takes {most} at a time",
                hint="send fewer prompts or a lower n",
            )
        if self.slots_in_use + completions > most:
            self.metrics.refused()
            raise Busy(
                429,
                "queue_full",
                f"{self.slots_in_use} requests run or wait, which is what the server takes",
            )
        return Slot(self, completions)

    def submit(self, slot: Slot, submission: Submission, asked: int | None) -> OutputStream:
        """Let the engine work on ``submission``; ``asked``: tokens that must fit beside the prompt,
        and not only as many as there is room for.

        Raises: UsageError, for a prompt that cannot be; Busy, when all are ended.
        """
        if self._aborted:
            raise Busy(503, "draining", "the server is ending")
        for prompt in submission.prompts:
            self._check_prompt(prompt, asked or 1)
        submission.params.check_vocabulary(self.info.vocab_size)
        self._hold_logprobs(slot, submission)
        slot.stream = self.engine.submit(submission)
        return slot.stream

    async def compiled(self, params: SamplingParams) -> tuple[str, str, str] | None:
        """Return the grammar of ``params``, compiled where it can do no harm; None when there is
        none.
        """
        if params.constraint is None:
            return None
        kind, text = params.constraint
        return kind, text, await self.grammars.compiled(kind, text)

    def new_id(self, kind: str) -> str:
        """Return a name for a request, such as ``chatcmpl-0123...``."""
        return f"{kind}-{uuid.uuid4().hex}"

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

    def _check_prompt(self, prompt: Sequence[int], asked: int) -> None:
        context = self.info.context_length
        if not prompt:
            raise UsageError(
                "E_EMPTY_PROMPT", "the prompt has no tokens", hint="send one token at least"
            )
        if len(prompt) + asked > context:
            message = (
                f"the context holds {context} tokens; the prompt has {len(prompt)}, and {asked} "
                "are asked for"
            )
            raise UsageError("E_TOO_LONG", message, hint="shorten the prompt, or lower max_tokens")
        if max(prompt) >= self.info.vocab_size:
            message = (
                f"the prompt has a token {max(prompt)}, and the model knows {self.info.vocab_size}"
            )
            raise UsageError(
                "E_PROMPT",
                message,
                hint=f"tokens are whole numbers from 0 to {self.info.vocab_size - 1}",
            )

    def _hold_logprobs(self, slot: Slot, submission: Submission) -> None:
        """Count what ``submission`` may make of them: kept until it is read, they are the largest
        part of an answer. Raises: UsageError, Busy.
        """
        if submission.top_logprobs is None:
            return
        tokens = 0
        for prompt in submission.prompts:
            room = self.info.context_length - len(prompt)
            most = (
                room
                if submission.params.max_new_tokens is None
                else submission.params.max_new_tokens
            )
            tokens += (
                most + (len(prompt) if submission.prompt_logprobs_from >= 0 else 0)
            ) * submission.params.n
        logprobs = tokens * (1 + submission.top_logprobs)
        if logprobs > MAX_LOGPROBS:
            message = (
                f"{logprobs:,} log probabilities in one request; the server gives {MAX_LOGPROBS:,}"
            )
            raise UsageError(
                "E_TOO_MANY", message, hint="lower n, max_tokens or the number of log probabilities"
            )
        if self.logprobs_held + logprobs > MAX_LOGPROBS_HELD:
            self.metrics.refused()
            raise Busy(
                429,
                "queue_full",
                "other requests hold as many log probabilities as the server keeps",
            )
        slot.logprobs = logprobs
        self.logprobs_held += logprobs

    async def warm_up(self) -> None:
        """Let the model answer once.

        Raises: QtoolError, when its logits are not finite or the engine is gone.
        """
        prompt = [self.info.eos_ids[0] if self.info.eos_ids else 0]
        params = SamplingParams(max_new_tokens=WARM_UP_TOKENS, temperature=0.0, ignore_eos=True)
        stream = self.engine.submit(
            Submission([prompt], params, stream=False, rid=self.new_id("warm-up"))
        )
        try:
            await stream.collect()
        finally:
            self.engine.cancel(stream)

    def _ended(self, error: QtoolError) -> None:
        self.failure = error
        self.failed.set()


def _generation_config(path: Path) -> dict[str, Any]:
    """Return the model's own sampling defaults; what is not usable is left out, with a warning."""
    file = path / "generation_config.json"
    try:
        config = json.loads(file.read_bytes()) if file.is_file() else {}
    except (OSError, ValueError):
        config = {}
    found = {}
    for name in DEFAULTS:
        value = config.get(name) if isinstance(config, Mapping) else None
        value = -1 if name == "top_k" and value == 0 else value
        if value is None:
            continue
        try:
            SamplingParams.from_dict({name: value})
        except QtoolError as error:
            LOG.warning("generation_config.json: %s; it is left out", error.message)
        else:
            found[name] = value
    return found

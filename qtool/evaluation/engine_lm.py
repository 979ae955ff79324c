"""`EngineLM`: lm-eval's model `qtool`, which is `qtool.Engine` in process."""

from __future__ import annotations

import queue
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias, cast

from jinja2 import TemplateError
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from qtool.engine.engine import Engine
from qtool.engine.outputs import CompletionError, CompletionOutput, Output
from qtool.engine.requests import GenerateRequest
from qtool.errors import DataRefused, UsageError
from qtool.events import NoteEvent, OnEvent, ProgressEvent, ignore_event

MAX_NEW_TOKENS = 256  # of tasks that do not say, as in lm-eval's own models
GENERATION_OPTIONS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")

Tokens: TypeAlias = list[int]
Scored: TypeAlias = tuple[object, Tokens, Tokens]  # what it is of, context, continuation


class TaskRequest(Protocol):
    """What is read of a request of lm-eval."""

    args: tuple[Any, ...]


class TaskTokenizer(Protocol):
    """What is used of a tokenizer of transformers, besides what the engine uses."""

    name_or_path: str
    bos_token_id: int | None
    eos_token_id: int

    def encode(self, text: str, *, add_special_tokens: bool) -> Tokens:
        """Return ``text`` as tokens."""

    def decode(self, tokens: int | Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of ``tokens``."""

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        tokenize: bool,
        add_generation_prompt: bool,
        continue_final_message: bool,
    ) -> str:
        """Return ``messages`` as the text of a prompt."""


@dataclass(frozen=True)
class _Generation:
    """What a task wants to be written."""

    context: str
    until: list[str]
    """Strings that end the text."""
    max_new_tokens: int
    options: Mapping[str, object]
    """Fields of `SamplingParams`."""

    @classmethod
    def of(cls, context: str, given: Mapping[str, object]) -> _Generation:
        """Read the options of lm-eval. Raises: UsageError, for one that the engine lacks."""
        options: dict[str, Any] = normalize_gen_kwargs(dict(given), MAX_NEW_TOKENS)
        until, count = options.pop("until"), options.pop("max_gen_toks")
        options.pop("do_sample", None)  # the temperature is 0 without
        for name in options:
            if name not in GENERATION_OPTIONS:
                known = f"the engine takes {', '.join(GENERATION_OPTIONS)}"
                message = f"unknown generation option `{name}` of a task"
                raise UsageError("E_TASK_OPTION", message, hint=known)
        return cls(context, until, count, options)


@register_model("qtool")
class EngineLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """A checkpoint on qtool's engine, with the kernels that serve it.

    Tokens and windows are those of lm-eval's ``hf``. A window has one token less than the context
    holds beside its prediction, because the engine always generates one.

    Args:
        pretrained: a checkpoint folder, a name on the Hub, or an engine that runs.
        device: cpu, cuda or cuda:<n>.
        batch_size: ignored, like ``max_batch_size``: the engine batches by itself.
        on_event: gets a `ProgressEvent` for each answer.
        options: further fields of `EngineConfig`.
    """

    tokenizer: TaskTokenizer

    def __init__(
        self,
        pretrained: str | Engine,
        *,
        device: str | None = None,
        batch_size: object = None,
        max_batch_size: object = None,
        on_event: OnEvent = ignore_event,
        **options: object,
    ) -> None:
        super().__init__()
        if isinstance(pretrained, Engine):
            self.engine = pretrained
        else:
            self.engine = Engine(pretrained, device=device, **options)
        self.tokenizer = cast(TaskTokenizer, self.engine.tokenizer)
        self._on_event = on_event

    @property
    def max_length(self) -> int:
        """Tokens that a prediction may see: one less than the longest prompt."""
        return self.engine.context_length - 2

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """The name by which lm-eval keeps requests."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as the text of a prompt, without the system's turns where the
        template refuses them.
        """
        render = partial(
            self.tokenizer.apply_chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        try:
            return render(chat_history)
        except TemplateError:
            self._on_event(NoteEvent("the chat template refuses a system turn, which is left out"))
            return render([turn for turn in chat_history if turn["role"] != "system"])

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> Tokens:
        """Return ``string`` as tokens; by default with the tokenizer's first token, unless the
        text begins with it, as a chat template's does.
        """
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def loglikelihood(
        self, requests: Sequence[TaskRequest], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Return the log likelihood of each continuation, and whether it is the greedy one."""
        return cast(
            list[tuple[float, bool]], super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], **_: object
    ) -> list[tuple[float, bool]]:
        prompts = [
            self._scored_prompt(context, continuation) for _, context, continuation in requests
        ]
        outputs = self._run(prompts, what="log likelihoods")
        return [_likelihood(output) for output in outputs]

    def loglikelihood_rolling(
        self, requests: Sequence[TaskRequest], disable_tqdm: bool = True
    ) -> list[float]:
        """Return the log likelihood of each whole text, in windows of the context."""
        windows: list[Scored] = []
        counts = []
        for (text,) in (request.args for request in requests):
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            before = len(windows)
            windows += [(None, *make_disjoint_window(pair)) for pair in pairs]
            counts.append(len(windows) - before)
        found = iter(self._loglikelihood_tokens(windows))
        return [sum(next(found)[0] for _ in range(count)) for count in counts]

    def generate_until(
        self, requests: Sequence[TaskRequest], disable_tqdm: bool = True
    ) -> list[str]:
        """Return the text that follows each context, up to its first stop string."""
        tasks = [_Generation.of(*request.args) for request in requests]
        prompts = [self._generated_prompt(task) for task in tasks]
        outputs = self._run(prompts, what="answers")
        texts = []
        for task, output in zip(tasks, outputs, strict=True):
            text = self.tokenizer.decode(output.token_ids, skip_special_tokens=True)
            texts.append(
                cast(str, postprocess_generated_text(text, stop=task.until, think_end_token=None))
            )
        return texts

    def _scored_prompt(self, context: Tokens, continuation: Tokens) -> GenerateRequest:
        """Return the request for the log probabilities of ``continuation``; of a long context the
        end is taken.
        """
        if not 0 < len(continuation) <= self.max_length:
            raise DataRefused(
                "E_TASK_LENGTH",
                f"a continuation of {len(continuation)} tokens cannot be scored",
                hint=f"this model takes 1 to {self.max_length}",
            )
        tokens = (context + continuation)[-(self.max_length + 1) :]
        return GenerateRequest(
            input_ids=tokens,
            sampling_params={"max_new_tokens": 1, "temperature": 0},
            return_logprob=True,
            logprob_start_len=len(tokens) - len(continuation) - 1,
            top_logprobs_num=1,
        )

    def _generated_prompt(self, task: _Generation) -> GenerateRequest:
        room = self.engine.context_length - task.max_new_tokens
        if room < 1:
            raise UsageError(
                "E_TASK_LENGTH",
                f"the task asks for {task.max_new_tokens} tokens, and the context holds "
                f"{self.engine.context_length}",
                hint="use a task with shorter answers",
            )
        params = {
            **task.options,
            "max_new_tokens": task.max_new_tokens,
            "stop": task.until or None,
            "sampling_seed": 0,
        }
        return GenerateRequest(
            input_ids=self.tok_encode(task.context)[-room:], sampling_params=params
        )

    def _run(self, given: Iterable[GenerateRequest], *, what: str) -> list[CompletionOutput]:
        """Run all requests at once and return their outputs in order."""
        done: queue.SimpleQueue[tuple[int, Output]] = queue.SimpleQueue()
        running = []
        try:
            for number, request in enumerate(given):
                running += self.engine.submit(request, partial(_put, done, number))
            outputs: dict[int, CompletionOutput] = {}
            while len(outputs) < len(running):
                number, output = done.get()
                if isinstance(output, CompletionError):
                    raise output.error
                outputs[number] = output
                self._on_event(ProgressEvent(what, len(outputs), len(running)))
            return [outputs[number] for number in range(len(running))]
        finally:
            self.engine.cancel(running)


def _put(done: queue.SimpleQueue[tuple[int, Output]], number: int, output: Output) -> None:
    done.put((number, output))


def _likelihood(output: CompletionOutput) -> tuple[float, bool]:
    """Return the log likelihood of the scored tokens, and whether each is the likeliest."""
    assert output.finish is not None
    _, *scored = output.prompt_logprobs  # nothing is known of the first
    total = sum(one.logprob or 0.0 for one in scored)
    return total, all(one.top is not None and one.top[0][1] == one.token_id for one in scored)

"""Chats: messages through the model's template, the tools that may be called, and one submission to
the engine. Each route that chats has a `Reply` of its own shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from starlette.responses import Response

from qtool.engine.sampling_params import SamplingParams
from qtool.errors import UsageError
from qtool.serve.api.answer_reader import AnswerForm, form_of
from qtool.serve.api.answering import Reply, answer
from qtool.serve.api.fields import Json
from qtool.serve.api.prompt import render_prompt
from qtool.serve.api.protocol import ChatRequest
from qtool.serve.api.replies import Account, log_request
from qtool.serve.api.sampling import is_constrained, sampling_params
from qtool.serve.api.tools.choice import Choice, choose, log_not_held, schema_for
from qtool.serve.api.tools.parsers import call_tag
from qtool.serve.backend.messages import Submission
from qtool.serve.service import Service
from qtool.serve.turns import current_origin


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A chat that is about to be answered."""

    service: Service

    body: ChatRequest

    rid: str
    """The id of the request and of its reply."""

    account: Account
    """Counts what the chat uses."""

    form: AnswerForm
    """What the text of an answer may consist of."""

    prompt_tokens: int

    @property
    def model(self) -> str:
        """The name of the model, as the reply has it."""
        return self.body.model or self.service.settings.name


async def run_chat(
    service: Service,
    body: ChatRequest,
    make_reply: Callable[[Chat], Reply],
    *,
    rid: str,
    kind: str = "chat",
    fits_answer: bool = False,
) -> Response:
    """Let the engine answer ``body``, and return what the reply makes of it.

    Args:
        service: the served model.
        body: the chat.
        make_reply: returns what makes the response.
        rid: the id of the request.
        kind: of the request, for the log.
        fits_answer: whether an answer that is too long for the context ends where it ends; if not,
            a request whose ``max_tokens`` do not fit is refused.
    Raises: UsageError, ModelNotFound, Busy; what ``make_reply`` raises.
    """
    account = Account(kind, service.metrics, streamed=bool(body.stream))
    service.check_model(body.model)
    if body.top_logprobs and not body.logprobs:
        raise UsageError(
            "E_LOGPROBS",
            "top_logprobs is set, and logprobs is not",
            hint="set logprobs to true, too",
        )
    max_tokens = body.max_completion_tokens
    if max_tokens is None:
        max_tokens = body.max_tokens
    choice, params = await service.threads.run(
        current_origin().body_bytes, _choice_and_params, service, body, max_tokens
    )
    with service.acquire(params.n) as slot:
        text, prompt = await render_prompt(service, choice.tools, body)
        form = form_of(service, body, choice, text)
        params = form.constrain(params)
        log_request(text, params, service.settings)
        submission = Submission(
            [prompt],
            params,
            stream=bool(body.stream),
            rid=rid,
            top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            cache_salt=body.salt,
            grammar=await service.compiled(params),
        )
        account.expect(submission.prompts)
        if form.markers is not None:
            account.reasoning_tokens = 0
        chat = Chat(
            service=service,
            body=body,
            rid=rid,
            account=account,
            form=form,
            prompt_tokens=len(prompt),
        )
        reply = make_reply(chat)
        return await answer(service, slot, submission, reply, None if fits_answer else max_tokens)


async def count_prompt_tokens(service: Service, body: ChatRequest) -> int:
    """Return the tokens of the prompt of ``body``. Raises: UsageError, ModelNotFound."""
    service.check_model(body.model)
    _, prompt = await render_prompt(service, choose(body.tools, body.tool_choice).tools, body)
    return len(prompt)


def _choice_and_params(
    service: Service, body: ChatRequest, max_tokens: int | None
) -> tuple[Choice, SamplingParams]:
    choice = _held_choice(service, body)
    forced = _forced_constraint(service, body, choice)
    return choice, sampling_params(body, service.defaults, max_tokens, forced)


def _held_choice(service: Service, body: ChatRequest) -> Choice:
    """Return what ``body`` lets the model call; not strict where calls cannot be held."""
    choice = choose(body.tools, body.tool_choice)
    if not choice.is_strict:
        return choice
    if not service.grammars.can_compile:
        log_not_held("no-xgrammar")
    elif is_constrained(body):
        log_not_held("constrained-answer")
    else:
        return choice
    return replace(choice, is_held=False)


def _forced_constraint(
    service: Service, body: ChatRequest, choice: Choice
) -> tuple[str, Json] | None:
    """Return the constraint of an answer that must call, or may call strict tools, and its kind."""
    parallel = body.parallel_tool_calls is not False
    if tag := call_tag(choice, service.tool_style, parallel=parallel):
        return "structural_tag", tag
    if choice.is_strict:
        log_not_held(f"style-{service.tool_style}")
    schema = schema_for(choice, parallel=parallel)
    return ("json_schema", schema) if schema else None

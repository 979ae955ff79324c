"""A checkpoint as it will be served: our engine's layers and kernels, logits of whole texts, greedy
answers.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qtool.checkpoint import Checkpoint
from qtool.engine.attention.pages import PAGE
from qtool.engine.config import EngineConfig
from qtool.engine.engine import Engine
from qtool.engine.prompt_logits import page_count, prompt_logits
from qtool.errors import CheckpointRefused
from qtool.evaluation.texts import Window
from qtool.runtime.causal_lm import CausalLM
from qtool.runtime.load import materialize
from qtool.runtime.load_plan import LoadPlan, plan_load

STEP_TOKENS = {"cpu": 2048, "cuda": 8192}
ANSWERS = 16  # greedy answers at once


class Served(Protocol):
    """A loaded model that the evaluation asks."""

    runs_on: str
    """``engine``, or ``transformers`` for its layers around our kernels."""

    def logits(self, windows: Sequence[Window]) -> Tensor:
        """Return the logits [R, V] that predict the tokens of ``windows`` that count, in order."""

    def answers(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        """Return the greedy continuations of ``prompts``, each of ``tokens`` tokens at most."""


@dataclass(frozen=True, kw_only=True)
class ServeSpec:
    """How the models run."""

    device: torch.device
    dtype: str | None
    """What unquantized layers compute in; None for the checkpoint's."""

    seq_len: int
    """Tokens of a window, at most."""

    answer_tokens: int
    """Tokens of an answer; 0 for none."""


def kernels_by_scheme(plan: LoadPlan) -> dict[str, dict[str, int]]:
    """Return how many layers of each scheme each kernel multiplies."""
    found: dict[str, Counter[str]] = {}
    for group in plan.groups:
        scheme = found.setdefault(group.spec.scheme.name, Counter())
        scheme[group.choice.kernel] += len(group.sources)
    return {name: dict(counts) for name, counts in found.items()}


@contextmanager
def serving(plan: LoadPlan, spec: ServeSpec) -> Iterator[Served]:
    """Load what was planned and give it; its memory is free afterwards.

    A model whose attention the engine lacks runs as transformers' layers around our kernels.
    """
    try:
        engine = _engine(plan, spec)
    except CheckpointRefused as error:
        if error.code != "E_ATTENTION":
            raise
        # the engine has put its attention into the plan's skeleton
        again = plan_serving(plan.checkpoint, spec)
        yield _InTransformers(materialize(again), spec.device)
        return
    with engine:
        yield _InEngine(engine)


def plan_serving(checkpoint: Checkpoint, spec: ServeSpec) -> LoadPlan:
    """Return what each layer of ``checkpoint`` becomes; reads no weights.

    Raises: CheckpointRefused, for a model that cannot be loaded or continues no text.
    """
    plan = plan_load(checkpoint, spec.device, dtype=spec.dtype or "auto")
    if plan.skeleton.config.is_encoder_decoder or not plan.skeleton.model.can_generate():
        raise CheckpointRefused(
            "E_ARCHITECTURE",
            f"{checkpoint.source}: {type(plan.skeleton.model).__name__} does not continue a text, "
            "so there is no next token to compare",
            hint="compare its weights: `qtool inspect --against`",
        )
    return plan


def _engine(plan: LoadPlan, spec: ServeSpec) -> Engine:
    tokens = STEP_TOKENS[spec.device.type]
    answers = ANSWERS * (spec.answer_tokens + spec.seq_len + PAGE) if spec.answer_tokens else 0
    config = EngineConfig(
        skip_tokenizer_init=True,
        disable_radix_cache=True,
        disable_cuda_graph=True,
        max_running_requests=ANSWERS,
        chunked_prefill_size=tokens,
        max_total_tokens=max(2 * tokens + spec.seq_len, answers),
    )
    return Engine.from_plan(plan, config)


class _InEngine:
    runs_on = "engine"

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._step_tokens = engine.loop.runner.limits.token_budget

    def logits(self, windows: Sequence[Window]) -> Tensor:
        runner = self._engine.loop.runner
        parts = []
        for batch in self._batches(windows):
            starts = itertools.accumulate((len(each.ids) for each in batch), initial=0)
            kept = [
                start + index
                for start, each in zip(starts, batch, strict=False)
                for index in range(each.first - 1, len(each.ids) - 1)
            ]
            ids = [each.ids for each in batch]
            parts.append(prompt_logits(runner.model, runner.layers, ids, kept))
        return torch.cat(parts)

    def _batches(self, windows: Sequence[Window]) -> Iterator[list[Window]]:
        """Yield as many windows at a time as a step, the pages and the rows have room for."""
        batch: list[Window] = []
        tokens = pages = 0
        most = self._engine.loop.runner.page_count
        rows = self._engine.loop.runner.limits.max_running
        for window in windows:
            need = page_count([window.ids])
            full = tokens + len(window.ids) > self._step_tokens or pages + need > most
            if batch and (full or len(batch) == rows):
                yield batch
                batch, tokens, pages = [], 0, 0
            batch.append(window)
            tokens += len(window.ids)
            pages += need
        yield batch

    def answers(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        params = {"temperature": 0, "max_new_tokens": tokens}
        results = self._engine.generate(input_ids=prompts, sampling_params=params)
        return [list(result["output_ids"]) for result in results]


class _InTransformers:
    runs_on = "transformers"

    def __init__(self, model: CausalLM, device: torch.device) -> None:
        self._model = model
        self._device = device

    @torch.inference_mode()
    def logits(self, windows: Sequence[Window]) -> Tensor:
        parts = []
        for window in windows:
            ids = torch.tensor([window.ids], device=self._device)
            logits = self._model(input_ids=ids, use_cache=False).logits[0]
            parts.append(logits[window.first - 1 : -1])
        return torch.cat(parts)

    @torch.inference_mode()
    def answers(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        found = []
        for prompt in prompts:
            ids = torch.tensor([list(prompt)], device=self._device)
            output = self._model.generate(ids, max_new_tokens=tokens, do_sample=False)
            found.append(output[0, len(prompt) :].tolist())
        return found

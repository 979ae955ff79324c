"""Runs a quantized model and its reference over the same texts: side by side where both fit into
memory, else one after the other.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import psutil
import torch
from torch import Tensor

from qtool.checkpoint import Checkpoint
from qtool.evaluation.agreement import Agreement
from qtool.evaluation.collapse import Collapse, compare_answers
from qtool.evaluation.reference import ReferenceFile, as_stored, from_stored, reference_file
from qtool.evaluation.served import Served, ServeSpec, serving
from qtool.evaluation.texts import Window
from qtool.events import OnEvent, ProgressEvent, StageEvent
from qtool.memory import limit_bytes
from qtool.runtime.load_plan import LoadPlan

BATCH_TOKENS = 8192  # whose logits are in memory at a time
BATCH_BYTES = 1 << 30  # of the logits of one model
PROMPT_TOKENS = 32  # of a document, that greedy answers continue
RESERVE = 1.2  # of the weights, for what a pass needs besides


@dataclass(frozen=True)
class Model:
    """A checkpoint, and how it runs."""

    checkpoint: Checkpoint
    plan: LoadPlan

    @property
    def vocab_size(self) -> int:
        """Logits after each token."""
        return int(self.plan.skeleton.model.get_output_embeddings().out_features)


@dataclass(frozen=True)
class Task:
    """What both models are asked."""

    spec: ServeSpec
    windows: Sequence[Window]
    answers: int
    """Greedy answers, at most."""

    @cached_property
    def prompts(self) -> list[tuple[int, ...]]:
        """The beginnings of the longest windows."""
        longest = sorted((each.ids for each in self.windows), key=len, reverse=True)
        return [ids[:PROMPT_TOKENS] for ids in longest[: self.answers]]


@dataclass(frozen=True)
class Compared:
    """What two models said."""

    agreement: Agreement
    answers: int
    """Greedy answers that were compared."""

    collapsed: list[Collapse]
    runs_on: tuple[str, str]
    """What ran the quantized model, and the reference; ``stored`` for one that did not run."""


@dataclass(frozen=True)
class _Reference:
    """What the reference says, live or from a file."""

    runs_on: str
    rows: Callable[[Sequence[Window], int], Tensor]
    """Of windows, and the number of tokens that counted before them: logits or log-probabilities
    [R, V].
    """

    is_log: bool
    answers: Callable[[], Sequence[Sequence[int]]]


def compare_models(
    quantized: Model,
    reference: Model,
    task: Task,
    *,
    cache_dir: Path | None,
    on_event: OnEvent,
) -> Compared:
    """Ask both models, and compare what they say.

    Args:
        quantized: the checkpoint that is evaluated.
        reference: what it is compared with, of the same vocabulary.
        task: what both are asked.
        cache_dir: where the reference's log-probabilities are kept; None: only where memory is too
            small for both models, in a temporary folder.
        on_event: gets stages and progress.
    """
    side_by_side = cache_dir is None and _fit(quantized, reference, task.spec.device)
    with ExitStack() as stack:
        if side_by_side:
            on_event(StageEvent("loading the reference"))
            source = stack.enter_context(_live(reference, task))
        else:
            folder = cache_dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            source = _stored(reference, task, folder, on_event)
        on_event(StageEvent("loading the quantized model"))
        served = stack.enter_context(serving(quantized.plan, task.spec))
        agreement = Agreement()
        for batch, done in _batches(task.windows, quantized.vocab_size, "comparing", on_event):
            logits = served.logits(batch)
            agreement.add(batch, source.rows(batch, done), logits, is_log=source.is_log)
        found: list[Collapse] = []
        if task.prompts:
            on_event(StageEvent(f"{len(task.prompts)} greedy answers"))
            answers = served.answers(task.prompts, task.spec.answer_tokens)
            found = compare_answers(task.prompts, source.answers(), answers)
        return Compared(agreement, len(task.prompts), found, (served.runs_on, source.runs_on))


@contextmanager
def _live(reference: Model, task: Task) -> Iterator[_Reference]:
    with serving(reference.plan, task.spec) as served:
        yield _Reference(
            runs_on=served.runs_on,
            rows=lambda windows, _: served.logits(windows),
            is_log=False,
            answers=lambda: served.answers(task.prompts, task.spec.answer_tokens),
        )


def _stored(reference: Model, task: Task, folder: Path, on_event: OnEvent) -> _Reference:
    """Return what the reference says from a file in ``folder``, which is written if need be."""
    spec = task.spec
    file = reference_file(
        folder,
        reference.checkpoint,
        task.windows,
        vocab_size=reference.vocab_size,
        settings=[spec.device.type, spec.dtype, spec.answer_tokens, task.answers],
    )
    runs_on = "stored"
    if not file.is_complete or (task.prompts and _answers(file, task) is None):
        file.check_output()
        on_event(StageEvent("loading the reference"))
        with serving(reference.plan, spec) as served:
            _write(file, served, task, on_event)
            runs_on = served.runs_on
    rows = file.read()
    return _Reference(
        runs_on=runs_on,
        rows=lambda windows, done: from_stored(
            rows[done : done + sum(window.count for window in windows)], file.path
        ),
        is_log=True,
        answers=lambda: _answers(file, task) or [],
    )


def _answers(file: ReferenceFile, task: Task) -> list[list[int]] | None:
    return file.read_answers(len(task.prompts))


def _write(file: ReferenceFile, served: Served, task: Task, on_event: OnEvent) -> None:
    if task.prompts:
        answers = served.answers(task.prompts, task.spec.answer_tokens)
        file.write_answers(answers)
    with file.writing() as array:
        for batch, done in _batches(task.windows, file.vocab_size, "reference", on_event):
            rows = as_stored(served.logits(batch))
            array[done : done + len(rows)] = rows


def _batches(
    windows: Sequence[Window], vocab_size: int, what: str, on_event: OnEvent
) -> Iterator[tuple[list[Window], int]]:
    """Yield windows whose logits fit into memory together, and how many tokens counted before."""
    most = max(1, min(BATCH_TOKENS, BATCH_BYTES // (2 * vocab_size)))
    total = sum(window.count for window in windows)
    done = 0
    batch: list[Window] = []
    size = 0
    on_event(StageEvent(what))
    for window in windows:
        if batch and size + len(window.ids) > most:
            yield batch, done
            done += sum(each.count for each in batch)
            on_event(ProgressEvent(f"{what}: tokens", done, total))
            batch, size = [], 0
        batch.append(window)
        size += len(window.ids)
    yield batch, done
    on_event(ProgressEvent(f"{what}: tokens", total, total))


def _fit(quantized: Model, reference: Model, device: torch.device) -> bool:
    """Return whether both models have room on ``device`` at the same time."""
    need = RESERVE * (quantized.checkpoint.size_bytes + reference.checkpoint.size_bytes)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        ours = limit_bytes() - psutil.Process().memory_info().rss
        free = min(psutil.virtual_memory().available, ours)
    return need + 4 * BATCH_BYTES < free

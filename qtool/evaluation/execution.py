"""`evaluate` compares a quantized checkpoint with its 16-bit reference, and applies a gate."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from qtool.checkpoint import Checkpoint, open_checkpoint, resolve_model
from qtool.checkpoint.manifest import read_manifest
from qtool.checkpoint.part_costs import PartCost
from qtool.errors import CheckpointRefused, ResourceError, UsageError
from qtool.evaluation.agreement import WorstToken
from qtool.evaluation.by_layer import cost_by_layer
from qtool.evaluation.collapse import Collapse, net_share
from qtool.evaluation.comparison import Compared, Model, Task, compare_models
from qtool.evaluation.detokenized import as_texts
from qtool.evaluation.faults import checkpoint_faults, has_tokenizer
from qtool.evaluation.gate import BATCHES, NAMES, Limit, Measure, check_gate, parse_gate
from qtool.evaluation.harness import KnownTasks, find_tasks, recovery, run_tasks
from qtool.evaluation.measures import kl_by_position, measures_of
from qtool.evaluation.report import (
    Data,
    Evaluation,
    ShownCollapse,
    ShownToken,
    Side,
    Speed,
)
from qtool.evaluation.served import ServeSpec, kernels_by_scheme, plan_serving
from qtool.evaluation.speed import measure_speed, slower_note, speedups
from qtool.evaluation.texts import (
    Document,
    TextSpec,
    Window,
    cut_windows,
    read_documents,
    texts_digest,
    vocab_size,
)
from qtool.events import OnEvent, StageEvent, ignore_event
from qtool.inspection.model_card import record_evaluation
from qtool.options import EvalOptions, keywords_of, make_options
from qtool.runtime.devices import device_named

ANSWER_TOKENS = 200
NORMAL_95 = 1.96  # standard errors on either side of a mean
CONTEXT_TOKENS = 24  # shown before a token


@keywords_of(EvalOptions)
def evaluate(
    model_path: str | os.PathLike[str], *, on_event: OnEvent = ignore_event, **options: object
) -> Evaluation:
    """Compare a quantized checkpoint with its 16-bit reference.

    Args:
        model_path: a checkpoint folder or a Hub name.
        on_event: gets what the run reports: an `Event` of `qtool.events`.
        options: the fields of `qtool.options.EvalOptions`.
    Returns: all that was measured; a gate that fails is in it, and raises nothing.
    Raises: QtoolError.
    """
    return run_evaluation(model_path, make_options(EvalOptions, options), on_event=on_event)


@dataclass(frozen=True)
class _Prepared:
    """All that is known before a model is loaded."""

    ours: Model
    theirs: Model
    spec: ServeSpec
    texts: TextSpec
    tokenizer: Path
    """The folder whose tokenizer read the texts."""

    documents: Sequence[Document]
    windows: Sequence[Window]
    faults: Sequence[str]
    limits: Sequence[Limit]
    tasks: Sequence[str]
    """Of lm-eval."""


def run_evaluation(
    model_path: str | os.PathLike[str],
    options: EvalOptions,
    *,
    on_event: OnEvent = ignore_event,
) -> Evaluation:
    """Do what `evaluate` says."""
    began = time.monotonic()
    given = _prepare(model_path, options, on_event)
    ours, theirs, spec = given.ours, given.theirs, given.spec
    found = compare_models(
        ours,
        theirs,
        Task(spec, given.windows, options.answers),
        cache_dir=Path(options.cache_dir) if options.cache_dir else None,
        on_event=on_event,
    )
    speed = _speed(ours, theirs, spec, on_event) if options.speed else {}
    faster = speedups(speed["model"], speed["reference"]) if speed else {}
    measures = {
        **measures_of(found.agreement, seed=options.seed),
        **_collapsed(found),
        "faults": Measure(len(given.faults)),
        "size_ratio": Measure(ours.checkpoint.size_bytes / theirs.checkpoint.size_bytes),
        **_task_measures(given, options, on_event),
        **{name: Measure(value) for name, value in faster.items()},
    }
    evaluation = Evaluation(
        model=_side(ours, found.runs_on[0]),
        reference=_side(theirs, found.runs_on[1]),
        data=_data(given.texts, given.documents, given.windows),
        device=str(spec.device),
        measures=measures,
        faults=given.faults,
        kl_by_position=kl_by_position(found.agreement),
        worst=_worst(found.agreement.worst_tokens(), given.documents, given.tokenizer),
        collapsed=_answers(found.collapsed, given.tokenizer),
        answers=found.answers,
        speed=speed,
        by_layer=_by_layer(ours, theirs, given.windows, spec, options, on_event),
        notes=[*slower_note(faster), *_notes(theirs, given.documents)],
        checks=check_gate(given.limits, measures, strict=options.strict),
        seconds=time.monotonic() - began,
    )
    if options.record:
        record_evaluation(ours.checkpoint.published_folder, evaluation.for_manifest())
    return evaluation


def _prepare(
    model_path: str | os.PathLike[str], options: EvalOptions, on_event: OnEvent
) -> _Prepared:
    """Read headers and texts, and check all that can be checked without a model."""
    quantized, reference = (
        open_checkpoint(resolve_model(os.fspath(path), revision=revision))
        for path, revision in ((model_path, options.revision), (options.reference, None))
    )
    if options.record:
        _check_recordable(quantized)
    texts = _text_spec(options, [quantized, reference])
    # before anything else starts threads or a GPU: tokenizers run in a fork of this process
    on_event(StageEvent("reading the data"))
    tokenizer = quantized.path if has_tokenizer(quantized) else reference.path
    documents = read_documents(
        texts,
        tokenizer,
        vocab_size(quantized),
        trust_remote_code=options.trust_remote_code,
    )
    faults = checkpoint_faults(
        quantized, reference, texts, documents, trust_remote_code=options.trust_remote_code
    )
    on_event(StageEvent("planning"))
    spec = _serve_spec(options, texts, device_named(options.device))
    ours, theirs = (Model(each, plan_serving(each, spec)) for each in (quantized, reference))
    _check_vocabularies(ours, theirs, documents)
    tasks = find_tasks(_tasks(options))
    gate = [options.gate] if isinstance(options.gate, str) else options.gate
    schemes = {group.spec.scheme: None for group in ours.plan.groups}
    return _Prepared(
        ours=ours,
        theirs=theirs,
        spec=spec,
        texts=texts,
        tokenizer=tokenizer,
        documents=documents,
        windows=cut_windows(documents, texts.seq_len, texts.stride),
        faults=faults,
        limits=parse_gate(gate, [*schemes], partial(_is_measured, options, tasks), tasks.names),
        tasks=tasks.names,
    )


def check_source(source: Checkpoint, options: EvalOptions) -> None:
    """Raise a QtoolError when what is quantized from ``source`` could not be evaluated, for its
    architecture, its tokenizer or the texts; reads no weights.
    """
    texts = _text_spec(options, [source])
    read_documents(
        texts, source.path, vocab_size(source), trust_remote_code=options.trust_remote_code
    )
    plan_serving(source, _serve_spec(options, texts, torch.device("cpu")))


def _serve_spec(options: EvalOptions, texts: TextSpec, device: torch.device) -> ServeSpec:
    return ServeSpec(
        device=device,
        dtype=options.dtype,
        seq_len=texts.seq_len,
        answer_tokens=ANSWER_TOKENS if options.answers else 0,
    )


def _check_recordable(checkpoint: Checkpoint) -> None:
    """Raise a QtoolError when nothing can be recorded in the manifest of ``checkpoint``."""
    read_manifest(checkpoint.published_folder)
    if not os.access(checkpoint.published_folder, os.W_OK):
        raise ResourceError(
            "E_OUTPUT_PLACE",
            f"{checkpoint.published_folder}: cannot write there",
            hint="leave out --record, or copy the checkpoint to where you may write",
        )


def _text_spec(options: EvalOptions, checkpoints: Sequence[Checkpoint]) -> TextSpec:
    """Return which texts are read; windows are no longer than the models' context."""
    seq_len = options.seq_len
    for checkpoint in checkpoints:
        context = checkpoint.text_config.get("max_position_embeddings")
        if isinstance(context, int) and 0 < context < seq_len:
            seq_len = context
    return TextSpec(
        source=options.data,
        text_column=options.text_column,
        max_tokens=options.max_tokens,
        seq_len=seq_len,
        stride=min(options.stride or seq_len, seq_len),
        seed=options.seed,
    )


def _check_vocabularies(quantized: Model, reference: Model, documents: Sequence[Document]) -> None:
    """Raise CheckpointRefused when the models, or the texts, have different vocabularies."""
    sizes = (quantized.vocab_size, reference.vocab_size)
    if sizes[0] != sizes[1]:
        raise CheckpointRefused(
            "E_REFERENCE",
            f"{quantized.checkpoint.source} has a vocabulary of {sizes[0]} tokens, and "
            f"{reference.checkpoint.source} one of {sizes[1]}",
            hint="the reference is the 16-bit model that was quantized",
        )
    largest = max(max(document.ids) for document in documents)
    if largest >= sizes[0]:
        raise CheckpointRefused(
            "E_TOKENIZER",
            f"{quantized.checkpoint.source}: its tokenizer gives token {largest}, and the model "
            f"knows {sizes[0]}",
            hint="is tokenizer.json of this model?",
        )


def _is_measured(options: EvalOptions, tasks: KnownTasks, name: str) -> bool:
    """Return whether a run with ``options`` measures ``name``."""
    if name.startswith("task:"):
        return tasks.may_score(name.removeprefix("task:").removesuffix(".recovery"))
    if name == "prefill_speedup" or name in [f"speedup@{batch}" for batch in BATCHES]:
        return options.speed
    return name in NAMES and (name != "collapsed" or options.answers > 0)


def _speed(ours: Model, theirs: Model, spec: ServeSpec, on_event: OnEvent) -> dict[str, Speed]:
    found = {}
    for name, model in (("reference", theirs), ("model", ours)):
        on_event(StageEvent(f"timing the {name}"))
        found[name] = measure_speed(model.checkpoint, spec.device, spec.dtype)
    return found


def _tasks(options: EvalOptions) -> list[str]:
    if options.tasks is None:
        return []
    names = [name.strip() for name in options.tasks.split(",") if name.strip()]
    if not names:
        raise UsageError("E_TASK", f"`{options.tasks}` names no task", hint="--tasks gsm8k,mmlu")
    return names


def _task_measures(given: _Prepared, options: EvalOptions, on_event: OnEvent) -> dict[str, Measure]:
    """Return each task's score and recovery, by the names that gates use."""
    if not given.tasks:
        return {}
    scores = []
    for checkpoint in (given.theirs.checkpoint, given.ours.checkpoint):
        on_event(StageEvent(f"tasks of {checkpoint.name}"))
        found = run_tasks(
            checkpoint.source,
            given.tasks,
            options.task_limit,
            device=options.device,
            dtype=options.dtype,
            on_event=on_event,
        )
        scores.append({score.task: score for score in reversed(found)})  # the first metric of each
    before, after = scores
    measures = {}
    for task, score in after.items():
        measures[f"task:{task}"] = _with_interval(score.value, score.stderr)
        kept = recovery(before[task], score)
        if kept.value is not None:
            measures[f"task:{task}.recovery"] = _with_interval(kept.value, kept.stderr)
    return measures


def _with_interval(value: float, stderr: float | None) -> Measure:
    if stderr is None:
        return Measure(value)
    return Measure(value, value - NORMAL_95 * stderr, value + NORMAL_95 * stderr)


def _by_layer(
    ours: Model,
    theirs: Model,
    windows: Sequence[Window],
    spec: ServeSpec,
    options: EvalOptions,
    on_event: OnEvent,
) -> tuple[PartCost, ...]:
    if options.by_layer is None:
        return ()
    return cost_by_layer(
        ours.checkpoint,
        theirs.checkpoint,
        windows,
        parts=options.by_layer,
        device=spec.device,
        dtype=ours.plan.skeleton.dtype,
        on_event=on_event,
    )


def _notes(reference: Model, documents: Sequence[Document]) -> Iterator[str]:
    schemes = ", ".join(kernels_by_scheme(reference.plan))
    if schemes:
        yield f"the reference is quantized itself ({schemes}): nothing is compared with 16 bits"
    if len(documents) == 1:
        yield "there is one text only, so means have no interval"


def _collapsed(found: Compared) -> dict[str, Measure]:
    if not found.answers:
        return {}
    return {"collapsed": Measure(net_share(found.collapsed, found.answers))}


def _side(model: Model, runs_on: str) -> Side:
    return Side(
        path=str(model.checkpoint.source),
        schemes=kernels_by_scheme(model.plan),
        size_bytes=model.checkpoint.size_bytes,
        runs_on=runs_on,
    )


def _data(spec: TextSpec, documents: Sequence[Document], windows: Sequence[Window]) -> Data:
    return Data(
        source=spec.source,
        documents=len(documents),
        windows=len(windows),
        tokens=sum(window.count for window in windows),
        seq_len=spec.seq_len,
        stride=spec.stride,
        seed=spec.seed,
        digest=texts_digest(windows),
    )


def _worst(
    found: Sequence[WorstToken], documents: Sequence[Document], tokenizer: Path
) -> list[ShownToken]:
    pieces: list[Sequence[int]] = []
    for each in found:
        ids = documents[each.document].ids
        pieces += [
            ids[max(0, each.position - CONTEXT_TOKENS) : each.position],
            [ids[each.position]],
            [each.reference_token],
            [each.token],
        ]
    texts = iter(as_texts(tokenizer, pieces))
    return [
        ShownToken(
            kl=each.kl,
            where=documents[each.document].where,
            position=each.position,
            context=next(texts),
            following=next(texts),
            reference=next(texts),
            reference_probability=each.reference_probability,
            quantized=next(texts),
            probability=each.probability,
        )
        for each in found
    ]


def _answers(collapsed: Sequence[Collapse], tokenizer: Path) -> list[ShownCollapse]:
    found = [each for each in collapsed if not each.of_reference]
    pieces: list[Sequence[int]] = []
    for each in found:
        pieces += [each.prompt, each.tokens]
    texts = iter(as_texts(tokenizer, pieces))
    return [
        ShownCollapse(
            kind=each.kind,
            prompt=next(texts),
            answer=next(texts),
        )
        for each in found
    ]

"""`run` has a worker quantize, verifies what it wrote, and publishes it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from qtool import __version__
from qtool.backends import Job, load_backend
from qtool.backends.worker import run_job
from qtool.checkpoint import (
    Staging,
    digest_files,
    stage_output,
)
from qtool.checkpoint.aux_files import finish_files, write_json
from qtool.checkpoint.digests import Digests
from qtool.checkpoint.expert_tokens import ExpertTokens, to_manifest
from qtool.checkpoint.manifest import MANIFEST, MANIFEST_VERSION
from qtool.checkpoint.strict_json import JsonDict
from qtool.checkpoint.writer import LOG_MARK
from qtool.errors import (
    BackendFailed,
    CheckpointRefused,
    GateFailed,
    InputRefused,
    OutputTaken,
    ResourceError,
    UsageError,
)
from qtool.events import (
    CalibrationEvent,
    Event,
    ExpertTokensEvent,
    NoteEvent,
    OnEvent,
    PublishedEvent,
    StageEvent,
    StateSavedEvent,
    ignore_event,
)
from qtool.formats import check_values, detect
from qtool.inspection.model_card import source_metadata, write_card
from qtool.plan import Plan
from qtool.quantization.request import Request
from qtool.quantization.restoration import restore_source
from qtool.quantization.verification import verify
from qtool.sizes import format_size
from qtool.terminal import printable


@dataclass(frozen=True)
class Measured:
    """How good a result is."""

    evaluation: JsonDict
    """For the manifest and the model card."""

    lines: tuple[str, ...]
    """For people."""

    failure: GateFailed | None
    """Why the result does not pass its gate."""


Measure = Callable[[Path], Measured]


@dataclass(frozen=True)
class QuantizeResult:
    """What a run wrote."""

    output: Path
    """The checkpoint folder: complete, checked, and described by its manifest."""

    log: Path
    """What the library printed."""

    method: str
    """The name of the recipe."""

    backend: str
    """The library and its version."""

    quantized_modules: int
    """How many linear layers are quantized."""

    bytes_before: int
    """The size of the source."""

    bytes_after: int
    """The size of the output."""

    seconds: float
    """How long the run took."""

    calibration: Mapping[str, str | int] | None
    """The report on the calibration data; None when the method needs none."""

    expert_tokens: ExpertTokens | None = None
    """The tokens of it that each expert got; None for a model without experts."""

    evaluation: JsonDict | None = None
    """What a gate measured."""

    measured: tuple[str, ...] = ()
    """The same in words."""

    def summary(self) -> str:
        """Return the result in a few lines."""
        lines = [
            f"{printable(str(self.output))}: {printable(self.method)} by {self.backend}, "
            f"{self.quantized_modules} modules "
            f"quantized in {self.seconds:.1f} s",
            f"size: {format_size(self.bytes_before)} -> {format_size(self.bytes_after)} "
            f"({self.bytes_after / self.bytes_before:.0%})",
        ]
        if self.calibration:
            data = self.calibration
            of = f" of {data['asked']} asked for" if data["asked"] != data["used"] else ""
            lines.append(
                f"calibration: {data['used']} samples{of}, {data['tokens']:,} tokens, "
                f"{data['truncated']} truncated, {data['dropped']} dropped"
            )
        if self.expert_tokens:
            lines.append(printable(self.expert_tokens.summary()))
        return "\n".join([*lines, *self.measured])

    def to_dict(self) -> JsonDict:
        """Return the result for ``--json``."""
        values = {
            key: str(value) if isinstance(value, Path) else value
            for key, value in vars(self).items()
            if key != "measured"
        }
        tokens = self.expert_tokens
        return {**values, "expert_tokens": tokens.counts if tokens else None}


def run(
    request: Request, *, on_event: OnEvent = ignore_event, measure: Measure | None = None
) -> QuantizeResult:
    """Run a prepared request in a worker, verify what it wrote, and put it in its place.

    Args:
        request: what is done.
        on_event: gets what the run reports.
        measure: measures the finished checkpoint; one that fails its gate is put in its place only
            if the request says so.
    Raises: GateFailed, when the result fails its gate.
    """
    assert measure or not request.gate
    start = time.monotonic()
    plan = request.plan
    with ExitStack() as stack:
        staging, state = _stage(request, stack)
        stack.enter_context(_kept_log(staging, request.log))
        threads = stack.enter_context(ThreadPoolExecutor(max_workers=2))
        reading = _read_source(request, stack)
        listener = _Listener(request, state, reading, on_event)
        for note in request.notes:
            on_event(NoteEvent(note))
        try:
            versions = run_job(
                _job(request, staging, state),
                plan,
                log=staging.log,
                on_event=listener.handle,
                python=request.backend_python,
                keep_open=staging.folder.lock_fd,
            )
        except BackendFailed:
            reading.refuse_damage()  # it may be the reason
            raise
        reading.refuse_damage()
        on_event(StageEvent("checking the result"))
        finish_files(request.source.aux, request.source.folder, staging.checkpoint)
        restore_source(plan, staging.checkpoint)
        # hashing, writing out and checking share the time
        digests = threads.submit(digest_files, staging.files(), root=staging.checkpoint)
        flushed = threads.submit(staging.flush)
        written = verify(plan, staging.checkpoint)
        flushed.result()  # the system reports a failed write only once
        measured = measure(staging.checkpoint) if measure else None
        if measured and measured.failure and not request.keep_failed:
            raise measured.failure
        made = {
            **_manifest(plan, listener.calibration, versions),
            **({"evaluation": measured.evaluation} if measured else {}),
        }
        card = write_card(written, request.output.name, made, on_event)
        manifest = {
            **made,
            **to_manifest(listener.expert_tokens),
            "source_files": reading.digests.result(),
            "files": {**digests.result(), **digest_files(card)},
        }
        write_json(staging.checkpoint / MANIFEST, manifest)
        request.source.check_unchanged(reading.digests.result())
        staging.publish_log(request.log)
        staging.publish()
        on_event(PublishedEvent(str(staging.output)))
    if measured and measured.failure:
        raise measured.failure
    return _result(request, listener, versions, written.size_bytes, measured, start)


def _result(
    request: Request,
    listener: _Listener,
    versions: Mapping[str, str],
    size_bytes: int,
    measured: Measured | None,
    start: float,
) -> QuantizeResult:
    plan = request.plan
    library = load_backend(plan.recipe.backend).distribution
    return QuantizeResult(
        output=request.output,
        log=request.log,
        method=plan.recipe.name,
        backend=f"{library} {versions[library]}",
        quantized_modules=len(plan.quantized),
        bytes_before=plan.bytes_before,
        bytes_after=size_bytes,
        seconds=time.monotonic() - start,
        calibration=listener.calibration,
        expert_tokens=listener.expert_tokens,
        evaluation=measured.evaluation if measured else None,
        measured=measured.lines if measured else (),
    )


@dataclass(frozen=True)
class _SourceReading:
    """The weights of the source, which are read while the worker is busy."""

    request: Request
    digests: Future[Digests]
    problems: Future[list[str]]
    """Which tensors hold NaN or infinity, one sentence each."""

    def refuse_damage(self) -> None:
        """Wait for the check of the values.

        Raises: CheckpointRefused, when a value is NaN or infinite, or a file was changed.
        """
        self.request.source.check_unchanged({})
        if problems := self.problems.result():
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            folder = self.request.plan.checkpoint.path
            raise CheckpointRefused(
                "E_VALUES",
                f"{folder}: {problems[0]}{more}",
                hint="nothing was published; `qtool inspect --deep` lists all of them; compare the "
                "digest of the file with that of its publisher",
            )

    def refuse_known_damage(self) -> None:
        """Do the same, if a problem has been found."""
        if self.problems.done() and self.problems.result():
            self.refuse_damage()


def _read_source(request: Request, stack: ExitStack) -> _SourceReading:
    """Begin to read the source; a run that ends early does not wait for it."""
    source = request.plan.checkpoint
    threads = stack.enter_context(ThreadPoolExecutor(max_workers=2))
    stop = threading.Event()
    stack.callback(stop.set)
    return _SourceReading(
        request,
        threads.submit(digest_files, source.weight_files, stop=stop),
        threads.submit(check_values, source, detect(source), stop=stop),
    )


class _Listener:
    """Passes events on, keeps the calibration report, publishes the state once it is saved, and
    ends a run whose source is damaged.
    """

    def __init__(
        self, request: Request, state: Staging | None, source: _SourceReading, on_event: OnEvent
    ) -> None:
        self.calibration: Mapping[str, str | int] | None = None
        self.expert_tokens: ExpertTokens | None = None
        self._spec = request.calibration
        self._state = state
        self._source = source
        self._on_event = on_event

    def handle(self, event: Event) -> None:
        self._source.refuse_known_damage()
        if isinstance(event, CalibrationEvent):
            asked = self._spec.num_samples if self._spec else 0
            self.calibration = {**event.report, "asked": asked}
        if isinstance(event, ExpertTokensEvent):
            self.expert_tokens = ExpertTokens(event.counts)
        if isinstance(event, StateSavedEvent) and self._state is not None:
            # at once: what follows may fail, and calibration was the long part
            self._state.publish()
            self._on_event(PublishedEvent(str(self._state.output)))
        self._on_event(event)


def _stage(request: Request, stack: ExitStack) -> tuple[Staging, Staging | None]:
    """Return the paths where the checkpoint and the calibrated state are written."""
    plan = request.plan
    need_bytes = int(plan.bytes_after * 1.05) + request.source.aux_bytes
    if plan.recipe.backend == "gptqmodel":
        need_bytes += plan.bytes_before
    staging = stack.enter_context(
        stage_output(
            request.output,
            inputs=request.checkpoint_inputs,
            overwrite=request.overwrite,
            need_bytes=need_bytes,
        )
    )
    if request.state_save is None:
        return staging, None
    state = stack.enter_context(
        stage_output(
            request.state_save,
            inputs=request.inputs,
            overwrite=request.overwrite,
            need_bytes=plan.bytes_before,
        )
    )
    return staging, state


def _job(request: Request, staging: Staging, state: Staging | None) -> Job:
    return Job(
        model=str(request.plan.checkpoint.path.resolve()),
        recipe=request.plan.recipe.to_dict(),
        output=str(staging.checkpoint),
        scratch=str(staging.scratch),
        device=request.device,
        calibration=request.calibration,
        trust_remote_code=request.trust_remote_code,
        state_save=str(state.checkpoint) if state else None,
        state_restore=str(request.state_restore) if request.state_restore else None,
    )


@contextmanager
def _kept_log(staging: Staging, log: Path) -> Iterator[None]:
    """Begin the run's log, and keep it at ``log`` when the run fails; a run that is refused or
    interrupted leaves none.
    """
    staging.log.write_bytes(LOG_MARK)
    try:
        yield
    except (InputRefused, UsageError, OutputTaken, GateFailed):
        raise
    except Exception as error:
        with suppress(OSError, OutputTaken):  # the first failure is the one to report
            staging.publish_log(log)
            has_output = log.stat().st_size > len(LOG_MARK)
            if isinstance(error, BackendFailed | ResourceError) and has_output:
                error.hint = "; ".join(
                    filter(None, (error.hint, f"the output of the library is in {log}"))
                )
        raise


def _manifest(
    plan: Plan, calibration: Mapping[str, str | int] | None, versions: Mapping[str, str]
) -> JsonDict:
    """Return what a reader needs to trust the checkpoint and to make it again; no path, no user, no
    time.
    """
    recipe = plan.recipe.to_dict()
    recipe.pop("calibration", None)
    if calibration:
        calibration = {**calibration, "source": Path(str(calibration["source"])).name}
    return {
        "manifest_version": MANIFEST_VERSION,
        "model": plan.checkpoint.name,
        "source": source_metadata(plan.checkpoint),
        "recipe": recipe,
        "calibration": calibration,
        "versions": {"qtool": __version__, **versions},
    }

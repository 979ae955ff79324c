"""A worker does what a `Request` says; what it wrote is verified and published."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtool import __version__
from qtool.backends import Job, load_backend
from qtool.backends.worker import run_job
from qtool.checkpoint import (
    Staging,
    digest_files,
    stage_output,
)
from qtool.checkpoint.aux_files import MANIFEST, MANIFEST_VERSION, finish_files, write_json
from qtool.errors import (
    BackendFailed,
    InputRefused,
    OutputTaken,
    ResourceError,
    UsageError,
)
from qtool.events import (
    CalibrationEvent,
    Event,
    NoteEvent,
    OnEvent,
    StageEvent,
    StateSavedEvent,
    ignore_event,
)
from qtool.plan import Plan
from qtool.quantization.request import Request
from qtool.quantization.verification import verify
from qtool.sizes import format_size


@dataclass(frozen=True)
class QuantizeResult:
    """What a run wrote: ``output`` is complete, checked, and described by its manifest."""

    output: Path
    log: Path
    method: str
    backend: str
    quantized_modules: int
    bytes_before: int
    bytes_after: int
    seconds: float
    calibration: Mapping[str, Any] | None

    def summary(self) -> str:
        """Return the result in a few lines."""
        lines = [
            f"{self.output}: {self.method} by {self.backend}, {self.quantized_modules} modules "
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
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the result for ``--json``."""
        return {
            key: str(value) if isinstance(value, Path) else value
            for key, value in vars(self).items()
        }


def run(request: Request, *, on_event: OnEvent = ignore_event) -> QuantizeResult:
    """Run a prepared request in a worker, verify what it wrote, and put it in its place."""
    start = time.monotonic()
    plan = request.plan
    source = plan.checkpoint.path
    need_bytes = int(plan.bytes_after * 1.05) + (
        plan.bytes_before if plan.recipe.backend == "gptqmodel" else 0
    )
    with ExitStack() as stack:
        inputs = [
            source,
            *_paths(
                request.state_restore,
                Path(request.calibration.source) if request.calibration else None,
            ),
        ]
        others = [*inputs, *_paths(request.state_save)]
        staging = stack.enter_context(
            stage_output(
                request.output, inputs=others, overwrite=request.overwrite, need_bytes=need_bytes
            )
        )
        state = None
        if request.state_save:
            state = stack.enter_context(
                stage_output(
                    request.state_save,
                    inputs=inputs,
                    overwrite=request.overwrite,
                    need_bytes=plan.bytes_before,
                )
            )
        log = stack.enter_context(_kept_log(staging, request.log))
        helpers = stack.enter_context(ThreadPoolExecutor(max_workers=2))
        stop = threading.Event()
        stack.callback(stop.set)  # a run that ends early does not wait for its digests
        # while the worker is busy
        source_digests = helpers.submit(digest_files, plan.checkpoint.weight_files, stop=stop)
        calibration: dict[str, Any] | None = None

        def handle(event: Event) -> None:
            nonlocal calibration
            if isinstance(event, CalibrationEvent):
                calibration = {
                    **event.report,
                    "asked": request.calibration.num_samples if request.calibration else 0,
                }
            if isinstance(event, StateSavedEvent) and state is not None:
                state.publish()  # at once: what follows may fail, and calibration was the long part
            on_event(event)

        for note in request.notes:
            on_event(NoteEvent(note))
        job = Job(
            model=str(source.resolve()),
            recipe=plan.recipe.to_dict(),
            output=str(staging.checkpoint),
            scratch=str(staging.scratch),
            device=request.device,
            calibration=request.calibration,
            trust_remote_code=request.trust_remote_code,
            state_save=str(state.checkpoint) if state else None,
            state_restore=str(request.state_restore) if request.state_restore else None,
        )
        versions = run_job(
            job,
            plan,
            log=log,
            on_event=handle,
            python=request.backend_python,
            keep_open=staging.lock_fd,
        )
        on_event(StageEvent("checking the result"))
        finish_files(source, staging.checkpoint)
        # hashing, writing out and checking share the time
        digests = helpers.submit(digest_files, staging.files())
        flushed = helpers.submit(staging.flush)
        written = verify(plan, staging.checkpoint)
        flushed.result()  # the system tells of a write that failed once
        manifest = _manifest(plan, calibration, versions, source_digests.result(), digests.result())
        write_json(staging.checkpoint / MANIFEST, manifest)
        staging.publish()
    library = load_backend(plan.recipe.backend).distribution
    return QuantizeResult(
        output=request.output,
        log=request.log,
        method=plan.recipe.name,
        backend=f"{library} {versions[library]}",
        quantized_modules=len(plan.quantized),
        bytes_before=plan.bytes_before,
        bytes_after=written.size_bytes,
        seconds=time.monotonic() - start,
        calibration=calibration,
    )


@contextmanager
def _kept_log(staging: Staging, place: Path) -> Iterator[Path]:
    """Give the run's log; it goes to ``place`` when the run ended well or a library failed, and
    away when it was refused or interrupted.
    """
    log = staging.root / "log"
    try:
        yield log
    except (InputRefused, UsageError, OutputTaken):
        raise
    except Exception as error:
        if log.exists():
            log.replace(place)
            if isinstance(error, BackendFailed | ResourceError):
                error.hint = "; ".join(
                    filter(None, (error.hint, f"what the library said is in {place}"))
                )
        raise
    log.replace(place)


def _paths(*paths: Path | None) -> list[Path]:
    return [path for path in paths if path is not None]


def _manifest(
    plan: Plan,
    calibration: dict[str, Any] | None,
    versions: dict[str, str],
    source: dict[str, Any],
    files: dict[str, Any],
) -> dict[str, Any]:
    """Return what a reader needs to trust the checkpoint and to make it again; no path, no user, no
    time.
    """
    return {
        "manifest_version": MANIFEST_VERSION,
        "model": plan.checkpoint.name,
        "recipe": {
            key: value for key, value in plan.recipe.to_dict().items() if key != "calibration"
        },
        "calibration": calibration
        and {**calibration, "source": Path(str(calibration["source"])).name},
        "versions": {"qtool": __version__, **versions},
        "source_files": source,
        "files": files,
    }

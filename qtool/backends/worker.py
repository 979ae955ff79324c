"""Run one job in a process of its own: `run_job` starts it and reads its events, `main` is what
runs there.

The worker gets its job as one JSON line on stdin, and stdin stays open as its lifeline: when the
parent dies, it ends. It sends events as JSON lines over a pipe. Its stdout and stderr, banners and
all, go to the log.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib
import importlib.metadata
import json
import os
import platform
import random
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

from qtool.architecture import map_names
from qtool.backends import Job, Work, check_device, check_model_code, load_backend
from qtool.backends.failures import from_exception, from_exit
from qtool.calibration import CalibrationSpec, isolated_tokenizing, load_calibration
from qtool.checkpoint import open_checkpoint
from qtool.devices import gpu_number
from qtool.errors import (
    ResourceError,
    from_wire,
    to_wire,
)
from qtool.events import (
    CalibrationEvent,
    DoneEvent,
    ErrorEvent,
    Event,
    ExpertTokensEvent,
    OnEvent,
    ProgressEvent,
    StageEvent,
    StateSavedEvent,
    from_line,
    to_line,
)
from qtool.imports import skip_unused
from qtool.memory import no_collection
from qtool.plan import Plan, make_plan
from qtool.recipe import recipe_from
from qtool.sandbox import code_of_main
from qtool.terminal import lossy_stream

# threads that spin while they wait starve whoever shares the cores
TRACEBACK_S = 5.0  # for a worker that has sent its error to write the traceback to the log
QUIET_WAITING = {"OMP_WAIT_POLICY": "passive"}
VERSIONS = ("torch", "transformers", "safetensors")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def run_job(
    job: Job,
    plan: Plan,
    *,
    log: Path,
    on_event: OnEvent,
    python: str = sys.executable,
    keep_open: int,
) -> dict[str, str]:
    """Run ``job`` in a worker and pass its events to ``on_event``; return the versions it ran with
    when it is done.

    Args:
        log: the file to which everything is appended that the library prints.
        python: the interpreter to run in; its environment needs the library, pydantic and PyYAML,
            not qtool.
        keep_open: a descriptor the worker inherits; it holds the output's lock until the last of
            both ends.
    Raises: whatever QtoolError the worker sent; ResourceError when it was killed, as the system
        does when memory runs out;
        BackendFailed when it ended in any other way.
    """
    read_fd, write_fd = os.pipe()
    code = code_of_main("qtool.backends.worker", write_fd)
    backend = load_backend(plan.recipe.backend)
    environment = {
        **QUIET_WAITING,
        **os.environ,
        **_device_environment(job.device),
        "TMPDIR": job.scratch,
        **backend.environment(plan, job.device),
    }
    with log.open("ab") as log_file, os.fdopen(read_fd, "rb") as pipe:
        try:
            worker = subprocess.Popen(
                [python, "-P", "-c", code],
                stdin=subprocess.PIPE,
                stdout=log_file,
                stderr=log_file,
                env=environment,
                cwd=job.scratch,
                pass_fds=(write_fd, keep_open),
                start_new_session=True,
            )
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.ENOMEM):
                raise ResourceError(
                    "E_OUT_OF_MEMORY",
                    f"the system cannot start a process for the library: {error.strerror}",
                    hint="end other programs, or raise `ulimit -u`",
                ) from error
            raise ResourceError(
                "E_BACKEND_PYTHON",
                f"{python} cannot be started: {error.strerror}",
                hint="check --backend-python",
            ) from None
        finally:
            os.close(write_fd)
        try:
            assert worker.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it died at once; what follows says how
                worker.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
                worker.stdin.flush()
            for event in _events(worker, pipe):
                if isinstance(event, ErrorEvent):
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        worker.wait(TRACEBACK_S)
                    raise from_wire(event.error)
                on_event(event)
                if isinstance(event, DoneEvent):
                    return dict(event.versions)
            raise from_exit(worker.wait(), plan, job, log)
        finally:
            _kill(worker)


def _events(worker: subprocess.Popen[bytes], pipe: BinaryIO) -> Iterator[Event]:
    """Yield the worker's events until it is done or gone.

    A process it left behind may hold the pipe open, so its end is watched too.
    """
    buffer = b""
    while True:
        ended = worker.poll() is not None
        if not select.select([pipe], [], [], 0 if ended else 0.5)[0]:
            if ended:
                return
            continue
        chunk = os.read(pipe.fileno(), 1 << 16)
        if not chunk:
            return
        *lines, buffer = (buffer + chunk).split(b"\n")
        yield from map(from_line, lines)


def _kill(worker: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    if worker.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            worker.stdin.close()


def _device_environment(device: str) -> dict[str, str]:
    """Return the variables that show a worker only ``device``."""
    if device == "cpu":
        return {"CUDA_VISIBLE_DEVICES": ""}
    index = gpu_number(device)
    if index is None:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return {"CUDA_VISIBLE_DEVICES": str(index), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    listed = [entry for entry in visible.split(",") if entry]
    if index >= len(listed):
        message = (
            f"device `{device}` was asked for and CUDA_VISIBLE_DEVICES shows {len(listed)} devices"
        )
        raise ResourceError(
            "E_NO_DEVICE",
            message,
            hint="devices are counted from 0 among those that are visible",
        )
    return {"CUDA_VISIBLE_DEVICES": listed[index]}


class _PipeReporter:
    """Sends events over the pipe, and remembers the last one for an error's message."""

    def __init__(self, write_fd: int) -> None:
        self._descriptor = write_fd
        self._lock = threading.Lock()
        self.where = "while starting"

    def send(self, event: Event) -> None:
        line = to_line(event).encode()
        with self._lock:
            _write_all(self._descriptor, line)

    def stage(self, what: str) -> None:
        self.where = f"while {what}"
        self.send(StageEvent(what))

    def progress(self, what: str, done: int, total: int) -> None:
        self.where = f"after {what} {done} of {total}"
        self.send(ProgressEvent(what, done, total))

    def expert_tokens(self, counts: Mapping[str, Sequence[int]]) -> None:
        self.send(ExpertTokensEvent(counts))

    def state_saved(self) -> None:
        self.send(StateSavedEvent())

    def fail(self, error: BaseException, job: Job) -> None:
        """Send ``error``, or an error that was made before if there is no memory to describe it."""
        try:
            self.send(ErrorEvent(to_wire(from_exception(error, job, self.where))))
        except MemoryError:
            _write_all(self._descriptor, _NO_MEMORY_LINE)


_NO_MEMORY_LINE = to_line(
    ErrorEvent(
        to_wire(
            ResourceError(
                "E_OUT_OF_MEMORY",
                "the library's process ran out of memory",
                hint="use a machine with more memory, or raise the limit",
            )
        )
    )
).encode()


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def main(write_fd: int) -> None:
    """Run the job that stdin brings, and end the process."""
    _die_with_parent()
    os.set_inheritable(write_fd, False)
    # the log may be on a full disk: a line that cannot be written must not end the work
    sys.stdout = lossy_stream(1)
    sys.stderr = lossy_stream(2)
    report = _PipeReporter(write_fd)
    data = json.loads(sys.stdin.readline())
    if data["calibration"] is not None:
        data["calibration"] = CalibrationSpec(**data["calibration"])
    job = Job(**data)
    skip_unused(str(job.recipe["backend"]))
    try:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
        _run(job, report)
        report.send(DoneEvent(_versions(str(job.recipe["backend"]))))
    except BaseException as error:
        report.fail(error, job)
        with contextlib.suppress(Exception):
            traceback.print_exception(error)
    os._exit(0)  # libraries leave threads and exit hooks that can take seconds or hang


def _versions(backend: str) -> dict[str, str]:
    libraries = (*VERSIONS, load_backend(backend).distribution)
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in libraries},
    }


def _run(job: Job, report: _PipeReporter) -> None:
    recipe = recipe_from(job.recipe)
    checkpoint = open_checkpoint(Path(job.model))
    plan = make_plan(checkpoint, recipe, map_names(checkpoint))
    samples: tuple[tuple[int, ...], ...] = ()
    if job.calibration is not None:
        report.stage("reading calibration data")
        vocab_size = int(plan.checkpoint.text_config.get("vocab_size", 1 << 31))
        with isolated_tokenizing(
            job.calibration,
            Path(job.model),
            vocab_size,
            trust_remote_code=job.trust_remote_code,
        ) as steps:
            calibration = load_calibration(job.calibration, steps)
        samples = calibration.samples
        report.send(CalibrationEvent(asdict(calibration.report)))
    backend = load_backend(recipe.backend)
    report.stage(f"importing {backend.distribution}")
    with no_collection(keep=True):
        device = _find_device(job.device, plan)
        check_model_code(plan.checkpoint, trusted=job.trust_remote_code)
        for module in backend.modules:
            importlib.import_module(module)
    _seed(recipe.seed)
    backend.quantize(Work(job, plan, samples, device, report))


def _find_device(device: str, plan: Plan) -> str:
    import torch

    found = torch.cuda.is_available()
    # the environment shows the worker one device alone
    check_device(device.partition(":")[0], plan.recipe, gpus=int(found))
    return "cuda:0" if found else "cpu"


def _seed(seed: int) -> None:
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def _die_with_parent() -> None:
    with contextlib.suppress(AttributeError):  # not Linux: the lifeline alone has to do
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_with_stdin() -> None:
    sys.stdin.read()
    os._exit(1)

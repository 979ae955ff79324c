"""What the failure of a worker means to the user: an exception, or an end without a result."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
from pathlib import Path

from qtool.backends import BACKENDS, Job, host_memory_bytes, load_backend, version_of
from qtool.errors import (
    BackendFailed,
    QtoolError,
    ResourceError,
    from_os_error,
    library_os_error,
    one_line,
)
from qtool.memory import address_space_is_limited, limit_bytes, memory_error, says_no_memory
from qtool.plan import Plan
from qtool.sizes import format_size

TAIL_BYTES = 4096  # of the log: what a worker printed last
FULL_BYTES = 1 << 16  # a disk with less is full
# what GPTQModel and transformers say when a file of the model's folder could not be read, without
# the error of the system
NOT_READ = ("can't open model path", "Repo id must be in the form")
# signals that code sends itself; all others come from outside
CRASHES = (signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV)


def from_exception(error: BaseException, job: Job, where: str) -> QtoolError:
    """Return what ``error``, raised in a worker, means to the user; ``where`` says how far the work
    was, e.g. ``while saving``.
    """
    if isinstance(error, QtoolError):
        return error
    library = version_of(load_backend(str(job.recipe["backend"])))
    hint = "lower --num-samples, --seq-len or --batch-size, or run it with --device cpu"
    no_memory = memory_error(error, library, where=where, hint=hint)
    if no_memory is not None:
        return no_memory
    if isinstance(error, ModuleNotFoundError) and (missing := _distribution(error.name or "")):
        return ResourceError(
            "E_NOT_INSTALLED",
            f"{library} needs the package `{error.name}`",
            hint=f"pip install {missing}",
        )
    inputs, outputs = _paths(job)
    if file_error := library_os_error(error, [*inputs, *outputs]):
        if file_error.filename is None and file_error.errno in (errno.ENOSPC, errno.EDQUOT):
            file_error.filename = job.output
        return from_os_error(file_error, reading=inputs, where=where)
    if any(text in str(error) for text in NOT_READ):
        not_read = OSError(errno.EIO, os.strerror(errno.EIO), job.model)
        return from_os_error(not_read, reading=inputs, where=where)
    if shutil.disk_usage(job.output).free < FULL_BYTES:  # torch does not say why a write failed
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), job.output)
        return from_os_error(full, where=where)
    return BackendFailed(
        "E_BACKEND_FAILED", f"{library} failed {where}: {type(error).__name__}: {one_line(error)}"
    )


def _distribution(module: str) -> str:
    """Return what to install for ``module``; empty when qtool does not ask for it."""
    if module in BACKENDS:
        return load_backend(module).distribution
    known = (*BACKENDS, "torch", "transformers")
    return module if module.partition(".")[0] in known else ""


def _paths(job: Job) -> tuple[list[Path], list[Path]]:
    """Return what the job reads and what it writes."""
    source = job.calibration.source if job.calibration else None
    inputs = [job.model, source, job.state_restore]
    outputs = [job.output, job.scratch, job.state_save]
    return [Path(path) for path in inputs if path], [Path(path) for path in outputs if path]


def from_exit(status: int, plan: Plan, job: Job, log: Path) -> QtoolError:
    """Return why a worker ended that sent neither a result nor an error.

    Args:
        status: its exit code; negative for the signal that ended it.
        plan: what it worked on.
        job: where it read and wrote.
        log: what it printed.
    """
    library = version_of(load_backend(plan.recipe.backend))
    last_words = _tail(log)
    ended = f"with exit code {status}"
    if status < 0:
        ended = f"by signal {signal.Signals(-status).name}"
    crashed = -status in CRASHES and address_space_is_limited()
    if status == -signal.SIGKILL or crashed or says_no_memory(last_words):
        return _too_little_memory(library, ended, plan)
    if shutil.disk_usage(log.parent).free < FULL_BYTES:
        return from_os_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(log)))
    inputs, outputs = _paths(job)
    file_error = _printed_os_error(last_words, [*inputs, *outputs])
    if file_error is not None:
        return from_os_error(file_error, reading=inputs, where="while the library ran")
    if status < 0 and -status not in CRASHES:
        return ResourceError(
            "E_WORKER_KILLED",
            f"{library} was ended {ended}, which came from outside",
            hint="run it again; `ulimit -t` and memory watchers send such signals",
        )
    return BackendFailed("E_BACKEND_DIED", f"{library} ended {ended} without a result")


def _too_little_memory(library: str, ended: str, plan: Plan) -> ResourceError:
    needed = host_memory_bytes(plan)
    return ResourceError(
        "E_OUT_OF_MEMORY",
        f"{library} ended {ended}, most likely for memory: about {format_size(needed)} were "
        f"needed, and it may have {format_size(limit_bytes())}",
        hint="lower --num-samples or --seq-len, or use a machine with more memory",
    )


def _printed_os_error(printed: str, roots: list[Path]) -> OSError | None:
    """Return the last OSError, of Python or Rust, whose traceback is in ``printed``; else one that
    is quoted there.

    Some libraries end the process when a thread of theirs fails, having printed its traceback.
    """
    number = r"(?:\[Errno (\d+)\]|.*\(os error (\d+)\))"
    raised = rf"^[\w.]*(?:Error|Exception): {number}.*"
    for last in [*re.finditer(raised, printed, re.MULTILINE)][-1:]:
        if named := library_os_error(RuntimeError(last[0]), roots):
            return named
        code = int(last[1] or last[2])
        names_none = not re.search("['\"]", last[0])
        if names_none and (found := library_os_error(OSError(code, os.strerror(code)), ())):
            return found
    return library_os_error(RuntimeError(printed), ())


def _tail(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL_BYTES))
        return file.read().decode(errors="replace")

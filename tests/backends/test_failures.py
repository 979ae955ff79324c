"""What the end of a worker means: an exit code of resources where the machine had too little, also
when nothing could be written to the log.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from support import EXAMPLE

from qtool.backends import Job, check_device, failures
from qtool.backends.failures import from_exception, from_exit
from qtool.checkpoint import open_checkpoint
from qtool.errors import ResourceError
from qtool.events import from_line
from qtool.plan import make_plan
from qtool.recipe import load_recipe


@pytest.fixture
def job(tmp_path):
    recipe = load_recipe("fp8_dynamic")
    return Job(str(EXAMPLE), recipe.to_dict(), str(tmp_path), str(tmp_path), "cpu", None)


@pytest.fixture(scope="module")
def plan():
    return make_plan(open_checkpoint(EXAMPLE), load_recipe("fp8_dynamic"))


@pytest.mark.parametrize(
    ("status", "log", "code"),
    [
        (-signal.SIGKILL, b"", "E_OUT_OF_MEMORY"),
        (-signal.SIGABRT, b"terminate called after 'std::bad_alloc'", "E_OUT_OF_MEMORY"),
        (-signal.SIGABRT, b"memory allocation of 99 bytes failed", "E_OUT_OF_MEMORY"),
        (1, b"ImportError: libx.so: failed to map segment from shared object", "E_OUT_OF_MEMORY"),
        (1, b"OSError: [Errno 28] No space left on device", "E_DISK"),
        (1, b"x" * 9000 + b"SafetensorError: (os error 27)", "E_FILE_SIZE"),
        (-signal.SIGTERM, b"", "E_WORKER_KILLED"),
        (-signal.SIGXCPU, b"", "E_WORKER_KILLED"),
        (-signal.SIGSEGV, b"", "E_BACKEND_DIED"),
        (3, b"\xff", "E_BACKEND_DIED"),
    ],
)
def test_a_worker_that_sent_nothing_is_understood(plan, job, tmp_path, status, log, code):
    (tmp_path / "log").write_bytes(log)
    error = from_exit(status, plan, job, tmp_path / "log")
    assert error.code == code
    assert error.exit_code == (5 if code == "E_BACKEND_DIED" else 4)


def test_a_crash_below_ulimit_v_is_one_of_memory(plan, job, tmp_path, monkeypatch):
    (tmp_path / "log").touch()
    monkeypatch.setattr(failures, "address_space_is_limited", lambda: True)
    assert from_exit(-signal.SIGSEGV, plan, job, tmp_path / "log").code == "E_OUT_OF_MEMORY"


def test_the_file_that_made_a_library_end_its_process_is_found_in_the_log(plan, job, tmp_path):
    log = tmp_path / "log"
    log.write_text(f"ERROR\nPermissionError: [Errno 13] Permission denied: '{tmp_path}/a'\n\n")
    assert from_exit(1, plan, job, log).code == "E_UNWRITABLE"
    log.write_text(f"OSError: [Errno 5] Input/output error: '{EXAMPLE}/config.json'\nended\n")
    assert from_exit(1, plan, job, log).code == "E_UNREADABLE"
    log.write_text(f'rust.SafetensorError: I/O error: (os error 13) at path "{tmp_path}/a"\n')
    assert f"{tmp_path}/a cannot be written" in from_exit(1, plan, job, log).message
    log.write_text("Traceback:\nIsADirectoryError: [Errno 21] Is a directory\n")
    assert from_exit(1, plan, job, log).code == "E_UNWRITABLE"
    log.write_text("PermissionError: [Errno 13] Permission denied: '/nowhere/tool'\n")
    assert from_exit(1, plan, job, log).code == "E_BACKEND_DIED"


def test_a_library_that_keeps_the_error_of_the_system_to_itself_is_understood(job):
    said = "Loader: can't open model path `/m` for offload_to_disk."
    error = from_exception(RuntimeError(said), job, "while loading the model")
    assert (error.exit_code, error.code) == (3, "E_UNREADABLE")


@pytest.mark.parametrize("status", [1, -signal.SIGBUS])
def test_a_disk_that_is_full_is_seen_without_a_log(plan, job, tmp_path, monkeypatch, status):
    (tmp_path / "log").touch()
    monkeypatch.setattr(failures, "FULL_BYTES", 1 << 62)
    assert from_exit(status, plan, job, tmp_path / "log").code == "E_DISK"
    assert from_exception(RuntimeError("file write failed"), job, "while saving").code == "E_DISK"


WORKER = """
import os, sys
from qtool.backends import worker
def broken(job, report):
    print("x" * 100_000)  # what a library prints
    print("y" * 100_000, file=sys.stderr, flush=True)
    {what}
worker._run = broken
worker.main(int(sys.argv[1]))
"""


@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("raise OSError(28, 'No space left on device', job.output)", "E_DISK"),
        ("raise RuntimeError('Cannot allocate memory')", "E_OUT_OF_MEMORY"),
        (
            "worker.from_exception = broken_too = lambda *_: [0] * 2**62; raise ValueError",
            "E_OUT_OF_MEMORY",
        ),
        ("raise SystemExit(3)", "E_BACKEND_FAILED"),
    ],
)
def test_a_worker_whose_log_is_on_a_full_disk_sends_its_error(job, what, code):
    read_fd, write_fd = os.pipe()
    with Path("/dev/full").open("wb") as full:
        worker = subprocess.Popen(
            [sys.executable, "-c", WORKER.format(what=what), str(write_fd)],
            stdin=subprocess.PIPE,
            stdout=full,
            stderr=full,
            pass_fds=[write_fd],
        )
    os.close(write_fd)
    worker.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
    worker.stdin.flush()
    with os.fdopen(read_fd, "rb") as pipe:
        event = from_line(pipe.readline())
    worker.communicate(timeout=30)
    assert event.error["code"] == code


def test_too_little_address_space_to_start_with_is_said_at_once():
    limit = (128 << 20, resource.RLIM_INFINITY)
    done = subprocess.run(
        [sys.executable, "-m", "qtool.cli", "quantize", "--list", "--json"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, limit),
        capture_output=True,
        text=True,
    )
    error = json.loads(done.stdout)["error"]
    assert (done.returncode, error["code"]) == (4, "E_OUT_OF_MEMORY")
    assert "134.22 MB" in error["message"]


@pytest.mark.parametrize(
    ("method", "device", "gpus", "code"),
    [
        ("fp8_dynamic", "cpu", 0, ""),
        ("fp8_dynamic", "auto", 0, ""),
        ("fp8_dynamic", "cuda", 0, "E_NO_DEVICE"),
        ("fp8_dynamic", "cuda:1", 1, "E_NO_DEVICE"),
        ("fp8_dynamic", "cuda:1", 2, ""),
        ("torchao_int4wo", "auto", 0, "E_NEEDS_GPU"),
        ("torchao_int4wo", "cpu", 1, "E_NEEDS_GPU"),
        ("torchao_int4wo", "auto", 1, ""),
    ],
)
def test_a_device_that_a_run_needs_and_is_not_there_is_refused(method, device, gpus, code):
    found = ""
    try:
        check_device(device, load_recipe(method), gpus=gpus)
    except ResourceError as error:
        found = error.code
    assert found == code

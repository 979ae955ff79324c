"""Let one file operation of a run fail, in the command or in its worker, and say how it ended.

`Faults` starts a process that has loaded faults.c and all libraries. It forks for each run, so that
a run takes a second and not ten: ``python -m support.faults SCENARIO FOLDER`` is what it starts.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from support import EXAMPLE, TESTS

ERRORS = (
    *("ENOSPC", "EFBIG", "EBUSY", "EISDIR", "EACCES"),
    *("ENAMETOOLONG", "EROFS", "EIO", "EMFILE"),
)
GOOD_ENDS = (3, 4, 6)
RUN_S = 120.0
COMMON = ("--model-path", "{root}/model", "--output", "{root}/out", "--quiet")
DATA = ("--calibration", "{root}/model/calibration.jsonl", "--num-samples", "2", "--seq-len", "64")
QUANTIZE = ("quantize", *COMMON, "--device", "cpu", "--method")
SCENARIOS = {  # name -> arguments, modules that are imported beforehand
    "export": (("export", *COMMON, "--to", "f16"), ()),
    "overwrite": (("export", *COMMON, "--to", "f16", "--overwrite"), ()),
    "inspect": (("inspect", "--model-path", "{root}/model", "--deep", "--verify"), ()),
    "llmcompressor": ((*QUANTIZE, "fp8_dynamic"), ("llmcompressor",)),
    "llmcompressor data": ((*QUANTIZE, "fp8_static", *DATA), ("llmcompressor",)),
    "gptqmodel": ((*QUANTIZE, "gptq_int4", *DATA), ("gptqmodel",)),
    "modelopt": ((*QUANTIZE, "modelopt_fp8", *DATA), ("modelopt.torch.quantization",)),
    "torchao": ((*QUANTIZE, "torchao_int8wo"), ("torchao.quantization",)),
}


@dataclass(frozen=True)
class Fault:
    """One file operation that is to fail."""

    process: str
    """command or worker."""
    number: int
    """Which of its operations, from 0; -1 for none."""
    error: str = "EIO"


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    exit_code: int
    stderr: str
    operations: tuple[str, ...]
    """Of the process that was asked for: what and on which file."""
    problems: tuple[str, ...]
    """What should not be."""
    log: str
    """The end of what the library printed."""

    @property
    def code(self) -> str:
        """The error code it ended with; empty when it ended well."""
        found = re.search(r"error\[(\w+)\]", self.stderr)
        return found[1] if found else ""


def may_fail(process: str, operation: str) -> bool:
    """Whether the run notices that ``operation`` fails. Libraries ask whether optional files are
    there, and take an error for a no.
    """
    return process == "command" or not operation.startswith("stat\t")


class Faults:
    """Runs one scenario again and again in ``folder``."""

    def __init__(self, scenario: str, folder: Path) -> None:
        library = folder / "faults.so"
        source = Path(__file__).with_suffix(".c")
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-w", source, "-o", library], check=True)
        python_path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
        self._server = subprocess.Popen(
            [sys.executable, "-m", "support.faults", scenario, str(folder / "files")],
            env={**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": python_path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Faults:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()

    def run(self, fault: Fault) -> Outcome:
        """Run the scenario with one fault, and check what it leaves."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(vars(fault)) + "\n")
        self._server.stdin.flush()
        found = json.loads(self._server.stdout.readline())
        return Outcome(**{**found, **{name: tuple(found[name]) for name in LISTS}})


LISTS = ("operations", "problems")


# What runs in the process that forks


def main(scenario: str, folder: Path) -> None:
    """Answer each fault on stdin with an outcome on stdout."""
    arguments, modules = SCENARIOS[scenario]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for name in ("qtool.cli.app", "qtool.conversion.streaming", "transformers", *modules):
        importlib.import_module(name)
    folder.mkdir()
    _make_model(folder / "model")
    command = [argument.format(root=folder) for argument in arguments]
    expects_output = "--output" in command
    if "--overwrite" in command:
        _run(command, folder, Fault("command", -1))
    source = _contents(folder / "model")
    before = _contents(folder / "out")
    for line in sys.stdin:
        fault = Fault(**json.loads(line))
        exit_code, stderr, operations = _run(command, folder, fault)
        problems = list(_problems(exit_code, stderr, fault))
        log = folder / "out.qtool.log"
        log_text = log.read_text(errors="replace")[-3000:] if log.exists() else ""
        if _contents(folder / "model") != source:
            problems.append("the source was changed")
        if expects_output:
            problems += _output_problems(folder, exit_code, before, command)
        outcome = {
            "exit_code": exit_code,
            "stderr": stderr[-3000:],
            "operations": operations,
            "problems": problems,
            "log": log_text,
        }
        answers.write(json.dumps(outcome) + "\n")


def _make_model(folder: Path) -> None:
    """Write the bundled model with one layer, described by a manifest."""
    from qtool.checkpoint import digest_files
    from support.samples import shorten

    shorten(EXAMPLE, folder, layers=1)
    shutil.copy(EXAMPLE / "calibration.jsonl", folder)
    manifest = {"files": digest_files(folder.iterdir())}
    (folder / "qtool-manifest.json").write_text(json.dumps(manifest))


def _contents(folder: Path) -> dict[str, bytes] | None:
    if not folder.exists():
        return None
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _problems(exit_code: int, stderr: str, fault: Fault) -> list[str]:
    problems = []
    # a fault that something else makes up for is none
    if exit_code not in (0, *GOOD_ENDS) or (fault.number < 0 and exit_code):
        problems.append(f"exit code {exit_code}")
    if exit_code and "error[E_" not in stderr:
        problems.append("no error code")
    if "Traceback" in stderr:
        problems.append("a traceback")
    return problems


def _output_problems(
    folder: Path, exit_code: int, before: dict[str, bytes] | None, command: list[str]
) -> list[str]:
    """Say what is wrong with the output, then put everything back as it was."""
    from qtool.checkpoint.manifest import check_manifest

    problems = []
    output = folder / "out"
    now = _contents(output)
    if exit_code and now != before and not (now and check_manifest(output).matches):
        problems.append("an output that is neither the former one nor complete")
    if not exit_code and not check_manifest(output).matches:
        problems.append("exit code 0 without a complete output")
    left = [path for path in folder.iterdir() if path.name not in ("model", "out", "out.qtool.log")]
    if left or (exit_code and now != before):
        if before is None and now is not None:
            shutil.rmtree(output)
        next_code, stderr, _ = _run(command, folder, Fault("command", -1))
        if next_code:
            problems.append(f"the next run ended with {next_code}: {stderr[-300:]}")
        left = [path for path in left if path.exists()]
        problems += [f"{path.name} is still there" for path in left]
    if before is None and output.exists():
        shutil.rmtree(output)
    (folder / "out.qtool.log").unlink(missing_ok=True)
    return problems


def _run(command: list[str], folder: Path, fault: Fault) -> tuple[int, str, list[str]]:
    """Run ``command`` in a fork; return its exit code, stderr and operations."""
    with tempfile.TemporaryFile() as errors, tempfile.TemporaryFile() as log:
        pid = os.fork()
        if not pid:
            _become_command(command, folder, fault, errors, log)
        status = _wait(pid)
        errors.seek(0)
        log.seek(0)
        lines = log.read().decode(errors="replace").splitlines()
        return status, errors.read().decode(errors="replace"), lines


def _wait(pid: int) -> int:
    deadline = time.monotonic() + RUN_S
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -1000  # it hung


def _become_command(
    command: list[str], folder: Path, fault: Fault, errors: IO[bytes], log: IO[bytes]
) -> None:
    import qtool.backends.worker
    from qtool.cli import main as run

    try:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.dup2(errors.fileno(), 2)
        sys.stdin, sys.stdout = _stream(0, "r"), _stream(1, "w")
        sys.stderr = _stream(2, "w")
        _ForkedWorker.fault, _ForkedWorker.folder, _ForkedWorker.log = fault, folder, log
        qtool.backends.worker.subprocess = _Subprocess  # type: ignore[assignment]
        if fault.process == "command":
            arm(folder, fault, log)
        run(command)
    except SystemExit as end:
        sys.stderr.flush()
        os._exit(int(end.code or 0))
    os._exit(99)


def _stream(descriptor: int, mode: str) -> IO[str]:
    """Return a stream that leaves its descriptor open."""
    return os.fdopen(descriptor, mode, closefd=False)


def arm(folder: Path, fault: Fault, log: IO[bytes]) -> None:
    """Let an operation of this process fail."""
    library = ctypes.CDLL(None)
    code = getattr(errno, fault.error)
    place = os.fsencode(folder)
    library.fault_arm(place, ctypes.c_long(fault.number), code, log.fileno())


class _ForkedWorker:
    """Stands in for the `Popen` of a worker: a fork that has imported the library."""

    fault: Fault
    folder: Path
    log: IO[bytes]

    def __init__(self, command: list[str], **options: Any) -> None:
        read_fd, write_fd = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            self._become_worker(read_fd, write_fd, options)
        os.close(read_fd)
        self.stdin = os.fdopen(write_fd, "wb")
        self._status: int | None = None

    def _become_worker(self, read_fd: int, write_fd: int, options: dict[str, Any]) -> None:
        from qtool.backends import worker

        try:
            os.setsid()
            os.dup2(read_fd, 0)
            os.close(write_fd)
            os.dup2(options["stdout"].fileno(), 1)
            os.dup2(options["stderr"].fileno(), 2)
            sys.stdin = _stream(0, "r")
            os.environ.update(options["env"])
            os.chdir(options["cwd"])
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            fault = self.fault if self.fault.process == "worker" else Fault("worker", -1)
            arm(self.folder if fault is self.fault else Path("/none"), fault, self.log)
            worker.main(options["pass_fds"][0])
        except BaseException:
            traceback.print_exc()
        os._exit(98)  # it ends like a worker that died

    def poll(self) -> int | None:
        if self._status is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def wait(self, timeout: float = RUN_S) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("worker", timeout)
            time.sleep(0.005)
        assert self._status is not None
        return self._status


class _Subprocess:
    """What the worker's module takes from `subprocess`."""

    Popen = _ForkedWorker
    PIPE = subprocess.PIPE
    TimeoutExpired = subprocess.TimeoutExpired


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

"""What reaches stdout and stderr, and the exit code, however a command ends and whatever the
streams are.
"""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys

import pytest

from qtool.cli.app import run
from qtool.errors import UsageError

pytestmark = pytest.mark.slow  # each test starts processes

QTOOL = f"{shlex.quote(sys.executable)} -m qtool.cli"


@pytest.fixture
def sh(tmp_path, tiny_model):
    """A function that runs a line of the shell in ``tmp_path``, where $QTOOL is qtool and $MODEL a
    model.
    """

    def sh(line: str) -> subprocess.CompletedProcess[str]:
        text = line.replace("$QTOOL", QTOOL).replace("$MODEL", shlex.quote(str(tiny_model)))
        return subprocess.run(
            ["bash", "-c", text], cwd=tmp_path, capture_output=True, text=True, timeout=120
        )

    return sh


@pytest.mark.parametrize(
    ("line", "exit_code"),
    [
        ("$QTOOL inspect --model-path $MODEL >&-", 0),  # nobody wants the result
        ("$QTOOL inspect --model-path $MODEL <&- >&- 2>&-", 0),
        ("$QTOOL inspect --model-path $MODEL >/dev/full", 4),
        ("$QTOOL inspect --model-path $MODEL --modules --html /dev/full", 4),
        ("$QTOOL quantize --list >/dev/full", 4),
        ("$QTOOL inspect --model-path ./none --json >/dev/full 2>/dev/full", 3),
        ("mkdir z; cd z; rmdir ../z; $QTOOL export --model-path ../m --to f16 -o ../o", 4),
        ("$QTOOL inspect --model-path $MODEL --modules | true; exit ${PIPESTATUS[0]}", 4),
    ],
)
def test_streams_that_are_closed_or_full_give_an_exit_code(sh, line, exit_code):
    done = sh(line)
    assert done.returncode == exit_code, done.stderr
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_progress_that_cannot_be_written_is_lost_and_the_work_is_not(sh, tmp_path):
    done = sh("$QTOOL export --model-path $MODEL --to f16 --output out --verbose >&- 2>/dev/full")
    assert done.returncode == 0
    assert (tmp_path / "out" / "qtool-manifest.json").is_file()


def test_a_result_that_cannot_be_printed_names_what_was_written(sh, tmp_path):
    done = sh("$QTOOL export --model-path $MODEL --to f16 --output out >/dev/full")
    assert done.returncode == 4
    assert f"complete: {tmp_path / 'out'}" in done.stderr
    assert (tmp_path / "out" / "qtool-manifest.json").is_file()


BUG = """
import sys, qtool.inspection as module
def broken(*arguments, **options): {what}
module.inspect = broken
from qtool.cli import main
main(["inspect", "--model-path", sys.argv[1], "--json"])
"""


@pytest.mark.parametrize(
    ("what", "exit_code", "code"),
    [
        ("raise TypeError('a\\x1b[2J')", 1, "E_BUG"),
        ("raise SystemExit(7)", 1, "E_BUG"),
        ("raise MemoryError", 4, "E_OUT_OF_MEMORY"),
        ("raise OSError(28, 'No space left on device', 'x')", 4, "E_DISK"),
        ("import os; os.kill(os.getpid(), 2)", 130, "E_INTERRUPTED"),
        ("print('a library says hello'); raise ValueError", 1, "E_BUG"),
    ],
)
def test_every_outcome_is_one_json_document(tiny_model, what, exit_code, code):
    command = [sys.executable, "-c", BUG.format(what=what), str(tiny_model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    error = json.loads(done.stdout)["error"]
    assert done.returncode == error["exit_code"] == exit_code, done.stderr
    assert error["code"] == code
    assert f"error[{code}]: " in done.stderr
    assert ("Traceback" in done.stderr) == (code == "E_BUG")
    assert "\x1b" not in done.stderr


PUBLISHED = """
import os, sys, qtool.quantization as module
from qtool.errors import BackendFailed
from types import SimpleNamespace
from qtool.events import PublishedEvent, StageEvent
module.prepare = lambda *arguments, **options: SimpleNamespace(gate=())
def run(request, *, on_event, measure):
    on_event(PublishedEvent("/x/state"))
    {what}
module.run = run
from qtool.cli import main
main(["quantize", "--model-path", "m", "--method", "modelopt_fp8", "--json"])
"""


@pytest.mark.parametrize(
    "what",
    [
        "os.kill(os.getpid(), 15)",
        "raise BackendFailed('E_BACKEND_FAILED', 'x')",
        """try: os.kill(os.getpid(), 15)
    except BaseException: pass  # a library that is imported
    on_event(StageEvent("next"))
    raise ValueError""",
    ],
)
def test_what_was_published_before_the_end_is_named(what):
    command = [sys.executable, "-c", PUBLISHED.format(what=what)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout)["error"]["published"] == ["/x/state"]
    assert "/x/state is complete" in done.stderr
    assert "no output was written" not in done.stderr


def test_ignored_signals_stay_ignored(tiny_model):
    code = BUG.format(what="import os; os.kill(os.getpid(), 1); raise ValueError('went on')")
    command = ["nohup", sys.executable, "-c", code, str(tiny_model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout)["error"]["message"] == "ValueError: went on"


INTERRUPTED = """
import os, sys, qtool.conversion as module
from qtool.cli import main
from qtool.events import ProgressEvent
run_export = module.run_export
def interrupted(model_path, options, *, on_event):
    def interrupt(event):
        on_event(event)
        if isinstance(event, ProgressEvent):  # one layer is written, others are in threads
            try: os.kill(os.getpid(), {number})
            finally: os.kill(os.getpid(), {number})  # to the process and to its group
    return run_export(model_path, options, on_event=interrupt)
module.run_export = interrupted
main(["export", "--json", *sys.argv[1:]])
"""


def test_an_interrupted_export_is_one_document_and_leaves_nothing(tmp_path, make_model):
    number = signal.SIGHUP
    rows = {f"model.layers.{layer}.mlp.up_proj.weight": (1024, 1024) for layer in range(8)}
    arguments = ["--model-path", make_model(rows), "--to", "f16", "--output", tmp_path / "out"]
    code = INTERRUPTED.format(number=int(number))
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + number, done.stderr
    assert json.loads(done.stdout)["error"]["message"].startswith(f"interrupted by {number.name}")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


HUGE = ("9" * 320, "1e400", "inf", "nan", "-1", "-99999999999999999999")
NUMBERS = {
    "export": ["--max-shard-size"],
    "inspect": ["--tp"],
    "quantize": ["--num-samples", "--seq-len", "--batch-size", "--seed", "--group-size"],
    "serve": [
        *("--port", "--max-queued-requests", "--drain-timeout", "--context-length", "--tp"),
        *("--max-running-requests", "--max-total-tokens", "--chunked-prefill-size"),
        *("--random-seed", "--mem-fraction-static"),
    ],
}
GIVEN = {
    "export": ["--to", "f16", "--output", "nowhere"],
    "inspect": ["--engine", "vllm"],
    "quantize": ["--method", "fp8_dynamic", "--dry-run"],
    "serve": ["--dry-run"],
}


@pytest.mark.parametrize(
    ("command", "option"), [(name, each) for name, options in NUMBERS.items() for each in options]
)
def test_numbers_that_cannot_be_are_refused(command, option, tiny_model):
    for value in HUGE:
        if (option, value) == ("--group-size", "-1"):
            continue  # one scale per row
        arguments = [command, "--model-path", str(tiny_model), *GIVEN[command]]
        with pytest.raises(UsageError):
            run([*arguments, f"{option}={value}"])

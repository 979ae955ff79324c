"""What tests share: the bundled model, a copy to break, models made of headers alone, and the
command line as a user runs it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from support import EXAMPLE, TESTS
from support.server import Server, start_server

from qtool.memory import no_collection

# models are too small for two threads, which only wait for each other; so do tests beside each other
os.environ.setdefault("OMP_NUM_THREADS", "1")
# where it is set, each command that a test starts would compile qtool again
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# a runner in the background ignores it, and so would every command that a test starts
signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup
    signal.signal(signal.SIGHUP, lambda *_: None)
# a busy machine is no failure, and CI draws the same examples each time
settings.register_profile("qtool", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("qtool")
BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I32": 4, "U8": 1, "F8_E4M3": 1}
SLOW_FIXTURES = {  # whoever uses one of these is slow
    "sample",  # makes checkpoints with all three libraries
    "quantized",  # runs a library
    "saved",
    "run_here",  # compiles or interprets Triton kernels
    "browser",
    "engine",  # starts an Engine, or two
    "example",
    "served",  # starts a server
    "other",  # starts another
    "uniform_draws",
}

# Runs a file of tests without packages that only transformers imports, which takes a second or two.
RUN_FILE = """
import runpy, sys
from qtool.imports import skip_unused
skip_unused()
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Libraries and tests are objects that stay: a quarter of the time here, and a part of that of
    each test, would be spent on searching them for cycles.
    """
    with no_collection(keep=True):
        return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if SLOW_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
        if uses_module_fixture(item) and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


def uses_module_fixture(item: pytest.Item) -> bool:
    """Whether a test shares a fixture with others of its file, which one process makes once."""
    fixtures = getattr(item, "_fixtureinfo", None)
    return fixtures is not None and any(
        definitions[-1].scope == "module" for definitions in fixtures.name2fixturedefs.values()
    )


@dataclass(frozen=True)
class CliResult:
    exit_code: int
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    return EXAMPLE


@pytest.fixture(scope="session")
def calibration_file(tiny_model) -> Path:
    return tiny_model / "calibration.jsonl"


@pytest.fixture
def tiny_copy(tmp_path, tiny_model) -> Path:
    """A copy of the tiny model that a test may break."""
    return Path(
        shutil.copytree(
            tiny_model, tmp_path / "tiny", ignore=shutil.ignore_patterns("*.py", "*.jsonl")
        )
    )


@pytest.fixture(scope="session")
def two_layers(tmp_path_factory, tiny_model) -> Path:
    """The tiny model with its first two layers, for algorithms that take their time for each."""
    from support.samples import shorten

    return shorten(tiny_model, tmp_path_factory.mktemp("short") / "two-layers")


@pytest.fixture
def run_cli(tmp_path):
    """A function that runs qtool in ``tmp_path`` as a process of its own, without the caller's
    Hugging Face variables.
    """

    def run(*arguments, env: Mapping[str, str] | None = None, timeout: float = 120) -> CliResult:
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))
        }
        command = [sys.executable, "-m", "qtool.cli", *map(str, arguments)]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={**environment, **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        return CliResult(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def run_python(tmp_path):
    """A function that runs code in a fresh interpreter and returns what it prints."""

    def run(code: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    return run


@pytest.fixture
def make_model(tmp_path):
    """A function that writes a model folder whose tensors, name -> shape, are all holes: any size
    costs no disk.
    """

    def make(
        tensors: Mapping[str, tuple[int, ...]],
        *,
        folder: str = "model",
        dtype: str = "BF16",
        **config,
    ) -> Path:
        header, end = {}, 0
        for name, shape in tensors.items():
            size = BYTES[dtype]
            for length in shape:
                size *= length
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        path = tmp_path / folder
        path.mkdir()
        (path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
        with (path / "model.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        return path

    return make


@pytest.fixture
def run_here(request):
    """A function that runs the test's own file as a script, ``what`` its argument, and returns what
    it printed: Triton is set up once a process.
    """
    pytest.importorskip("triton", reason="triton is for Linux only")

    def run(what: str) -> str:
        path = os.pathsep.join(map(str, (TESTS, TESTS.parent, request.path.parent)))
        environment = {
            **os.environ,
            "PYTHONPATH": path,
            "TRITON_INTERPRET": "1" if what.startswith("interpret") else "0",
        }
        done = subprocess.run(
            [sys.executable, "-c", RUN_FILE, request.path, what],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    return run


@pytest.fixture(scope="session")
def quantized_model(tmp_path_factory, tiny_model) -> Path:
    """The tiny model in FP8, with a scale for each row, as LLM Compressor's FP8_DYNAMIC has it."""
    from qtool import export

    output = tmp_path_factory.mktemp("quantized") / "tiny-fp8"
    export(
        tiny_model, to="compressed-tensors", requantize=True, scheme="FP8_DYNAMIC", output=output
    )
    return output


@pytest.fixture(scope="session")
def served(tmp_path_factory, quantized_model) -> Iterator[Server]:
    """A server of the quantized tiny model, called `tiny`, that all tests share: leave it as it
    was.
    """
    server = start_server(
        tmp_path_factory.mktemp("served"),
        quantized_model,
        "--served-model-name",
        "tiny",
        "--log-level",
        "debug",
    )
    yield server
    assert server.end() == 0


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, through playwright."""
    executable = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if executable is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()

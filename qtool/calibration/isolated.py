"""`Reading` in a process of its own: files, chat templates and tokenizers that do not end, fill the
memory or crash a library are refused.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NoReturn, Protocol, cast

from qtool.calibration.reading import TOKENIZER_HINT, Drawn, Reading
from qtool.calibration.sources import is_hub_source
from qtool.calibration.spec import CalibrationSpec
from qtool.checkpoint.strict_json import JsonDict
from qtool.errors import (
    CheckpointRefused,
    DataRefused,
    QtoolError,
    ResourceError,
    from_wire,
    one_line,
    to_wire,
)
from qtool.sandbox import LimitExceeded, Sandbox, SandboxError
from qtool.sandbox.blocking import BlockingSandbox
from qtool.sandbox.child import limited_memory
from qtool.sandbox.forked import ForkedSandbox

# time limits of one step
READ_S = 300.0  # until the next record
HUB_S = 100.0
LOAD_S = 120.0  # a tokenizer
TEXT_S = 15.0  # rendering or tokenizing; longer for more text:
SLOW_BYTES_PER_S = 200_000
# memory limits
READ_BYTES = 4 << 30
TEXT_BYTES = 1 << 30
OUTPUT_BYTES = 256 << 20
# what the Hub's libraries read, besides those that begin with HF_
HUB_VARIABLES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "XDG_CACHE_HOME", "CURL_CA_BUNDLE")
QUIET_VARIABLES = {
    # reserves no address space that it does not use
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class Caller(Protocol):
    """A sandbox whose calls return when they are answered."""

    def call(self, *args: object, timeout_s: float) -> object:
        """Return the function's result."""


@contextmanager
def isolated_reading(spec: CalibrationSpec) -> Iterator[IsolatedReading]:
    """Start a process that reads the records of ``spec``."""
    sandbox = Sandbox(
        f"{__name__}:{answer.__name__}",
        timeout_s=READ_S,
        memory_bytes=READ_BYTES,
        output_bytes=OUTPUT_BYTES,
        environment=_environment(spec),
    )
    with BlockingSandbox(sandbox) as caller:
        yield IsolatedReading(caller, spec)


@contextmanager
def isolated_tokenizing(
    spec: CalibrationSpec, model: Path, vocab_size: int, *, trust_remote_code: bool = False
) -> Iterator[IsolatedReading]:
    """Fork a process that reads the records of ``spec`` and tokenizes them, with the tokenizer in
    the folder ``model``.

    The libraries are imported before the fork, as that takes seconds.
    """
    from transformers import AutoTokenizer  # noqa: F401

    with ForkedSandbox(
        answer,
        memory_bytes=READ_BYTES,
        output_bytes=OUTPUT_BYTES,
        environment=_environment(spec),
    ) as caller:
        yield IsolatedReading(
            caller, spec, model=str(model), trust=trust_remote_code, vocab_size=vocab_size
        )


class IsolatedReading:
    """Calls the steps of a `Reading` in another process."""

    def __init__(
        self,
        caller: Caller,
        spec: CalibrationSpec,
        *,
        model: str | None = None,
        trust: bool = False,
        vocab_size: int = 0,
    ) -> None:
        self._caller, self._spec = caller, spec
        self._drawn: deque[Drawn] = deque()
        self._left = 0
        """Records that are not rendered yet."""
        self.separator: int | None = None
        """The end-of-sequence token."""
        found = self._call("start", asdict(spec), model, trust, vocab_size, timeout_s=LOAD_S)
        self.separator = found if isinstance(found, int) else None

    def read(self) -> tuple[list[Drawn], bool]:
        """Draw the next records; return them, and whether there may be more."""
        is_hub = is_hub_source(self._spec.source)
        found = self._call("read", timeout_s=HUB_S if is_hub else READ_S)
        records, more = cast(tuple[list[tuple[str, int]], bool], found)
        drawn = [Drawn(*each) for each in records]
        self._drawn.extend(drawn)
        self._left = len(self._drawn)
        return drawn, more

    def render(self) -> int:
        """Render conversations; return how many are left."""
        if self._left:
            self._left = cast(int, self._call("render", timeout_s=self._text_s()))
        return self._left

    def encode(self) -> list[list[int]]:
        """Return the token ids of the next records."""
        found = cast(list[list[int]], self._call("encode", timeout_s=self._text_s()))
        for _ in found:
            self._drawn.popleft()
        return found

    def _text_s(self) -> float:
        return TEXT_S + sum(each.most_tokens for each in self._drawn) / SLOW_BYTES_PER_S

    def _call(self, what: str, *args: object, timeout_s: float) -> object:
        try:
            found = self._caller.call(what, *args, timeout_s=timeout_s)
        except SandboxError as error:
            self._fail(what, error)
        match found:
            case ["error", dict(refusal)]:
                raise from_wire(refusal)
            case ["found", result]:
                return result
        raise AssertionError(found)

    def _fail(self, what: str, error: SandboxError) -> NoReturn:
        why = str(error) if isinstance(error, LimitExceeded) else f"its process failed: {error}"
        source = self._spec.source
        if what == "read" and is_hub_source(source):
            raise ResourceError(
                "E_HUB_UNREACHABLE",
                f"data set `{source}`, from {_endpoint()}: {why}",
                hint="try again, or download it and give a local file",
            ) from None
        if what == "read":
            raise DataRefused(
                "E_DATA_LIMIT",
                f"{source} cannot be read: {why}",
                hint="is the file what its name says? Large data is read best as .jsonl",
            ) from None
        if what == "render":
            where = self._drawn[len(self._drawn) - self._left].where
            raise DataRefused(
                "E_DATA_TEMPLATE",
                f"{where}: the chat template cannot render these messages: {why}",
                hint="is chat_template.jinja the model's own? Plain `text` needs none",
            ) from None
        message = f"the tokenizer cannot be loaded: {why}"
        if what == "encode":
            message = f"{self._drawn[0].where}, or soon after: the tokenizer fails: {why}"
        raise CheckpointRefused("E_TOKENIZER", message, hint=TOKENIZER_HINT) from None


_reading: Reading | None = None  # in the child


def answer(what: str, *args: object) -> object:
    """Run, in the child, the step ``what`` for the parent."""
    global _reading
    try:
        if what == "start":
            _reading = _start(*args)  # type: ignore[arg-type]
            return "found", _reading.separator
        assert _reading is not None
        steps: Mapping[str, Callable[[], object]] = {
            "read": partial(_read, _reading),
            "render": partial(_with_limit, _reading.render),
            "encode": partial(_with_limit, _reading.encode),
        }
        return "found", steps[what]()
    except QtoolError as error:
        return "error", to_wire(error)


def _read(reading: Reading) -> object:
    drawn, more = reading.read()
    return [(each.where, each.most_tokens) for each in drawn], more


def _with_limit(step: Callable[[], object]) -> object:
    with limited_memory(TEXT_BYTES):
        return step()


def _start(spec: JsonDict, model: str | None, trust: bool, vocab_size: int) -> Reading:
    if model is None:
        return Reading(CalibrationSpec(**spec))
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust)
    except MemoryError:
        raise
    except Exception as error:
        message = f"{model}: the tokenizer cannot be loaded: {one_line(error)}"
        raise CheckpointRefused("E_TOKENIZER", message, hint=TOKENIZER_HINT) from error
    return Reading(CalibrationSpec(**spec), tokenizer, vocab_size)


def _environment(spec: CalibrationSpec) -> dict[str, str]:
    """Return what the process needs; the token and the proxies only for data of the Hub."""
    if not is_hub_source(spec.source):
        return QUIET_VARIABLES
    found = {**QUIET_VARIABLES, "HF_HUB_OFFLINE": ""}  # a sandbox sets it
    for name, value in os.environ.items():
        is_hub = name.startswith(("HF_", "HUGGING", "TRANSFORMERS_")) or name in HUB_VARIABLES
        if is_hub or name.lower().endswith("_proxy"):
            found[name] = value
    return found


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)

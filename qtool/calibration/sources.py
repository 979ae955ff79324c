"""Where records come from: a file or a Hub data set, streamed in an order that the seed alone
decides.
"""

from __future__ import annotations

import json
import random
import re
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from qtool.checkpoint.hub import is_offline, unreachable
from qtool.errors import DataRefused, ResourceError, UsageError, nearest, one_line

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

MIN_TOKENS = 11  # GPTQModel 7.6 drops rows of 10 tokens and fewer; one rule for every backend
# what a record is searched for, besides --text-column
FIELDS = (
    "input_ids",
    "messages",
    "prompt",
    "completion",
    "text",
)

MAX_LINE_BYTES = 64 << 20
# a text without blank lines is cut at the next line end, so that it still gives many samples
MAX_PARAGRAPH_BYTES = 1 << 20
MAX_JSON_BYTES = 1 << 30
SHUFFLE_BUFFER = 1000  # records of a Hub stream that are fetched before the first is drawn


@dataclass(frozen=True)
class CalibrationSpec:
    """Which data, and how it is cut.

    Raises: UsageError, when a number is too small to calibrate with.
    """

    source: str
    """A .jsonl, .json, .txt or .parquet file, or a Hub data set name[:config][:split]."""
    text_column: str | None = None
    """The field that holds the text; None: one of `FIELDS`."""
    num_samples: int = 512
    seq_len: int = 2048
    """Tokens of a sample, at most."""
    seed: int = 0
    """Decides the order in which records are drawn."""
    pack: bool = False
    """Join the texts and cut them into pieces of ``seq_len`` tokens."""
    batch_size: int = 1
    """Samples that a backend sees at a time."""

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 1), ("seq_len", MIN_TOKENS), ("batch_size", 1)):
            if getattr(self, name) < least:
                message = (
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; the least is {least}"
                )
                raise UsageError(
                    "E_CALIBRATION_SIZE",
                    message,
                    hint="the defaults are 512 samples of 2048 tokens, one at a time",
                )


Rows = Iterator[tuple[str, object]]  # where the record stands, for messages; the record


def rows(spec: CalibrationSpec) -> Rows:
    """Yield the records of ``spec.source`` in the order of the draw, unchecked, reading no more
    than is asked for.

    Raises: DataRefused, naming file and line; ResourceError, when the Hub does not answer.
    """
    path = Path(spec.source)
    hub = re.fullmatch(r"(\w[\w.-]*(?:/\w[\w.-]*)?)(?::([^:]*))?(?::([^:]*))?", spec.source)
    try:
        if hub and Path(hub[1]).suffix.lower() not in READERS and not path.exists():
            yield from _hub(spec, hub[1], hub[2] or None, hub[3] or "train")
        else:
            yield from _reader_of(path)(path, spec)
    except OSError as error:
        raise DataRefused(
            "E_DATA_MISSING",
            f"{path} cannot be read: {error}",
            hint="check the path, its permissions and the disk",
        ) from error


def bad_line(where: str, what: str) -> DataRefused:
    """Return the refusal of a line that is not a JSON object."""
    hint = 'a record looks like {"text": "..."}; in JSON Lines each stands on a line of its own'
    return DataRefused("E_DATA_LINE", f"{where}: expected a JSON object; {what}", hint=hint)


def _reader_of(path: Path) -> Callable[[Path, CalibrationSpec], Rows]:
    """Return the reader for ``path``, after a look at its name and first bytes."""
    if not path.is_file():
        raise _no_file(path)
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise DataRefused(
            "E_DATA_FORMAT",
            f"{path}: unknown kind of file `{path.suffix}`",
            hint=f"known: {', '.join(READERS)}; unpack or convert it first",
        )
    with path.open("rb") as file:
        head = file.read(8192)
    if b"\0" in head and suffix != ".parquet":
        hint = "Parquet needs the suffix .parquet; unpack what is compressed; text must be UTF-8"
        raise DataRefused("E_DATA_BINARY", f"{path} is a binary file, not text", hint=hint)
    return READERS[suffix] if head else _no_records


def _no_file(path: Path) -> DataRefused:
    near = ""
    if path.is_dir():
        what = "is a folder"
    elif path.exists():
        what = "is not a regular file"
    else:
        what = "does not exist"
        if path.parent.is_dir():
            near = nearest(path.name, (other.name for other in path.parent.iterdir()))
    known = ", ".join(READERS)
    return DataRefused(
        "E_DATA_MISSING",
        f"{path} {what}",
        hint=near or f"give a file ({known}) or a Hub data set, name[:config][:split]",
    )


def _no_records(path: Path, spec: CalibrationSpec) -> Rows:
    return iter(())


def _text(path: Path, spec: CalibrationSpec) -> Rows:
    for where, text in _spans(path, spec.seed, paragraphs=True):
        yield where, {"text": text}


def _json_lines(path: Path, spec: CalibrationSpec) -> Rows:
    for where, text in _spans(path, spec.seed):
        try:
            yield where, json.loads(text)
        except (ValueError, RecursionError) as error:
            raise bad_line(where, f"this is not JSON: {error}") from error


def _spans(path: Path, seed: int, *, paragraphs: bool = False) -> Iterator[tuple[str, str]]:
    """Yield the lines that are not blank, or the paragraphs, in random order.

    Memory: 24 bytes for each, and the one that is drawn.
    """
    spans = array("Q")  # line number, first byte, end; and so on
    joins = False
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
            if len(line) > MAX_LINE_BYTES:
                raise bad_line(
                    f"{path}, line {number}", f"this line is longer than {MAX_LINE_BYTES:,} bytes"
                )
            end = file.tell()
            if not line.strip():
                joins = False
            elif joins and end - spans[-2] <= MAX_PARAGRAPH_BYTES:
                spans[-1] = end
            else:
                spans.extend((number, end - len(line), end))
                joins = paragraphs
        for index in _shuffled(len(spans) // 3, seed):
            number, start, end = spans[3 * index : 3 * index + 3]
            file.seek(start)
            try:
                yield (
                    f"{path}, line {number}",
                    file.read(end - start).decode("utf-8-sig").rstrip("\r\n"),
                )
            except UnicodeDecodeError as error:
                what = (
                    f"byte {error.start + 1} of {'this paragraph' if paragraphs else 'this line'} "
                    f"is 0x{error.object[error.start]:02x}, not UTF-8"
                )
                raise DataRefused(
                    "E_DATA_BINARY",
                    f"{path}, line {number}: {what}",
                    hint="save the file as UTF-8 text",
                ) from error


def _json(path: Path, spec: CalibrationSpec) -> Rows:
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        message = f"{path}: {size:,} bytes of JSON; the limit is {MAX_JSON_BYTES:,}"
        raise DataRefused(
            "E_DATA_FORMAT",
            message,
            hint="write one object a line and name it .jsonl, which is streamed",
        )
    try:
        records = _records_in(json.loads(path.read_bytes()), spec)
    except (ValueError, RecursionError) as error:
        # one value ends and the next begins: these are JSON Lines
        if getattr(error, "msg", "") == "Extra data":
            yield from _json_lines(path, spec)
            return
        raise bad_line(
            f"{path}, line {getattr(error, 'lineno', 1)}", f"this is not JSON: {error}"
        ) from error
    for index in _shuffled(len(records), spec.seed):
        yield f"{path}, item {index + 1}", records[index]


def _records_in(value: object, spec: CalibrationSpec) -> list[object]:
    """Return a list itself, the first list in an object such as ``{"data": [...]}``, or else
    ``value`` as the only record.
    """
    if isinstance(value, list):
        return value
    if isinstance(value, dict) and not value.keys() & {*FIELDS, spec.text_column}:
        return next((part for part in value.values() if isinstance(part, list)), [value])
    return [value]


def _parquet(path: Path, spec: CalibrationSpec) -> Rows:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = [
                name for name in names if name in (*FIELDS, "attention_mask", spec.text_column)
            ]
            if not columns or spec.text_column not in (None, *names):
                columns = names  # it will be refused, with all of them named
            order = _shuffled(file.metadata.num_rows, spec.seed)
            while drawn := list(islice(order, spec.num_samples)):
                found = _parquet_rows(file, sorted(drawn), columns)
                yield from ((f"{path}, row {row + 1}", found[row]) for row in drawn)
    except pyarrow.ArrowException as error:
        raise DataRefused(
            "E_DATA_BINARY",
            f"{path} cannot be read as Parquet: {one_line(error)}",
            hint="write it again, or as .jsonl",
        ) from error


def _parquet_rows(file: ParquetFile, numbers: list[int], columns: list[str]) -> dict[int, object]:
    """Return the records at ``numbers``, which are sorted; row groups without any of them are not
    read.
    """
    found: dict[int, object] = {}
    group_end = 0
    for group in range(file.num_row_groups):
        first, group_end = group_end, group_end + file.metadata.row_group(group).num_rows
        if bisect_left(numbers, first) == bisect_left(numbers, group_end):
            continue
        for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=columns):
            stop = bisect_left(numbers, first + batch.num_rows)
            here = numbers[bisect_left(numbers, first) : stop]
            if here:
                taken = batch.take([number - first for number in here]).to_pylist()
                found.update(zip(here, taken, strict=True))
            first += batch.num_rows
    return found


def _hub(spec: CalibrationSpec, name: str, config: str | None, split: str) -> Rows:
    from qtool.checkpoint.hub_download import is_reachable

    # offline, the cache answers, or the library refuses at once
    if not is_offline() and not is_reachable():
        raise unreachable(spec.source)
    import datasets
    import httpx

    try:
        stream = datasets.load_dataset(name, config, split=split, streaming=True).shuffle(
            seed=spec.seed, buffer_size=SHUFFLE_BUFFER
        )
        for number, record in enumerate(stream, 1):
            yield f"{spec.source}, record {number} of the shuffled stream", record
    except (ConnectionError, httpx.TransportError) as error:
        hint = (
            "give a local file, or fill the Hub cache where there is a network; with "
            "HF_HUB_OFFLINE only that cache is read"
        )
        raise ResourceError(
            "E_HUB_UNREACHABLE",
            f"data set `{name}` is not a local file, is not in the Hub cache, and: "
            f"{one_line(error)}",
            hint=hint,
        ) from error
    # the library raises what its readers raise: a wrong name, config or split, a broken file
    except Exception as error:
        hint = (
            "write name:config:split or name::split; a private or gated data set needs `hf auth "
            "login`"
        )
        message = (
            f"Hub data set `{name}`, config {config or 'default'}, split {split}: {one_line(error)}"
        )
        raise DataRefused("E_DATA_HUB", message, hint=hint) from error


def _shuffled(count: int, seed: int) -> Iterator[int]:
    """Yield 0 to ``count - 1`` in random order; memory grows with what is drawn, not with ``count``
    (a sparse Fisher-Yates shuffle).
    """
    draw = random.Random(seed)
    moved: dict[int, int] = {}
    for position in range(count):
        chosen = draw.randrange(position, count)
        here = moved.pop(position, position)
        if chosen == position:
            yield here
        else:
            yield moved.get(chosen, chosen)
            moved[chosen] = here


READERS: dict[str, Callable[[Path, CalibrationSpec], Rows]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".txt": _text,
    ".parquet": _parquet,
}

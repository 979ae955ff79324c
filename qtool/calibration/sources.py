"""Where records come from: a file or a Hub data set, streamed in an order that the seed alone
decides.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

from qtool.calibration.hub_data import hub_rows
from qtool.calibration.parquet import parquet_rows
from qtool.calibration.spec import FIELDS, CalibrationSpec, Rows, shuffled
from qtool.errors import DataRefused, nearest

MAX_LINE_BYTES = 64 << 20
# a text without blank lines is cut at the next line end, so that it still gives many samples
MAX_PARAGRAPH_BYTES = 1 << 20
MAX_JSON_BYTES = 1 << 30


def rows(spec: CalibrationSpec) -> Rows:
    """Yield the records of ``spec.source`` in the order of the draw, unchecked, reading no more
    than is asked for.

    Raises: DataRefused, naming file and line; ResourceError, when the Hub does not answer.
    """
    path = Path(spec.source)
    try:
        if hub := _hub_name(spec.source):
            yield from hub_rows(spec, hub[1], hub[2] or None, hub[3] or "train")
        else:
            yield from _reader_of(path)(path, spec)
    except OSError as error:
        raise DataRefused(
            "E_DATA_MISSING",
            f"{path} cannot be read: {error}",
            hint="check the path, its permissions and the disk",
        ) from error


def is_hub_source(source: str) -> bool:
    """Whether ``source`` names a data set of the Hub, not a file."""
    return _hub_name(source) is not None


def _hub_name(source: str) -> re.Match[str] | None:
    hub = re.fullmatch(r"(\w[\w.-]*(?:/\w[\w.-]*)?)(?::([^:]*))?(?::([^:]*))?", source)
    if hub is None or Path(hub[1]).suffix.lower() in READERS:
        return None
    try:
        return None if Path(source).exists() else hub
    except OSError:  # too long for a file, and for the Hub
        return None


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
        for index in shuffled(len(spans) // 3, seed):
            number, start, end = spans[3 * index : 3 * index + 3]
            file.seek(start)
            try:
                yield (
                    f"{path}, line {number}",
                    file.read(end - start).decode("utf-8-sig").rstrip("\r\n"),
                )
            except UnicodeDecodeError as error:
                unit = "this paragraph" if paragraphs else "this line"
                raise _not_utf8(f"{path}, line {number}", unit, error) from error


def _not_utf8(where: str, unit: str, error: UnicodeDecodeError) -> DataRefused:
    byte = error.object[error.start]
    return DataRefused(
        "E_DATA_BINARY",
        f"{where}: byte {error.start + 1} of {unit} is 0x{byte:02x}, not UTF-8",
        hint="save the file as UTF-8 text",
    )


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
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise _not_utf8(f"{path}, line {line}", "this file", error) from error
    except (ValueError, RecursionError) as error:
        # one value ends and the next begins: these are JSON Lines
        if getattr(error, "msg", "") == "Extra data":
            yield from _json_lines(path, spec)
            return
        raise bad_line(
            f"{path}, line {getattr(error, 'lineno', 1)}", f"this is not JSON: {error}"
        ) from error
    for index in shuffled(len(records), spec.seed):
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


READERS: dict[str, Callable[[Path, CalibrationSpec], Rows]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".txt": _text,
    ".parquet": parquet_rows,
}

"""The start of a GGUF file, read as far as its header goes: numbers, strings and arrays, bounded by
what a real vocabulary takes.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, TypeAlias

from qtool.checkpoint.strict_json import refused, regular_size
from qtool.errors import naming

MAX_HEADER_BYTES = 64 << 20  # the largest vocabulary of a public model takes 20 MB
MAX_STRING_BYTES = 8 << 20
MAX_VALUES = 4_000_000
"""In all arrays of a file together; strings count as three."""
READ_BYTES = 1 << 20
STRING, ARRAY, BOOL = 8, 9, 7
SCALARS: Mapping[int, str] = {  # type of a value -> as `struct` and `array` call it
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    BOOL: "B",
    10: "Q",
    11: "q",
    12: "d",
}

Value: TypeAlias = "int | float | bool | str | tuple[str, ...] | array[int] | array[float]"


class Reader:
    """The start of a file, read as far as it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = regular_size(path)
        self.data = bytearray()
        self.position = 0
        self.values_left = MAX_VALUES
        with naming(path), path.open("rb") as file:
            self._file: BinaryIO = file
            self._fill(min(self.size, READ_BYTES))

    def take(self, count: int, what: str) -> memoryview:
        """Return the next ``count`` bytes, which hold ``what``."""
        start = self.position
        if start + count > len(self.data):
            self._need(count, what)
        self.position = start + count
        return memoryview(self.data)[start : self.position]

    def number(self, code: str, what: str) -> int:
        """Return the next number, of the `struct` format ``code``."""
        (value,) = struct.unpack(f"<{code}", self.take(struct.calcsize(code), what))
        return value  # type: ignore[no-any-return]

    def string(self, what: str, limit: int = MAX_STRING_BYTES) -> str:
        """Return the next string, of at most ``limit`` bytes."""
        length = self.number("Q", what)
        if length > limit:
            raise refused(
                "E_GGUF_STRING",
                f"{self.path}: {what} is said to have {length:,} bytes; the limit is {limit:,}",
            )
        try:
            return str(self.take(length, what), "utf-8")
        except UnicodeDecodeError as error:
            raise refused(
                "E_GGUF_STRING", f"{self.path}: {what} is not UTF-8 ({error.reason})"
            ) from None

    def spend(self, values: int, what: str) -> None:
        """Count the ``values`` of an array against the limit."""
        self.values_left -= values
        if self.values_left < 0:
            raise refused(
                "E_GGUF_COUNT",
                f"{self.path}: {what} brings the arrays of the file over {MAX_VALUES:,} values",
                "no vocabulary known is as large: is it a model?",
            )

    def _need(self, count: int, what: str) -> None:
        end = self.position + count
        if end > self.size:
            raise refused(
                "E_TRUNCATED",
                f"{self.path} ends inside {what}: {count:,} bytes are expected at byte "
                f"{self.position:,} of {self.size:,}",
                "the download or copy was interrupted: fetch the file again",
            )
        if end > MAX_HEADER_BYTES:
            raise refused(
                "E_GGUF_HEADER",
                f"{self.path}: its header is larger than {MAX_HEADER_BYTES:,} bytes at {what}",
                "no vocabulary known is as large: is it a model?",
            )
        with naming(self.path), self.path.open("rb") as file:
            self._file = file
            self._fill(min(self.size, max(end, 2 * len(self.data))))
        if end > len(self.data):
            raise refused("E_TRUNCATED", f"{self.path} became shorter while it was read")

    def _fill(self, end: int) -> None:
        self._file.seek(len(self.data))
        self.data = self.data + self._file.read(end - len(self.data))


def read_value(reader: Reader, key: str) -> Value:
    """Return the value of ``key``, with its type before it."""
    kind = reader.number("I", key)
    if kind == STRING:
        return reader.string(key)
    if kind == ARRAY:
        return _read_array(reader, key)
    if kind not in SCALARS:
        raise refused(
            "E_GGUF_VALUE", f"{reader.path}: {key} has the unknown type {kind:,} of values"
        )
    value = reader.number(SCALARS[kind], key)
    if kind != BOOL:
        return value
    if value not in (0, 1):
        raise refused("E_GGUF_VALUE", f"{reader.path}: {key} is a boolean and holds {value}")
    return bool(value)


def _read_array(reader: Reader, key: str) -> Value:
    kind = reader.number("I", key)
    count = reader.number("Q", key)
    if kind == STRING:
        reader.spend(3 * count, key)
        return tuple(_read_strings(reader, count, key))
    if kind not in SCALARS:
        what = "an array of arrays" if kind == ARRAY else f"an array of the unknown type {kind:,}"
        raise refused("E_GGUF_VALUE", f"{reader.path}: {key} is {what}")
    reader.spend(count, key)
    values: array[int] | array[float] = array(SCALARS[kind])
    values.frombytes(reader.take(count * values.itemsize, key))
    return values


def _read_strings(reader: Reader, count: int, key: str) -> list[str]:
    strings = []
    length_at = struct.Struct("<Q").unpack_from
    for _ in range(count):
        start = reader.position
        if start + 8 > len(reader.data):
            reader.take(8, key)
            reader.position = start
        (length,) = length_at(reader.data, start)
        end = start + 8 + length
        if end > len(reader.data) or length > MAX_STRING_BYTES:
            strings.append(reader.string(f"an entry of {key}"))
            continue
        reader.position = end
        try:
            strings.append(reader.data[start + 8 : end].decode())
        except UnicodeDecodeError as error:
            message = f"{reader.path}: an entry of {key} is not UTF-8 ({error.reason})"
            raise refused("E_GGUF_STRING", message) from None
    return strings

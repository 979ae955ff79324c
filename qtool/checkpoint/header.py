"""The header of a safetensors file: each number is checked against the file before it is trusted.

Source: https://github.com/huggingface/safetensors, section "Format".
"""

from __future__ import annotations

import math
import reprlib
import sys
from collections.abc import Collection, Mapping
from operator import attrgetter
from pathlib import Path

from qtool.checkpoint.model import DTYPE_BITS, TensorInfo
from qtool.checkpoint.strict_json import (
    DAMAGED,
    Json,
    check_json_size,
    parse_object,
    refused,
    regular_size,
)
from qtool.errors import CheckpointRefused, naming

FIELDS = {"dtype", "shape", "data_offsets"}
INTEGERS = {int}  # without booleans
MAX_DIMENSIONS = 16
MAX_NUMBER = 1 << 62
MAX_NAME = 1_000
IMPOSTORS = (  # how a file starts, code, what it is, what helps
    (
        b"version ",
        "E_LFS_POINTER",
        "a Git LFS pointer",
        "run `git lfs pull` in the folder, or download again",
    ),
    (b"<", "E_NOT_SAFETENSORS", "an HTML page", "the download failed: fetch it again"),
    (
        b"GGUF",
        "E_GGUF",
        "a GGUF file under another name",
        "name it .gguf: qtool reads GGUF by that name",
    ),
    (
        b"PK\3\4",
        "E_PICKLE",
        "a zip archive, as torch.save writes,",
        "convert it to safetensors first",
    ),
    (b"\x80\2", "E_PICKLE", "a pickle", "convert it to safetensors first"),
)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors that the safetensors file ``path`` declares, after checking every number
    against the file.
    """
    size = regular_size(path)
    with naming(path), path.open("rb") as file:
        start = file.read(8)
        length = _header_length(path, start, size)
        text = file.read(length)
    if not text.startswith(b"{"):
        raise refused(
            "E_HEADER_START",
            f"{path}: the header of {length:,} bytes starts with {text[:8]!r}, not with an "
            "opening brace",
        )
    header = parse_object(
        text, f"{path}: header", parse_int=_not_minus_zero if b"-0" in text else None
    )
    del text
    _check_metadata(path, header.pop("__metadata__", None))
    _check_names(path, header)
    tensors = {
        name: _tensor_info(path, name, entry, 8 + length, size - 8 - length)
        for name, entry in header.items()
    }
    _check_tiling(path, tensors, 8 + length, size)
    return tensors


def _header_length(path: Path, start: bytes, size: int) -> int:
    length = int.from_bytes(start, "little")
    # only then can it be something else: letters make a length beyond any file
    if len(start) < 8 or length < 2 or 8 + length > size:
        for mark, code, what, hint in IMPOSTORS:
            if start.lstrip().startswith(mark):
                raise refused(
                    code, f"{path} is {what} of {size:,} bytes, not a safetensors file", hint
                )
    again = "the file is truncated or is not safetensors: download it again"
    if len(start) < 8:
        raise refused(
            "E_HEADER_SHORT", f"{path}: {size:,} bytes, too short for the length of a header", again
        )
    if length < 2:
        raise refused(
            "E_HEADER_EMPTY",
            f"{path}: a header of {length:,} bytes is declared in a file of {size:,} bytes",
            again,
        )
    if 8 + length > size:
        raise refused(
            "E_HEADER_LENGTH",
            f"{path}: a header of {length:,} bytes is declared in a file of {size:,} bytes",
            again,
        )
    check_json_size(length, f"{path}: header")
    return length


def _not_minus_zero(digits: str) -> int:
    if digits == "-0":
        raise ValueError("-0 counts nothing")
    return int(digits)


def _check_metadata(path: Path, metadata: object) -> None:
    if metadata is not None and (
        not isinstance(metadata, dict)
        or not all(isinstance(value, str) for value in metadata.values())
    ):
        hint = "safetensors keeps texts only there: save the file again"
        raise refused(
            "E_HEADER_METADATA",
            f"{path}: `__metadata__` is {reprlib.repr(metadata)}, and must map texts to texts",
            hint,
        )


def _check_names(path: Path, names: Collection[str]) -> None:
    # checked together: there may be a quarter of a million
    if all(map(str.isprintable, names)) and max(map(len, names), default=0) <= MAX_NAME:
        return
    bad = next(name for name in names if not name.isprintable() or len(name) > MAX_NAME)
    raise refused(
        "E_HEADER_NAME",
        f"{path}: a tensor is called {reprlib.repr(bad)}, {len(bad):,} characters",
        "rename it where it was saved",
    )


def _tensor_info(
    path: Path, name: str, entry: object, data_start: int, data_size: int
) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != FIELDS:
        raise _bad_entry(path, name, entry)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    bits = DTYPE_BITS.get(dtype, 0) if type(dtype) is str else 0
    if not bits:
        raise refused(
            "E_HEADER_DTYPE",
            f"{path}: tensor `{name}` has the unknown dtype {reprlib.repr(dtype)}",
            f"known are {', '.join(DTYPE_BITS)}",
        )
    if not _are_counts(shape, offsets) or offsets[1] > data_size:
        raise _bad_numbers(path, name, shape, offsets, data_size)
    start, end = offsets
    size_bytes, rest = divmod(math.prod(shape) * bits, 8)
    if rest or not size_bytes or end - start != size_bytes:
        _check_size(path, name, entry, size_bytes, rest)
    return TensorInfo(name, sys.intern(dtype), tuple(shape), path, data_start + start, size_bytes)


def _are_counts(shape: object, offsets: object) -> bool:
    """Whether ``shape`` and ``offsets`` are lists of whole numbers as headers have them."""
    if type(shape) is not list or type(offsets) is not list or len(offsets) != 2:
        return False
    numbers = [*shape, *offsets]
    if set(map(type, numbers)) != INTEGERS or len(shape) > MAX_DIMENSIONS:
        return False
    start, end = offsets
    return 0 <= min(numbers) <= max(numbers) < MAX_NUMBER and bool(start <= end)


def _bad_entry(path: Path, name: str, entry: object) -> CheckpointRefused:
    if not isinstance(entry, dict):
        return refused(
            "E_HEADER_ENTRY", f"{path}: tensor `{name}` is described by {reprlib.repr(entry)}"
        )
    return refused(
        "E_HEADER_FIELDS",
        f"{path}: tensor `{name}` is described by {reprlib.repr(sorted(entry))}; expected "
        f"{sorted(FIELDS)}",
    )


def _check_size(path: Path, name: str, entry: Json, size_bytes: int, rest: int) -> None:
    """Raise CheckpointRefused when shape and offsets do not go together."""
    dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if rest:
        raise refused(
            "E_HEADER_BITS",
            f"{path}: tensor `{name}`, {dtype} {shape}, ends inside a byte",
            "pad its last dimension where it was saved",
        )
    is_huge = math.prod(size or 1 for size in shape) >= MAX_NUMBER
    if end - start != size_bytes or (not size_bytes and is_huge):
        raise refused(
            "E_HEADER_SIZE",
            f"{path}: tensor `{name}`, {dtype} {shape}, needs {size_bytes:,} bytes and is given "
            f"{end - start:,}",
        )


def _bad_numbers(
    path: Path, name: str, shape: object, offsets: object, data_size: int
) -> CheckpointRefused:
    if _are_counts(shape, offsets):
        message = (
            f"{path}: tensor `{name}` is said to lie at {reprlib.repr(offsets)} in {data_size:,} "
            "bytes of data"
        )
        return refused(
            "E_TRUNCATED", message, "the download or copy was interrupted: fetch the file again"
        )
    if not _are_counts(shape, [0, 0]):
        hint = f"a shape is a list of at most {MAX_DIMENSIONS} whole numbers; {DAMAGED}"
        return refused(
            "E_HEADER_SHAPE", f"{path}: tensor `{name}` has the shape {reprlib.repr(shape)}", hint
        )
    message = f"{path}: tensor `{name}` is said to lie at {reprlib.repr(offsets)}"
    return refused(
        "E_HEADER_OFFSETS", message, f"offsets are two whole numbers, start and end; {DAMAGED}"
    )


def _check_tiling(
    path: Path, tensors: Mapping[str, TensorInfo], data_start: int, size: int
) -> None:
    end, before = data_start, None
    for tensor in sorted(tensors.values(), key=attrgetter("offset", "size_bytes")):
        if tensor.offset != end:
            code, what = (
                ("E_OVERLAP", "overlaps")
                if tensor.offset < end
                else ("E_HOLE", "leaves a hole after")
            )
            neighbour = f"`{before.name}`" if before else "the header"
            raise refused(
                code,
                f"{path}: tensor `{tensor.name}` at byte {tensor.offset:,} {what} {neighbour}, "
                f"which ends at {end:,}",
            )
        end, before = tensor.offset + tensor.size_bytes, tensor
    if end != size:
        raise refused(
            "E_TRAILING_BYTES",
            f"{path}: {size - end:,} bytes behind the last tensor belong to none",
        )

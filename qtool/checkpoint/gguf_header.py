"""The header of a GGUF file, split over several files or not: each number is checked against the
file before it is trusted.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from qtool.checkpoint.gguf_types import BLOCKS, READ, TYPE_NAMES
from qtool.checkpoint.gguf_values import Reader, Value, read_value
from qtool.checkpoint.strict_json import DAMAGED, refused
from qtool.errors import CheckpointRefused, is_there

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_KEYS = 10_000
MAX_TENSORS = 100_000
MAX_SPLITS = 1_000
MAX_NAME = 1_000
MAX_DIMENSIONS = 4
MAX_NUMBER = 1 << 62
MAX_ALIGNMENT = 1 << 16
SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


class GgufTensor(NamedTuple):
    """One tensor as a header describes it."""

    name: str
    type: str
    """As ggml calls it, e.g. ``Q4_K``."""
    shape: tuple[int, ...]
    """The slowest dimension first, as safetensors has it: rows before columns."""
    file: Path
    offset: int
    """Bytes from the start of ``file``."""
    size_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """What the headers of one model say."""

    files: tuple[Path, ...]
    metadata: Mapping[str, Value]
    tensors: Mapping[str, GgufTensor]
    digest: str
    """SHA-256 of all headers."""


def is_gguf(path: Path) -> bool:
    """Whether ``path`` is named as a GGUF file."""
    return path.suffix == ".gguf"


def read_gguf(path: Path) -> GgufHeader:
    """Return what the GGUF file ``path`` declares, and the other files of a split model.

    Raises: CheckpointRefused, naming the file and the numbers that do not fit.
    """
    files = _files_of(path)
    metadata: dict[str, Value] = {}
    tensors: dict[str, GgufTensor] = {}
    digest = hashlib.sha256()
    for number, file in enumerate(files):
        reader = Reader(file)
        found, listed = _read_file(reader)
        _check_split(file, found, number, len(files))
        digest.update(bytes(reader.data[: reader.position]))
        if number == 0:
            metadata = found
        for tensor in listed:
            if tensor.name in tensors:
                raise refused(
                    "E_DUPLICATE",
                    f"tensor `{tensor.name}` is in {tensors[tensor.name].file} and in {file.name}",
                    "the files are not of one model: take all of them from one source",
                )
            tensors[tensor.name] = tensor
    _check_tensor_count(path, metadata, tensors)
    return GgufHeader(files, metadata, tensors, digest.hexdigest())


def _files_of(path: Path) -> tuple[Path, ...]:
    """Return all files of the model that ``path`` is a part of, in order."""
    found = SPLIT_NAME.fullmatch(path.name)
    if not found:
        return (path,)
    stem, part, count = found[1], int(found[2]), int(found[3])
    if not 1 <= part <= count:
        raise refused("E_GGUF_SPLIT", f"{path}: its name says part {part:,} of {count:,}")
    if count > MAX_SPLITS:
        raise refused(
            "E_GGUF_SPLIT",
            f"{path}: its name says {count:,} files; the limit is {MAX_SPLITS:,}",
        )
    files = [
        path.with_name(f"{stem}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)
    ]
    if missing := [file for file in files if not is_there(file)]:
        raise refused(
            "E_MISSING_SHARD",
            f"{missing[0]} is missing: the model is split over {count} files, and "
            f"{count - len(missing)} are there",
            "download or copy it again",
        )
    return tuple(files)


def _check_split(file: Path, metadata: Mapping[str, Value], number: int, count: int) -> None:
    """Refuse a file that is not part ``number`` of ``count``."""
    said = metadata.get("split.no", 0), metadata.get("split.count", 0)
    if said == (number, count) or (count == 1 and said in ((0, 0), (0, 1))):
        return
    raise refused(
        "E_GGUF_SPLIT",
        f"{file} is part {number + 1} of {count} by its name, and by its metadata split.no is "
        f"{said[0]!r:.40} and split.count {said[1]!r:.40}",
        "the files were renamed or are of several models: llama.cpp's names end in "
        "-00001-of-00003.gguf",
    )


def _check_tensor_count(
    path: Path, metadata: Mapping[str, Value], tensors: Mapping[str, GgufTensor]
) -> None:
    if not tensors:
        raise refused(
            "E_NO_TENSORS",
            f"{path}: no tensor inside",
            "it holds a vocabulary alone, or the weights were not saved: take the model's file",
        )
    said = metadata.get("split.tensors.count", len(tensors))
    if said != len(tensors):
        raise refused(
            "E_GGUF_SPLIT",
            f"{path}: its files hold {len(tensors):,} tensors, and split.tensors.count is "
            f"{said!r:.40}",
            "the files are of several models: take all of them from one source",
        )


def _read_file(reader: Reader) -> tuple[dict[str, Value], list[GgufTensor]]:
    path = reader.path
    _check_magic(reader)
    tensor_count = _count(reader, "tensors", MAX_TENSORS, least_bytes=32)
    key_count = _count(reader, "metadata keys", MAX_KEYS, least_bytes=13)
    metadata: dict[str, Value] = {}
    for number in range(key_count):
        key = reader.string(f"the key {number + 1:,} of {key_count:,}", MAX_NAME)
        _check_name(path, "key", key)
        if key in metadata:
            raise refused("E_GGUF_KEY", f"{path}: the key `{key}` appears twice")
        metadata[key] = read_value(reader, f"`{key}`")
    tensors = [_read_tensor(reader, number, tensor_count) for number in range(tensor_count)]
    _check_distinct(path, tensors)
    alignment = _alignment(path, metadata)
    start = -(-reader.position // alignment) * alignment
    placed = [tensor._replace(offset=tensor.offset + start) for tensor in tensors]
    _check_offsets(path, placed, start, alignment, reader.size)
    return metadata, placed


def _check_distinct(path: Path, tensors: list[GgufTensor]) -> None:
    counts = Counter(tensor.name for tensor in tensors)
    if len(counts) < len(tensors):
        twice = counts.most_common(1)[0][0]
        raise refused("E_DUPLICATE", f"{path}: tensor `{twice}` appears twice")


def _check_magic(reader: Reader) -> None:
    path = reader.path
    if bytes(reader.data[:4]) != MAGIC:
        starts = bytes(reader.data[:16])
        if starts.startswith(b"version "):
            hint = "run `git lfs pull` in the folder, or download again"
            raise refused("E_LFS_POINTER", f"{path} is a Git LFS pointer, not a GGUF file", hint)
        raise refused(
            "E_NOT_GGUF",
            f"{path} starts with {starts[:8]!r}, and GGUF files start with {MAGIC!r}",
            "the download failed, or it is another kind of file: fetch it again",
        )
    reader.take(4, "the magic")
    version = reader.number("I", "the version")
    if version not in VERSIONS:
        is_swapped = version & 0xFFFF == 0 and version >> 24 in (1, 2, 3)
        kind = "big-endian" if is_swapped else f"version {version:,}"
        raise refused(
            "E_GGUF_VERSION",
            f"{path}: the file is {kind}; qtool reads little-endian versions 2 and 3",
            "convert the model again with a current llama.cpp",
        )


def _count(reader: Reader, what: str, limit: int, *, least_bytes: int) -> int:
    count = reader.number("Q", f"the number of {what}")
    if count > limit or count * least_bytes > reader.size:
        raise refused(
            "E_GGUF_COUNT",
            f"{reader.path}: {count:,} {what} are declared in {reader.size:,} bytes; the limit is "
            f"{limit:,}",
        )
    return count


def _check_name(path: Path, what: str, name: str) -> None:
    if not name or not name.isprintable():
        raise refused("E_GGUF_NAME", f"{path}: a {what} is called {name[:80]!r}")


def _read_tensor(reader: Reader, number: int, count: int) -> GgufTensor:
    path = reader.path
    name = reader.string(f"the name of tensor {number + 1:,} of {count:,}", MAX_NAME)
    _check_name(path, "tensor", name)
    what = f"the entry of tensor `{name}`"
    dimensions = reader.number("I", what)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise refused(
            "E_GGUF_SHAPE",
            f"{path}: tensor `{name}` has {dimensions:,} dimensions, and 1 to {MAX_DIMENSIONS} are "
            "allowed",
        )
    sizes = struct.unpack(f"<{dimensions}Q", reader.take(8 * dimensions, what))
    kind = reader.number("I", what)
    offset = reader.number("Q", what)
    if not all(sizes) or math.prod(sizes) >= MAX_NUMBER or offset >= MAX_NUMBER:
        raise refused(
            "E_GGUF_SHAPE", f"{path}: tensor `{name}` has the shape {[*sizes]} at {offset:,}"
        )
    type_name = _type_name(path, name, kind)
    block, block_bytes = BLOCKS[type_name]
    if sizes[0] % block:
        raise refused(
            "E_GGUF_SHAPE",
            f"{path}: tensor `{name}` has rows of {sizes[0]:,}, and {type_name} has blocks of "
            f"{block}",
        )
    size_bytes = math.prod(sizes) // block * block_bytes
    return GgufTensor(name, type_name, sizes[::-1], path, offset, size_bytes)


def _type_name(path: Path, tensor: str, kind: int) -> str:
    name = TYPE_NAMES.get(kind)
    if name in READ:
        return name
    if name is None:
        raise refused("E_GGUF_TYPE", f"{path}: tensor `{tensor}` has the unknown type {kind:,}")
    raise refused(
        "E_GGUF_TYPE",
        f"{path}: tensor `{tensor}` is {name}, which qtool does not read",
        f"llama.cpp reads it; qtool reads {', '.join(READ)}: take such a file of the same model",
    )


def _alignment(path: Path, metadata: Mapping[str, Value]) -> int:
    alignment = metadata.get("general.alignment", 32)
    is_power = type(alignment) is int and alignment > 0 and not alignment & (alignment - 1)
    if not isinstance(alignment, int) or not is_power or alignment > MAX_ALIGNMENT:
        raise refused(
            "E_GGUF_ALIGNMENT",
            f"{path}: general.alignment is {alignment!r:.40}, and must be a power of two up to "
            f"{MAX_ALIGNMENT:,}",
        )
    return alignment


def _check_offsets(
    path: Path, tensors: list[GgufTensor], start: int, alignment: int, size: int
) -> None:
    """Refuse tensors that overlap, leave holes or lie outside of the file."""
    if outside := next((each for each in tensors if each.offset + each.size_bytes > size), None):
        raise _outside(path, outside, size)
    end, before = start, "the header"
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        expected = -(-end // alignment) * alignment
        if tensor.offset != expected:
            code, what = (
                ("E_OVERLAP", "overlaps")
                if tensor.offset < expected
                else (
                    "E_HOLE",
                    "leaves a hole after",
                )
            )
            raise refused(
                code,
                f"{path}: tensor `{tensor.name}` at byte {tensor.offset:,} {what} {before}, which "
                f"ends at {end:,} (alignment {alignment})",
            )
        end, before = tensor.offset + tensor.size_bytes, f"`{tensor.name}`"
    _check_end(path, end, alignment, size)


def _check_end(path: Path, end: int, alignment: int, size: int) -> None:
    if size - end >= alignment:
        raise refused(
            "E_TRAILING_BYTES",
            f"{path}: {size - end:,} bytes behind the last tensor belong to none",
            DAMAGED,
        )


def _outside(path: Path, tensor: GgufTensor, size: int) -> CheckpointRefused:
    return refused(
        "E_TRUNCATED",
        f"{path}: tensor `{tensor.name}` is said to take {tensor.size_bytes:,} bytes at byte "
        f"{tensor.offset:,} of {size:,}",
        "the download or copy was interrupted: fetch the file again",
    )

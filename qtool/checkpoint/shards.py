"""Write safetensors files whose contents are known beforehand: headers first, then each tensor at
its place, in any order, from several threads.
"""

from __future__ import annotations

import errno
import json
import os
import re
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from qtool.checkpoint.model import DTYPE_BITS, INDEX, TensorInfo
from qtool.checkpoint.strict_json import JsonDict
from qtool.errors import CheckpointRefused, UsageError, naming

UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
}
MIN_SHARD_BYTES = 1 << 20
COPY_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written: its name, its safetensors dtype and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of its data."""
        bits = DTYPE_BITS[self.dtype]
        for size in self.shape:
            bits *= size
        return -(-bits // 8)


class Shards:
    """Files of a checkpoint folder, open for writing; a file is complete when each of its tensors
    was written once.
    """

    def __init__(self, folder: Path, specs: Iterable[TensorSpec], max_shard_bytes: int) -> None:
        groups = _grouped(list(specs), max_shard_bytes)
        names = (
            [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
            if len(groups) > 1
            else ["model.safetensors"]
        )
        self._byte_ranges: dict[str, tuple[Path, int, int]] = {}
        self._left: dict[Path, int] = {}
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()
        # two writers of one file only spin on its lock in the kernel
        self._writing = threading.Lock()
        for name, group in zip(names, groups, strict=True):
            self._begin(folder / name, group)
        if len(groups) > 1:
            _write_index(
                folder,
                {
                    spec.name: name
                    for name, group in zip(names, groups, strict=True)
                    for spec in group
                },
                self._byte_ranges,
            )

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def write(self, name: str, data: Any) -> Path | None:
        """Write the bytes of the tensor ``name``; return its file when that was the last one of it,
        else None.
        """
        path, offset, size = self._byte_ranges[name]
        view = memoryview(data).cast("B") if size else memoryview(b"")
        if len(view) != size:
            raise ValueError(f"{name}: {len(view)} bytes for a range of {size}")
        done = 0
        with self._writing, naming(path):
            target = self._open(path)
            while done < size:
                done += os.pwrite(target, view[done:], offset + done)
        return self._done(path)

    def copy(self, name: str, source: TensorInfo) -> Path | None:
        """Write the bytes of ``source`` as the tensor ``name``, inside the kernel where that can;
        else as `write`.
        """
        if source.arrangement is not None:
            return self.write(name, source.read())
        path, offset, size = self._byte_ranges[name]
        done = 0
        with source.file.open("rb", buffering=0) as file:
            read_ahead(file.fileno(), source.offset, size)
            with self._writing, naming(path):
                target = self._open(path)
                while done < size:
                    count = _copy_range(
                        file.fileno(), target, size - done, source.offset + done, offset + done
                    )
                    if not count:
                        hint = "it was changed meanwhile: start again"
                        raise CheckpointRefused(
                            "E_TRUNCATED", f"{source.file} ends inside `{source.name}`", hint=hint
                        )
                    done += count
        return self._done(path)

    def _begin(self, path: Path, specs: Sequence[TensorSpec]) -> None:
        header: JsonDict = {"__metadata__": {"format": "pt"}}
        end = 0
        # the widest first: each then lies at a multiple of its width
        for spec in sorted(specs, key=lambda spec: -DTYPE_BITS[spec.dtype]):
            header[spec.name] = {
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "data_offsets": [end, end := end + spec.size_bytes],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with naming(path), path.open("xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        self._left[path] = len(specs)
        for spec in specs:
            start, stop = header[spec.name]["data_offsets"]
            self._byte_ranges[spec.name] = path, 8 + len(text) + start, stop - start

    def _open(self, path: Path) -> int:
        """Return the descriptor of ``path``, open from its first write to its last: a checkpoint
        may have more files than a process may open.
        """
        if path not in self._descriptors:
            self._descriptors[path] = os.open(path, os.O_RDWR)
        return self._descriptors[path]

    def _done(self, path: Path) -> Path | None:
        with self._lock:
            self._left[path] -= 1
            if self._left[path]:
                return None
            if path in self._descriptors:
                os.close(self._descriptors.pop(path))
            return path


def read_ahead(source: int, start: int, size: int) -> None:
    """Let the system read from the disk while others write."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(source, start, size, os.POSIX_FADV_WILLNEED)


def _copy_range(source: int, target: int, size: int, source_offset: int, target_offset: int) -> int:
    """Copy up to ``size`` bytes from one open file to another and return how many; 0 at the end of
    the source.
    """
    if hasattr(os, "copy_file_range"):
        try:
            if count := os.copy_file_range(
                source, target, min(size, 1 << 30), source_offset, target_offset
            ):
                return count  # some file systems answer 0 for what they cannot do
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                raise
    return os.pwrite(target, os.pread(source, min(size, COPY_BYTES), source_offset), target_offset)


def parse_size(text: str) -> int:
    """Return the bytes that ``text``, e.g. ``5GB`` or ``500 MiB``, stands for. Raises: UsageError,
    also for less than 1 MiB.
    """
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-z]*)\s*", text)
    if not found or found[2].upper() not in UNITS:
        raise UsageError("E_SIZE", f"`{text}` is not a size", hint="for example 5GB, 500MB or 2GiB")
    size = int(Decimal(found[1]) * UNITS[found[2].upper()])
    if size < MIN_SHARD_BYTES:
        raise UsageError(
            "E_SIZE", f"a shard of {size:,} bytes is too small", hint="1MiB at least; usual is 5GB"
        )
    return size


def _grouped(specs: Sequence[TensorSpec], max_shard_bytes: int) -> list[list[TensorSpec]]:
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if groups[-1] and filled + spec.size_bytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += spec.size_bytes
    return groups


def _write_index(
    folder: Path, weight_map: dict[str, str], byte_ranges: dict[str, tuple[Path, int, int]]
) -> None:
    index = {
        "metadata": {"total_size": sum(size for _, _, size in byte_ranges.values())},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

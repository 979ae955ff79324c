"""Digests of files: of all their bytes, or of samples."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qtool.errors import naming

CHUNK_BYTES = 4 << 20
SAMPLE_EVERY, SAMPLE_BYTES = 64 << 20, 64 << 10
Digests = dict[str, dict[str, object]]  # by file name


def digest_files(
    files: Iterable[Path], *, root: Path | None = None, stop: threading.Event | None = None
) -> Digests:
    """Return ``{name: {"sha256": ..., "size_bytes": ...}}`` for ``files``, hashed in parallel.

    Args:
        files: what is read.
        root: the folder from which files are named, with the folders in it; None: by their last
            name alone.
        stop: once it is set, reading ends and the digests are useless.
    """
    ordered = sorted(files)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        digests = pool.map(lambda file: _sha256(file, stop or threading.Event()), ordered)
        return {
            _name(file, root): {"sha256": digest, "size_bytes": file.stat().st_size}
            for file, digest in zip(ordered, digests, strict=True)
        }


def sample_files(files: Iterable[Path]) -> Digests:
    """Return ``{name: {"sample_sha256": ..., "size_bytes": ...}}``: of the size, the first 4 MB,
    where the header is, and 64 kB of each 64 MB.

    Tells which file it was in a fraction of the time that all its bytes take.
    """
    return {
        path.name: {"sample_sha256": _sampled(path), "size_bytes": path.stat().st_size}
        for path in sorted(files)
    }


def _name(file: Path, root: Path | None) -> str:
    return file.name if root is None else file.relative_to(root).as_posix()


def _sampled(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with naming(path), path.open("rb", buffering=0) as file:
        digest.update(file.read(CHUNK_BYTES))
        for start in range(SAMPLE_EVERY, size, SAMPLE_EVERY):
            file.seek(start)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _sha256(path: Path, stop: threading.Event) -> str:
    digest, buffer = hashlib.sha256(), bytearray(CHUNK_BYTES)
    with naming(path), path.open("rb", buffering=0) as file:
        while (count := file.readinto(buffer)) and not stop.is_set():
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()

"""C of this package, compiled on first use and loaded: a library is kept in ``qtool`` in the user's
cache folder, under a hash of its source, avx512.h, flags and compiler.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
HEADER = Path(__file__).with_name("avx512.h")
"""What all C of this package may include."""
BASE_FLAGS = (
    "-std=gnu11",
    "-O3",
    "-mavx512f",
    "-mavx512bw",
    "-mavx512vl",
    "-mavx512dq",
    "-mfma",
    "-shared",
    "-fPIC",
)

_of_thread = threading.local()


def workspace(size: int) -> Tensor:
    """Return at least ``size`` bytes of this thread, aligned to 64 as tensors are.

    They are kept, since fresh memory is slow.
    """
    memory: Tensor | None = getattr(_of_thread, "memory", None)
    if memory is None or memory.numel() < size:
        memory = _of_thread.memory = torch.empty(size, dtype=torch.uint8)
    return memory


def fields(kind: type, names: str) -> list[tuple[str, type]]:
    """Return members of a `ctypes.Structure`, all of one ``kind``."""
    return [(name, kind) for name in names.split()]


def openmp() -> ctypes.c_void_p:
    """Return GOMP_parallel of the OpenMP that torch runs on."""
    torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    return ctypes.cast(torch_cpu.GOMP_parallel, ctypes.c_void_p)


def load_library(source: Path, flags: Sequence[str], kind: Callable[[Path], T]) -> T | str:
    """Compile ``source`` and load it as ``kind``; or return why that fails."""
    compiler = _compiler()
    if shutil.which(compiler[0]) is None:
        return "no C compiler: install gcc or clang, or set CC"
    try:
        return kind(_compiled(source, flags, compiler))
    except subprocess.CalledProcessError as error:
        errors = [line for line in (error.stderr or "").splitlines() if "error" in line]
        reason = errors[0].strip() if errors else "no message"
        return f"the C compiler `{shlex.join(compiler)}` failed: {reason[:200]}"
    except (OSError, AttributeError) as error:
        return f"{source.name} did not load: {error}"


def _compiler() -> list[str]:
    """Return the command of the C compiler: CC, or the first of cc, gcc and clang."""
    if named := shlex.split(os.environ.get("CC", "")):
        return named
    return [next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), "cc")]


def _compiled(source: Path, flags: Sequence[str], compiler: list[str]) -> Path:
    """Return ``source`` as a shared library, from the cache folder if it is there."""
    version = subprocess.run(
        [*compiler, "--version"], check=True, capture_output=True, text=True
    ).stdout
    made_of = [source.read_text(), HEADER.read_text(), *flags, *compiler, version]
    name = f"{source.stem}-{hashlib.sha256(chr(0).join(made_of).encode()).hexdigest()[:16]}.so"
    cache_home = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(cache_home) if cache_home else Path("~/.cache").expanduser()) / "qtool"
    if (folder / name).is_file():
        return folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=name, delete=False) as file:
            target = Path(file.name)
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="qtool-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        target = folder / f"{name}.new"
    try:
        subprocess.run(
            [*compiler, *flags, f"-I{HEADER.parent}", "-o", str(target), str(source)],
            check=True,
            capture_output=True,
            text=True,
        )
        return target.replace(folder / name)  # two processes at once write the same file
    finally:
        target.unlink(missing_ok=True)

"""Compile the Triton kernels of a piece of work at the same time, before the work is done."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from triton import AsyncCompileMode, knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from qtool.runtime.triton.routing import WRITES_INDICES

LOG = logging.getLogger("qtool.runtime")
MAX_THREADS = 16
_ONE_AT_A_TIME = threading.Lock()
_THREAD = threading.local()  # `serves`: requests wait for what it compiles


class _Compilers(ThreadPoolExecutor):
    """Threads that compile a kernel and its launcher, which is C: Triton would compile that at the
    first launch, in 0.3 s.
    """

    def submit(  # type: ignore[override]
        self, compile_kernel: Callable[[], CompiledKernel]
    ) -> Future[CompiledKernel]:
        """Compile as ``compile_kernel`` does, and its launcher."""

        def compile_both() -> CompiledKernel:
            kernel = compile_kernel()
            driver.active.launcher_cls(kernel.src, kernel.metadata)  # into the cache on disk
            return kernel

        return super().submit(compile_both)


@contextmanager
def compile_in_parallel() -> Iterator[None]:
    """Compile the kernels of qtool that this thread launches meanwhile, on all cores, instead of
    running them, so that their outputs hold whatever the memory held. Kernels whose outputs are
    indices run all the same, as do those of other libraries. At the end the compiled kernels can be
    launched, and are on disk. Threads take turns; a thread must not enter twice.

    The error of a kernel that cannot be compiled is left to its launch.
    """
    threads = min(MAX_THREADS, os.cpu_count() or 1)
    with (
        _ONE_AT_A_TIME,
        _Compilers(threads, "compile") as pool,
        AsyncCompileMode(pool, ignore_errors=True),
    ):
        owner, run = threading.get_ident(), JITFunction.run

        def only_compile(kernel, *args, grid, warmup, **options):  # type: ignore[no-untyped-def]
            mine = threading.get_ident() == owner and kernel not in WRITES_INDICES
            mine = mine and kernel.fn.__module__.startswith("qtool.")
            return run(kernel, *args, grid=grid, warmup=warmup or mine, **options)

        JITFunction.run = only_compile
        try:
            yield
        finally:
            JITFunction.run = run


def log_compiles() -> None:
    """Log each kernel that this thread compiles from now on: a request may be waiting for it."""
    _THREAD.serves = True
    knobs.compilation.listener = _log_compile


def _log_compile(*, metadata: dict[str, Any], times: Any, cache_hit: bool, **_: object) -> None:
    if getattr(_THREAD, "serves", False) and not cache_hit:
        seconds = times.total / 1e6
        LOG.warning("requests wait for a kernel: %s compiled in %.1f s", metadata["name"], seconds)

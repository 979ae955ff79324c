"""Where kernels are compiled before they are wanted."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def compile_in_parallel(device: torch.device) -> AbstractContextManager[None]:
    """Compile what is launched on ``device`` meanwhile, in parallel, instead of running it; see
    `qtool.runtime.triton.parallel_compile`. A CPU has nothing to compile, and runs everything.
    """
    if device.type != "cuda":
        return nullcontext()
    from qtool.runtime.triton import parallel_compile

    return parallel_compile.compile_in_parallel()


def log_compiles(device: torch.device) -> None:
    """Log each kernel for ``device`` that is compiled from now on, while a request waits."""
    if device.type == "cuda":
        from qtool.runtime.triton import parallel_compile

        parallel_compile.log_compiles()

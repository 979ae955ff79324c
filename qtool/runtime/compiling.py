"""Where kernels are compiled before they are wanted."""

from __future__ import annotations

import logging
import threading
from contextlib import AbstractContextManager, nullcontext

import torch

LOG = logging.getLogger("qtool.runtime")


def compile_in_parallel(device: torch.device) -> AbstractContextManager[None]:
    """Compile what is launched on ``device`` meanwhile, in parallel, instead of running it; see
    `qtool.runtime.triton.parallel_compile`. A CPU has nothing to compile, and runs everything.
    """
    if device.type != "cuda":
        return nullcontext()
    from qtool.runtime.triton import parallel_compile

    return parallel_compile.compile_in_parallel()


def log_compiles(device: torch.device) -> None:
    """Log each kernel for ``device`` that this thread compiles from now on, while a request
    waits.
    """
    if device.type == "cuda":
        from qtool.runtime.triton import parallel_compile

        parallel_compile.log_compiles()


def hash_compiler(device: torch.device) -> None:
    """Start to hash Triton's own files in a thread. The hash is part of the keys of its cache on
    disk, and takes 0.3 s, which the first kernel would wait for.
    """
    if device.type != "cuda":
        return
    import triton.runtime.cache

    # some versions lack it; it caches its result
    key = getattr(triton.runtime.cache, "triton_key", None)
    if key is not None:
        threading.Thread(target=key, name="qtool-triton-key", daemon=True).start()


def warn_of_version(device: torch.device) -> None:
    """Warn when the fastest kernels for ``device`` do not run with this version of Triton."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return
    import triton

    from qtool.runtime.triton.tiles import GLUON, GLUON_VERSION

    if not GLUON:
        LOG.warning(
            "with Triton %s prompts in 8 bits and FP8 KV caches run in slower kernels: the fast "
            "ones were tested with Triton %s alone",
            triton.__version__,
            GLUON_VERSION,
        )

"""Where kernels are compiled before they are wanted."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def compiled_together(device: torch.device) -> AbstractContextManager[None]:
    """Compile what is launched on ``device`` meanwhile, all at the same time, and do not run it;
    see `qtool.runtime.triton.together`. A CPU has nothing to compile, and runs everything.
    """
    if device.type != "cuda":
        return nullcontext()
    from qtool.runtime.triton import together

    return together.compiled_together()

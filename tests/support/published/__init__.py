"""Layouts of published quantized checkpoints, each written small from the facts of its config.

`PUBLISHED` has a function for each layout: it writes a checkpoint to a folder that does not exist
and returns the weights that its quantized layers stand for, computed without qtool.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

Expected = dict[str, Tensor]
"""The dequantized weights, f32 [N, K], by the layer's name in the checkpoint."""
Writer = Callable[[Path], Expected]
PUBLISHED: dict[str, Writer] = {}


def layout(name: str) -> Callable[[Writer], Writer]:
    """Add a function to `PUBLISHED` as ``name``, e.g. ``llama-3.1-405b-fbgemm-fp8``."""

    def add(writer: Writer) -> Writer:
        assert name not in PUBLISHED, f"{name} is there already"
        PUBLISHED[name] = writer
        return writer

    return add


# each adds its layouts
from support.published import (  # noqa: E402, F401
    auto_round,
    bnb,
    compressed_tensors,
    fp8,
    gguf_files,
    gpt_oss,
    gptq,
    modelopt,
    stacks,
    torchao,
)

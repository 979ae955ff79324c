"""NVIDIA ModelOpt, by its versions and by how models are mixed of several schemes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from support.published import Expected, layout
from support.published.floats import nvfp4
from support.published.models import llama, write

PRODUCER = {"name": "modelopt", "version": "0.33.0"}


@layout("nvidia-llama-nvfp4")
def nvfp4_flat(folder: Path) -> Expected:
    """NVFP4 with its config in config.json."""
    return write(
        folder,
        llama(),
        {"layers": partial(nvfp4, input_amax=4.0)},
        {
            "quant_method": "modelopt",
            "quant_algo": "NVFP4",
            "producer": PRODUCER,
            "ignore": ["lm_head"],
        },
    )

"""FP8 and its family, by the tools that are not ModelOpt: DeepSeek, AutoFP8, FBGEMM, Quark."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from support.published import Expected, layout
from support.published.floats import fp8_tensor
from support.published.models import Stored, llama, write


@layout("neuralmagic-llama-3-fp8-kv")
def autofp8_kv_scale(folder: Path) -> Expected:
    """AutoFP8: static inputs, and one scale for keys and values together."""

    def key(weight: Tensor) -> Stored:
        parts, dense = fp8_tensor(weight, input_scale=0.01)
        return {**parts, "../kv_scale": torch.tensor(0.02)}, dense

    return write(
        folder,
        llama(),
        {"k_proj": key, "layers": partial(fp8_tensor, input_scale=0.01)},
        {
            "activation_scheme": "static",
            "ignored_layers": ["lm_head"],
            "kv_cache_scheme": "static",
            "quant_method": "fp8",
        },
    )

"""The MXFP4 format of gpt-oss: the experts of a layer in one tensor of blocks of 32 and one of
their scales; all else stays in 16 bits.

Source: gpt-oss, `gpt_oss/torch/weights.py`; transformers 5.17, `integrations/mxfp4.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from qtool.checkpoint import Checkpoint
from qtool.checkpoint.strict_json import Json, JsonDict
from qtool.formats.layout import Layout, Parts, QuantizedModule, modules_of
from qtool.scheme import SCHEMES

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.weight import QuantizedWeight

GROUP = 32
BLOCKS, SCALES = "_blocks", "_scales"


def matches_config(config: Json) -> bool:
    """Whether ``config`` is of this format."""
    return config.get("quant_method") == "mxfp4"


def detect(checkpoint: Checkpoint, config: Json) -> Layout:
    """Return the layout: a projection of stacked experts is quantized when it has blocks,
    ``experts.gate_up_proj_blocks``.
    """
    modules: dict[str, QuantizedModule] = {}
    for parts in modules_of(checkpoint):
        for suffix in parts.tensors:
            if suffix.endswith(BLOCKS):
                module = _module(parts, suffix.removesuffix(BLOCKS))
                modules[module.name] = module
    return Layout(
        "mxfp4",
        modules,
        None,
        () if modules else ("the config says mxfp4 and no tensor is quantized",),
    )


def read(module: QuantizedModule, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    """Return the common form of ``tensors``, all experts in one matrix."""
    import torch

    from qtool.weight import QuantizedWeight

    rows, columns = module.shape
    scale = tensors[SCALES].reshape(rows, columns // GROUP).view(torch.float8_e8m0fnu)
    return QuantizedWeight(tensors[BLOCKS].reshape(rows, columns // 2), scale)


def unsupported_reason(module: QuantizedModule, weight: QuantizedWeight) -> str | None:
    """Return the constraint that keeps this format from holding ``weight``."""
    if module.scheme != SCHEMES["MXFP4A16"]:
        return (
            f"scheme: the weights are {module.scheme.name}, and this format holds MXFP4 with "
            "inputs in 16 bits"
        )
    if module.experts == 1:
        return "experts: this format holds the stacked experts of gpt-oss, and no linear layers"
    return None


def write(module: QuantizedModule, weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return the blocks [E, N, K / 32, 16] and scales [E, N, K / 32] of E experts."""
    import torch

    rows, columns = module.shape
    groups = columns // GROUP
    blocks = weight.data.reshape(module.experts, rows // module.experts, groups, GROUP // 2)
    return {
        BLOCKS: blocks,
        SCALES: weight.scale.view(torch.uint8).reshape(
            module.experts, rows // module.experts, groups
        ),
    }


def quantization_config(
    modules: Sequence[QuantizedModule], unquantized: Sequence[str], kv_cache: str | None
) -> dict[str, JsonDict]:
    """Return the config."""
    return {
        "config.json": {
            "quantization_config": {
                "quant_method": "mxfp4",
                "modules_to_not_convert": list(unquantized),
            }
        }
    }


def cache_scale(attention: str, which: str, count: int) -> tuple[str, tuple[int, ...]] | None:
    """Return name and shape of the KV-cache scale ``which`` of an attention module; None when it
    has no place.
    """
    return None


def fallbacks() -> tuple[str, ...]:
    """Return the scheme that weights can be rounded to for this format."""
    return ("MXFP4A16",)


def _module(parts: Parts, projection: str) -> QuantizedModule:
    blocks, scales = parts[projection + BLOCKS], parts[projection + SCALES]
    if blocks.dtype != "U8" or len(blocks.shape) != 4 or blocks.shape[3] != GROUP // 2:
        raise parts.misfit(projection + BLOCKS, "U8 [experts, outputs, groups, 16]")
    if scales.dtype not in ("U8", "F8_E8M0") or scales.shape != blocks.shape[:3]:
        raise parts.misfit(
            projection + SCALES, f"U8 {list(blocks.shape[:3])}, a scale for each block"
        )
    experts, rows, groups = scales.shape
    tensors = {BLOCKS: blocks, SCALES: scales}
    name = f"{parts.name}.{projection}"
    return QuantizedModule(
        name, SCHEMES["MXFP4A16"], (experts * rows, groups * GROUP), tensors, experts=experts
    )

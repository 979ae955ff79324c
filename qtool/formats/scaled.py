"""Layers of a ``weight`` and its ``weight_scale``, whose dtypes and shapes say what they hold: of
ModelOpt and Quark, and the NVFP4 experts that NVIDIA stores beside DeepSeek's FP8.

Layers that ModelOpt copies from a checkpoint of FP8 keep the name ``weight_scale_inv``: those of
MiniMax-M3 beside NVFP4 experts, and the MTP experts of Qwen3.8.
Source: nvidia-modelopt 0.47, `examples/minimax_m3/hf_ptq_mixed_mxfp8_nvfp4.py`; SGLang 0.5.23,
    `layers/quantization/modelopt_quant.py`, ModelOptMixedPrecisionConfig.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from qtool.checkpoint import TensorInfo
from qtool.formats.layout import SCALE_DTYPES, Parts, QuantizedModule, block_size, group_size
from qtool.scheme import Format, ScaleFormat, Weights

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.weight import QuantizedWeight

E8M0_DTYPES = ("U8", "F8_E8M0")  # powers of two, by their exponents
WEIGHT_SCALES = ("weight_scale", "weight_scale_inv")  # both multiply
INPUT_SCALES = ("input_scale", "input_scale_2")  # the second is Quark's, for NVFP4
KEPT_SUFFIXES = (
    "weight",
    "bias",
    *WEIGHT_SCALES,
    "weight_scale_2",
    *INPUT_SCALES,
    "pre_quant_scale",
)


def is_quantized(parts: Parts) -> bool:
    """Whether ``parts`` are of a quantized layer."""
    if "weight" in parts:
        return parts["weight"].dtype not in (*SCALE_DTYPES, "F64")
    # a quantized layer that has lost its weight
    return any(name in parts for name in WEIGHT_SCALES)


def weights_of(parts: Parts, *, in_blocks: bool = False) -> tuple[Weights, tuple[int, int]]:
    """Return what the tensors ``parts`` hold, and its shape.

    Args:
        parts: the tensors of a quantized layer.
        in_blocks: whether one scale is that of a block, not of the whole matrix.
    Raises: CheckpointRefused, when they hold nothing that is read.
    """
    weight, scale = parts["weight"], parts[_scale_name(parts)]
    rows, columns = parts.matrix("weight", "U8", "I8", "F8_E4M3")
    if weight.dtype != "U8":
        format: Format = "int8" if weight.dtype == "I8" else "fp8"
        return _of_bytes(parts, format, rows, columns, in_blocks=in_blocks), (rows, columns)
    if scale.dtype in SCALE_DTYPES:
        rows *= 2  # int4 is packed along the outputs
        return Weights("int4", "group", _grouped(parts, rows, columns)), (rows, columns)
    columns *= 2
    two_levels = scale.dtype == "F8_E4M3"
    if two_levels:
        parts["weight_scale_2"]
    size = _grouped(parts, rows, columns)
    scale_format: ScaleFormat = "e4m3" if two_levels else "e8m0"
    return Weights("fp4", "group", size, scale=scale_format), (rows, columns)


def _scale_name(parts: Parts) -> str:
    return next((name for name in WEIGHT_SCALES if name in parts), WEIGHT_SCALES[0])


def kept_tensors(parts: Parts) -> dict[str, TensorInfo]:
    """Return the tensors of a layer, without those of the KV cache that lie on it."""
    return {suffix: tensor for suffix, tensor in parts.tensors.items() if suffix in KEPT_SUFFIXES}


def read(module: QuantizedModule, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    """Return the common form of ``tensors``."""
    import torch

    from qtool.weight import Activation, QuantizedWeight, uneven_block

    weights, activations, (rows, _) = module.scheme.weights, module.scheme.activations, module.shape
    data, scale2 = tensors["weight"], None
    scale = next(tensors[name] for name in WEIGHT_SCALES if name in tensors)
    if weights.format == "int4":  # two rows in a byte, the even one low, in two's complement
        even, odd = data[:, ::2], data[:, 1::2]
        data = (
            torch.stack(((even & 15) | (odd << 4), (even >> 4) | (odd & 0xF0)), dim=1).flatten(0, 1)
            ^ 0x88
        )
    if scale.element_size() == 1 and weights.scale != "e4m3":
        scale = multipliers(scale, weights)
    if weights.scale == "e4m3":
        scale2 = tensors["weight_scale_2"].float().reshape(1).expand(rows).contiguous()
    if weights.granularity == "block":
        scale = scale.reshape(scale.shape[0], -1)
    elif weights.granularity in ("tensor", "channel"):
        scale = scale.reshape(-1, 1).expand(rows, 1).contiguous()
    input_scale = next((tensors[name] for name in INPUT_SCALES if name in tensors), None)
    activation = None
    if activations:
        static_scale = None if input_scale is None else input_scale.reshape(())
        activation = Activation(activations, static_scale)
    block = uneven_block(weights, module.shape)
    return QuantizedWeight(
        data,
        scale,
        scale2,
        pre_scale=tensors.get("pre_quant_scale"),
        activation=activation,
        block=block,
    )


def multipliers(exponents: Tensor, weights: Weights) -> Tensor:
    """Return the powers of two that ``exponents``, e8m0 of whatever dtype, stand for: as they are
    for MX, and f32 for blocks and matrices, which other numbers scale too.
    """
    import torch

    scale = exponents.view(torch.float8_e8m0fnu)
    return scale if weights.scale == "e8m0" else scale.float()


def _of_bytes(parts: Parts, format: Format, rows: int, columns: int, *, in_blocks: bool) -> Weights:
    scale = parts[_scale_name(parts)]
    is_e8m0 = scale.dtype in E8M0_DTYPES
    if is_e8m0 and not in_blocks and scale.shape[:1] == (rows,):
        return Weights(format, "group", _grouped(parts, rows, columns), scale="e8m0")
    if not is_e8m0 and scale.dtype not in SCALE_DTYPES:
        raise parts.misfit(
            _scale_name(parts),
            f"{' or '.join(SCALE_DTYPES)} scales of a {parts['weight'].dtype} weight",
        )
    if in_blocks:
        return _in_blocks(parts, format, rows, columns)
    if scale.count == 1:
        return Weights(format, "tensor")
    if scale.shape in ((rows,), (rows, 1)):
        return Weights(format, "channel")
    return _in_blocks(parts, format, rows, columns)


def _in_blocks(parts: Parts, format: Format, rows: int, columns: int) -> Weights:
    scale = parts[_scale_name(parts)]
    blocks = scale.shape[::2] if len(scale.shape) == 4 else scale.shape
    expected = f"one scale, {rows}, or one for each block of {rows} x {columns}"
    if len(blocks) != 2 or scale.count != math.prod(blocks) or not scale.count:
        raise parts.misfit(_scale_name(parts), expected)
    height, width = block_size(rows, blocks[0]), block_size(columns, blocks[1])
    if (math.ceil(rows / height), math.ceil(columns / width)) != blocks:
        raise parts.misfit(_scale_name(parts), expected)
    return Weights(format, "block", block=(height, width))


def _grouped(parts: Parts, rows: int, columns: int) -> int:
    scale = parts[_scale_name(parts)]
    if (
        len(scale.shape) != 2
        or scale.shape[0] != rows
        or not scale.shape[1]
        or columns % scale.shape[1]
    ):
        raise parts.misfit(_scale_name(parts), f"one scale for each group of {rows} x {columns}")
    return group_size(columns, scale.shape[1])

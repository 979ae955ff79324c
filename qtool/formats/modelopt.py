"""The unified Hugging Face export of NVIDIA ModelOpt: FP8, NVFP4, MX, INT8 and INT4 AWQ, one or
several in a checkpoint.

Source: nvidia-modelopt 0.47, `torch/export/quant_utils.py`, `torch/export/unified_export_hf.py`,
    `torch/quantization/qtensor`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from qtool.checkpoint import Checkpoint, TensorInfo
from qtool.checkpoint.strict_json import Json
from qtool.formats.layout import (
    SCALE_DTYPES,
    Layout,
    Parts,
    QuantizedModule,
    block_size,
    group_size,
    modules_of,
    refused,
    shared_unsupported_reason,
)
from qtool.formats.modelopt_config import (
    ALGORITHM_OF_SCHEME,
    MIXED,
    WITH_INPUT_FACTORS,
    algorithm_of,
    kv_cache_format,
    merged_config,
    name_matcher,
    quantization_config,
)
from qtool.modules import parse_cache_scale
from qtool.scheme import (
    SCHEMES,
    Activations,
    Format,
    ScaleFormat,
    Scheme,
    Weights,
)

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.weight import QuantizedWeight

__all__ = [
    "cache_scale",
    "detect",
    "fallbacks",
    "matches_config",
    "quantization_config",
    "read",
    "unsupported_reason",
    "write",
]
KEPT_SUFFIXES = (
    "weight",
    "bias",
    "weight_scale",
    "weight_scale_2",
    "input_scale",
    "pre_quant_scale",
)
INPUT_OF_ALGORITHM: Mapping[str, Activations | None] = {
    "FP8": SCHEMES["FP8"].activations,
    "FP8_PER_CHANNEL_PER_TOKEN": SCHEMES["FP8_DYNAMIC"].activations,
    "FP8_PB_WO": None,
    "FP8_BLOCK_SCALES": SCHEMES["FP8_BLOCK"].activations,
    "NVFP4": SCHEMES["NVFP4"].activations,
    "NVFP4_AWQ": SCHEMES["NVFP4"].activations,
    "W4A16_NVFP4": None,
    "W4A8_NVFP4_FP8": SCHEMES["NVFP4AFP8"].activations,
    "MXFP4": SCHEMES["MXFP4"].activations,
    "W4A8_MXFP4_FP8": SCHEMES["MXFP4AFP8"].activations,
    "MXFP8": SCHEMES["MXFP8"].activations,
    "W4A16_AWQ": None,
    "W4A8_AWQ": SCHEMES["W4AFP8_STATIC"].activations,
    "W8A8_SQ_PER_CHANNEL": SCHEMES["W8A8_STATIC"].activations,
    "W8A16": None,
}
BLOCK_ALGORITHMS = ("FP8_PB_WO", "FP8_BLOCK_SCALES")


def matches_config(config: Json) -> bool:
    """Whether ``config`` is of this format: flat in config.json, nested in hf_quant_config.json."""
    producer = config.get("producer")
    name = producer.get("name") if isinstance(producer, Mapping) else None
    return str(config.get("quant_method", "")).startswith("modelopt") or name == "modelopt"


def detect(checkpoint: Checkpoint, config: Json) -> Layout:
    """Return the layout; hf_quant_config.json, if there is one, adds what config.json has lost."""
    config = merged_config(checkpoint, config)
    algorithm = str(config.get("quant_algo") or "").upper()
    per_layer = config.get("quantized_layers") or {}
    excluded = name_matcher(config.get("exclude_modules") or config.get("ignore") or [])
    modules: dict[str, QuantizedModule] = {}
    warnings: list[str] = []
    for parts in modules_of(checkpoint):
        own = per_layer.get(parts.name)
        if _is_quantized(parts):
            own_algorithm = _own_algorithm(checkpoint, parts, own, algorithm)
            if excluded(parts.name):
                warnings.append(f"`{parts.name}` is quantized and the config excludes it")
            modules[parts.name] = _module(parts, own_algorithm)
        elif own:
            warnings.append(
                f"`{parts.name}` is in `quantized_layers` and is stored as {parts['weight'].dtype}"
            )
    kv_cache = kv_cache_format(config)
    warnings += _kv_cache_warnings(checkpoint, kv_cache)
    if not modules and algorithm:
        warnings.append(f"the config says {algorithm} and no tensor is quantized")
    return Layout("modelopt", modules, kv_cache, tuple(warnings))


def read(module: QuantizedModule, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    """Return the common form of ``tensors``."""
    import torch

    from qtool.weight import Activation, QuantizedWeight, uneven_block

    weights, activations, (rows, _) = module.scheme.weights, module.scheme.activations, module.shape
    data, scale, scale2 = tensors["weight"], tensors["weight_scale"], None
    if weights.format == "int4":  # two rows in a byte, the even one low, in two's complement
        even, odd = data[:, ::2], data[:, 1::2]
        data = (
            torch.stack(((even & 15) | (odd << 4), (even >> 4) | (odd & 0xF0)), dim=1).flatten(0, 1)
            ^ 0x88
        )
    if weights.scale == "e8m0":
        scale = scale.view(torch.float8_e8m0fnu)
    elif weights.scale == "e4m3":
        scale2 = tensors["weight_scale_2"].float().reshape(1).expand(rows).contiguous()
    if weights.granularity == "block":
        scale = scale.reshape(scale.shape[0], -1)
    elif weights.granularity in ("tensor", "channel"):
        scale = scale.reshape(-1, 1).expand(rows, 1).contiguous()
    input_scale = tensors.get("input_scale")
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


def unsupported_reason(module: QuantizedModule, weight: QuantizedWeight) -> str | None:
    """Return the constraint that keeps ModelOpt from holding ``weight``."""
    scheme, (rows, columns) = module.scheme, module.shape
    algorithm = algorithm_of(module)
    if algorithm is None:
        return (
            f"scheme: ModelOpt's export has no algorithm for {scheme.name}; it has "
            f"{', '.join(ALGORITHM_OF_SCHEME)}"
        )
    if algorithm == "W4A8_AWQ" and "weight_scale_2" not in module.tensors:
        return (
            "weight_scale_2: layers that engines fuse share a second scale, and only ModelOpt "
            "finds it"
        )
    if scheme.weights.format == "int4" and (
        rows % 2 or columns % (scheme.weights.group_size or columns)
    ):
        return (
            "shape: ModelOpt's int4 needs outputs in pairs and inputs in whole groups, found "
            f"{rows} x {columns}"
        )
    return shared_unsupported_reason(module, weight, pre_scale=algorithm in WITH_INPUT_FACTORS)


def write(module: QuantizedModule, weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return ``weight``, its scales and what its input needs, in the shapes of
    `torch/export/quant_utils.py`; scales keep their dtype.
    """
    import torch

    data = weight.data
    if module.scheme.weights.format == "int4":
        even, odd = (data ^ 0x88).reshape(data.shape[0] // 2, 2, -1).unbind(1)
        pairs = ((even & 15) | (odd << 4), (even >> 4) | (odd & 0xF0))
        data = torch.stack(pairs, dim=-1).flatten(1)
    tensors = {"weight": data, "weight_scale": _written_scale(module, weight.scale)}
    if weight.scale2 is not None:
        tensors["weight_scale_2"] = weight.scale2[0]
    # kernels that unpack to fp8 divide by it; fused layers share one, which only ModelOpt knows
    elif algorithm_of(module) == "W4A8_AWQ":
        tensors["weight_scale_2"] = _as_found(module.tensors["weight_scale_2"])
    if weight.activation and weight.activation.scale is not None:
        tensors["input_scale"] = weight.activation.scale
    if weight.pre_scale is not None:
        tensors["pre_quant_scale"] = weight.pre_scale
    return tensors


def cache_scale(attention: str, which: str, count: int) -> tuple[str, tuple[int, ...]] | None:
    """Return name and shape of the KV-cache scale ``which`` of an attention module; None when it
    has no place.
    """
    return (f"{attention}.{which}_proj.{which}_scale", ()) if count == 1 else None


def fallbacks() -> tuple[str, ...]:
    """Return the schemes that weights can be rounded to for ModelOpt without data."""
    return "W4A16", "W8A16_CHANNEL"


def _as_found(tensor: TensorInfo) -> Tensor:
    import torch

    from qtool.formats.packing import torch_dtype

    return torch.frombuffer(bytearray(tensor.read()), dtype=torch_dtype(tensor)).reshape(
        tensor.shape
    )


def _is_quantized(parts: Parts) -> bool:
    if "weight" in parts:
        return parts["weight"].dtype not in SCALE_DTYPES
    return "weight_scale" in parts  # a quantized module that has lost its weight


def _kv_cache_warnings(checkpoint: Checkpoint, kv_cache: str | None) -> Iterator[str]:
    if kv_cache is None and any(_is_key_scale(name) for name in checkpoint.tensors):
        yield "KV-cache scales are stored and the config names no KV-cache format"


def _is_key_scale(name: str) -> bool:
    """Whether ``name`` is a scale of cached keys, however its projection stands in the name."""
    scale = parse_cache_scale(name)
    return scale is not None and scale.kind == "k" and scale.spelling != "proj.output_scale"


def _own_algorithm(checkpoint: Checkpoint, parts: Parts, own: Json | None, shared: str) -> str:
    """Return the algorithm of a layer: its ``own``, or the ``shared`` one of the config."""
    if own:
        return str(own["quant_algo"]).upper()
    if own is None and shared == MIXED:
        raise refused(
            "E_QUANT_TARGET",
            f"{checkpoint.path}: `{parts.name}` is quantized and `quantized_layers` does not name "
            "it",
        )
    return shared


def _module(parts: Parts, algorithm: str) -> QuantizedModule:
    if algorithm not in INPUT_OF_ALGORITHM:
        raise refused(
            "E_QUANT_ALGORITHM",
            f"`{parts.name}`: ModelOpt's `{algorithm}` is not read",
            f"read are {', '.join(INPUT_OF_ALGORITHM)}",
        )
    weights, shape = _weights(parts, in_blocks=algorithm in BLOCK_ALGORITHMS)
    activations = INPUT_OF_ALGORITHM[algorithm]
    if activations and activations.needs_data:
        parts["input_scale"]
    tensors = {
        suffix: tensor for suffix, tensor in parts.tensors.items() if suffix in KEPT_SUFFIXES
    }
    return QuantizedModule(parts.name, Scheme(weights, activations), shape, tensors)


def _weights(parts: Parts, *, in_blocks: bool) -> tuple[Weights, tuple[int, int]]:
    weight, scale = parts["weight"], parts["weight_scale"]
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


def _of_bytes(parts: Parts, format: Format, rows: int, columns: int, *, in_blocks: bool) -> Weights:
    scale = parts["weight_scale"]
    if scale.dtype in ("U8", "F8_E8M0"):
        return Weights(format, "group", _grouped(parts, rows, columns), scale="e8m0")
    if scale.dtype not in SCALE_DTYPES:
        raise parts.misfit(
            "weight_scale",
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
    scale = parts["weight_scale"]
    blocks = scale.shape[::2] if len(scale.shape) == 4 else scale.shape
    if len(blocks) != 2 or scale.count != math.prod(blocks):
        raise parts.misfit(
            "weight_scale", f"one scale, {rows}, or one for each block of {rows} x {columns}"
        )
    block = block_size(rows, blocks[0]), block_size(columns, blocks[1])
    return Weights(format, "block", block=block)


def _written_scale(module: QuantizedModule, scale: Tensor) -> Tensor:
    import torch

    weights = module.scheme.weights
    if weights.granularity == "tensor":
        return scale[0, 0]
    if weights.granularity == "channel":
        return scale.flatten()
    if weights.granularity == "block" and algorithm_of(module) == "fp8_pb_wo":
        return scale[:, None, :, None]
    return scale.view(torch.uint8) if weights.scale == "e8m0" else scale


def _grouped(parts: Parts, rows: int, columns: int) -> int:
    scale = parts["weight_scale"]
    if (
        len(scale.shape) != 2
        or scale.shape[0] != rows
        or not scale.shape[1]
        or columns % scale.shape[1]
    ):
        raise parts.misfit("weight_scale", f"one scale for each group of {rows} x {columns}")
    return group_size(columns, scale.shape[1])

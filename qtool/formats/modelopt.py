"""The unified Hugging Face export of NVIDIA ModelOpt: FP8, NVFP4, MX, INT8 and INT4 AWQ, one or several in a checkpoint.

Source: nvidia-modelopt 0.47, `torch/export/quant_utils.py`, `torch/export/unified_export_hf.py`, `torch/quantization/qtensor`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from qtool.checkpoint import Checkpoint, read_json
from qtool.formats.layout import SCALE_DTYPES, Layout, Parts, QuantizedModule, block_size, group_size, modules_of, refused
from qtool.scheme import SCHEMES, Activations, Scheme, Weights

if TYPE_CHECKING:
    from qtool.weight import QuantizedWeight

KEPT_SUFFIXES = ("weight", "bias", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale")
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


def claims(config: Mapping[str, Any]) -> bool:
    """Whether ``config``, embedded (flat) or sidecar (nested), is of this format."""
    producer = config.get("producer")
    name = producer.get("name") if isinstance(producer, Mapping) else None
    return str(config.get("quant_method", "")).startswith("modelopt") or name == "modelopt"


def detect(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Layout:
    """Return the layout; the sidecar, where there is one, adds what the embedded config has lost."""
    config = _merged(checkpoint, config)
    algorithm = str(config.get("quant_algo") or "").upper()
    per_layer = config.get("quantized_layers") or {}
    excluded = list(config.get("exclude_modules") or config.get("ignore") or [])
    modules: dict[str, QuantizedModule] = {}
    warnings: list[str] = []
    for parts in modules_of(checkpoint):
        own = per_layer.get(parts.name)
        if _is_quantized(parts):
            if own is None and algorithm == "MIXED_PRECISION":
                raise refused("E_QUANT_CONFIG", f"{checkpoint.path}: `{parts.name}` is quantized and `quantized_layers` does not name it")
            if any(fnmatchcase(parts.name, pattern) for pattern in excluded):
                warnings.append(f"`{parts.name}` is quantized and the config excludes it")
            modules[parts.name] = _module(parts, str(own["quant_algo"]).upper() if own else algorithm)
        elif own:
            warnings.append(f"`{parts.name}` is in `quantized_layers` and is stored as {parts['weight'].dtype}")
    kv_cache = _kv_cache(config)
    has_scales = any(name.endswith(".k_scale") for name in checkpoint.tensors)
    if has_scales and kv_cache is None:
        warnings.append("KV-cache scales are stored and the config names no KV-cache format")
    if not modules and algorithm:
        warnings.append(f"the config says {algorithm} and no tensor is quantized")
    return Layout("modelopt", modules, kv_cache, tuple(warnings))


def read(checkpoint: Checkpoint, module: QuantizedModule) -> QuantizedWeight:
    """Read ``module`` into the common form."""
    import torch

    from qtool.formats.packing import load, pack_pairs
    from qtool.weight import Activation, QuantizedWeight

    weights, activations, (rows, _) = module.scheme.weights, module.scheme.activations, module.shape
    tensors = load(checkpoint, module)
    data, scale, scale2 = tensors["weight"], tensors["weight_scale"], None
    if weights.format == "int4":  # two rows in a byte, the even one low, in two's complement
        data = pack_pairs(torch.stack((data & 15, data >> 4), dim=1).flatten(0, 1) ^ 8)
    if weights.scale == "e8m0":
        scale = scale.view(torch.float8_e8m0fnu)
    elif weights.scale == "e4m3":
        scale2 = tensors["weight_scale_2"].float().reshape(1).expand(rows).contiguous()
    if weights.granularity == "block":
        scale = scale.reshape(scale.shape[0], -1)
    elif weights.granularity in ("tensor", "channel"):
        scale = scale.reshape(-1, 1).expand(rows, 1).contiguous()
    input_scale = tensors.get("input_scale")
    activation = Activation(activations, None if input_scale is None else input_scale.float().reshape(())) if activations else None
    return QuantizedWeight(data, scale, scale2, None, None, tensors.get("pre_quant_scale"), activation)


def _merged(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Mapping[str, Any]:
    sidecar = checkpoint.path / "hf_quant_config.json"
    nested = config.get("quantization") or (read_json(sidecar).get("quantization") if sidecar.is_file() else None) or {}
    flat = {key: value for key, value in config.items() if value is not None}
    return {**nested, **flat}  # the embedded config wins where both speak


def _is_quantized(parts: Parts) -> bool:
    if "weight" in parts:
        return parts["weight"].dtype not in SCALE_DTYPES
    return "weight_scale" in parts  # a quantized module that has lost its weight


def _module(parts: Parts, algorithm: str) -> QuantizedModule:
    if algorithm not in INPUT_OF_ALGORITHM:
        raise refused("E_FORMAT", f"`{parts.name}`: ModelOpt's `{algorithm}` is not read", f"read are {', '.join(INPUT_OF_ALGORITHM)}")
    weights, shape = _weights(parts)
    activations = INPUT_OF_ALGORITHM[algorithm]
    if activations and activations.needs_data:
        parts["input_scale"]
    tensors = {suffix: tensor for suffix, tensor in parts.tensors.items() if suffix in KEPT_SUFFIXES}
    return QuantizedModule(parts.name, Scheme(weights, activations), shape, tensors)


def _weights(parts: Parts) -> tuple[Weights, tuple[int, int]]:
    weight, scale = parts["weight"], parts["weight_scale"]
    rows, columns = parts.matrix("weight", "U8", "I8", "F8_E4M3")
    if weight.dtype == "U8" and scale.dtype in SCALE_DTYPES:
        rows *= 2  # int4 is packed along the outputs
        return Weights("int4", "group", _grouped(parts, rows, columns)), (rows, columns)
    if weight.dtype == "U8":
        columns *= 2
        if scale.dtype == "F8_E4M3":
            parts["weight_scale_2"]
        return Weights("fp4", "group", _grouped(parts, rows, columns), scale="e4m3" if scale.dtype == "F8_E4M3" else "e8m0"), (rows, columns)
    format: Any = "int8" if weight.dtype == "I8" else "fp8"
    if scale.dtype in ("U8", "F8_E8M0"):
        return Weights(format, "group", _grouped(parts, rows, columns), scale="e8m0"), (rows, columns)
    if scale.dtype not in SCALE_DTYPES:
        raise parts.misfit("weight_scale", f"{' or '.join(SCALE_DTYPES)} scales of a {weight.dtype} weight")
    if scale.count == 1:
        return Weights(format, "tensor"), (rows, columns)
    if scale.shape in ((rows,), (rows, 1)):
        return Weights(format, "channel"), (rows, columns)
    blocks = scale.shape[::2] if len(scale.shape) == 4 else scale.shape
    if len(blocks) != 2 or scale.count != math.prod(blocks):
        raise parts.misfit("weight_scale", f"one scale, {rows}, or one for each block of {rows} x {columns}")
    block = block_size(rows, blocks[0]), block_size(columns, blocks[1])
    return Weights(format, "block", block=block), (rows, columns)


def _grouped(parts: Parts, rows: int, columns: int) -> int:
    scale = parts["weight_scale"]
    if len(scale.shape) != 2 or scale.shape[0] != rows or not scale.shape[1] or columns % scale.shape[1]:
        raise parts.misfit("weight_scale", f"one scale for each group of {rows} x {columns}")
    return group_size(columns, scale.shape[1])


def _kv_cache(config: Mapping[str, Any]) -> str | None:
    name, scheme = config.get("kv_cache_quant_algo"), config.get("kv_cache_scheme")
    if name is None and isinstance(scheme, Mapping):
        name = f"{'FP' if scheme.get('type') == 'float' else 'INT'}{scheme.get('num_bits', 8)}"
    return str(name or scheme).lower() if name or scheme else None

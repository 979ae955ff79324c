"""The unified Hugging Face export of NVIDIA ModelOpt: FP8, NVFP4, MX, INT8 and INT4 AWQ, one or
several in a checkpoint.

Source: nvidia-modelopt 0.47, `torch/export/quant_utils.py`, `torch/export/unified_export_hf.py`,
    `torch/quantization/qtensor`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from qtool.checkpoint import Checkpoint, TensorInfo
from qtool.checkpoint.strict_json import Json
from qtool.formats.layout import (
    Layout,
    Parts,
    QuantizedModule,
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
    layer_settings,
    merged_config,
    name_matcher,
    quantization_config,
)
from qtool.formats.scaled import is_quantized, kept_tensors, read, weights_of
from qtool.modules import has_key_scales, is_embedding
from qtool.scheme import SCHEMES, Scheme

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
SCHEME_OF_ALGORITHM: Mapping[str, Scheme] = {  # but for the size of groups and blocks
    "FP8": SCHEMES["FP8"],
    "FP8_PER_CHANNEL_PER_TOKEN": SCHEMES["FP8_DYNAMIC"],
    "FP8_PB_WO": SCHEMES["FP8_BLOCK_W8A16"],
    "FP8_BLOCK_SCALES": SCHEMES["FP8_BLOCK"],
    "NVFP4": SCHEMES["NVFP4"],
    "NVFP4_AWQ": SCHEMES["NVFP4"],
    "W4A16_NVFP4": SCHEMES["NVFP4A16"],
    "W4A8_NVFP4_FP8": SCHEMES["NVFP4AFP8"],
    "MXFP4": SCHEMES["MXFP4"],
    "W4A8_MXFP4_FP8": SCHEMES["MXFP4AFP8"],
    "MXFP8": SCHEMES["MXFP8"],
    "W4A16_AWQ": SCHEMES["W4A16"],
    "W4A8_AWQ": SCHEMES["W4AFP8_STATIC"],
    "W8A8_SQ_PER_CHANNEL": SCHEMES["W8A8_STATIC"],
    "W8A16": SCHEMES["W8A16_CHANNEL"],
}
BLOCK_ALGORITHMS = ("FP8_PB_WO", "FP8_BLOCK_SCALES")


def matches_config(config: Json) -> bool:
    """Whether ``config`` is of this format: flat in config.json, nested in hf_quant_config.json.

    Either may lack the method and then names an algorithm, and both may lack the producer.
    """
    if method := config.get("quant_method"):
        return str(method).startswith("modelopt")
    parts = (config, config.get("quantization"), config.get("producer"))
    flat, nested, producer = (part if isinstance(part, Mapping) else {} for part in parts)
    return producer.get("name") == "modelopt" or "quant_algo" in flat or "quant_algo" in nested


def detect(checkpoint: Checkpoint, config: Json) -> Layout:
    """Return the layout; hf_quant_config.json, if there is one, adds what config.json has lost."""
    config = merged_config(checkpoint, config)
    algorithm = str(config.get("quant_algo") or "").upper()
    settings_of = layer_settings(config.get("quantized_layers") or {})
    excluded = name_matcher(config.get("exclude_modules") or config.get("ignore") or [])
    modules: dict[str, QuantizedModule] = {}
    warnings: list[str] = []
    for parts in modules_of(checkpoint):
        own = settings_of(parts.name) if "weight" in parts else None
        if is_quantized(parts):
            own_algorithm = algorithm if own is None else str(own["quant_algo"]).upper()
            if own_algorithm == MIXED:
                own_algorithm = _algorithm_of_tensors(checkpoint, parts)
                warnings.append(f"`{parts.name}` is quantized and `quantized_layers` lacks it")
            if excluded(parts.name):
                warnings.append(f"`{parts.name}` is quantized and the config excludes it")
            modules[parts.name] = _module(parts, own_algorithm)
        elif own and len(parts["weight"].shape) == 2 and not excluded(parts.name):
            warnings.append(
                f"`{parts.name}` is in `quantized_layers` and is stored as {parts['weight'].dtype}"
            )
    kv_cache = kv_cache_format(config)
    warnings += _kv_cache_warnings(checkpoint, kv_cache)
    if not modules and algorithm:
        warnings.append(f"the config says {algorithm} and no tensor is quantized")
    return Layout("modelopt", modules, kv_cache, tuple(warnings))


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


def _kv_cache_warnings(checkpoint: Checkpoint, kv_cache: str | None) -> Iterator[str]:
    if kv_cache is None and has_key_scales(checkpoint.tensors):
        yield "KV-cache scales are stored and the config names no KV-cache format"


def _algorithm_of_tensors(checkpoint: Checkpoint, parts: Parts) -> str:
    """Return the algorithm of a layer that the config does not name.

    Raises: CheckpointRefused, when its tensors leave open what its input is rounded to.
    """
    weights, _ = weights_of(parts)
    has_input_scale = "input_scale" in parts
    if weights.scale == "e4m3":
        return "NVFP4" if has_input_scale else "W4A16_NVFP4"
    if has_input_scale and weights == SCHEMES["FP8"].weights:
        return "FP8"
    raise refused(
        "E_QUANT_TARGET",
        f"{checkpoint.source}: `{parts.name}` is quantized and `quantized_layers` does not name it",
    )


def _module(parts: Parts, algorithm: str) -> QuantizedModule:
    if algorithm not in SCHEME_OF_ALGORITHM:
        raise refused(
            "E_QUANT_ALGORITHM",
            f"`{parts.name}`: ModelOpt's `{algorithm}` is not read",
            f"read are {', '.join(SCHEME_OF_ALGORITHM)}",
        )
    weights, shape = weights_of(parts, in_blocks=algorithm in BLOCK_ALGORITHMS)
    scheme = SCHEME_OF_ALGORITHM[algorithm]
    said, activations = scheme.weights, scheme.activations
    if (weights.format, weights.scale) != (said.format, said.scale):
        raise refused(
            "E_QUANT_CONFIG",
            f"`{parts.name}`: the config says {algorithm}, and its tensors hold {weights}",
        )
    if activations and activations.needs_data and "input_scale" not in parts:
        if not is_embedding(parts.name):
            parts["input_scale"]  # raises CheckpointRefused
        activations = None  # a table multiplies no input, e.g. Qwen3.8's of n-grams
    return QuantizedModule(parts.name, Scheme(weights, activations), shape, kept_tensors(parts))


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

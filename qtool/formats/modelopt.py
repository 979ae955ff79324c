"""The unified Hugging Face export of NVIDIA ModelOpt: FP8, NVFP4, MX, INT8 and INT4 AWQ, one or
several in a checkpoint.

Source: nvidia-modelopt 0.47, `torch/export/quant_utils.py`, `torch/export/unified_export_hf.py`,
    `torch/quantization/qtensor`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import translate
from typing import TYPE_CHECKING, Any

from qtool.checkpoint import Checkpoint, TensorInfo, read_json
from qtool.checkpoint.strict_json import Json, JsonDict
from qtool.formats.layout import (
    SCALE_DTYPES,
    Layout,
    Parts,
    QuantizedModule,
    block_size,
    by_scheme,
    check_skipped,
    group_size,
    modules_of,
    refused,
    shared_unsupported_reason,
)
from qtool.modules import parse_cache_scale
from qtool.scheme import FORMAT_BITS, SCHEMES, Activations, Scheme, Weights

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.weight import QuantizedWeight

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
ALGORITHM_OF_SCHEME: Mapping[str, str] = {  # spelled as ModelOpt spells them
    "FP8": "FP8",
    "FP8_DYNAMIC": "FP8_PER_CHANNEL_PER_TOKEN",
    "FP8_BLOCK_W8A16": "fp8_pb_wo",
    # TensorRT-LLM's name; ModelOpt's own blocks leave inputs in 16 bits
    "FP8_BLOCK": "FP8_BLOCK_SCALES",
    "NVFP4": "NVFP4",
    "NVFP4A16": "W4A16_NVFP4",
    "NVFP4AFP8": "W4A8_NVFP4_FP8",
    "MXFP4": "mxfp4",
    "MXFP4AFP8": "W4A8_MXFP4_FP8",
    "MXFP8": "MXFP8",
    "W4A16": "W4A16_AWQ",
    "W4AFP8_STATIC": "W4A8_AWQ",
    "W8A8_STATIC": "W8A8_SQ_PER_CHANNEL",
    "W8A16_CHANNEL": "W8A16",
}
BLOCK_ALGORITHMS = ("FP8_PB_WO", "FP8_BLOCK_SCALES")
WITH_INPUT_FACTORS = ("W4A16_AWQ", "W4A8_AWQ", "W8A8_SQ_PER_CHANNEL", "NVFP4")
WITH_GROUPS_IN_CONFIG = ("FP8", "NVFP4", "W4A16_NVFP4", "MIXED_PRECISION")
WILDCARDS = frozenset("*?[")
PRODUCER = {"name": "modelopt", "version": "0.47.0"}


def matches_config(config: Json) -> bool:
    """Whether ``config`` is of this format: flat in config.json, nested in hf_quant_config.json."""
    producer = config.get("producer")
    name = producer.get("name") if isinstance(producer, Mapping) else None
    return str(config.get("quant_method", "")).startswith("modelopt") or name == "modelopt"


def detect(checkpoint: Checkpoint, config: Json) -> Layout:
    """Return the layout; hf_quant_config.json, if there is one, adds what config.json has lost."""
    config = _merged(checkpoint, config)
    algorithm = str(config.get("quant_algo") or "").upper()
    per_layer = config.get("quantized_layers") or {}
    excluded = _names(config.get("exclude_modules") or config.get("ignore") or [])
    modules: dict[str, QuantizedModule] = {}
    warnings: list[str] = []
    for parts in modules_of(checkpoint):
        own = per_layer.get(parts.name)
        if _is_quantized(parts):
            if own is None and algorithm == "MIXED_PRECISION":
                raise refused(
                    "E_QUANT_TARGET",
                    f"{checkpoint.path}: `{parts.name}` is quantized and `quantized_layers` does "
                    "not name it",
                )
            if excluded(parts.name):
                warnings.append(f"`{parts.name}` is quantized and the config excludes it")
            modules[parts.name] = _module(
                parts, str(own["quant_algo"]).upper() if own else algorithm
            )
        elif own:
            warnings.append(
                f"`{parts.name}` is in `quantized_layers` and is stored as {parts['weight'].dtype}"
            )
    kv_cache = _kv_cache(config)
    has_scales = any(
        scale.kind == "k" and scale.spelling != "proj.output_scale"
        for scale in map(parse_cache_scale, checkpoint.tensors)
        if scale
    )
    if has_scales and kv_cache is None:
        warnings.append("KV-cache scales are stored and the config names no KV-cache format")
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
    activation = (
        Activation(activations, None if input_scale is None else input_scale.reshape(()))
        if activations
        else None
    )
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
    algorithm = _algorithm(module)
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

    weights, data, scale = module.scheme.weights, weight.data, weight.scale
    tensors: dict[str, Tensor] = {}
    if weights.format == "int4":
        even, odd = (data ^ 0x88).reshape(data.shape[0] // 2, 2, -1).unbind(1)
        data = torch.stack(((even & 15) | (odd << 4), (even >> 4) | (odd & 0xF0)), dim=-1).flatten(
            1
        )
    if weights.granularity == "tensor":
        scale = scale[0, 0]
    elif weights.granularity == "channel":
        scale = scale.flatten()
    elif weights.granularity == "block" and _algorithm(module) == "fp8_pb_wo":
        scale = scale[:, None, :, None]
    elif weights.scale == "e8m0":
        scale = scale.view(torch.uint8)
    tensors |= {"weight": data, "weight_scale": scale}
    if weight.scale2 is not None:
        tensors["weight_scale_2"] = weight.scale2[0]
    # kernels that unpack to fp8 divide by it; fused layers share one, which only ModelOpt knows
    elif _algorithm(module) == "W4A8_AWQ":
        tensors["weight_scale_2"] = _as_found(module.tensors["weight_scale_2"])
    if weight.activation and weight.activation.scale is not None:
        tensors["input_scale"] = weight.activation.scale
    if weight.pre_scale is not None:
        tensors["pre_quant_scale"] = weight.pre_scale
    return tensors


def quantization_config(
    modules: Sequence[QuantizedModule], unquantized: Sequence[str], kv_cache: str | None
) -> dict[str, JsonDict]:
    """Return the flat config and the nested one of hf_quant_config.json, which says more.

    Raises: CheckpointRefused, when layers of one algorithm have different groups, or engines would
        skip a quantized layer.
    """
    layers = {module.name: {"quant_algo": _name(module), **_group(module)} for module in modules}
    kinds = {tuple(layer.items()) for layer in layers.values()}
    algorithms = {_name(module) for module in modules}
    if len(kinds) > len(algorithms):
        raise refused(
            "E_CANNOT_HOLD",
            f"group_size: ModelOpt has one for each algorithm, found {sorted(map(str, kinds))}",
            "convert to gptq",
        )
    check_skipped(unquantized, modules)
    # of the KV cache alone
    algorithm = (
        "MIXED_PRECISION" if len(algorithms) > 1 else algorithms.pop() if algorithms else None
    )
    shared: JsonDict = (
        {}
        if algorithm is None
        else {"quantized_layers": layers}
        if algorithm == "MIXED_PRECISION"
        else dict(next(iter(layers.values())))
    )
    shared["quant_algo"] = algorithm
    if algorithm in WITH_INPUT_FACTORS and algorithm != "NVFP4":
        shared |= {
            "has_zero_point": False,
            "pre_quant_scale": any("pre_quant_scale" in module.tensors for module in modules),
        }
    nested = {
        **shared,
        "kv_cache_quant_algo": "FP8" if kv_cache else None,
        "exclude_modules": list(unquantized),
    }
    flat: JsonDict = {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "ignore": list(unquantized),
        "producer": PRODUCER,
    }
    if algorithm == "MIXED_PRECISION":
        flat["quantized_layers"] = layers
    if algorithm in WITH_GROUPS_IN_CONFIG:
        flat["config_groups"] = {
            f"group_{index}": {
                "weights": _arguments(scheme.weights),
                "input_activations": _arguments(scheme.activations) if scheme.activations else None,
                "targets": ["Linear"]
                if algorithm != "MIXED_PRECISION"
                else [module.name for module in members],
            }
            for index, (scheme, members) in enumerate(by_scheme(modules).items())
        }
    if kv_cache:
        flat["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    return {
        "config.json": {"quantization_config": flat},
        "hf_quant_config.json": {"producer": PRODUCER, "quantization": nested},
    }


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


def _algorithm(module: QuantizedModule) -> str | None:
    scheme = module.scheme
    if scheme.weights.format == "int4" and scheme.weights.granularity == "group":
        scheme = scheme.with_group_size(128)  # the algorithms are named for any group size
    return ALGORITHM_OF_SCHEME.get(scheme.name)


def _name(module: QuantizedModule) -> str:
    name = _algorithm(module) or ""
    return "NVFP4_AWQ" if name == "NVFP4" and "pre_quant_scale" in module.tensors else name


def _group(module: QuantizedModule) -> dict[str, int]:
    size = module.scheme.weights.group_size
    return {"group_size": size} if size and _name(module) != "mxfp4" else {}


def _arguments(numbers: Weights | Activations) -> JsonDict:
    size = {"group_size": numbers.group_size} if numbers.group_size else {}
    return {
        "dynamic": False,
        "num_bits": FORMAT_BITS[numbers.format],
        "type": "float" if numbers.format.startswith("fp") else "int",
        **size,
    }


def _names(patterns: Sequence[str]) -> Callable[[str], bool]:
    """Return a function that says whether a name is one of ``patterns``, names and globs."""
    exact = frozenset(pattern for pattern in patterns if WILDCARDS.isdisjoint(pattern))
    globs = re.compile(
        "|".join(translate(pattern) for pattern in patterns if pattern not in exact) or "(?!)"
    )
    return lambda name: name in exact or globs.match(name) is not None


def _merged(checkpoint: Checkpoint, config: Json) -> Json:
    file = checkpoint.path / "hf_quant_config.json"
    nested = (
        config.get("quantization")
        or (read_json(file).get("quantization") if file.is_file() else None)
        or {}
    )
    flat = {key: value for key, value in config.items() if value is not None}
    return {**nested, **flat}  # config.json wins where both speak


def _is_quantized(parts: Parts) -> bool:
    if "weight" in parts:
        return parts["weight"].dtype not in SCALE_DTYPES
    return "weight_scale" in parts  # a quantized module that has lost its weight


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
    if weight.dtype == "U8" and scale.dtype in SCALE_DTYPES:
        rows *= 2  # int4 is packed along the outputs
        return Weights("int4", "group", _grouped(parts, rows, columns)), (rows, columns)
    if weight.dtype == "U8":
        columns *= 2
        if scale.dtype == "F8_E4M3":
            parts["weight_scale_2"]
        return Weights(
            "fp4",
            "group",
            _grouped(parts, rows, columns),
            scale="e4m3" if scale.dtype == "F8_E4M3" else "e8m0",
        ), (rows, columns)
    format: Any = "int8" if weight.dtype == "I8" else "fp8"
    if scale.dtype in ("U8", "F8_E8M0"):
        return Weights(format, "group", _grouped(parts, rows, columns), scale="e8m0"), (
            rows,
            columns,
        )
    if scale.dtype not in SCALE_DTYPES:
        raise parts.misfit(
            "weight_scale", f"{' or '.join(SCALE_DTYPES)} scales of a {weight.dtype} weight"
        )
    if scale.count == 1 and not in_blocks:
        return Weights(format, "tensor"), (rows, columns)
    if not in_blocks and scale.shape in ((rows,), (rows, 1)):
        return Weights(format, "channel"), (rows, columns)
    blocks = scale.shape[::2] if len(scale.shape) == 4 else scale.shape
    if len(blocks) != 2 or scale.count != math.prod(blocks):
        raise parts.misfit(
            "weight_scale", f"one scale, {rows}, or one for each block of {rows} x {columns}"
        )
    block = block_size(rows, blocks[0]), block_size(columns, blocks[1])
    return Weights(format, "block", block=block), (rows, columns)


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


def _kv_cache(config: Json) -> str | None:
    name, scheme = config.get("kv_cache_quant_algo"), config.get("kv_cache_scheme")
    if name is None and isinstance(scheme, Mapping):
        name = f"{'FP' if scheme.get('type') == 'float' else 'INT'}{scheme.get('num_bits', 8)}"
    said = str(name or scheme or "").lower()
    return (said if said.isalnum() else "unknown") if said else None

"""The `fp8` method of DeepSeek, Qwen and vLLM: float8_e4m3 in blocks of 128 x 128, or with one
scale for a whole matrix; and those that store the same tensors: `fbgemm_fp8` with one scale for
each output, and `mxfp8` with a power of two for each 32 inputs.

DeepSeek-V4 calls its scales `scale`, stores them as powers of two, and its experts as FP4; NVIDIA
stores these experts as NVFP4 beside the rest as it was. Inputs of FP4 experts are left in 16 bits:
engines round them or not, by GPU.

Source: DeepSeek-V3, `inference/fp8_cast_bf16.py`; transformers 5.17,
    `integrations/finegrained_fp8.py`; vLLM 0.32, `layers/quantization/fp8.py`, `fbgemm_fp8.py`,
    `modelopt.py` ModelOptMxFp8Config, `models/deepseek_v4/quant_config.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from qtool.checkpoint import Checkpoint
from qtool.checkpoint.strict_json import Json, JsonDict
from qtool.formats.layout import (
    SCALE_DTYPES,
    Layout,
    Parts,
    QuantizedModule,
    modules_of,
    refused,
    shared_unsupported_reason,
)
from qtool.formats.scaled import E8M0_DTYPES, kept_tensors, multipliers, weights_of
from qtool.formats.scaled import read as read_scaled
from qtool.modules import has_key_scales, is_embedding
from qtool.scheme import SCHEMES, Activations, Scheme, Weights

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.weight import QuantizedWeight

INVERSE = "inverse"  # GPTQModel's variant, whose scale really is a reciprocal
NVFP4 = "nvfp4"  # the variant of experts as ModelOpt stores them
METHODS = ("fp8", "fbgemm_fp8", "mxfp8")
MX_GROUP = 32
SCALE_NAMES = ("weight_scale_inv", "weight_scale", "scale")
INPUT_SCALE_NAMES = ("input_scale", "activation_scale")  # the second is transformers'
STATIC = Activations("fp8", "tensor", dynamic=False)


def matches_config(config: Json) -> bool:
    """Whether ``config`` is of this format."""
    return config.get("quant_method") in METHODS


def detect(checkpoint: Checkpoint, config: Json) -> Layout:
    """Return the layout: a module is quantized when its weight is float8 or packed; the shape of
    its scale tells tensor, channel, group and block.
    """
    modules: dict[str, QuantizedModule] = {}
    warnings: list[str] = []
    skipped = frozenset(_skipped(config))
    for parts in modules_of(checkpoint):
        has_scale = _has_scale(parts)
        if "weight" not in parts and not has_scale:
            continue
        if parts["weight"].dtype in ("F8_E4M3", "I8", "U8"):
            modules[parts.name] = _module(parts, config)
            if parts.name in skipped:
                warnings.append(f"`{parts.name}` is quantized and modules_to_not_convert names it")
        elif has_scale:
            warnings.append(
                f"`{parts.name}` has a scale and a plain {parts['weight'].dtype} weight"
            )
    if config.get("quant_method") == "fbgemm_fp8" and "activation_scale_ub" in config:
        warnings.append(
            f"`activation_scale_ub` ({config['activation_scale_ub']}) is left out: FBGEMM clips "
            "inputs there, and qtool does not"
        )
    kv_cache = "fp8" if has_key_scales(checkpoint.tensors) else None  # the config does not say
    return Layout("fp8_block", modules, kv_cache, tuple(warnings))


def read(module: QuantizedModule, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    """Return the common form of ``tensors``; ``weight_scale_inv`` multiplies, whatever its name
    says, but in GPTQModel's variant.
    """
    import torch

    from qtool.weight import Activation, QuantizedWeight, uneven_block

    if module.variant == NVFP4:
        return read_scaled(module, tensors)
    weights, (rows, _) = module.scheme.weights, module.shape
    data = tensors["weight"]
    if weights.format == "fp4":
        data = data.view(torch.uint8)
    scale = next(tensors[name] for name in SCALE_NAMES if name in tensors)
    if scale.element_size() == 1:
        scale = multipliers(scale, weights)
    if module.variant == INVERSE:
        scale = 1 / scale.float()
    if weights.granularity in ("tensor", "channel"):
        scale = scale.reshape(-1, 1).expand(rows, 1).contiguous()
    activations = module.scheme.activations
    static = next(
        (tensors[name].reshape(()) for name in INPUT_SCALE_NAMES if name in tensors), None
    )
    activation = Activation(activations, static) if activations else None
    block = uneven_block(weights, module.shape)
    return QuantizedWeight(data, scale, activation=activation, block=block)


def unsupported_reason(module: QuantizedModule, weight: QuantizedWeight) -> str | None:
    """Return the constraint that keeps this format from holding ``weight``."""
    weights, activations = module.scheme.weights, module.scheme.activations
    if weights.format != "fp8" or weights.scale != "float":
        return f"format: the weights are {weights}, and this format holds fp8"
    if weights.granularity not in ("block", "tensor"):
        return (
            f"granularity: one scale for each {weights.granularity}, and this format has one for "
            "each block or matrix"
        )
    wanted = _block_inputs(weights.block[1]) if weights.block else STATIC
    if activations != wanted:
        return (
            f"activations: inputs are {activations or 'left in 16 bits'}, and engines round them "
            f"to {wanted} here"
        )
    return shared_unsupported_reason(module, weight)


def write(module: QuantizedModule, weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return ``weight`` and ``weight_scale_inv`` [blocks of N, blocks of K], or the scalars
    ``weight_scale`` and ``input_scale``.
    """
    if module.scheme.weights.granularity == "block":
        return {"weight": weight.data, "weight_scale_inv": weight.scale}
    tensors = {"weight": weight.data, "weight_scale": weight.scale[0, 0]}
    if weight.activation and weight.activation.scale is not None:
        tensors["input_scale"] = weight.activation.scale
    return tensors


def quantization_config(
    modules: Sequence[QuantizedModule], unquantized: Sequence[str], kv_cache: str | None
) -> dict[str, JsonDict]:
    """Return the config.

    Raises: CheckpointRefused, when layers differ: the method knows one scheme.
    """
    schemes = {module.scheme for module in modules}
    if len(schemes) > 1:
        raise refused(
            "E_CANNOT_HOLD",
            f"scheme: one for all layers, found {', '.join(sorted(map(str, schemes)))}",
            "convert to compressed-tensors",
        )
    block = schemes.pop().weights.block
    config = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic" if block else "static",
        **({"weight_block_size": list(block)} if block else {}),
        "modules_to_not_convert": list(unquantized),
    }
    return {"config.json": {"quantization_config": config}}


def cache_scale(attention: str, which: str, count: int) -> tuple[str, tuple[int, ...]] | None:
    """Return name and shape of the KV-cache scale ``which`` of an attention module; None when it
    has no place.
    """
    return (f"{attention}.{which}_scale", ()) if count == 1 else None


def fallbacks() -> tuple[str, ...]:
    """Return the scheme that weights can be rounded to for this format."""
    return ("FP8_BLOCK",)


def _block_inputs(size: int) -> Activations:
    return Activations("fp8", "group", size)


def _skipped(config: Json) -> list[str]:
    return [*(config.get("modules_to_not_convert") or []), *(config.get("ignored_layers") or [])]


def _has_scale(parts: Parts) -> bool:
    if any(name in parts for name in SCALE_NAMES[:2]):
        return True
    return "scale" in parts and parts["scale"].dtype == "F8_E8M0"  # another may be a norm's


def _module(parts: Parts, config: Json) -> QuantizedModule:
    if "weight_scale_2" in parts:
        return _nvfp4_module(parts)
    scale_name = next((name for name in SCALE_NAMES if name in parts), SCALE_NAMES[0])
    scale = parts[scale_name]
    if scale.dtype not in (*SCALE_DTYPES, *E8M0_DTYPES):
        raise parts.misfit(scale_name, f"scales of {' or '.join((*SCALE_DTYPES, *E8M0_DTYPES))}")
    if parts["weight"].dtype != "F8_E4M3":
        return _fp4_module(parts, scale_name)
    shape = rows, columns = parts.matrix("weight", "F8_E4M3")
    variant = INVERSE if config.get("weight_scale_semantics") == INVERSE else ""
    block = _block_of(config)
    if block == (1, MX_GROUP) and scale.dtype in E8M0_DTYPES:
        _check_groups(parts, scale_name, rows, columns)
        scheme = SCHEMES["MXFP8"]
    elif block and scale.count == 1 and is_embedding(parts.name):
        scheme = Scheme(Weights("fp8", "tensor"))  # Qwen3.8's table of n-grams
    elif block:
        scheme = _block_scheme(parts, scale_name, shape, block)
    elif scale.count == 1 and config.get("quant_method") != "fbgemm_fp8":
        scheme = _tensor_scheme(parts, config.get("activation_scheme"))
    elif scale.count == rows:
        scheme = SCHEMES["FP8_W8A16" if variant else "FP8_DYNAMIC"]
    else:
        raise parts.misfit(
            scale_name,
            f"one scale, or {rows}, or blocks that the config's weight_block_size names",
        )
    return QuantizedModule(parts.name, scheme, shape, parts.tensors, variant)


def _nvfp4_module(parts: Parts) -> QuantizedModule:
    weights, shape = weights_of(parts)
    scheme = SCHEMES["NVFP4" if "input_scale" in parts else "NVFP4A16"]
    if weights != scheme.weights:
        raise parts.misfit("weight_scale", "an F8_E4M3 scale for each 16 inputs of FP4")
    return QuantizedModule(parts.name, scheme, shape, kept_tensors(parts), NVFP4)


def _fp4_module(parts: Parts, scale_name: str) -> QuantizedModule:
    """Return a layer of FP4 in pairs, of I8 or U8."""
    rows, pairs = parts.matrix("weight", "I8", "U8")
    if parts[scale_name].dtype not in E8M0_DTYPES:
        raise parts.misfit(scale_name, "powers of two (F8_E8M0), as FP4 in pairs has them here")
    _check_groups(parts, scale_name, rows, 2 * pairs)
    return QuantizedModule(parts.name, SCHEMES["MXFP4A16"], (rows, 2 * pairs), parts.tensors)


def _check_groups(parts: Parts, scale_name: str, rows: int, columns: int) -> None:
    if parts[scale_name].shape != (rows, columns // MX_GROUP) or columns % MX_GROUP:
        raise parts.misfit(
            scale_name, f"one scale for each {MX_GROUP} inputs of {rows} x {columns}"
        )


def _block_of(config: Json) -> tuple[int, int] | None:
    """Return the outputs and inputs under one scale; None where the tensors tell."""
    if block := config.get("weight_block_size"):
        height, width = block
        return height, width
    return (1, MX_GROUP) if config.get("quant_method") == "mxfp8" else None


def _block_scheme(
    parts: Parts, scale_name: str, shape: tuple[int, int], block: tuple[int, int]
) -> Scheme:
    (rows, columns), (height, width) = shape, block
    if parts[scale_name].shape != (math.ceil(rows / height), math.ceil(columns / width)):
        raise parts.misfit(
            scale_name, f"one scale for each block of {height} x {width} of {rows} x {columns}"
        )
    return Scheme(Weights("fp8", "block", block=block), _block_inputs(width))


def _tensor_scheme(parts: Parts, activation_scheme: object) -> Scheme:
    has_input_scale = any(name in parts for name in INPUT_SCALE_NAMES)
    if activation_scheme == "dynamic" or (activation_scheme is None and not has_input_scale):
        return Scheme(Weights("fp8", "tensor"), Activations("fp8", "token"))
    if not has_input_scale:
        parts[INPUT_SCALE_NAMES[0]]
    return SCHEMES["FP8"]

"""The `fp8` method of DeepSeek, Qwen and vLLM: float8_e4m3 in blocks of 128 x 128, or with one
scale for a whole matrix.

Source: DeepSeek-V3, `inference/fp8_cast_bf16.py`; transformers 5.17,
    `integrations/finegrained_fp8.py`; vLLM 0.33, `layers/quantization/fp8.py`.
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
from qtool.modules import parse_cache_scale
from qtool.scheme import SCHEMES, Activations, Scheme, Weights

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.weight import QuantizedWeight

INVERSE = "inverse"  # GPTQModel's variant, whose scale really is a reciprocal
SCALE_NAMES = ("weight_scale_inv", "weight_scale")
INPUT_SCALE_NAMES = ("input_scale", "activation_scale")  # the second is transformers'
STATIC = Activations("fp8", "tensor", dynamic=False)


def matches_config(config: Json) -> bool:
    """Whether ``config`` is of this format."""
    return config.get("quant_method") == "fp8"


def detect(checkpoint: Checkpoint, config: Json) -> Layout:
    """Return the layout: a module is quantized when its weight is float8; the shape of its scale
    tells tensor from block.
    """
    modules: dict[str, QuantizedModule] = {}
    warnings: list[str] = []
    skipped = _skipped(config)
    for parts in modules_of(checkpoint):
        scale = next((name for name in SCALE_NAMES if name in parts), None)
        if "weight" in parts and parts["weight"].dtype in ("F8_E4M3", "I8", "U8"):
            modules[parts.name] = _module(parts, config, scale or SCALE_NAMES[0])
            if parts.name in skipped:
                warnings.append(f"`{parts.name}` is quantized and modules_to_not_convert names it")
        elif scale:
            warnings.append(
                f"`{parts.name}` has a scale and a plain {parts['weight'].dtype} weight"
            )
    return Layout("fp8_block", modules, _kv_cache(checkpoint), tuple(warnings))


def read(module: QuantizedModule, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    """Return the common form of ``tensors``; ``weight_scale_inv`` multiplies, whatever its name
    says, but in GPTQModel's variant.
    """
    from qtool.weight import Activation, QuantizedWeight, uneven_block

    rows, _ = module.shape
    scale = next(tensors[name] for name in SCALE_NAMES if name in tensors)
    if module.variant == INVERSE:
        scale = 1 / scale.float()
    if module.scheme.weights.granularity != "block":
        scale = scale.reshape(-1, 1).expand(rows, 1).contiguous()
    activations = module.scheme.activations
    static = next(
        (tensors[name].reshape(()) for name in INPUT_SCALE_NAMES if name in tensors), None
    )
    activation = Activation(activations, static) if activations else None
    return QuantizedWeight(
        tensors["weight"],
        scale,
        activation=activation,
        block=uneven_block(module.scheme.weights, module.shape),
    )


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


def _kv_cache(checkpoint: Checkpoint) -> str | None:
    """Return the format of the KV cache: the config does not say, and scales tell."""
    return "fp8" if any(_is_key_scale(name) for name in checkpoint.tensors) else None


def _is_key_scale(name: str) -> bool:
    """Whether ``name`` is a scale of cached keys, or of keys and values together."""
    scale = parse_cache_scale(name)
    return scale is not None and "k" in scale.kind and scale.spelling != "proj.output_scale"


def _module(parts: Parts, config: Json, scale_name: str) -> QuantizedModule:
    shape = parts.matrix("weight", "F8_E4M3")
    variant = INVERSE if config.get("weight_scale_semantics") == INVERSE else ""
    if parts[scale_name].dtype not in SCALE_DTYPES:
        raise parts.misfit(scale_name, f"scales of {' or '.join(SCALE_DTYPES)}")
    if block := config.get("weight_block_size"):
        height, width = (int(size) for size in block)
        scheme = _block_scheme(parts, scale_name, shape, (height, width))
    elif parts[scale_name].count == 1:
        scheme = _tensor_scheme(parts, is_static=config.get("activation_scheme") == "static")
    elif parts[scale_name].count == shape[0]:
        scheme = SCHEMES["FP8_W8A16" if variant else "FP8_DYNAMIC"]
    else:
        raise parts.misfit(
            scale_name,
            f"one scale, or {shape[0]}, or blocks that the config's weight_block_size names",
        )
    return QuantizedModule(parts.name, scheme, shape, parts.tensors, variant)


def _block_scheme(
    parts: Parts, scale_name: str, shape: tuple[int, int], block: tuple[int, int]
) -> Scheme:
    (rows, columns), (height, width) = shape, block
    if parts[scale_name].shape != (math.ceil(rows / height), math.ceil(columns / width)):
        raise parts.misfit(
            scale_name, f"one scale for each block of {height} x {width} of {rows} x {columns}"
        )
    return Scheme(Weights("fp8", "block", block=block), _block_inputs(width))


def _tensor_scheme(parts: Parts, *, is_static: bool) -> Scheme:
    if not is_static:
        return Scheme(Weights("fp8", "tensor"), Activations("fp8", "token"))
    if not any(name in parts for name in INPUT_SCALE_NAMES):
        parts[INPUT_SCALE_NAMES[0]]
    return SCHEMES["FP8"]

"""The compressed-tensors format of LLM Compressor: float, int, packed int, NVFP4, MXFP4 and MXFP8,
in one or several groups.

Source: compressed-tensors 0.19, `quantization/quant_args.py`, `compressors/`, `utils/match.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from qtool.checkpoint import Checkpoint
from qtool.checkpoint.strict_json import Json
from qtool.formats.compressed_tensors_config import (
    Group,
    Targets,
    check_dense,
    has_online_transforms,
    kv_cache_format,
    quantization_config,
    tensor_format,
    weight_groups,
)
from qtool.formats.compressed_tensors_modules import ModuleReader, is_quantized
from qtool.formats.layout import (
    Layout,
    Parts,
    QuantizedModule,
    modules_of,
    refused,
    shared_unsupported_reason,
)
from qtool.formats.patterns import Names
from qtool.modules import has_key_scales, stays_unquantized
from qtool.scheme import SCHEMES, Activations, Weights

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.weight import Activation, QuantizedWeight

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


def matches_config(config: Json) -> bool:
    """Whether ``config`` is of this format."""
    return config.get("quant_method") in ("compressed-tensors", "compressed_tensors") or (
        "config_groups" in config and "quant_method" not in config
    )


def detect(checkpoint: Checkpoint, config: Json) -> Layout:
    """Return the layout that ``config`` and the tensors of ``checkpoint`` describe together."""
    check_dense(config, checkpoint.path)
    groups = weight_groups(config)
    targets = Targets(groups)
    ignored = Names(config.get("ignore") or [])
    reader = ModuleReader(checkpoint)
    modules: dict[str, QuantizedModule] = {}
    warnings: list[str] = []
    for parts in modules_of(checkpoint):
        group = targets.group_of(parts.name)
        if is_quantized(parts):
            module_group = group or _only_group(groups, checkpoint, parts)
            warnings += _quantized_warnings(parts, group, ignored)
            modules[parts.name] = reader.read(parts, module_group)
        elif warning := _unquantized_warning(parts, targets, ignored):
            warnings.append(warning)
    rotates_inputs = has_online_transforms(config)
    if rotates_inputs:
        warnings.append(
            "the config holds online rotations (QuIP, SpinQuant R3/R4): weights as read are "
            "still rotated"
        )
    kv_cache = kv_cache_format(config)
    warnings += _kv_cache_warnings(checkpoint, kv_cache)
    return Layout("compressed-tensors", modules, kv_cache, tuple(warnings), rotates_inputs)


def read(module: QuantizedModule, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    """Return the common form of ``tensors``."""
    from qtool.formats.packing import permutation, reorder
    from qtool.weight import QuantizedWeight, uneven_block

    weights, rows = module.scheme.weights, module.shape[0]
    data, zero = _read_codes(module, tensors)
    scale, scale2 = _read_scales(module, tensors)
    if weights.granularity in ("tensor", "channel"):
        scale = scale.reshape(-1, 1).expand(rows, 1).contiguous()
        zero = None if zero is None else zero.reshape(-1, 1).expand(rows, 1).contiguous()
    perm = None
    if "weight_g_idx" in tensors:
        perm = permutation(module, tensors["weight_g_idx"])
    return QuantizedWeight(
        data if perm is None else reorder(data, perm),
        scale,
        scale2,
        zero,
        perm,
        activation=_read_activation(module.scheme.activations, tensors),
        block=uneven_block(weights, module.shape),
    )


def unsupported_reason(module: QuantizedModule, weight: QuantizedWeight) -> str | None:
    """Return the constraint that keeps compressed-tensors from holding ``weight``."""
    weights = module.scheme.weights
    if weights.group_size and module.shape[1] % weights.group_size:
        return (
            f"group_size: {weights.group_size} does not divide {module.shape[1]} inputs, and "
            "compressed-tensors takes whole groups"
        )
    if weights.scale == "e4m3" and weights.group_size != 16:
        return (
            "group_size: fp4 with e4m3 scales comes in groups of 16 here, found "
            f"{weights.group_size}"
        )
    if reason := _activations_reason(weights, module.scheme.activations):
        return reason
    if weight.perm is not None and weights.format.startswith("fp"):
        return "act-order: only packed integers have a g_idx here"
    return shared_unsupported_reason(module, weight, act_order=True, embeddings=True)


def _activations_reason(weights: Weights, activations: Activations | None) -> str | None:
    if activations is None:
        return None
    if weights.scale == "e4m3" and activations != SCHEMES["NVFP4"].activations:
        return f"activations: NVFP4 weights go with NVFP4 inputs here, found {activations}"
    mx = (weights.format, "e8m0")
    if weights.scale == "e8m0" and (activations.format, activations.scale) != mx:
        return (
            f"activations: mx{weights.format} weights go with mx{weights.format} inputs here, "
            f"found {activations}"
        )
    return None


def write(module: QuantizedModule, weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return the tensors that `tensor_format` names; ``weight_scale`` keeps its dtype."""
    import torch

    from qtool.formats.packing import groups_of_inputs, reorder

    weights, columns = module.scheme.weights, module.shape[1]
    data = weight.data
    tensors: dict[str, Tensor] = {}
    if weight.perm is not None:
        data = reorder(data, torch.argsort(weight.perm))
        group_size = weights.group_size or columns
        tensors["weight_g_idx"] = groups_of_inputs(columns, group_size, weight.perm)
    tensors |= _written_codes(module, data)
    tensors |= _written_scales(module, weight)
    tensors |= _written_activation(module, weight.activation)
    return tensors


def cache_scale(attention: str, which: str, count: int) -> tuple[str, tuple[int, ...]] | None:
    """Return name and shape of the KV-cache scale ``which`` of an attention module; None when it
    has no place.
    """
    return f"{attention}.{which}_scale", (count,) if count == 1 else (count, 1, 1)


def fallbacks() -> tuple[str, ...]:
    """Return the schemes that weights can be rounded to for compressed-tensors."""
    return "W2A16", "W3A16", "W4A16", "W8A16"


def _only_group(groups: list[Group], checkpoint: Checkpoint, parts: Parts) -> Group:
    """Return the one group there is, for a quantized layer that none targets."""
    if len(groups) == 1:
        return groups[0]
    raise refused(
        "E_QUANT_TARGET",
        f"{checkpoint.source}: `{parts.name}` is quantized and no group of the config targets it",
        "add its name to the `targets` of its group in the quantization config",
    )


def _quantized_warnings(parts: Parts, group: Group | None, ignored: Names) -> Iterator[str]:
    if parts.name in ignored:
        yield f"`{parts.name}` is quantized and the config ignores it"
    if group is None:
        yield f"`{parts.name}` is quantized and the config does not target it"


def _unquantized_warning(parts: Parts, targets: Targets, ignored: Names) -> str:
    if "weight_scale" in parts:
        return (
            f"`{parts.name}` has scales and a plain {parts['weight'].dtype} weight: its "
            "quantization is only simulated"
        )
    if targets.group_of(parts.name) is None or parts.name in ignored:
        return ""
    if "weight" not in parts or len(parts["weight"].shape) != 2:
        return ""
    # no engine quantizes these where only their class is a target
    if stays_unquantized(parts.name) and not targets.names(parts.name):
        return ""
    return f"`{parts.name}` is a target of the config and is stored as {parts['weight'].dtype}"


def _kv_cache_warnings(checkpoint: Checkpoint, kv_cache: str | None) -> Iterator[str]:
    has_scales = has_key_scales(checkpoint.tensors)
    if has_scales and kv_cache is None:
        yield "KV-cache scales are stored and the config has no kv_cache_scheme"
    if kv_cache is not None and not has_scales:
        yield "the KV cache is quantized and has no scales"


def _read_codes(
    module: QuantizedModule, tensors: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Return ``data`` and ``zero`` of a `QuantizedWeight`, but for the shape of ``zero``."""
    from qtool.formats.packing import data_from_bytes, data_from_words, signed, unpack_bits

    weights, (rows, columns) = module.scheme.weights, module.shape
    if weights.symmetric and "weight_zero_point" in tensors:
        _check_no_zeros(module, tensors["weight_zero_point"])
    zero = None if weights.symmetric else tensors["weight_zero_point"]
    if weights.format == "fp4":
        return tensors["weight_packed"], zero
    if "weight_packed" in tensors:
        data = data_from_words(tensors["weight_packed"], weights.bits, columns)
        if zero is not None:  # packed along N
            codes = unpack_bits(zero.T.contiguous(), weights.bits, rows)
            zero = signed(codes, weights.bits).T.contiguous()
        return data, zero
    if weights.format.startswith("int"):
        return data_from_bytes(module, tensors["weight"]), zero
    return tensors["weight"], zero


def _check_no_zeros(module: QuantizedModule, zero: Tensor) -> None:
    """Raise CheckpointRefused when symmetric weights have zero points, which some tools store."""
    import torch

    from qtool.formats.packing import check_constant

    bits = module.scheme.weights.bits
    if zero.dtype == torch.int32:
        check_constant(module, zero.T.contiguous(), bits, module.shape[0], {2 ** (bits - 1)})
    elif not zero.is_meta and bool((zero.float() != 0).any()):
        raise refused(
            "E_ZERO_POINT",
            f"`{module.name}` is symmetric, as the config says, and has zero points",
            "set `symmetric` to false in the quantization config if the weights are asymmetric",
        )


def _read_scales(
    module: QuantizedModule, tensors: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor | None]:
    import torch

    from qtool.formats.packing import from_divisor

    scale = tensors["weight_scale"]
    if module.scheme.weights.scale == "e8m0":
        return scale.view(torch.float8_e8m0fnu), None
    if module.scheme.weights.scale == "e4m3":  # the file keeps the reciprocal of this scale
        scale2 = from_divisor(tensors["weight_global_scale"].float())
        return scale, scale2.expand(module.shape[0]).contiguous()
    return scale, None


def _read_activation(
    activations: Activations | None, tensors: Mapping[str, Tensor]
) -> Activation | None:
    from qtool.formats.packing import from_divisor
    from qtool.weight import Activation

    if activations is None:
        return None
    if activations.scale == "e4m3":  # the file keeps the reciprocal of this scale
        divisor = tensors["input_global_scale"].float().reshape(())
        return Activation(activations, from_divisor(divisor))
    scale, zero = (tensors.get(name) for name in ("input_scale", "input_zero_point"))
    return Activation(
        activations,
        None if scale is None else scale.reshape(()),
        None if zero is None else zero.float().reshape(()),
    )


def _written_codes(module: QuantizedModule, data: Tensor) -> dict[str, Tensor]:
    import torch

    from qtool.codes import unpack_pairs
    from qtool.formats.packing import words_from_data

    weights = module.scheme.weights
    if tensor_format(module.scheme) == "pack-quantized":
        return {
            "weight_packed": words_from_data(data, weights.bits),
            "weight_shape": torch.tensor(module.shape),
        }
    if weights.format == "fp4":
        return {"weight_packed": data}
    if weights.format == "int4":
        data = unpack_pairs(data).view(torch.int8) - 8
    return {"weight": data}


def _written_scales(module: QuantizedModule, weight: QuantizedWeight) -> dict[str, Tensor]:
    import torch

    from qtool.formats.packing import offset_binary, pack_bits, to_divisor

    weights = module.scheme.weights
    scale, zero = weight.scale, weight.zero
    if zero is not None and tensor_format(module.scheme) == "pack-quantized":
        codes = offset_binary(zero.T.contiguous(), weights.bits)
        zero = pack_bits(codes, weights.bits).T.contiguous()
    if weights.granularity == "tensor":
        scale = scale[0]
        zero = None if zero is None else zero[0]
    elif weights.scale == "e8m0":
        scale = scale.view(torch.uint8)
    tensors = {"weight_scale": scale}
    if zero is not None:
        tensors["weight_zero_point"] = zero
    if weight.scale2 is not None:
        tensors["weight_global_scale"] = to_divisor(weight.scale2[:1])
    return tensors


def _written_activation(
    module: QuantizedModule, activation: Activation | None
) -> dict[str, Tensor]:
    import torch

    from qtool.formats.packing import to_divisor

    tensors: dict[str, Tensor] = {}
    if activation is None:
        return tensors
    activations = module.scheme.activations
    two_levels = activations is not None and activations.scale == "e4m3"
    if activation.scale is not None and two_levels:
        tensors["input_global_scale"] = to_divisor(activation.scale.reshape(1))
    elif activation.scale is not None:
        tensors["input_scale"] = activation.scale.reshape(1)
    if activation.zero is not None:
        tensors["input_zero_point"] = activation.zero.to(torch.int8).reshape(1)
    return tensors

"""The compressed-tensors format of LLM Compressor: float, int, packed int, NVFP4, MXFP4 and MXFP8,
in one or several groups.

Source: compressed-tensors 0.19, `quantization/quant_args.py`, `compressors/`, `utils/match.py`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qtool.checkpoint import Checkpoint
from qtool.checkpoint.model import FLOAT_DTYPES
from qtool.checkpoint.strict_json import Json, JsonDict
from qtool.formats.layout import (
    PER_HEAD,
    Layout,
    Parts,
    QuantizedModule,
    block_size,
    by_scheme,
    group_size,
    modules_of,
    refused,
    shared_unsupported_reason,
)
from qtool.formats.patterns import Names
from qtool.modules import parse_cache_scale
from qtool.scheme import FORMAT_BITS, SCHEMES, Activations, Scheme, Weights

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.weight import QuantizedWeight

FLOATS = tuple(sorted(FLOAT_DTYPES))
VERSION = "0.19.0"  # from 0.18 on, codes of 3, 5, 6 and 7 bits are packed densely
CLASS = "Linear"  # a target that means every linear layer
ACT_ORDER_VERSION = "0.18.0"  # the last that takes a g_idx
SCALE_DTYPE = {"e4m3": "torch.float8_e4m3fn", "e8m0": "torch.uint8"}


def matches_config(config: Json) -> bool:
    """Whether ``config`` is of this format."""
    return config.get("quant_method") in ("compressed-tensors", "compressed_tensors") or (
        "config_groups" in config and "quant_method" not in config
    )


def detect(checkpoint: Checkpoint, config: Json) -> Layout:
    """Return the layout that ``config`` and the tensors of ``checkpoint`` describe together."""
    sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense" or config.get("format") in (
        "marlin-24",
        "sparse-24-bitmask",
        "sparse-bitmask",
    ):
        hint = "quantize the original again, without sparsity"
        raise refused(
            "E_SPARSE",
            f"{checkpoint.path}: sparse compressed-tensors ({sparsity}, {config.get('format')}) "
            "is not read",
            hint,
        )
    groups = _weight_groups(config)
    ignored = Names(config.get("ignore") or [])
    targets = _targets(groups)
    by_class = next(
        (group for group in groups.values() if CLASS in (group.get("targets") or [])), None
    )
    modules: dict[str, QuantizedModule] = {}
    known: dict[Hashable, QuantizedModule] = {}
    warnings: list[str] = []
    for parts in modules_of(checkpoint):
        group = next((group for names, group in targets if parts.name in names), by_class)
        if _is_quantized(parts):
            if parts.name in ignored:
                warnings.append(f"`{parts.name}` is quantized and the config ignores it")
            if group is None and len(groups) != 1:
                raise refused(
                    "E_QUANT_TARGET",
                    f"{checkpoint.path}: `{parts.name}` is quantized and no group of the config "
                    "targets it",
                )
            if group is None:
                warnings.append(f"`{parts.name}` is quantized and the config does not target it")
            group = group or next(iter(groups.values()))
            alike = (
                id(group),
                *((suffix, tensor.dtype, tensor.shape) for suffix, tensor in parts.tensors.items()),
            )
            like = known.get(alike)
            if like is None or "weight_shape" in parts:  # whose data may say more than its header
                like = known[alike] = _module(checkpoint, parts, group)
            modules[parts.name] = QuantizedModule(
                parts.name, like.scheme, like.shape, parts.tensors
            )
        elif "weight_scale" in parts:
            warnings.append(
                f"`{parts.name}` has scales and a plain {parts['weight'].dtype} weight: its "
                "quantization is only simulated"
            )
        elif (
            group
            and parts.name not in ignored
            and "embed" not in parts.name
            and len(getattr(parts.tensors.get("weight"), "shape", ())) == 2
        ):
            warnings.append(
                f"`{parts.name}` is a target of the config and is stored as {parts['weight'].dtype}"
            )
    if _online_transforms(config):
        warnings.append(
            "the config holds online rotations (QuIP, SpinQuant R3/R4): weights as read are "
            "still rotated"
        )
    kv_cache = _kv_cache(config)
    has_scales = any(_is_key_scale(name) for name in checkpoint.tensors)
    if has_scales != (kv_cache is not None):
        warnings.append(
            "KV-cache scales are stored and the config has no kv_cache_scheme"
            if has_scales
            else "the KV cache is quantized and has no scales"
        )
    return Layout(
        "compressed-tensors", modules, kv_cache, tuple(warnings), _online_transforms(config)
    )


def read(module: QuantizedModule, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    """Return the common form of ``tensors``."""
    import torch

    from qtool.formats.packing import (
        data_from_words,
        from_divisor,
        permutation,
        reorder,
        signed,
        unpack_bits,
    )
    from qtool.weight import QuantizedWeight, pack_pairs, uneven_block

    weights, (rows, columns) = module.scheme.weights, module.shape
    scale, scale2 = tensors["weight_scale"], None
    zero = None if weights.symmetric else tensors["weight_zero_point"]
    if weights.format == "fp4":
        data = tensors["weight_packed"]
    elif "weight_packed" in tensors:
        data = data_from_words(tensors["weight_packed"], weights.bits, columns)
        if zero is not None:  # packed along N
            zero = signed(
                unpack_bits(zero.T.contiguous(), weights.bits, rows), weights.bits
            ).T.contiguous()
    else:
        data = tensors["weight"]
        if weights.format == "int4":
            data = pack_pairs((data + 8).view(torch.uint8))
    if weights.scale == "e8m0":
        scale = scale.view(torch.float8_e8m0fnu)
    if weights.scale == "e4m3":  # the file keeps the reciprocal of this scale
        scale2 = from_divisor(tensors["weight_global_scale"].float()).expand(rows).contiguous()
    if weights.granularity in ("tensor", "channel"):
        scale = scale.reshape(-1, 1).expand(rows, 1).contiguous()
        zero = None if zero is None else zero.reshape(-1, 1).expand(rows, 1).contiguous()
    g_idx = tensors.get("weight_g_idx")
    perm = (
        None if g_idx is None else permutation(g_idx, scale.shape[1], weights.group_size or columns)
    )
    if perm is not None:
        data = reorder(data, perm)
    activation = _activation(module.scheme.activations, tensors)
    return QuantizedWeight(
        data, scale, scale2, zero, perm, None, activation, uneven_block(weights, module.shape)
    )


def unsupported_reason(module: QuantizedModule, weight: QuantizedWeight) -> str | None:
    """Return the constraint that keeps compressed-tensors from holding ``weight``."""
    weights, activations = module.scheme.weights, module.scheme.activations
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
    if weights.scale == "e4m3" and activations and activations != SCHEMES["NVFP4"].activations:
        return f"activations: NVFP4 weights go with NVFP4 inputs here, found {activations}"
    if (
        weights.scale == "e8m0"
        and activations
        and (activations.format, activations.scale) != (weights.format, "e8m0")
    ):
        return (
            f"activations: mx{weights.format} weights go with mx{weights.format} inputs here, "
            f"found {activations}"
        )
    if weight.perm is not None and weights.format.startswith("fp"):
        return "act-order: only packed integers have a g_idx here"
    return shared_unsupported_reason(module, weight, act_order=True)


def write(module: QuantizedModule, weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return the tensors that `_format_of` the scheme has; ``weight_scale`` keeps its dtype."""
    import torch

    from qtool.formats.packing import (
        groups_of_inputs,
        offset_binary,
        pack_bits,
        reorder,
        to_divisor,
        words_from_data,
    )
    from qtool.weight import unpack_pairs

    weights, activations, (rows, columns) = (
        module.scheme.weights,
        module.scheme.activations,
        module.shape,
    )
    format, data, activation = _format_of(module.scheme), weight.data, weight.activation
    tensors: dict[str, Tensor] = {}
    if weight.perm is not None:
        data = reorder(data, torch.argsort(weight.perm))
        tensors["weight_g_idx"] = groups_of_inputs(
            columns, weights.group_size or columns, weight.perm
        )
    zero = weight.zero
    if format == "pack-quantized":
        tensors["weight_packed"] = words_from_data(data, weights.bits)
        tensors["weight_shape"] = torch.tensor([rows, columns])
        if zero is not None:
            zero = pack_bits(
                offset_binary(zero.T.contiguous(), weights.bits), weights.bits
            ).T.contiguous()
    elif weights.format == "fp4":
        tensors["weight_packed"] = data
    else:
        tensors["weight"] = (
            unpack_pairs(data).view(torch.int8) - 8 if weights.format == "int4" else data
        )
    per_tensor = weights.granularity == "tensor"
    tensors["weight_scale"] = (
        weight.scale[0]
        if per_tensor
        else weight.scale.view(torch.uint8)
        if weights.scale == "e8m0"
        else weight.scale
    )
    if zero is not None:
        tensors["weight_zero_point"] = zero[0] if per_tensor else zero
    if weight.scale2 is not None:
        tensors["weight_global_scale"] = to_divisor(weight.scale2[:1])
    if activation and activation.scale is not None:
        if activations and activations.scale == "e4m3":
            tensors["input_global_scale"] = to_divisor(activation.scale.reshape(1))
        else:
            tensors["input_scale"] = activation.scale.reshape(1)
    if activation and activation.zero is not None:
        tensors["input_zero_point"] = activation.zero.to(torch.int8).reshape(1)
    return tensors


def quantization_config(
    modules: Sequence[QuantizedModule], unquantized: Sequence[str], kv_cache: str | None
) -> dict[str, JsonDict]:
    """Return the config: one group for each scheme, by class where there is one, else by name."""
    schemes = by_scheme(modules)
    groups = {}
    for index, (scheme, members) in enumerate(schemes.items()):
        names = [module.name for module in members]
        # SGLang takes it for a target only by name
        heads = [name for name in names if name.rpartition(".")[2] == "lm_head"]
        groups[f"group_{index}"] = {
            "targets": [CLASS, *heads] if len(schemes) == 1 else names,
            "weights": _arguments(
                scheme.weights, act_order=any(module.act_order for module in members)
            ),
            "input_activations": _arguments(scheme.activations) if scheme.activations else None,
            "output_activations": None,
            "format": _format_of(scheme),
        }
    formats = {group["format"] for group in groups.values()}
    config = {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(unquantized),
        "kv_cache_scheme": {
            **_arguments(KV_CACHE),
            **({"strategy": "attn_head"} if kv_cache.endswith(PER_HEAD) else {}),
        }
        if kv_cache
        else None,
        "global_compression_ratio": None,
        "version": ACT_ORDER_VERSION if any(module.act_order for module in modules) else VERSION,
    }
    return {"config.json": {"quantization_config": config}}


def cache_scale(attention: str, which: str, count: int) -> tuple[str, tuple[int, ...]] | None:
    """Return name and shape of the KV-cache scale ``which`` of an attention module; None when it
    has no place.
    """
    return f"{attention}.{which}_scale", (count,) if count == 1 else (count, 1, 1)


def fallbacks() -> tuple[str, ...]:
    """Return the schemes that weights can be rounded to for compressed-tensors."""
    return "W2A16", "W3A16", "W4A16", "W8A16"


KV_CACHE = Activations("fp8", "tensor", dynamic=False)


def _format_of(scheme: Scheme) -> str:
    """Return the name of the tensors' layout, by the rules of compressed-tensors 0.18 and up."""
    weights = scheme.weights
    if weights.scale == "e8m0":
        return "mxfp4-pack-quantized" if weights.format == "fp4" else "mxfp8-quantized"
    if weights.format == "fp4":
        return "nvfp4-pack-quantized"
    if weights.format.startswith("int"):
        return "int-quantized" if scheme.activations else "pack-quantized"
    return "float-quantized" if scheme.activations else "naive-quantized"


def _arguments(numbers: Weights | Activations, *, act_order: bool = False) -> JsonDict:
    """Return the `QuantizationArgs` that stand for ``numbers``."""
    dynamic = isinstance(numbers, Activations) and numbers.dynamic
    block = numbers.block if isinstance(numbers, Weights) else None
    return {
        "num_bits": FORMAT_BITS[numbers.format],
        "type": "float" if numbers.format.startswith("fp") else "int",
        "symmetric": numbers.symmetric,
        "strategy": "tensor_group" if numbers.scale == "e4m3" else numbers.granularity,
        "group_size": numbers.group_size,
        "block_structure": list(block) if block else None,
        "dynamic": "local" if dynamic and numbers.scale == "e4m3" else dynamic,
        "actorder": "group" if act_order else None,
        "scale_dtype": SCALE_DTYPE.get(numbers.scale),
        "zp_dtype": None if numbers.symmetric else "torch.int8",
    }


def _weight_groups(config: Json) -> dict[str, Json]:
    groups = {}
    for name, group in (config.get("config_groups") or {}).items():
        if isinstance(group, list):
            hint = "write the group out, with `targets` and `weights`"
            raise refused(
                "E_QUANT_PRESET",
                f"config group `{name}` is only a preset's name, which compressed-tensors reads "
                "and never writes",
                hint,
            )
        if group.get("weights"):
            groups[name] = group
    return groups


def _targets(groups: Mapping[str, Json]) -> list[tuple[Names, Json]]:
    """Return what each group targets by name: exact names first, then patterns, the smallest string
    first, as compressed-tensors takes them.
    """
    entries = [
        (entry.startswith("re:"), entry, key)
        for key, group in groups.items()
        for entry in group.get("targets") or []
        if entry != CLASS
    ]
    exact = {
        key: [entry for is_pattern, entry, owner in entries if owner == key and not is_pattern]
        for key in groups
    }
    patterns = sorted((entry, key) for is_pattern, entry, key in entries if is_pattern)
    return [(Names(names), groups[key]) for key, names in exact.items()] + [
        (Names([entry]), groups[key]) for entry, key in patterns
    ]


def _is_key_scale(name: str) -> bool:
    """Whether ``name`` is the scale of cached keys as compressed-tensors writes and wrote it."""
    scale = parse_cache_scale(name)
    return (
        scale is not None
        and scale.kind == "k"
        and scale.spelling in ("scale", "proj.output_scale")
        and scale.module.endswith("self_attn")
        and not scale.on_attn
    )


def _is_quantized(parts: Parts) -> bool:
    if "weight_packed" in parts or "weight_global_scale" in parts:
        return True
    if "weight" in parts:
        return parts["weight"].dtype not in FLOATS
    return "weight_scale" in parts  # a quantized module that has lost its weight


def _module(checkpoint: Checkpoint, parts: Parts, group: Json) -> QuantizedModule:
    args = group["weights"]
    bits, is_float = int(args.get("num_bits", 8)), args.get("type", "int") == "float"
    if is_float and bits == 4:
        rows, half = parts.matrix("weight_packed", "U8")
        shape = rows, 2 * half
    elif "weight_packed" in parts or "weight_shape" in parts:
        shape = _packed_shape(checkpoint, parts, bits, args.get("group_size"))
    else:
        shape = parts.matrix("weight", "F8_E4M3" if is_float else "I8")
    weights = _weights(parts, args, shape)
    activations = _activations(parts, group.get("input_activations"))
    return QuantizedModule(parts.name, Scheme(weights, activations), shape, parts.tensors)


def _packed_shape(
    checkpoint: Checkpoint, parts: Parts, bits: int, group: int | None
) -> tuple[int, int]:
    """Return (N, K) of an integer matrix packed along K; 16 bytes of ``weight_shape`` are read only
    where the header leaves K open.
    """
    rows, words = parts.matrix("weight_packed", "I32")
    scale = parts["weight_scale"]
    columns = words * 32 // bits
    if 32 % bits == 0 and group and len(scale.shape) == 2 and columns == scale.shape[1] * group:
        return rows, columns
    data = checkpoint.read(parts["weight_shape"].name)
    shape = int.from_bytes(data[:8], "little"), int.from_bytes(data[8:16], "little")
    dense, padded = math.ceil(shape[1] * bits / 32), math.ceil(shape[1] / (32 // bits))
    if shape[0] != rows or words not in (dense, padded):
        raise parts.misfit(
            "weight_packed",
            f"[{shape[0]}, {dense}] for {bits}-bit weights of `weight_shape` {list(shape)}",
            code="E_WEIGHT_SHAPE",
        )
    return shape


def _weights(parts: Parts, args: Json, shape: tuple[int, int]) -> Weights:
    rows, columns = shape
    scale, strategy = parts["weight_scale"], _strategy(args)
    bits, is_float, symmetric = (
        int(args.get("num_bits", 8)),
        args.get("type", "int") == "float",
        bool(args.get("symmetric", True)),
    )
    format: Any = f"{'fp' if is_float else 'int'}{bits}"
    if not symmetric:
        parts["weight_zero_point"]
    if strategy in ("tensor", "channel"):
        if scale.dtype not in FLOATS or scale.count != (1 if strategy == "tensor" else rows):
            raise parts.misfit(
                "weight_scale",
                f"one scale {'in all' if strategy == 'tensor' else f'for each of {rows} rows'}, "
                "as the config says",
            )
        return Weights(format, "tensor" if strategy == "tensor" else "channel", symmetric=symmetric)
    if strategy == "block":
        count = parts.matrix("weight_scale", *FLOATS)
        block = _block(args) or (block_size(rows, count[0]), block_size(columns, count[1]))
        if count != (math.ceil(rows / block[0]), math.ceil(columns / block[1])):
            raise parts.misfit(
                "weight_scale",
                f"one scale for each block of {block[0]} x {block[1]} of {rows} x {columns}",
            )
        return Weights(format, "block", block=block, symmetric=symmetric)
    if strategy not in ("group", "tensor_group"):
        raise refused(
            "E_QUANT_STRATEGY",
            f"`{parts.name}`: weights of strategy `{strategy}` are not read",
            "tensor, channel, group and block are",
        )
    nvfp4 = format == "fp4" and (strategy == "tensor_group" or scale.dtype == "F8_E4M3")
    if nvfp4:
        parts["weight_global_scale"]
    mx = is_float and not nvfp4 and (bits == 4 or scale.dtype not in FLOATS)
    _, groups = parts.matrix(
        "weight_scale", *(("F8_E4M3",) if nvfp4 else ("U8", "F8_E8M0") if mx else FLOATS)
    )
    size = group_size(columns, groups, args.get("group_size"))
    if scale.shape[0] != rows or math.ceil(columns / size) != groups:
        raise parts.misfit(
            "weight_scale", f"one scale for each group of {size} of {rows} x {columns}"
        )
    return Weights(
        format,
        "group",
        size,
        symmetric=symmetric,
        scale="e4m3" if nvfp4 else "e8m0" if mx else "float",
    )


def _activations(parts: Parts, args: Json | None) -> Activations | None:
    if not args:
        return None
    strategy, is_float, dynamic = (
        _strategy(args),
        args.get("type", "int") == "float",
        bool(args.get("dynamic", False)),
    )
    format: Any = f"{'fp' if is_float else 'int'}{args.get('num_bits', 8)}"
    if strategy == "tensor_group":
        parts["input_global_scale"]
        return Activations(format, "group", args.get("group_size") or 16, scale="e4m3")
    if not dynamic:
        parts["input_scale"]
    if strategy == "group":
        size = args.get("group_size")
        # old files do not say
        is_mx = (
            is_float
            and size == 32
            and args.get("scale_dtype", SCALE_DTYPE["e8m0"]) == SCALE_DTYPE["e8m0"]
        )
        return Activations(
            format,
            "group",
            size,
            dynamic,
            bool(args.get("symmetric", True)),
            "e8m0" if is_mx else "float",
        )
    symmetric = bool(args.get("symmetric", True))
    return Activations(format, strategy, None, dynamic, symmetric)  # type: ignore[arg-type]


def _strategy(args: Json) -> str:
    size = args.get("group_size")
    return str(
        args.get("strategy") or ("tensor" if size is None else "group" if size > 0 else "channel")
    )


def _block(args: Json) -> tuple[int, int] | None:
    block = args.get("block_structure")
    if isinstance(block, str):
        block = block.split("x")
    return (int(block[0]), int(block[1])) if block else None


def _kv_cache(config: Json) -> str | None:
    args = config.get("kv_cache_scheme")
    if not args:
        return None
    return f"{'fp' if args.get('type', 'int') == 'float' else 'int'}{int(args.get('num_bits', 8))}"


def _online_transforms(config: Json) -> bool:
    groups = (config.get("transform_config") or {}).get("config_groups") or {}
    return any(
        not str(apply.get("location", "")).startswith("weight_")
        for group in groups.values()
        for apply in group.get("apply") or []
    )


def _activation(activations: Activations | None, tensors: Mapping[str, Tensor]) -> Any:
    from qtool.formats.packing import from_divisor
    from qtool.weight import Activation

    if activations is None:
        return None
    if activations.scale == "e4m3":  # the file keeps the reciprocal of this scale
        return Activation(
            activations, from_divisor(tensors["input_global_scale"].float().reshape(()))
        )
    scale, zero = (tensors.get(name) for name in ("input_scale", "input_zero_point"))
    return Activation(
        activations,
        None if scale is None else scale.reshape(()),
        None if zero is None else zero.float().reshape(()),
    )

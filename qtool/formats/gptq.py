"""The GPTQ format of GPTQModel, AutoGPTQ and optimum, v1 and v2: 2, 3, 4 and 8 bit codes packed along the inputs.

Source: gptqmodel 7.6, `nn_modules/qlinear`; AutoGPTQ; vLLM 0.33, `auto_gptq`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qtool.checkpoint import Checkpoint
from qtool.formats.layout import SCALE_DTYPES, Layout, Parts, QuantizedModule, grouped_integers, modules_of, refused
from qtool.scheme import Scheme

if TYPE_CHECKING:
    from qtool.weight import QuantizedWeight

READ_BITS = (2, 3, 4, 8)
ONE_IN_EVERY_FIELD = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


def claims(config: Mapping[str, Any]) -> bool:
    """Whether ``config`` is of this format; an old sidecar names no method, but bits and a group size."""
    return config.get("quant_method") == "gptq" or ("quant_method" not in config and "bits" in config and "group_size" in config)


def detect(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Layout:
    """Return the layout: a module is quantized when it has a ``qweight``, whatever the config says; bits and groups follow from the shapes."""
    variant = _variant(config)
    if variant not in ("gptq", "gptq_v2", "gptq_p") or config.get("is_marlin_format"):
        raise refused(
            "E_FORMAT", f"{checkpoint.path}: GPTQ in the layout `{variant}` is a kernel's own and is not read", "quantize the original again"
        )
    if config.get("pack_dtype", "int32") != "int32":
        raise refused("E_FORMAT", f"{checkpoint.path}: GPTQ packed in {config['pack_dtype']} is not read; int32 is")
    modules: dict[str, QuantizedModule] = {}
    warnings: list[str] = []
    for parts in modules_of(checkpoint):
        if not parts.tensors.keys() & {"qweight", "qzeros", "scales", "g_idx"}:
            continue
        options = _options(config, parts.name)
        modules[parts.name] = module = _module(parts, {} if options is None else options)
        if options is None:
            warnings.append(f"`{parts.name}` is quantized and `dynamic` leaves it out")
        elif options.get("bits", module.scheme.weights.bits) != module.scheme.weights.bits:
            warnings.append(f"`{parts.name}` has {module.scheme.weights.bits} bits and the config says {options['bits']}")
    return Layout("gptq", modules, None, tuple(warnings))


def read(checkpoint: Checkpoint, module: QuantizedModule) -> QuantizedWeight:
    """Read ``module`` into the common form, the inputs sorted by group when act-order has scattered them."""
    import torch

    from qtool.formats.packing import load, pack_pairs, permutation, signed, unpack_bits
    from qtool.weight import QuantizedWeight

    config = checkpoint.quantization_config or {}
    weights, (rows, columns) = module.scheme.weights, module.shape
    bits = weights.bits
    if bits not in READ_BITS or (_variant(config) == "gptq_p" and bits == 3):
        raise refused("E_FORMAT", f"`{module.name}`: GPTQModel's planar layout of {bits} bits is not read; {READ_BITS} are")
    tensors = load(checkpoint, module)
    codes = unpack_bits(tensors["qweight"].T.contiguous(), bits, columns)
    scale = tensors["scales"].T.contiguous()
    zero = None
    if not weights.symmetric:
        words = tensors["qzeros"]
        if _variant(config) == "gptq" and bits != 3:  # v1 keeps zero - 1, taken from whole words: a zero of 0 has borrowed from its neighbour
            words = ((words.long() + ONE_IN_EVERY_FIELD[bits]) & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)
        zero = unpack_bits(words, bits, rows)
        if _variant(config) == "gptq" and bits == 3:
            zero = (zero + 1) % 8
        zero = signed(zero, bits).T.contiguous()
    perm = permutation(tensors["g_idx"], scale.shape[1]) if "g_idx" in tensors else None
    if perm is not None:
        codes = codes[:, perm.long()]
    data = pack_pairs(codes) if bits == 4 else signed(codes, bits)
    return QuantizedWeight(data, scale, None, zero, perm, None, None)


def _variant(config: Mapping[str, Any]) -> str:
    return str(config.get("checkpoint_format") or config.get("format") or "gptq")


def _options(config: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """Return the config as it holds for the module ``name``; None when ``dynamic`` leaves the module out. Skips come first, as in GPTQModel."""
    dynamic = config.get("dynamic") or {}
    for pattern, override in sorted(dynamic.items(), key=lambda item: not item[0].startswith("-:")):
        if re.match(pattern.removeprefix("-:").removeprefix("+:"), name):
            return None if pattern.startswith("-:") or override is False else {**config, **(override or {})}
    return config


def _module(parts: Parts, options: Mapping[str, Any]) -> QuantizedModule:
    word_rows, rows = parts.matrix("qweight", "I32")
    groups, _ = parts.matrix("scales", *SCALE_DTYPES)
    zero_groups, zero_words = parts.matrix("qzeros", "I32")
    bits = zero_words * 32 // rows if rows else 0
    if not 2 <= bits <= 8 or math.ceil(rows * bits / 32) != zero_words:
        raise parts.misfit("qzeros", f"{rows} zeros of 2 to 8 bits in each of {groups} rows")
    columns = parts["g_idx"].count if "g_idx" in parts else word_rows * 32 // bits
    if math.ceil(columns * bits / 32) != word_rows:
        raise parts.misfit("qweight", f"{math.ceil(columns * bits / 32)} rows for {columns} inputs of {bits} bits")
    if parts["scales"].shape != (groups, rows) or zero_groups != groups:
        raise parts.misfit("scales", f"[{zero_groups}, {rows}], as `qzeros` and `qweight` have it")
    weights = grouped_integers(
        bits, columns, groups, options.get("group_size"), symmetric=bool(options.get("sym", not options.get("zero_point", False)))
    )
    return QuantizedModule(parts.name, Scheme(weights), (rows, columns), parts.tensors)

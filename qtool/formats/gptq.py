"""The GPTQ format of GPTQModel, AutoGPTQ and optimum, v1 and v2: 2, 3, 4 and 8 bit codes packed
along the inputs.

Source: gptqmodel 7.6, `nn_modules/qlinear`; AutoGPTQ; vLLM 0.33, `auto_gptq`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from qtool.checkpoint import Checkpoint
from qtool.checkpoint.strict_json import Json, JsonDict
from qtool.formats.layout import (
    SCALE_DTYPES,
    Layout,
    Parts,
    QuantizedModule,
    grouped_integers,
    modules_of,
    refused,
    shared_unsupported_reason,
)
from qtool.formats.patterns import patterns_of
from qtool.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.weight import QuantizedWeight

BITS = (2, 3, 4, 8)
# engines match `dynamic` with the fused name
FUSED = (
    (("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    (("gate_proj", "up_proj"), "gate_up_proj"),
)
ONE_IN_EVERY_FIELD = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


def matches_config(config: Json) -> bool:
    """Whether ``config`` is of this format; an old `quantize_config.json` names no method, but
    bits and a group size.
    """
    return config.get("quant_method") == "gptq" or (
        "quant_method" not in config and "bits" in config and "group_size" in config
    )


def detect(checkpoint: Checkpoint, config: Json) -> Layout:
    """Return the layout: a module is quantized when it has a ``qweight``, whatever the config says;
    bits and groups follow from the shapes.
    """
    variant = _variant(config)
    if variant not in ("gptq", "gptq_v2", "gptq_p") or config.get("is_marlin_format"):
        raise refused(
            "E_KERNEL_LAYOUT",
            f"{checkpoint.path}: GPTQ in the layout `{variant}` is a kernel's own and is not read",
            "quantize the original again",
        )
    if config.get("pack_dtype", "int32") != "int32":
        raise refused(
            "E_PACK_DTYPE",
            f"{checkpoint.path}: GPTQ packed in {config['pack_dtype']} is not read; int32 is",
            "quantize the original again",
        )
    dynamic = _Dynamic(config)
    modules: dict[str, QuantizedModule] = {}
    warnings: list[str] = []
    for parts in modules_of(checkpoint):
        if not parts.tensors.keys() & {"qweight", "qzeros", "scales", "g_idx"}:
            continue
        options = dynamic.options(parts.name)
        modules[parts.name] = module = _module(parts, {} if options is None else options, variant)
        if options is None:
            warnings.append(f"`{parts.name}` is quantized and `dynamic` leaves it out")
        elif options.get("bits", module.scheme.weights.bits) != module.scheme.weights.bits:
            warnings.append(
                f"`{parts.name}` has {module.scheme.weights.bits} bits and the config says "
                f"{options['bits']}"
            )
    return Layout("gptq", modules, None, tuple(warnings))


def read(module: QuantizedModule, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    """Return the common form of ``tensors``, the inputs sorted by group when act-order has
    scattered them.
    """
    import torch

    from qtool.formats.packing import (
        check_constant,
        data_from_words,
        permutation,
        reorder,
        signed,
        unpack_bits,
    )
    from qtool.weight import QuantizedWeight, uneven_block

    weights, (rows, columns) = module.scheme.weights, module.shape
    bits = weights.bits
    if bits not in BITS or (module.variant == "gptq_p" and bits == 3):
        raise refused(
            "E_FORMAT",
            f"`{module.name}`: GPTQModel's planar layout of {bits} bits is not read; {BITS} are",
        )
    data = data_from_words(tensors["qweight"].T.contiguous(), bits, columns)
    scale = tensors["scales"].T.contiguous()
    zero = None
    if weights.symmetric:
        middle = 2 ** (bits - 1)
        # either version: who reads symmetric weights does not look
        check_constant(module, tensors["qzeros"], bits, rows, {middle - 1, middle})
    else:
        words = tensors["qzeros"]
        # v1 keeps zero - 1, taken from whole words: a zero of 0 has borrowed from its neighbour
        if module.variant == "gptq" and bits != 3:
            words = (
                ((words.long() + ONE_IN_EVERY_FIELD[bits]) & 0xFFFFFFFF)
                .to(torch.uint32)
                .view(torch.int32)
            )
        zero = unpack_bits(words, bits, rows)
        if module.variant == "gptq" and bits == 3:
            zero = (zero + 1) % 8
        zero = signed(zero, bits).T.contiguous()
    perm = (
        permutation(tensors["g_idx"], scale.shape[1], weights.group_size or columns)
        if "g_idx" in tensors
        else None
    )
    if perm is not None:
        data = reorder(data, perm)
    return QuantizedWeight(data, scale, None, zero, perm, block=uneven_block(weights, module.shape))


def unsupported_reason(module: QuantizedModule, weight: QuantizedWeight) -> str | None:
    """Return the constraint that keeps GPTQ from holding ``weight``."""
    scheme, (rows, columns) = module.scheme, module.shape
    weights = scheme.weights
    if not weights.format.startswith("int") or weights.bits not in BITS:
        return (
            f"format: the weights are {weights.format}, and GPTQ holds integers of "
            f"{', '.join(map(str, BITS))} bits"
        )
    if weights.granularity not in ("channel", "group"):
        return (
            f"granularity: one scale for each {weights.granularity}, and GPTQ has one for each "
            "group or row"
        )
    if scheme.activations:
        return (
            f"activations: inputs are rounded to {scheme.activations}, and GPTQ leaves them in 16 "
            "bits"
        )
    if rows * weights.bits % 32 or columns * weights.bits % 32:
        return (
            f"shape: {rows} x {columns} codes of {weights.bits} bits do not fill words of 32 bits"
        )
    return shared_unsupported_reason(module, weight, act_order=True)


def write(module: QuantizedModule, weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return ``qweight`` [K * bits / 32, N], ``qzeros``, ``scales`` [G, N] and ``g_idx`` [K]; the
    version of the zeros is ``module.variant``.
    """
    import torch

    from qtool.formats.packing import (
        groups_of_inputs,
        offset_binary,
        pack_bits,
        reorder,
        words_from_data,
    )

    bits, columns = module.scheme.weights.bits, module.shape[1]
    data = weight.data if weight.perm is None else reorder(weight.data, torch.argsort(weight.perm))
    zero = torch.zeros_like(weight.scale, dtype=torch.int8) if weight.zero is None else weight.zero
    codes = offset_binary(zero.T.contiguous(), bits)
    if module.variant == "gptq" and bits == 3:
        codes = (codes + 7) % 8
    words = pack_bits(codes, bits)
    if module.variant == "gptq" and bits != 3:
        words = (
            ((words.long() - ONE_IN_EVERY_FIELD[bits]) & 0xFFFFFFFF)
            .to(torch.uint32)
            .view(torch.int32)
        )
    return {
        "qweight": words_from_data(data, bits).T.contiguous(),
        "qzeros": words,
        "scales": weight.scale.T.contiguous(),
        "g_idx": groups_of_inputs(
            columns, module.scheme.weights.group_size or columns, weight.perm
        ),
    }


def quantization_config(
    modules: Sequence[QuantizedModule], unquantized: Sequence[str], kv_cache: str | None
) -> dict[str, JsonDict]:
    """Return the config, which also stands in a file of its own; layers that differ from most are
    in ``dynamic``.
    """
    options = {module.name: (module.scheme.weights, module.act_order) for module in modules}
    (weights, act_order), _ = Counter(options.values()).most_common(1)[0]
    group_size = weights.group_size or -1
    differing = {
        name: {
            "bits": own.bits,
            "group_size": own.group_size or -1,
            "sym": own.symmetric,
            "desc_act": own_order,
        }
        for name, (own, own_order) in options.items()
        if (own, own_order) != (weights, act_order)
    }
    skipped: dict[str, JsonDict] = {
        name: {} for name in unquantized if name.rpartition(".")[2] != "lm_head"
    }
    dynamic = {f"-:{pattern}": own for pattern, own in _patterns(skipped, [*options, *unquantized])}
    dynamic |= {
        f"+:{pattern}": own for pattern, own in _patterns(differing, [*options, *unquantized])
    }
    config = {
        "quant_method": "gptq",
        "bits": weights.bits,
        "group_size": group_size,
        "desc_act": act_order,
        "sym": weights.symmetric,
        "checkpoint_format": modules[0].variant,
        "pack_dtype": "int32",
        "lm_head": any(name.rpartition(".")[2] == "lm_head" for name in options),
        **({"dynamic": dynamic} if dynamic else {}),
    }
    return {"config.json": {"quantization_config": config}, "quantize_config.json": config}


def cache_scale(attention: str, which: str, count: int) -> tuple[str, tuple[int, ...]] | None:
    """Return name and shape of the KV-cache scale ``which`` of an attention module; None when it
    has no place.
    """
    return None


def fallbacks() -> tuple[str, ...]:
    """Return the schemes that weights can be rounded to for GPTQ."""
    return "W2A16", "W3A16", "W4A16", "W8A16"


def _patterns(
    wanted: Mapping[str, JsonDict], names: Sequence[str]
) -> Iterator[tuple[str, JsonDict]]:
    """Yield regexes that match the names in ``wanted`` and no other of ``names``: one for a kind
    where all layers agree, else one for each.
    """
    everywhere: dict[str, list[str]] = {}
    for name in names:
        everywhere.setdefault(_without_numbers(name), []).append(name)
    agreed: dict[str, JsonDict] = {}
    for kind, members in everywhere.items():
        found = [wanted.get(name) for name in members]
        if found[0] is not None and all(options == found[0] for options in found):
            agreed[kind] = found[0]
        else:
            yield from ((re.escape(name) + "$", wanted[name]) for name in members if name in wanted)
    for kind, options in agreed.items():
        yield kind + "$", options
        for shards, fused in FUSED:
            parent, _, last = kind.rpartition(r"\.")
            if last == shards[-1] and all(
                agreed.get(rf"{parent}\.{shard}") == options for shard in shards
            ):
                yield rf"{parent}\.{fused}$", options


def _without_numbers(name: str) -> str:
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))


def _variant(config: Json) -> str:
    return str(config.get("checkpoint_format") or config.get("format") or "gptq")


class _Dynamic:
    """The config's ``dynamic``: what holds for single layers. Skips come first, as in GPTQModel."""

    def __init__(self, config: Json) -> None:
        self._config = config
        rules = sorted(
            (config.get("dynamic") or {}).items(), key=lambda item: not item[0].startswith("-:")
        )
        patterns = patterns_of([key.removeprefix("-:").removeprefix("+:") for key, _ in rules])
        self._rules = [
            (pattern, key.startswith("-:"), options)
            for pattern, (key, options) in zip(patterns, rules, strict=True)
        ]

    def options(self, name: str) -> Json | None:
        """Return the config as it holds for the layer ``name``; None when it is left out."""
        for pattern, is_skip, override in self._rules:
            if pattern.match(name):
                return (
                    None if is_skip or override is False else {**self._config, **(override or {})}
                )
        return self._config


def _module(parts: Parts, options: Json, variant: str) -> QuantizedModule:
    word_rows, rows = parts.matrix("qweight", "I32")
    groups, _ = parts.matrix("scales", *SCALE_DTYPES)
    zero_groups, zero_words = parts.matrix("qzeros", "I32")
    bits = zero_words * 32 // rows if rows else 0
    if not 2 <= bits <= 8 or math.ceil(rows * bits / 32) != zero_words:
        raise parts.misfit("qzeros", f"{rows} zeros of 2 to 8 bits in each of {groups} rows")
    columns = parts["g_idx"].count if "g_idx" in parts else word_rows * 32 // bits
    if math.ceil(columns * bits / 32) != word_rows:
        if "g_idx" in parts:
            expected = (
                f"{word_rows * 32 // bits}, a group for each input that `qweight` "
                f"{list(parts['qweight'].shape)} holds in {bits} bits"
            )
            raise parts.misfit("g_idx", expected, code="E_G_IDX_LENGTH")
        raise parts.misfit(
            "qweight", f"{math.ceil(columns * bits / 32)} rows for {columns} inputs of {bits} bits"
        )
    if parts["scales"].shape != (groups, rows) or zero_groups != groups:
        raise parts.misfit("scales", f"[{zero_groups}, {rows}], as `qzeros` and `qweight` have it")
    weights = grouped_integers(
        bits,
        columns,
        groups,
        options.get("group_size"),
        symmetric=bool(options.get("sym", not options.get("zero_point", False))),
    )
    return QuantizedModule(parts.name, Scheme(weights), (rows, columns), parts.tensors, variant)

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
from qtool.formats.auto_round import LayerOptions, is_from_auto_round
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
from qtool.formats.patterns import config_patterns
from qtool.modules import FUSED, last_part
from qtool.scheme import Scheme, Weights

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.weight import QuantizedWeight

BITS = (2, 3, 4, 8)
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
            f"{checkpoint.source}: GPTQ in the layout `{variant}` is a kernel's own and is not "
            "read",
            "quantize the original again",
        )
    if config.get("pack_dtype", "int32") != "int32":
        raise refused(
            "E_PACK_DTYPE",
            f"{checkpoint.source}: GPTQ packed in {config['pack_dtype']} is not read; int32 is",
            "quantize the original again",
        )
    single = LayerOptions(config) if is_from_auto_round(config) else _Dynamic(config)
    modules: dict[str, QuantizedModule] = {}
    warnings: list[str] = []
    for parts in modules_of(checkpoint):
        if not parts.tensors.keys() & {"qweight", "qzeros", "scales", "g_idx"}:
            continue
        options = single.options(parts.name)
        modules[parts.name] = module = _module(parts, {} if options is None else options, variant)
        if options is None:
            warnings.append(f"`{parts.name}` is quantized and the config leaves it out")
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
    from qtool.formats.packing import data_from_words, permutation, reorder
    from qtool.weight import QuantizedWeight, uneven_block

    weights, columns = module.scheme.weights, module.shape[1]
    bits = weights.bits
    if bits not in BITS or (module.variant == "gptq_p" and bits == 3):
        raise refused(
            "E_FORMAT",
            f"`{module.name}`: GPTQModel's planar layout of {bits} bits is not read; {BITS} are",
            "GPTQModel loads it; or quantize the 16-bit model again",
        )
    data = data_from_words(tensors["qweight"].T.contiguous(), bits, columns)
    scale = tensors["scales"].T.contiguous()
    perm = None
    if "g_idx" in tensors:
        perm = permutation(module, tensors["g_idx"])
    return QuantizedWeight(
        data if perm is None else reorder(data, perm),
        scale,
        zero=_read_zeros(module, tensors["qzeros"]),
        perm=perm,
        block=uneven_block(weights, module.shape),
    )


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
        words = _added(words, -ONE_IN_EVERY_FIELD[bits])
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
    kinds = Counter((module.scheme.weights, module.act_order) for module in modules)
    (weights, act_order), _ = kinds.most_common(1)[0]
    usual = _options(weights, act_order=act_order)
    config = {
        "quant_method": "gptq",
        "bits": usual["bits"],
        "group_size": usual["group_size"],
        "desc_act": usual["desc_act"],
        "sym": usual["sym"],
        "checkpoint_format": modules[0].variant,
        "pack_dtype": "int32",
        "lm_head": any(last_part(module.name) == "lm_head" for module in modules),
    }
    if dynamic := _dynamic(modules, unquantized, usual):
        config["dynamic"] = dynamic
    return {"config.json": {"quantization_config": config}, "quantize_config.json": config}


def cache_scale(attention: str, which: str, count: int) -> tuple[str, tuple[int, ...]] | None:
    """Return name and shape of the KV-cache scale ``which`` of an attention module; None when it
    has no place.
    """
    return None


def fallbacks() -> tuple[str, ...]:
    """Return the schemes that weights can be rounded to for GPTQ."""
    return "W2A16", "W3A16", "W4A16", "W8A16"


def _read_zeros(module: QuantizedModule, words: Tensor) -> Tensor | None:
    """Return the zero points, int8 [N, G]; of symmetric weights check ``words`` and return None."""
    from qtool.formats.packing import check_constant, signed, unpack_bits

    weights, rows = module.scheme.weights, module.shape[0]
    bits = weights.bits
    if weights.symmetric:
        middle = 2 ** (bits - 1)
        # either version: who reads symmetric weights does not look
        check_constant(module, words, bits, rows, {middle - 1, middle})
        return None
    # v1 keeps zero - 1, taken from whole words: a zero of 0 has borrowed from its neighbour
    if module.variant == "gptq" and bits != 3:
        words = _added(words, ONE_IN_EVERY_FIELD[bits])
    zero = unpack_bits(words, bits, rows)
    if module.variant == "gptq" and bits == 3:
        zero = (zero + 1) % 8
    return signed(zero, bits).T.contiguous()


def _added(words: Tensor, number: int) -> Tensor:
    """Return ``words`` + ``number`` as unsigned words of 32 bits add, int32."""
    import torch

    return ((words.long() + number) & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)


def _options(weights: Weights, *, act_order: bool) -> JsonDict:
    return {
        "bits": weights.bits,
        "group_size": weights.group_size or -1,
        "sym": weights.symmetric,
        "desc_act": act_order,
    }


def _dynamic(
    modules: Sequence[QuantizedModule], unquantized: Sequence[str], usual: JsonDict
) -> JsonDict:
    """Return what the config says of single layers: those to skip, those that are not as usual."""
    names = [*(module.name for module in modules), *unquantized]
    skipped: dict[str, JsonDict] = {
        name: {} for name in unquantized if last_part(name) != "lm_head"
    }
    differing: dict[str, JsonDict] = {}
    for module in modules:
        options = _options(module.scheme.weights, act_order=module.act_order)
        if options != usual:
            differing[module.name] = options
    dynamic = {f"-:{pattern}": own for pattern, own in _patterns(skipped, names)}
    return dynamic | {f"+:{pattern}": own for pattern, own in _patterns(differing, names)}


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
        first = wanted.get(members[0])
        if first is not None and all(wanted.get(name) == first for name in members):
            agreed[kind] = first
        else:
            yield from ((re.escape(name) + "$", wanted[name]) for name in members if name in wanted)
    for kind, options in agreed.items():
        yield kind + "$", options
        if fused := _fused_kind(kind, agreed):
            yield fused + "$", options


def _fused_kind(kind: str, agreed: Mapping[str, JsonDict]) -> str | None:
    """Return the regex of the fused layer whose last shard is ``kind``, if all shards agree."""
    parent, _, last = kind.rpartition(r"\.")
    for fused, shards in FUSED.items():  # with whose name engines match `dynamic`
        if last == shards[-1] and all(
            agreed.get(rf"{parent}\.{shard}") == agreed[kind] for shard in shards
        ):
            return rf"{parent}\.{fused}"
    return None


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
        compiler = config_patterns()
        self._rules = [
            (
                compiler.compile(key.removeprefix("-:").removeprefix("+:")),
                key.startswith("-:"),
                options,
            )
            for key, options in rules
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

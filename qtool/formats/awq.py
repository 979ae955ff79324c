"""The AWQ format of AutoAWQ and GPTQModel in its `gemm` version: 4-bit codes packed along the
outputs, in an interleaved order.

Source: AutoAWQ, `awq/utils/packing_utils.py`; gptqmodel 7.6, `nn_modules/qlinear`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from qtool.checkpoint import Checkpoint
from qtool.checkpoint.strict_json import Json, JsonDict
from qtool.formats.auto_round import LayerOptions, is_from_auto_round
from qtool.formats.layout import (
    SCALE_DTYPES,
    Layout,
    Parts,
    QuantizedModule,
    check_skipped,
    grouped_integers,
    modules_of,
    refused,
    shared_unsupported_reason,
)
from qtool.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.weight import QuantizedWeight

# nibble i of a word holds this one of its eight columns
COLUMN_OF_NIBBLE = (
    0,
    2,
    4,
    6,
    1,
    3,
    5,
    7,
)
NIBBLE_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)
LOW = 0x0F0F0F0F  # the even nibbles of a word
HIGH = ~LOW


def matches_config(config: Json) -> bool:
    """Whether ``config`` is of this format; GPTQModel's round-to-nearest says `gptq` and means
    `gemm` tensors.
    """
    return (
        config.get("quant_method") == "awq"
        or _named_version(config) == "gemm"
        or ("w_bit" in config and "quant_method" not in config)
    )


def detect(checkpoint: Checkpoint, config: Json) -> Layout:
    """Return the layout: a module is quantized when it has a ``qweight``; the config tells whether
    zeros are used.
    """
    if _version(config) != "gemm":
        message = (
            f"{checkpoint.source}: AWQ in the layout `{_version(config)}` is a kernel's own and is "
            "not read; `gemm` is"
        )
        raise refused("E_KERNEL_LAYOUT", message, "quantize the original again")
    modules: dict[str, QuantizedModule] = {}
    warnings: list[str] = []
    if config.get("quant_method") == "gptq":
        warnings.append("the config says gptq and the tensors are AWQ gemm: engines misread it")
    skipped = config.get("modules_to_not_convert") or []
    single = LayerOptions(config) if is_from_auto_round(config) else None
    for parts in modules_of(checkpoint):
        if parts.tensors.keys() & {"qweight", "qzeros", "scales"}:
            options = single.options(parts.name) if single else config
            modules[parts.name] = _module(parts, {} if options is None else options)
            if options is None:
                warnings.append(f"`{parts.name}` is quantized and the config leaves it out")
            if any(entry in parts.name for entry in skipped):
                warnings.append(f"`{parts.name}` is quantized and modules_to_not_convert names it")
    return Layout("awq", modules, None, tuple(warnings))


def read(module: QuantizedModule, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    """Return the common form of ``tensors``."""
    import torch

    from qtool.formats.packing import check_constant, signed, unpack_bits
    from qtool.weight import QuantizedWeight

    rows, columns = module.shape
    words = tensors["qweight"].T.contiguous()
    even, odd = words[:, ::2], words[:, 1::2]  # two inputs, which share a byte of `data`
    # the byte j of half h is nibble 2 j + h of both inputs
    halves = (
        (even & LOW) | ((odd & LOW) << 4),
        ((even >> 4) & LOW) | (odd & HIGH),
    )
    bytes_of = [half.view(torch.uint8).reshape(rows // 8, columns // 2, 4) for half in halves]
    data = torch.stack(
        [bytes_of[nibble % 2][..., nibble // 2] for nibble in NIBBLE_OF_COLUMN], dim=1
    ).reshape(rows, columns // 2)
    zero = None
    if module.scheme.weights.symmetric:
        if "qzeros" in tensors:
            check_constant(module, tensors["qzeros"], 4, rows, {8})
    else:
        codes = unpack_bits(tensors["qzeros"], 4, rows).reshape(-1, rows // 8, 8)[
            :, :, list(NIBBLE_OF_COLUMN)
        ]
        zero = signed(codes.flatten(1).T.contiguous(), 4)
    return QuantizedWeight(data, tensors["scales"].T.contiguous(), None, zero)


def unsupported_reason(module: QuantizedModule, weight: QuantizedWeight) -> str | None:
    """Return the constraint that keeps AWQ from holding ``weight``."""
    scheme, (rows, columns) = module.scheme, module.shape
    weights = scheme.weights
    if weights.format != "int4":
        return f"bits: the weights are {weights.format}, and AWQ holds int4"
    if weights.granularity not in ("channel", "group"):
        return (
            f"granularity: one scale for each {weights.granularity}, and AWQ has one for each "
            "group or row"
        )
    if scheme.activations:
        return (
            f"activations: inputs are rounded to {scheme.activations}, and AWQ leaves them in 16 "
            "bits"
        )
    if rows % 8 or columns % (weights.group_size or columns):
        return (
            f"shape: AWQ needs outputs in eights and inputs in whole groups, found {rows} x "
            f"{columns} in groups of {weights.group_size or columns}"
        )
    return shared_unsupported_reason(module, weight)


def write(module: QuantizedModule, weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return ``qweight`` [K, N / 8], ``qzeros`` [G, N / 8] and ``scales`` [G, N]; symmetric weights
    get zeros of 8, which engines ask for.
    """
    import torch

    from qtool.formats.packing import offset_binary, pack_bits

    rows, columns = module.shape
    by_column = weight.data.reshape(rows // 8, 8, columns // 2)
    low, high = (
        torch.stack([by_column[:, column] for column in COLUMN_OF_NIBBLE[half::2]], dim=-1).view(
            torch.int32
        )[..., 0]
        for half in (0, 1)
    )
    # the inverse of `read`
    words = torch.stack(
        ((low & LOW) | ((high & LOW) << 4), ((low >> 4) & LOW) | (high & HIGH)), dim=-1
    )
    zero = torch.zeros_like(weight.scale, dtype=torch.int8) if weight.zero is None else weight.zero
    zeros = offset_binary(zero, 4).T.reshape(-1, rows // 8, 8)[:, :, list(COLUMN_OF_NIBBLE)]
    return {
        "qweight": words.reshape(rows // 8, columns).T.contiguous(),
        "qzeros": pack_bits(zeros.flatten(1), 4),
        "scales": weight.scale.T.contiguous(),
    }


def quantization_config(
    modules: Sequence[QuantizedModule], unquantized: Sequence[str], kv_cache: str | None
) -> dict[str, JsonDict]:
    """Return the config; ``sym`` is GPTQModel's key, and tells that the zeros are all 8.

    Raises: CheckpointRefused, when the layers have different groups, or engines, which look for
        names inside names, would skip a quantized layer.
    """
    groups = {module.config_group_size for module in modules}
    if len(groups) > 1:
        raise refused(
            "E_CANNOT_HOLD",
            f"group_size: AWQ has one for the whole checkpoint, found {sorted(groups)}",
            "convert to gptq instead",
        )
    check_skipped(unquantized, modules)
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": groups.pop(),
        "zero_point": True,
        "sym": all(module.scheme.weights.symmetric for module in modules),
        "version": "gemm",
        "modules_to_not_convert": list(unquantized) or None,
    }
    return {"config.json": {"quantization_config": config}}


def cache_scale(attention: str, which: str, count: int) -> tuple[str, tuple[int, ...]] | None:
    """Return name and shape of the KV-cache scale ``which`` of an attention module; None when it
    has no place.
    """
    return None


def fallbacks() -> tuple[str, ...]:
    """Return the schemes that weights can be rounded to for AWQ."""
    return ("W4A16_ASYM",)


def _version(config: Json) -> str:
    """Return the layout; `gemm` where none is named, as transformers, vLLM and SGLang take it."""
    return _named_version(config) or "gemm"


def _named_version(config: Json) -> str:
    named = config.get("checkpoint_format") or config.get("format") or config.get("version")
    return str(named or "").lower()


def _module(parts: Parts, config: Json) -> QuantizedModule:
    columns, words = parts.matrix("qweight", "I32")
    groups, rows = parts.matrix("scales", *SCALE_DTYPES)
    if words * 8 != rows:
        raise parts.misfit(
            "qweight", f"[{columns}, {rows // 8}], 4-bit codes of {rows} outputs in `gemm` order"
        )
    symmetric = bool(config["sym"]) if "sym" in config else not config.get("zero_point", True)
    if columns % 2:
        raise parts.misfit("qweight", "an even number of inputs")
    if not symmetric and parts.matrix("qzeros", "I32") != (groups, words):
        raise parts.misfit("qzeros", f"[{groups}, {words}]")
    size = config.get("group_size", config.get("q_group_size"))
    return QuantizedModule(
        parts.name,
        Scheme(grouped_integers(4, columns, groups, size, symmetric=symmetric)),
        (rows, columns),
        parts.tensors,
    )

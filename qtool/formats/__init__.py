"""The on-disk formats of quantized checkpoints, one file each: detect from headers and configs,
read tensors to a QuantizedWeight, write them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qtool.checkpoint import Checkpoint
from qtool.checkpoint.strict_json import Json
from qtool.errors import RecipeRefused
from qtool.formats import (
    auto_round,
    awq,
    bitsandbytes,
    compressed_tensors,
    fp8_block,
    gguf,
    gptq,
    modelopt,
    mxfp4,
    quark,
    torchao,
    unread,
)
from qtool.formats.config_fields import check_fields
from qtool.formats.layout import (
    Detector,
    Format,
    Layout,
    QuantizedModule,
    modules_of,
    refused,
)
from qtool.formats.values import check_tensors, check_values, damaged, problem_in
from qtool.modules import is_cache_tensor

if TYPE_CHECKING:
    from qtool.weight import QuantizedWeight

__all__ = [
    "FORMATS",
    "NOT_READ",
    "WRITABLE",
    "Format",
    "Layout",
    "QuantizedModule",
    "check_tensors",
    "check_values",
    "damaged",
    "detect",
    "problem_in",
    "read",
    "tensor_name",
    "unquantized_tensors",
]

NOT_READ = frozenset(
    {
        "E_EXPERT_STACK",
        "E_KERNEL_LAYOUT",
        "E_PACK_DTYPE",
        "E_QUANT_CLASS",
        "E_QUANT_METHOD",
        "E_SPARSE",
    }
)
"""Codes of refusals of what is intact and not read: an engine may read it."""
WRITABLE: Mapping[str, Format] = {
    "compressed-tensors": compressed_tensors,
    "modelopt": modelopt,
    "awq": awq,
    "gptq": gptq,
    "fp8_block": fp8_block,
    "mxfp4": mxfp4,
}
# the first that matches a config reads it: ModelOpt's may look like that of compressed-tensors
FORMATS: Mapping[str, Detector] = {
    "modelopt": modelopt,
    **WRITABLE,
    "quark": quark,
    "torchao": torchao,
    "bitsandbytes": bitsandbytes,
    "gguf": gguf,
}
# what a config raises that holds something else than it should: it comes from outside
MISSHAPEN = (
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
PACKED_PARTS = ("qweight", "weight_packed", torchao.DATA, mxfp4.BLOCKS)
PACKED_DTYPES = frozenset({"U8", "I8", "I32", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E8M0"})


def detect(checkpoint: Checkpoint) -> Layout | None:
    """Return how ``checkpoint`` is quantized, from headers and configs alone; None when it is not.

    Raises: CheckpointRefused, when the format is not one qtool reads, or config and tensors
        contradict each other.
    """
    config = checkpoint.quantization_config
    unread.check(checkpoint, config)
    unread.check_stacks(checkpoint)
    if config is None:
        _check_unquantized(checkpoint)
        return None
    layout = _understand(checkpoint, config)
    if not layout.modules and layout.kv_cache is None:
        raise refused(
            "E_NOTHING_QUANTIZED",
            f"{checkpoint.source}: its config says `{layout.format}`, and no layer is quantized",
            "the weights are not quantized: remove `quantization_config`",
        )
    _check_one_weight(checkpoint, layout)
    return layout


def _check_one_weight(checkpoint: Checkpoint, layout: Layout) -> None:
    """Raise CheckpointRefused when a layer has a plain weight beside its packed one."""
    for name, module in layout.modules.items():
        packed = next((part for part in module.tensors if part.endswith(PACKED_PARTS)), None)
        plain = name if packed == mxfp4.BLOCKS else f"{name}.weight"
        if packed and plain in checkpoint.tensors:
            raise refused(
                "E_TWO_WEIGHTS",
                f"`{plain}` lies beside `{tensor_name(module, packed)}`: one layer has two weights",
                "take all files from one export; an engine takes one of them, or fails",
            )


def _check_unquantized(checkpoint: Checkpoint) -> None:
    """Raise CheckpointRefused when a tensor is quantized and no config says how."""
    for parts in modules_of(checkpoint):
        is_packed = "weight" in parts and parts["weight"].dtype in PACKED_DTYPES
        if is_packed or any(map(_is_packed_part, parts.tensors)):
            raise refused(
                "E_NO_QUANT_CONFIG",
                f"`{parts.name}` holds quantized tensors and no config of {checkpoint.source} says "
                "how",
                "config.json has lost its `quantization_config`: take it from the original",
            )


def _is_packed_part(suffix: str) -> bool:
    return suffix.endswith(PACKED_PARTS) or suffix.startswith("bitsandbytes__")


def _understand(checkpoint: Checkpoint, config: Json) -> Layout:
    """Return what the format of ``config`` detects; what it trips over there becomes a refusal."""
    hint = "compare it with the config.json of the original"
    try:
        config = auto_round.in_words_of_format(config)
        check_fields(str(checkpoint.path), config)
        return _format_of(checkpoint, config).detect(checkpoint, config)
    except RecipeRefused as error:  # the scheme the config describes is none
        message = f"{checkpoint.source}: {error.message}"
        raise refused("E_QUANT_CONFIG", message, error.hint or hint) from error
    except MISSHAPEN as error:
        message = (
            f"{checkpoint.source}: its quantization config cannot be understood "
            f"({type(error).__name__}: {error})"
        )
        raise refused("E_QUANT_CONFIG_TYPE", message, hint) from error


def _format_of(checkpoint: Checkpoint, config: Json) -> Detector:
    for format in FORMATS.values():
        if format.matches_config(config):
            return format
    method = config.get("quant_method")
    found = (
        f"quantization method `{method}`" if method else "a quantization config without a method"
    )
    raise refused(
        "E_QUANT_METHOD",
        f"{checkpoint.source}: {found} is not one qtool reads",
        f"it reads {', '.join((*FORMATS, *auto_round.METHODS[:1]))}; the tool that wrote the "
        "checkpoint may load it",
    )


def read(checkpoint: Checkpoint, layout: Layout, name: str) -> QuantizedWeight:
    """Read the module ``name`` of a checkpoint that `detect` described as ``layout``."""
    from qtool.formats.packing import load

    module = layout.modules[name]
    return FORMATS[layout.format].read(module, load(checkpoint, module))


def unquantized_tensors(checkpoint: Checkpoint, layout: Layout | None) -> list[str]:
    """Return the names of the tensors that belong to no quantized layer, without the scales of KV
    caches.
    """
    owned = layout.owned if layout else frozenset()
    return [name for name in checkpoint.tensors if name not in owned and not is_cache_tensor(name)]


def tensor_name(module: QuantizedModule, suffix: str) -> str:
    """Return the name of the tensor ``suffix`` of ``module``: a part of its own, but for stacked
    experts, ``gate_up_proj_blocks``.
    """
    return (
        f"{module.name}{suffix}"
        if suffix in (mxfp4.BLOCKS, mxfp4.SCALES)
        else f"{module.name}.{suffix}"
    )

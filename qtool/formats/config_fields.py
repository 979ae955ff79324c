"""Checks the fields of quantization configs: numbers, flags and lists of names.

A field may still contradict the tensors: then the tensors decide, and the format warns.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Mapping

from qtool.checkpoint.config_values import is_flag
from qtool.checkpoint.strict_json import Json
from qtool.formats.layout import refused

MAX_BITS = 32
BY_NAME = ("dynamic", "extra_config", "quantized_layers")  # their keys are names of layers
OTHER_PARTS = ("sparsity_config", "transform_config")  # their fields mean something else


def check_fields(where: str, config: Json) -> None:
    """Refuse a quantization ``config``, which ``where`` names, for a value that no format has.

    Raises: CheckpointRefused, with the field and its value.
    """
    for key, value in _fields(config):
        holds, wanted = FIELDS[key]
        if value is not None and not holds(value):
            raise refused(
                "E_QUANT_CONFIG",
                f"{where}: `{key}` of its quantization config is {reprlib.repr(value)}, and must "
                f"be {wanted}",
                "compare it with the config.json of the original",
            )


def _fields(config: Json) -> Iterator[tuple[str, object]]:
    """Yield the fields that are checked, those of groups and layers included."""
    parts: list[object] = [config]
    while parts:
        part = parts.pop()
        if not isinstance(part, Mapping):
            continue
        for key, value in part.items():
            if key in FIELDS:
                yield key, value
            if key in BY_NAME and isinstance(value, Mapping):
                parts += value.values()
            elif key not in OTHER_PARTS:
                parts.append(value)


def _is_bits(value: object) -> bool:
    return type(value) is int and 0 < value <= MAX_BITS


def _is_group_size(value: object) -> bool:
    return type(value) is int and (value == -1 or 0 < value < 1 << 31)


def _is_block(value: object) -> bool:
    return type(value) is int and 0 < value < 1 << 31 and (value == 1 or value % 8 == 0)


def _are_blocks(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_block, value))


def _is_structure(value: object) -> bool:
    """Return whether ``value`` is a block in a form that older files have too: 128x128."""
    if isinstance(value, str):
        value = [int(size) if size.isdecimal() else size for size in value.split("x")]
    return _are_blocks(value)


def _is_name(value: object) -> bool:
    return isinstance(value, str)


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


BITS = (_is_bits, f"a whole number from 1 to {MAX_BITS}")
FLAG = (is_flag, "true or false")
NAMES = (_are_names, "a list of names")
BLOCK_SIZES = "two whole numbers, each 1 or in eights"
FIELDS: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "activation_scheme": (lambda value: value in ("static", "dynamic"), "static or dynamic"),
    "bits": BITS,
    "bnb_4bit_quant_type": (lambda value: value in ("nf4", "fp4"), "nf4 or fp4"),
    "bnb_4bit_use_double_quant": FLAG,
    "block_structure": (_is_structure, BLOCK_SIZES),
    "checkpoint_format": (_is_name, "a name"),
    "desc_act": FLAG,
    "exclude": NAMES,
    "exclude_modules": NAMES,
    "format": (_is_name, "a name"),
    "group_size": (_is_group_size, "-1 or a whole number greater than zero"),
    "ignore": NAMES,
    "ignored_layers": NAMES,
    "is_dynamic": FLAG,
    "llm_int8_skip_modules": NAMES,
    "lm_head": FLAG,
    "load_in_4bit": FLAG,
    "load_in_8bit": FLAG,
    "modules_to_not_convert": NAMES,
    "num_bits": BITS,
    "strategy": (_is_name, "a name"),
    "sym": FLAG,
    "symmetric": FLAG,
    "targets": (lambda value: _are_names(value) and value != [], "a list of names"),
    "type": (lambda value: value in ("int", "float"), "int or float"),
    "weight_block_size": (_are_blocks, BLOCK_SIZES),
    "zero_point": FLAG,
}

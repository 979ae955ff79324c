"""torchao's tensor subclasses in safetensors, as transformers saves them: the parts of
`<module>.weight` under names of their own.

Source: torchao 0.18, `prototype/safetensors`, `quantization/quant_api.py` and
    `quantization/quantize_/workflows`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from qtool.checkpoint import Checkpoint
from qtool.checkpoint.strict_json import Json
from qtool.formats.layout import (
    SCALE_DTYPES,
    Layout,
    Parts,
    QuantizedModule,
    grouped_integers,
    modules_of,
    refused,
)
from qtool.formats.patterns import config_patterns
from qtool.patterns import Pattern
from qtool.scheme import SCHEMES, Activations, Scheme, Weights

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.weight import QuantizedWeight

DATA, SCALE, ZERO = "_weight_qdata", "_weight_scale", "_weight_zero_point"
TILES = "_weight_scale_and_zero"
ROW_SCHEMES = {  # configuration class -> scheme, where each output row has one scale
    "Int8WeightOnlyConfig": SCHEMES["W8A16_CHANNEL"],
    "Int8DynamicActivationInt8WeightConfig": SCHEMES["W8A8"],
    "Float8WeightOnlyConfig": SCHEMES["FP8_W8A16"],
    "Float8DynamicActivationFloat8WeightConfig": SCHEMES["FP8_DYNAMIC"],
}
INTX_CLASSES = {  # configuration class -> whether inputs are rounded to int8
    "IntxWeightOnlyConfig": False,
    "Int8DynamicActivationIntxWeightConfig": True,
}
TILED_CLASS = "Int4WeightOnlyConfig"
BY_NAME = ("FqnToConfig", "ModuleFqnToConfig")
READER = "transformers loads it, with the package `torchao`"


def matches_config(config: Json) -> bool:
    """Whether ``config`` is of this format."""
    return config.get("quant_method") == "torchao"


def detect(checkpoint: Checkpoint, config: Json) -> Layout:
    """Return the layout: a module is quantized when its weight has a ``qdata`` part; the config's
    class says what that means.
    """
    named = config.get("quant_type", {})
    if not isinstance(named, Mapping):
        raise _not_read(checkpoint, str(named))
    classes = _Classes(named.get("default") or {})
    modules = {
        parts.name: _module(checkpoint, parts, classes.of(parts.name))
        for parts in modules_of(checkpoint)
        if DATA in parts
    }
    return Layout("torchao", modules, None, ())


def read(module: QuantizedModule, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    """Return the common form of ``tensors``."""
    from qtool.formats.packing import data_from_bytes
    from qtool.weight import Activation, QuantizedWeight

    if TILES in tensors:
        raise refused(
            "E_FORMAT",
            f"`{module.name}`: torchao's int4 tiles are described and not read",
            READER,
        )
    activation = Activation(module.scheme.activations) if module.scheme.activations else None
    if ZERO not in tensors:
        return QuantizedWeight(tensors[DATA], tensors[SCALE], activation=activation)
    return QuantizedWeight(
        data_from_bytes(module, tensors[DATA]),
        tensors[SCALE],
        zero=_zeros(module, tensors[ZERO]),
        activation=activation,
    )


class _Classes:
    """The class of configuration that each module has: one for all, or by name."""

    def __init__(self, default: Json) -> None:
        self._default: Json | None = default
        self._exact: Mapping[str, Json | None] = {}
        self._patterns: list[tuple[Pattern, Json | None]] = []
        if default.get("_type") not in BY_NAME:
            return
        data = default["_data"]
        self._exact = data.get("fqn_to_config") or data.get("module_fqn_to_config") or {}
        self._default = self._exact.get("_default")
        compiler = config_patterns()
        self._patterns = [
            (compiler.compile(f"(?:{name[3:]})$"), own)
            for name, own in self._exact.items()
            if name.startswith("re:")
        ]

    def of(self, name: str) -> Json:
        """Return what the config says of the module ``name``; empty when it says nothing."""
        for each in (name, f"{name}.weight"):
            if each in self._exact:
                return self._exact[each] or {}
        for pattern, own in self._patterns:
            if pattern.match(name) or pattern.match(f"{name}.weight"):
                return own or {}
        return self._default or {}


def _module(checkpoint: Checkpoint, parts: Parts, config: Json) -> QuantizedModule:
    kind = str(config.get("_type"))
    if kind in ROW_SCHEMES:
        rows, columns = parts.matrix(DATA, "I8", "F8_E4M3")
        if parts.matrix(SCALE, *SCALE_DTYPES) != (rows, 1):
            raise parts.misfit(SCALE, f"[{rows}, 1]")
        return QuantizedModule(parts.name, ROW_SCHEMES[kind], (rows, columns), parts.tensors)
    if kind in INTX_CLASSES and ZERO in parts:
        return _intx(parts, config["_data"], has_inputs=INTX_CLASSES[kind])
    if kind == TILED_CLASS and TILES in parts and len(parts[DATA].shape) == 4:
        return _tiled(parts)
    raise _not_read(checkpoint, kind)


def _intx(parts: Parts, data: Json, *, has_inputs: bool) -> QuantizedModule:
    """Return a layer of signed codes, one in each byte, with zero points."""
    rows, columns = parts.matrix(DATA, "I8")
    scale_rows, groups = parts.matrix(SCALE, *SCALE_DTYPES)
    if scale_rows != rows or not groups or columns % groups:
        raise parts.misfit(SCALE, f"one scale for each group of {rows} x {columns}")
    if parts.matrix(ZERO, "I8") != (rows, groups):
        raise parts.misfit(ZERO, f"[{rows}, {groups}]")
    key = "weight_" if has_inputs else ""
    bits = int(re.fullmatch(r"int(\d)", data["weight_dtype"]["_data"])[1])  # type: ignore[index]
    mapping = str((data.get(f"{key}mapping_type") or {}).get("_data", "SYMMETRIC"))
    group = (data.get(f"{key}granularity") or {}).get("_data", {}).get("group_size")
    symmetric = mapping.startswith("SYMMETRIC")
    weights = grouped_integers(bits, columns, groups, group, symmetric=symmetric)
    inputs = None
    if has_inputs:
        rounding = str((data.get("act_mapping_type") or {}).get("_data", "ASYMMETRIC"))
        inputs = Activations("int8", "token", symmetric=rounding.startswith("SYMMETRIC"))
    return QuantizedModule(parts.name, Scheme(weights, inputs), (rows, columns), parts.tensors)


def _tiled(parts: Parts) -> QuantizedModule:
    """Return a layer in the tiles of tinygemm, which are padded: it may itself be smaller."""
    row_tiles, column_tiles, *_ = parts[DATA].shape
    rows, columns = row_tiles * 8, column_tiles * 8 * 16
    group_size = columns // parts[TILES].shape[0]
    scheme = Scheme(Weights("int4", "group", group_size, symmetric=False))
    return QuantizedModule(parts.name, scheme, (rows, columns), parts.tensors)


def _zeros(module: QuantizedModule, zero: Tensor) -> Tensor | None:
    if not module.scheme.weights.symmetric:
        return zero
    if not zero.is_meta and bool((zero != 0).any()):
        raise refused(
            "E_ZERO_POINT",
            f"`{module.name}` is symmetric, as the config says, and has zero points",
            "write ASYMMETRIC for its mapping type in the quantization config",
        )
    return None


def _not_read(checkpoint: Checkpoint, kind: str) -> Exception:
    return refused(
        "E_QUANT_CLASS",
        f"{checkpoint.source}: torchao's `{kind}` is not read",
        f"{', '.join([*ROW_SCHEMES, *INTX_CLASSES])} are; {READER}",
    )

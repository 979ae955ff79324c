"""torchao's tensor subclasses in safetensors, as transformers saves them: the parts of
`<module>.weight` under names of their own.

Source: torchao 0.18, `prototype/safetensors` and `quantization/quantize_/workflows`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qtool.checkpoint import Checkpoint
from qtool.checkpoint.strict_json import Json
from qtool.formats.layout import SCALE_DTYPES, Layout, Parts, QuantizedModule, modules_of, refused
from qtool.scheme import SCHEMES, Scheme, Weights

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.weight import QuantizedWeight

DATA, SCALE, TILES = "_weight_qdata", "_weight_scale", "_weight_scale_and_zero"
ROW_SCHEMES = {  # configuration class -> scheme, where each output row has one scale
    "Int8WeightOnlyConfig": SCHEMES["W8A16_CHANNEL"],
    "Int8DynamicActivationInt8WeightConfig": SCHEMES["W8A8"],
    "Float8WeightOnlyConfig": SCHEMES["FP8_W8A16"],
    "Float8DynamicActivationFloat8WeightConfig": SCHEMES["FP8_DYNAMIC"],
}


def matches_config(config: Json) -> bool:
    """Whether ``config`` is of this format."""
    return config.get("quant_method") == "torchao"


def detect(checkpoint: Checkpoint, config: Json) -> Layout:
    """Return the layout: a module is quantized when its weight has a ``qdata`` part; the config's
    class says what that means.
    """
    kind = str(config.get("quant_type", {}).get("default", {}).get("_type"))
    modules = {
        parts.name: _module(checkpoint, parts, kind)
        for parts in modules_of(checkpoint)
        if DATA in parts
    }
    return Layout("torchao", modules, None, ())


def read(module: QuantizedModule, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    """Return the common form of ``tensors``."""
    from qtool.weight import Activation, QuantizedWeight

    if module.scheme.weights.bits == 4:
        raise refused(
            "E_FORMAT", f"`{module.name}`: torchao's int4 tensors are described and not read yet"
        )
    activation = Activation(module.scheme.activations) if module.scheme.activations else None
    return QuantizedWeight(tensors[DATA], tensors[SCALE], activation=activation)


def _module(checkpoint: Checkpoint, parts: Parts, kind: str) -> QuantizedModule:
    if kind in ROW_SCHEMES:
        rows, columns = parts.matrix(DATA, "I8", "F8_E4M3")
        if parts.matrix(SCALE, *SCALE_DTYPES) != (rows, 1):
            raise parts.misfit(SCALE, f"[{rows}, 1]")
        return QuantizedModule(parts.name, ROW_SCHEMES[kind], (rows, columns), parts.tensors)
    if kind == "Int4WeightOnlyConfig" and TILES in parts and len(parts[DATA].shape) == 4:
        row_tiles, column_tiles, *_ = parts[DATA].shape
        # tiles of tinygemm, padded: the layer itself may be smaller
        rows, columns = (
            row_tiles * 8,
            column_tiles * 8 * 16,
        )
        group_size = columns // parts[TILES].shape[0]
        return QuantizedModule(
            parts.name,
            Scheme(Weights("int4", "group", group_size, symmetric=False)),
            (rows, columns),
            parts.tensors,
        )
    raise refused(
        "E_QUANT_CLASS",
        f"{checkpoint.path}: torchao's `{kind}` is not read",
        f"{', '.join([*ROW_SCHEMES, 'Int4WeightOnlyConfig'])} are",
    )

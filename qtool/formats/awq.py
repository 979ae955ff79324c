"""The AWQ format of AutoAWQ and GPTQModel in its `gemm` version: 4-bit codes packed along the outputs, in an interleaved order.

Source: AutoAWQ, `awq/utils/packing_utils.py`; gptqmodel 7.6, `nn_modules/qlinear`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qtool.checkpoint import Checkpoint
from qtool.formats.layout import SCALE_DTYPES, Layout, Parts, QuantizedModule, grouped_integers, modules_of, refused
from qtool.scheme import Scheme

if TYPE_CHECKING:
    from qtool.weight import QuantizedWeight

COLUMN_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word holds this one of its eight columns
NIBBLE_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)


def claims(config: Mapping[str, Any]) -> bool:
    """Whether ``config`` is of this format; GPTQModel's round-to-nearest says `gptq` and means `gemm` tensors."""
    return config.get("quant_method") == "awq" or _version(config) == "gemm" or ("w_bit" in config and "quant_method" not in config)


def detect(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Layout:
    """Return the layout: a module is quantized when it has a ``qweight``; the config tells whether zeros are used."""
    if _version(config) != "gemm":
        raise refused("E_FORMAT", f"{checkpoint.path}: AWQ in the layout `{_version(config)}` is a kernel's own and is not read; `gemm` is")
    modules: dict[str, QuantizedModule] = {}
    warnings: list[str] = []
    if config.get("quant_method") == "gptq":
        warnings.append("the config says gptq and the tensors are AWQ gemm: engines misread it")
    skipped = config.get("modules_to_not_convert") or []
    for parts in modules_of(checkpoint):
        if parts.tensors.keys() & {"qweight", "qzeros", "scales"}:
            modules[parts.name] = _module(parts, config)
            if any(entry in parts.name for entry in skipped):
                warnings.append(f"`{parts.name}` is quantized and modules_to_not_convert names it")
    return Layout("awq", modules, None, tuple(warnings))


def read(checkpoint: Checkpoint, module: QuantizedModule) -> QuantizedWeight:
    """Read ``module`` into the common form."""
    from qtool.formats.packing import load, pack_pairs, signed, unpack_bits
    from qtool.weight import QuantizedWeight

    rows, _ = module.shape
    tensors = load(checkpoint, module)

    def codes(name: str) -> Any:
        in_order = unpack_bits(tensors[name], 4, rows).reshape(-1, rows // 8, 8)[:, :, list(NIBBLE_OF_COLUMN)]
        return in_order.flatten(1).T.contiguous()

    zero = None if module.scheme.weights.symmetric else signed(codes("qzeros"), 4)
    return QuantizedWeight(pack_pairs(codes("qweight")), tensors["scales"].T.contiguous(), None, zero, None, None, None)


def _version(config: Mapping[str, Any]) -> str:
    return str(config.get("checkpoint_format") or config.get("format") or config.get("version") or ("gemm" if "w_bit" in config else "")).lower()


def _module(parts: Parts, config: Mapping[str, Any]) -> QuantizedModule:
    columns, words = parts.matrix("qweight", "I32")
    groups, rows = parts.matrix("scales", *SCALE_DTYPES)
    if words * 8 != rows:
        raise parts.misfit("qweight", f"[{columns}, {rows // 8}], 4-bit codes of {rows} outputs in `gemm` order")
    symmetric = bool(config["sym"]) if "sym" in config else not config.get("zero_point", True)
    if not symmetric and parts.matrix("qzeros", "I32") != (groups, words):
        raise parts.misfit("qzeros", f"[{groups}, {words}]")
    size = config.get("group_size", config.get("q_group_size"))
    return QuantizedModule(parts.name, Scheme(grouped_integers(4, columns, groups, size, symmetric=symmetric)), (rows, columns), parts.tensors)

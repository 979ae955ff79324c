"""GGUF: blocks of 32 or 256 inputs, each with its own scales, in one tensor for each layer.

The file says the type of each tensor; config.json, which `checkpoint.gguf` derives from it, says
only that there are such tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qtool.checkpoint import Checkpoint, TensorInfo
from qtool.checkpoint.strict_json import Json
from qtool.formats.layout import Layout, QuantizedModule
from qtool.scheme import SCHEMES, Scheme, Weights

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.weight import QuantizedWeight

TYPE_SCHEMES: Mapping[str, Scheme] = {
    "Q8_0": Scheme(Weights("int8", "group", 32)),
    "Q6_K": Scheme(Weights("int6", "group", 16)),
    "Q5_0": Scheme(Weights("int5", "group", 32)),
    "Q4_0": Scheme(Weights("int4", "group", 32)),
    "Q3_K": Scheme(Weights("int3", "group", 16)),
    "Q5_1": Scheme(Weights("int5", "group", 32, symmetric=False, offset=True)),
    "Q5_K": Scheme(Weights("int5", "group", 32, symmetric=False, offset=True)),
    "Q4_1": Scheme(Weights("int4", "group", 32, symmetric=False, offset=True)),
    "Q4_K": Scheme(Weights("int4", "group", 32, symmetric=False, offset=True)),
    "Q2_K": Scheme(Weights("int2", "group", 16, symmetric=False, offset=True)),
    "IQ4_NL": Scheme(Weights("iq4_nl", "group", 32)),
    "MXFP4": SCHEMES["MXFP4A16"],
}
"""What the blocks of each type hold."""


def matches_config(config: Json) -> bool:
    """Whether ``config`` is of this format."""
    return config.get("quant_method") == "gguf"


def detect(checkpoint: Checkpoint, config: Json) -> Layout:
    """Return the layout: every tensor of blocks is a layer."""
    modules = {}
    for tensor in checkpoint.tensors.values():
        if tensor.is_blocks:
            module = _module(tensor, checkpoint.tensors)
            modules[module.name] = module
    return Layout("gguf", modules, None, ())


def read(module: QuantizedModule, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    """Return the common form of ``tensors``, all experts in one matrix."""
    from qtool.codes import codebook, pack_pairs
    from qtool.formats.gguf_blocks import TYPES, unpack
    from qtool.weight import QuantizedWeight

    type = TYPES[module.variant]
    rows = module.shape[0]
    blocks = unpack(type, tensors["weight"].reshape(rows, -1))
    return QuantizedWeight(
        pack_pairs(blocks.codes) if type.bits == 4 else blocks.values,
        blocks.scale,
        codebook=codebook(module.scheme.weights.format, blocks.codes.device),
        offset=blocks.offset,
    )


def _module(tensor: TensorInfo, tensors: Mapping[str, TensorInfo]) -> QuantizedModule:
    name = tensor.name.removesuffix(".weight")
    parts = {"weight": tensor}
    experts, shape = 1, tensor.shape
    if len(shape) == 3:
        experts, shape = shape[0], (shape[0] * shape[1], shape[2])
    elif bias := tensors.get(f"{name}.bias"):
        parts["bias"] = bias
    return QuantizedModule(
        name,
        TYPE_SCHEMES[tensor.dtype],
        (shape[0], shape[1]),
        parts,
        variant=tensor.dtype,
        experts=experts,
    )

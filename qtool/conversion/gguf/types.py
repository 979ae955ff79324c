"""The file types that `--type` names, and the type that each tensor gets in them. Imports no torch.

Source: llama.cpp, `llama-quant.cpp`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from qtool.checkpoint.gguf_types import UNQUANTIZED
from qtool.errors import UsageError, nearest

FILE_TYPES: Mapping[str, tuple[int, str]] = {
    "F32": (0, "F32"),
    "F16": (1, "F16"),
    "BF16": (32, "BF16"),
    "Q8_0": (7, "Q8_0"),
    "Q6_K": (18, "Q6_K"),
    "Q5_K_M": (17, "Q5_K"),
    "Q5_K_S": (16, "Q5_K"),
    "Q5_1": (9, "Q5_1"),
    "Q5_0": (8, "Q5_0"),
    "Q4_K_M": (15, "Q4_K"),
    "Q4_K_S": (14, "Q4_K"),
    "Q4_1": (3, "Q4_1"),
    "Q4_0": (2, "Q4_0"),
    "IQ4_NL": (25, "IQ4_NL"),
    "MXFP4": (38, "MXFP4"),
    "Q3_K_L": (13, "Q3_K"),
    "Q3_K_M": (12, "Q3_K"),
    "Q3_K_S": (11, "Q3_K"),
    "Q2_K": (10, "Q2_K"),
}
"""Name -> its number in ``general.file_type``, and the type of most tensors."""
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "MXFP4_MOE": "MXFP4"}
FALLBACKS = {  # for rows that no blocks of 256 fill
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
MORE_BITS = ("Q4_K_M", "Q5_K_M")
LAYER = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True)
class ModelShape:
    """What of a model the choice of types depends on."""

    architecture: str
    """In GGUF's words."""
    layers: int
    heads: int
    kv_heads: int
    experts: int
    """Of one layer; 0 for a dense model."""
    has_tied_embeddings: bool

    @property
    def sharing(self) -> int:
        """How many query heads share one KV head."""
        return self.heads // max(1, self.kv_heads)

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp takes it for a model of 70B parameters."""
        known = self.architecture in ("llama", "qwen2")
        return known and self.layers == 80 and self.heads != self.kv_heads


def file_type_named(name: str) -> str:
    """Return the file type that ``name`` means. Raises: UsageError, with the nearest name."""
    known = ALIASES.get(name.upper(), name.upper())
    if known not in FILE_TYPES:
        raise UsageError(
            "E_GGUF_FILE_TYPE",
            f"unknown GGUF type `{name}`",
            hint=nearest(name.upper(), FILE_TYPES) or f"one of {', '.join(FILE_TYPES)}",
        )
    return known


def is_quantizable(tensor: str, dimensions: int) -> bool:
    """Whether ``tensor`` of a GGUF file may be quantized; what may not is F32."""
    if dimensions < 2 or not tensor.endswith(".weight") or tensor.endswith("_norm.weight"):
        return False
    return "ffn_gate_inp" not in tensor


def tensor_type(file_type: str, tensor: str, columns: int, shape: ModelShape) -> str:
    """Return the type of a quantizable ``tensor``, with ``columns`` inputs, in ``file_type``."""
    base = FILE_TYPES[file_type][1]
    if base in UNQUANTIZED:
        return base
    chosen = _by_layer(file_type, base, tensor, columns, shape)
    return with_fitting_blocks(chosen, columns)


def with_fitting_blocks(type: str, columns: int) -> str:
    """Return ``type``, or what llama.cpp takes in its place where rows are not whole blocks."""
    if type in FALLBACKS and columns % 256:
        type = FALLBACKS[type]
    return "F16" if columns % 32 and type not in UNQUANTIZED else type


def _by_layer(file_type: str, base: str, tensor: str, columns: int, shape: ModelShape) -> str:
    head = "token_embd.weight" if shape.has_tied_embeddings else "output.weight"
    if tensor == head:
        fills = columns % (256 if base.endswith("_K") else 32) == 0
        return "Q6_K" if fills and file_type not in ("MXFP4", "Q8_0") else "Q8_0"
    if file_type == "MXFP4":
        # llama.cpp has no MXFP4 for dense models
        is_expert = "_exps." in tensor or not shape.experts
        return "MXFP4" if is_expert and tensor != "token_embd.weight" else "Q8_0"
    return _of_layer(file_type, base, tensor, shape)


def _of_layer(file_type: str, base: str, tensor: str, shape: ModelShape) -> str:
    layer = int(found[1]) if (found := LAYER.match(tensor)) else 0
    if ".attn_v." in tensor or ".attn_qkv." in tensor:
        return _of_values(file_type, base, layer, shape)
    if ".attn_k." in tensor:
        return "Q8_0" if shape.experts == 8 else base
    if ".ffn_down" in tensor:
        return _of_down(file_type, base, layer, shape.layers)
    if ".attn_output." in tensor:
        return _of_attention_output(file_type, base, shape)
    return base


def _of_values(file_type: str, base: str, layer: int, shape: ModelShape) -> str:
    """Return the type of the values' matrix, also where it is joined with q and k."""
    chosen = base
    if file_type == "Q2_K":
        chosen = "Q4_K" if shape.sharing >= 4 else "Q3_K"
    elif file_type == "Q3_K_M":
        chosen = "Q5_K" if layer < 2 else "Q4_K"
    elif file_type == "Q3_K_L" or (file_type == "IQ4_NL" and shape.sharing >= 4):
        chosen = "Q5_K"
    elif file_type in MORE_BITS and _gets_more_bits(layer, shape.layers):
        chosen = "Q6_K"
    elif file_type == "Q4_K_S" and layer < 4:
        chosen = "Q5_K"
    if shape.is_70b and chosen in ("Q3_K", "Q4_K"):
        chosen = "Q5_K"
    return "Q8_0" if shape.experts == 8 else chosen


def _of_down(file_type: str, base: str, layer: int, layers: int) -> str:
    if file_type in MORE_BITS:
        return "Q6_K" if _gets_more_bits(layer, layers) else base
    if file_type == "Q3_K_M":
        return "Q5_K" if layer < layers // 16 else "Q4_K"
    if file_type in ("Q4_K_S", "IQ4_NL"):
        return "Q5_K" if layer < layers // 8 else base
    return {"Q2_K": "Q3_K", "Q3_K_L": "Q5_K"}.get(file_type, base)


def _of_attention_output(file_type: str, base: str, shape: ModelShape) -> str:
    if shape.experts == 8:
        is_small = base in ("Q2_K", "Q4_K", "IQ4_NL") or file_type in ("Q3_K_S", "Q3_K_M")
        return "Q5_K" if is_small else base
    return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(file_type, base)


def _gets_more_bits(layer: int, layers: int) -> bool:
    """Whether ``layer`` is among the first and last eighth, or every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2

"""torchao in safetensors, as transformers saves it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from support.published import Expected, layout
from support.published.floats import fp8_channel
from support.published.integers import int8, intx
from support.published.models import Stored, llama, write

LAYERS = r"layers\.\d+\.(self_attn|mlp)\.\w+$"


def config(kind: str, **data: Any) -> dict[str, Any]:
    """Return a quantization config for the configuration class ``kind``."""
    return {
        "quant_method": "torchao",
        "quant_type": {"default": {"_type": kind, "_version": 2, "_data": data}},
        "modules_to_not_convert": None,
        "include_input_output_embeddings": False,
    }


def enum(kind: str, value: object) -> dict[str, Any]:
    """Return a value of the class ``kind`` as torchao writes it."""
    return {"_type": kind, "_data": value}


def intx_data(bits: int, group: int | None, prefix: str = "", **more: Any) -> dict[str, Any]:
    """Return the data of a class for integers of ``bits`` bits in groups, or by rows."""
    granularity = enum("PerGroup", {"group_size": group}) if group else enum("PerAxis", {"axis": 0})
    return {
        "weight_dtype": enum("torch.dtype", f"int{bits}"),
        f"{prefix}granularity": granularity,
        f"{prefix}mapping_type": enum("MappingType", "SYMMETRIC"),
        "intx_packing_format": enum("IntxPackingFormat", "UNPACKED_TO_INT8"),
        **more,
    }


def renamed(stored: Stored) -> Stored:
    """Return the parts under torchao's names."""
    parts, dense = stored
    return {
        "_weight_qdata": parts["weight"],
        "_weight_scale": parts["weight_scale"].to(torch.bfloat16),
    }, dense


def rows_of_int8(weight: Tensor) -> Stored:
    """One scale for each row."""
    return renamed(int8(weight))


def rows_of_fp8(weight: Tensor) -> Stored:
    """One bf16 scale for each row."""
    parts, _ = fp8_channel(weight)
    scale = parts["weight_scale"].to(torch.bfloat16)
    return renamed(({**parts, "weight_scale": scale}, parts["weight"].float() * scale.float()))


@layout("pytorch-qwen3-int8-int4")
def int8_inputs_int4_weights(folder: Path) -> Expected:
    """8da4w: int4 in groups of 32, inputs rounded for each token with a zero point."""
    data = intx_data(4, 32, "weight_", act_mapping_type=enum("MappingType", "ASYMMETRIC"))
    return write(
        folder, llama(), {LAYERS: intx}, config("Int8DynamicActivationIntxWeightConfig", **data)
    )


@layout("pytorch-phi-4-int8-int4-embedding")
def embeddings_too(folder: Path) -> Expected:
    """The same by name, with embeddings of int8 by rows."""
    data = intx_data(4, 32, "weight_", act_mapping_type=enum("MappingType", "ASYMMETRIC"))
    by_name = {
        "_default": enum("Int8DynamicActivationIntxWeightConfig", data),
        "model.embed_tokens": enum("IntxWeightOnlyConfig", intx_data(8, None)),
        "lm_head": None,
    }
    quantizers = {"embed_tokens": partial(intx, bits=8, group=None), LAYERS: intx}
    return write(folder, llama(), quantizers, config("FqnToConfig", fqn_to_config=by_name))


@layout("torchao-intx-mixed")
def by_patterns(folder: Path) -> Expected:
    """Integers of 3 bits by rows and of 8 bits in groups, by patterns."""
    by_name = {
        r"re:.*self_attn\..*": enum("IntxWeightOnlyConfig", intx_data(8, 64)),
        r"re:.*mlp\..*": enum("IntxWeightOnlyConfig", intx_data(3, None)),
    }
    quantizers = {
        "self_attn": partial(intx, bits=8, group=64),
        "mlp": partial(intx, bits=3, group=None),
    }
    return write(
        folder, llama(), quantizers, config("ModuleFqnToConfig", module_fqn_to_config=by_name)
    )


@layout("torchao-int8-weight-only")
def int8_weight_only(folder: Path) -> Expected:
    """int8 by rows."""
    return write(folder, llama(), {LAYERS: rows_of_int8}, config("Int8WeightOnlyConfig"))


@layout("torchao-int8-dynamic")
def int8_dynamic(folder: Path) -> Expected:
    """int8 by rows, inputs rounded for each token."""
    return write(
        folder, llama(), {LAYERS: rows_of_int8}, config("Int8DynamicActivationInt8WeightConfig")
    )


@layout("pytorch-qwen3-fp8")
def fp8_dynamic(folder: Path) -> Expected:
    """FP8 by rows, inputs rounded for each token."""
    return write(
        folder, llama(), {LAYERS: rows_of_fp8}, config("Float8DynamicActivationFloat8WeightConfig")
    )

"""AutoRound, in its own words: the tensors are those of GPTQ, AWQ, compressed-tensors and `fp8`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from support.published import Expected, layout
from support.published.floats import fp8_block, mxfp4, mxfp8
from support.published.integers import awq, gptq
from support.published.models import llama, qwen3_moe, write

LAYERS = r"layers\.\d+\.(self_attn|mlp)\.\w+$"
GPTQ = partial(gptq, g_idx=False)
CONFIG = {
    "quant_method": "auto-round",
    "packing_format": "auto_round:auto_gptq",
    "autoround_version": "0.8.0",
    "bits": 4,
    "group_size": 128,
    "sym": True,
    "data_type": "int",
    "iters": 200,
    "block_name_to_quantize": "model.layers",
}


@layout("intel-qwen3-int4-autoround")
def as_gptq(folder: Path) -> Expected:
    """GPTQ's tensors without g_idx."""
    return write(folder, llama(), {LAYERS: GPTQ}, CONFIG)


@layout("intel-int4-autoround-awq")
def as_awq(folder: Path) -> Expected:
    """AWQ's tensors."""
    config = {**CONFIG, "sym": False, "packing_format": "auto_round:auto_awq"}
    return write(folder, llama(), {LAYERS: awq}, config)


@layout("opea-int4-sym-inc")
def old_words(folder: Path) -> Expected:
    """The method called `intel/auto-round`, the packing called `backend`, zeros as they are."""
    config = {
        "quant_method": "intel/auto-round",
        "backend": "auto_round:exllamav2",
        "autoround_version": "0.3.1",
        "bits": 4,
        "group_size": 128,
        "sym": False,
        "data_type": "int",
        "to_quant_block_names": None,
    }
    quantizer = partial(gptq, g_idx=False, symmetric=False, zero_minus_one=False)
    return write(folder, llama(), {LAYERS: quantizer}, config)


@layout("intel-autoround-asym")
def asymmetric(folder: Path) -> Expected:
    """GPTQ's tensors with zero points less one."""
    quantizer = partial(gptq, g_idx=False, symmetric=False)
    return write(folder, llama(), {LAYERS: quantizer}, {**CONFIG, "sym": False})


@layout("intel-int2-mixed-autoround")
def mixed(folder: Path) -> Expected:
    """`extra_config`: layers of other bits by name and by pattern, layers in 16 bits, a head."""
    extra = {
        "model.layers.0.mlp.down_proj": {"bits": 8},
        r".*self_attn\.[kv]_proj": {"bits": 4, "group_size": 64, "sym": False},
        "model.layers.1.self_attn.o_proj": {"bits": 16, "data_type": "float"},
        "lm_head": {"bits": 4, "group_size": 128, "sym": True, "data_type": "int"},
    }
    quantizers = {
        r"0\.mlp\.down_proj": partial(GPTQ, bits=8),
        r"[kv]_proj": partial(GPTQ, group=64, symmetric=False),
        "lm_head": GPTQ,
        r"0\.self_attn\.o_proj": partial(GPTQ, bits=2),
        r"(q|gate|up|down)_proj": partial(GPTQ, bits=2),
    }
    return write(folder, llama(), quantizers, {**CONFIG, "bits": 2, "extra_config": extra})


@layout("intel-autoround-awq-mixed")
def awq_mixed(folder: Path) -> Expected:
    """AWQ's tensors, where single layers have zero points and others stay in 16 bits."""
    extra = {
        r".*\.v_proj": {"sym": False},
        "model.layers.0.self_attn.o_proj": {"bits": 16},
        "model.layers.1.self_attn.o_proj": {"bits": 16},
    }
    config = {**CONFIG, "packing_format": "auto_round:awq", "extra_config": extra}
    quantizers = {
        "v_proj": awq,
        r"[qk]_proj|gate_proj|up_proj|down_proj": partial(awq, symmetric=True),
    }
    return write(folder, llama(), quantizers, config)


@layout("intel-qwen3-30b-a3b-autoround")
def experts(folder: Path) -> Expected:
    """A mixture, with a list of blocks and the routers in 16 bits."""
    extra = {f"model.layers.{layer}.mlp.gate": {"bits": 16} for layer in range(2)}
    config = {**CONFIG, "block_name_to_quantize": ["model.layers"], "extra_config": extra}
    return write(folder, qwen3_moe(), {r"experts|self_attn\.\w_proj": GPTQ}, config)


FLOATS = {
    **CONFIG,
    "packing_format": "auto_round:llm_compressor",
    "group_size": 32,
    "act_group_size": 32,
    "act_sym": True,
    "act_dynamic": True,
}


@layout("intel-mxfp4-autoround")
def as_mxfp4(folder: Path) -> Expected:
    """MXFP4 as compressed-tensors packs it."""
    config = {**FLOATS, "data_type": "mx_fp", "act_bits": 4, "act_data_type": "mx_fp_rceil"}
    return write(
        folder, llama(), {LAYERS: partial(mxfp4, names=("weight_packed", "weight_scale"))}, config
    )


@layout("intel-mxfp8-autoround")
def as_mxfp8(folder: Path) -> Expected:
    """MXFP8 in 16-bit neighbours that `extra_config` names."""
    config = {
        **FLOATS,
        "bits": 8,
        "data_type": "mx_fp",
        "act_bits": 8,
        "act_data_type": "mx_fp",
        "extra_config": {r".*o_proj": {"bits": 16, "act_bits": 16}},
    }
    kinds = r"[qkv]_proj|gate_proj|up_proj|down_proj"
    return write(folder, llama(), {kinds: mxfp8}, config)


@layout("intel-fp8-block-autoround")
def as_fp8_block(folder: Path) -> Expected:
    """FP8 in blocks, with the names of the `fp8` method."""
    config = {
        **FLOATS,
        "packing_format": "auto_round:fp8",
        "bits": 8,
        "group_size": [128, 128],
        "data_type": "fp",
        "act_bits": 8,
        "act_data_type": "fp",
        "act_group_size": 128,
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
    }
    return write(folder, llama(), {LAYERS: partial(fp8_block, scale_dtype=torch.bfloat16)}, config)

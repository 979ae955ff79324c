"""GPTQ and AWQ as their tools wrote them over the years."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from support.published import Expected, layout
from support.published.integers import awq, gptq
from support.published.models import llama, qwen3_moe, write

LAYERS = r"layers\.\d+\.(self_attn|mlp)\.\w+$"
EXPERTS = r"experts|self_attn\.\w_proj"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}


@layout("qwen2.5-gptq-int4")
def auto_gptq(folder: Path) -> Expected:
    """GPTQ of 4 bits by AutoGPTQ."""
    return write(folder, llama(), {LAYERS: gptq}, {**GPTQ, "damp_percent": 0.01})


@layout("qwen2.5-gptq-int8")
def auto_gptq_8_bits(folder: Path) -> Expected:
    """GPTQ of 8 bits by AutoGPTQ."""
    return write(folder, llama(), {LAYERS: partial(gptq, bits=8)}, {**GPTQ, "bits": 8})


@layout("thebloke-llama-2-gptq")
def act_order(folder: Path) -> Expected:
    """GPTQ with act-order, its config also in a file of its own."""
    config = {**GPTQ, "desc_act": True, "true_sequential": True}
    return write(
        folder,
        llama(),
        {LAYERS: partial(gptq, act_order=True)},
        config,
        files={"quantize_config.json": config},
    )


@layout("gptq-for-llama-2023")
def sidecar_alone(folder: Path) -> Expected:
    """GPTQ whose only config is quantize_config.json, without a method."""
    config = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True}
    return write(folder, llama(), {LAYERS: gptq}, None, files={"quantize_config.json": config})


@layout("modelcloud-gptq-v2-3bit")
def gptq_v2(folder: Path) -> Expected:
    """GPTQ v2 of 3 bits, asymmetric, by GPTQModel."""
    quantizer = partial(gptq, bits=3, symmetric=False, zero_minus_one=False)
    config = {**GPTQ, "bits": 3, "sym": False, "checkpoint_format": "gptq_v2"}
    return write(folder, llama(), {LAYERS: quantizer}, config)


@layout("modelcloud-gptq-2bit-rows")
def two_bits(folder: Path) -> Expected:
    """GPTQ of 2 bits with one scale for each row."""
    return write(
        folder,
        llama(),
        {LAYERS: partial(gptq, bits=2, group=None)},
        {**GPTQ, "bits": 2, "group_size": -1},
    )


@layout("modelcloud-gptq-dynamic")
def dynamic(folder: Path) -> Expected:
    """GPTQ with `dynamic`: 8 bits for one kind of layer, 16 for another, and the head quantized."""
    config = {
        **GPTQ,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "lm_head": True,
        "dynamic": {r"+:.*\.down_proj": {"bits": 8}, r"-:.*\.o_proj": {}},
    }
    quantizers = {
        "down_proj": partial(gptq, bits=8),
        r"\.[qkv]_proj|gate_proj|up_proj|lm_head": gptq,
    }
    return write(folder, llama(), quantizers, config)


@layout("llama-3-gptq-asym")
def asymmetric(folder: Path) -> Expected:
    """GPTQ v1 with zero points."""
    quantizer = partial(gptq, symmetric=False)
    return write(folder, llama(), {LAYERS: quantizer}, {**GPTQ, "sym": False})


@layout("qwen3-30b-a3b-gptq-int4")
def experts(folder: Path) -> Expected:
    """GPTQ of a mixture, one expert after another."""
    return write(folder, qwen3_moe(), {EXPERTS: gptq}, {**GPTQ, "dynamic": {r"-:.*\.gate$": {}}})


@layout("llama-3.1-awq-int4")
def auto_awq(folder: Path) -> Expected:
    """AWQ by AutoAWQ."""
    config = {**AWQ, "version": "gemm", "modules_to_not_convert": None}
    return write(folder, llama(), {LAYERS: awq}, config)


@layout("awq-without-version")
def awq_without_version(folder: Path) -> Expected:
    """AWQ whose config leaves `version` out."""
    return write(folder, llama(), {LAYERS: awq}, AWQ)


@layout("thebloke-llama-2-awq")
def awq_sidecar(folder: Path) -> Expected:
    """AWQ whose only config is quant_config.json, with the keys of llm-awq."""
    config = {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}
    return write(folder, llama(), {LAYERS: awq}, None, files={"quant_config.json": config})


@layout("qwen3-30b-a3b-awq")
def awq_experts(folder: Path) -> Expected:
    """AWQ of a mixture in groups of 64, its routers in 16 bits."""
    skipped = [f"model.layers.{layer}.mlp.gate." for layer in range(2)]
    config = {**AWQ, "group_size": 64, "version": "gemm", "modules_to_not_convert": skipped}
    return write(folder, qwen3_moe(), {EXPERTS: partial(awq, group=64)}, config)


@layout("gptqmodel-awq-sym")
def awq_symmetric(folder: Path) -> Expected:
    """AWQ without zero points, by GPTQModel."""
    config = {**AWQ, "zero_point": False, "sym": True, "format": "gemm"}
    return write(folder, llama(), {LAYERS: partial(awq, symmetric=True)}, config)

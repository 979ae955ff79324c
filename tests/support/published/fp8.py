"""FP8 and its family, by the tools that are not ModelOpt: DeepSeek, AutoFP8, FBGEMM, Quark."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from support.published import Expected, layout
from support.published.floats import fp8_block, fp8_channel, fp8_tensor, mxfp4, mxfp8, nvfp4
from support.published.models import (
    Json,
    Stored,
    deepseek_v4,
    llama,
    qwen3_moe,
    write,
)

UE8M0: Json = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}
E8M0 = torch.float8_e8m0fnu
V4_LINEARS = r"attn\.w(q_a|q_b|kv|o_a|o_b)$|shared_experts|indexer\.wq_b"
V4_EXPERTS = r"^layers.*experts\.\d"
MTP_EXPERTS = r"^mtp.*experts\.\d"
v4_linear = partial(fp8_block, scale_name="scale", scale_dtype=E8M0)
v4_expert = partial(mxfp4, names=("weight", "scale"), dtype=torch.int8, scale_dtype=E8M0)


static_fp8 = partial(fp8_tensor, input_scale=0.01)
AUTOFP8: Json = {
    "activation_scheme": "static",
    "ignored_layers": ["lm_head"],
    "kv_cache_scheme": "static",
    "quant_method": "fp8",
}


@layout("deepseek-v4-flash")
def deepseek_v4_fp4_experts(folder: Path) -> Expected:
    """Scales are called ``scale`` and are powers of two; experts are FP4 in pairs."""
    config, tensors = deepseek_v4()
    return write(
        folder,
        ({**config, "expert_dtype": "fp4"}, tensors),
        {V4_EXPERTS: v4_expert, MTP_EXPERTS: v4_expert, V4_LINEARS: v4_linear},
        UE8M0,
    )


@layout("deepseek-v4-flash-base")
def deepseek_v4_fp8_experts(folder: Path) -> Expected:
    """The same with FP8 experts and scales of any f32."""
    config, tensors = deepseek_v4()
    linear = partial(fp8_block, scale_name="scale")
    return write(
        folder,
        ({**config, "expert_dtype": "fp8"}, tensors),
        {V4_EXPERTS: linear, MTP_EXPERTS: linear, V4_LINEARS: linear},
        UE8M0,
    )


@layout("nvidia-deepseek-v4-nvfp4")
def deepseek_v4_nvfp4_experts(folder: Path) -> Expected:
    """NVIDIA's: experts of the decoder as NVFP4, those of its MTP layer and all else as they were.

    The method is still fp8, and ``quantized_layers`` names the experts by their parent.
    """
    config, tensors = deepseek_v4()
    return write(
        folder,
        ({**config, "expert_dtype": "fp4"}, tensors),
        {
            V4_EXPERTS: partial(nvfp4, input_amax=4.0),
            MTP_EXPERTS: v4_expert,
            V4_LINEARS: v4_linear,
        },
        {
            **UE8M0,
            "quant_algo": "MIXED_PRECISION",
            "moe_quant_algo": "NVFP4",
            "group_size": 16,
            "kv_cache_quant_algo": None,
            "ignore": ["*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"],
            "producer": {"name": "modelopt", "version": "0.45.0"},
            "quantized_layers": {
                f"layers.{index}.ffn.experts": {"quant_algo": "NVFP4", "group_size": 16}
                for index in range(2)
            },
        },
    )


@layout("qwen3-fp8-ue8m0")
def fp8_ue8m0(folder: Path) -> Expected:
    """Blocks of 128 x 128 under powers of two."""
    quantizer = partial(fp8_block, scale_dtype=E8M0)
    return write(
        folder, llama(), {"layers": quantizer}, {**UE8M0, "modules_to_not_convert": ["lm_head"]}
    )


@layout("qwen3-fp8-bf16-scales")
def fp8_bf16_scales(folder: Path) -> Expected:
    """Qwen's own: blocks whose scales are bfloat16, experts one by one."""
    return write(
        folder,
        qwen3_moe(),
        {r"mlp\.gate$": None, "layers": partial(fp8_block, scale_dtype=torch.bfloat16)},
        {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head", *(f"model.layers.{i}.mlp.gate" for i in (0, 1))],
        },
    )


@layout("neuralmagic-llama-3-fp8-kv")
def autofp8_kv_scale(folder: Path) -> Expected:
    """AutoFP8: static inputs, and one scale for keys and values together."""

    def key(weight: Tensor) -> Stored:
        parts, dense = static_fp8(weight)
        return {**parts, "../kv_scale": torch.tensor(0.02)}, dense

    return write(folder, llama(), {"k_proj": key, "layers": static_fp8}, AUTOFP8)


@layout("autofp8-kv-output-scale")
def autofp8_output_scale(folder: Path) -> Expected:
    """An older AutoFP8: scales of keys and values on their projections."""

    def cached(weight: Tensor) -> Stored:
        parts, dense = static_fp8(weight)
        return {**parts, "output_scale": torch.tensor(0.02)}, dense

    return write(folder, llama(), {r"[kv]_proj": cached, "layers": static_fp8}, AUTOFP8)


@layout("meta-llama-3.1-405b-fbgemm-fp8")
def fbgemm_fp8(folder: Path) -> Expected:
    """Meta's: a scale for each output, the MLP alone."""
    kept = [f"model.layers.{index}.self_attn.{kind}_proj" for index in (0, 1) for kind in "qkvo"]
    return write(
        folder,
        llama(),
        {"mlp": fp8_channel},
        {
            "activation_scale_ub": 1200.0,
            "modules_to_not_convert": [*kept, "lm_head"],
            "quant_method": "fbgemm_fp8",
        },
    )


@layout("minimax-m3-mxfp8")
def minimax_mxfp8(folder: Path) -> Expected:
    """MXFP8 whose powers of two are bytes called ``weight_scale_inv``."""
    routers = [f"model.layers.{index}.mlp.gate" for index in (0, 1)]
    return write(
        folder,
        qwen3_moe(),
        {r"mlp\.gate$": None, "layers": partial(mxfp8, scale_name="weight_scale_inv")},
        {
            "activation_scheme": "dynamic",
            "ignored_layers": ["lm_head", "model.embed_tokens", *routers],
            "quant_method": "mxfp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [1, 32],
        },
    )


def _quark(weight: Json | list[Json], inputs: Json | list[Json] | None, **settings: Any) -> Json:
    """Return Quark's config for all layers but the head."""
    scheme = {"bias": None, "input_tensors": inputs, "output_tensors": None, "weight": weight}
    return {
        "algo_config": None,
        "exclude": ["lm_head"],
        "export": {
            "kv_cache_group": [],
            "pack_method": "reorder",
            "weight_format": "real_quantized",
        },
        "global_quant_config": scheme,
        "kv_cache_quant_config": {},
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "quant_method": "quark",
        "quant_mode": "eager_mode",
        **settings,
    }


def _spec(dtype: str, qscheme: str, *, dynamic: bool = False, **others: Any) -> Json:
    return {
        "ch_axis": -1,
        "dtype": dtype,
        "group_size": None,
        "is_dynamic": dynamic,
        "qscheme": qscheme,
        "symmetric": True,
        **others,
    }


def _mx(dtype: str, *, dynamic: bool = False) -> Json:
    return _spec(
        dtype, "per_group", dynamic=dynamic, group_size=32, scale_format="e8m0", symmetric=None
    )


@layout("amd-llama-3.1-fp8-kv")
def quark_fp8_kv(folder: Path) -> Expected:
    """Quark FP8 for matrices and inputs, with scales of the KV cache on the projections."""

    def cached(weight: Tensor) -> Stored:
        parts, dense = static_fp8(weight)
        return {**parts, "output_scale": torch.tensor(0.02)}, dense

    fp8 = _spec("fp8_e4m3", "per_tensor")
    cache = {"bias": None, "input_tensors": fp8, "output_tensors": fp8, "weight": fp8}
    config = _quark(fp8, fp8, layer_quant_config={"*k_proj": cache, "*v_proj": cache})
    config["export"]["kv_cache_group"] = ["*k_proj", "*v_proj"]
    return write(folder, llama(), {r"[kv]_proj": cached, "layers": static_fp8}, config)


@layout("amd-llama-ptpc-fp8")
def quark_fp8_channel(folder: Path) -> Expected:
    """Quark FP8 for outputs and tokens."""
    weight = _spec("fp8_e4m3", "per_channel", ch_axis=0)
    inputs = _spec("fp8_e4m3", "per_channel", dynamic=True, ch_axis=1)
    return write(
        folder, llama(), {"layers": partial(fp8_channel, flat=True)}, _quark(weight, inputs)
    )


@layout("amd-qwen3-moe-mxfp4")
def quark_mxfp4(folder: Path) -> Expected:
    """Quark MXFP4 for experts alone; others are excluded by name, glob and regular expression."""
    config = _quark(
        _mx("fp4"),
        _mx("fp4", dynamic=True),
        exclude=["lm_head", "re:.*self_attn.*", "*.mlp.gate"],
    )
    return write(folder, qwen3_moe(), {"experts": mxfp4}, config)


@layout("amd-deepseek-mxfp4-fp8-attention")
def quark_mixed(folder: Path) -> Expected:
    """Quark MXFP4 with other settings for layers that a pattern names."""
    fp8 = {
        "input_tensors": _spec("fp8_e4m3", "per_channel", dynamic=True),
        "weight": _spec("fp8_e4m3", "per_channel", ch_axis=0),
    }
    config = _quark(
        _mx("fp4"),
        _mx("fp4", dynamic=True),
        exclude=["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"],
        layer_quant_config={"*self_attn*": fp8},
    )
    quantizers = {"self_attn": partial(fp8_channel, flat=True), "experts": mxfp4}
    return write(folder, qwen3_moe(), quantizers, config)


@layout("amd-gpt-oss-mxfp4-fp8-inputs")
def quark_mxfp4_fp8(folder: Path) -> Expected:
    """Quark MXFP4 whose inputs are FP8 with one scale."""

    def quantizer(weight: Tensor) -> Stored:
        parts, dense = mxfp4(weight)
        return {**parts, "input_scale": torch.tensor(0.01)}, dense

    config = _quark(_mx("fp4"), _spec("fp8_e4m3", "per_tensor"))
    return write(folder, llama(), {"layers": quantizer}, config)


@layout("amd-llama-nvfp4")
def quark_nvfp4(folder: Path) -> Expected:
    """Quark NVFP4: two entries for each of weight and input."""

    def quantizer(weight: Tensor) -> Stored:
        parts, dense = nvfp4(weight, input_amax=4.0)
        return {**parts, "input_scale_2": parts.pop("input_scale")}, dense

    group = _spec("fp4", "per_group", group_size=16)
    whole = _spec("fp8_e4m3", "per_tensor")
    config = _quark([group, whole], [{**group, "is_dynamic": True}, whole])
    return write(folder, llama(), {"layers": quantizer}, config)

"""NVIDIA ModelOpt, by its versions and by how models are mixed of several schemes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from support.published import Expected, layout
from support.published.floats import fp8_block, fp8_tensor, mxfp8, nvfp4
from support.published.models import Json, Stored, llama, qwen3_moe, write
from support.published.qwen3_5 import qwen3_5

PRODUCER = {"name": "modelopt", "version": "0.45.0"}
OLD_PRODUCER = {"name": "modelopt", "version": "0.31.0"}
NVFP4 = {"quant_algo": "NVFP4", "group_size": 16}
W4A16_NVFP4 = {"quant_algo": "W4A16_NVFP4", "group_size": 16}
FP8 = {"quant_algo": "FP8"}
static_fp8 = partial(fp8_tensor, input_scale=0.01)
static_nvfp4 = partial(nvfp4, input_amax=4.0)


def _group(bits: int, **others: int) -> Json:
    arguments = {"dynamic": False, "num_bits": bits, "type": "float", **others}
    return {"group_0": {"input_activations": arguments, "weights": arguments}}


def _mixed(layers: Json, ignored: list[str]) -> Json:
    return {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "producer": PRODUCER,
        "ignore": ignored,
        "quantized_layers": layers,
    }


@layout("nvidia-llama-nvfp4")
def nvfp4_flat(folder: Path) -> Expected:
    """NVFP4 with its config in config.json."""
    config = {"quant_method": "modelopt", **NVFP4, "producer": PRODUCER, "ignore": ["lm_head"]}
    return write(folder, llama(), {"layers": static_nvfp4}, config)


@layout("qwen3-32b-fp8-static-per-tensor")
def fp8_without_method(folder: Path) -> Expected:
    """No method, config groups like those of compressed-tensors, and a KV cache that is a name."""
    config = {
        "config_groups": _group(8),
        "ignore": ["lm_head"],
        "kv_cache_scheme": "FP8",
        "producer": OLD_PRODUCER,
        "quant_algo": "FP8",
    }
    sidecar = {
        "producer": OLD_PRODUCER,
        "quantization": {
            "quant_algo": "FP8",
            "kv_cache_quant_algo": "FP8",
            "exclude_modules": ["lm_head"],
        },
    }
    files = {"hf_quant_config.json": sidecar}
    return write(folder, llama(), {"layers": static_fp8}, config, files=files)


@layout("modelopt-nvfp4-without-method-or-producer")
def nvfp4_without_method(folder: Path) -> Expected:
    """Neither method nor producer: the algorithm tells."""
    config = {"config_groups": _group(4, group_size=16), "ignore": ["lm_head"], **NVFP4}
    return write(folder, llama(), {"layers": static_nvfp4}, config)


@layout("modelopt-sidecar-without-producer")
def sidecar_without_producer(folder: Path) -> Expected:
    """hf_quant_config.json alone, with the algorithm and nothing about who wrote it."""
    nested = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
    files = {"hf_quant_config.json": {"quantization": nested}}
    return write(folder, llama(), {"layers": static_fp8}, None, files=files)


@layout("nvidia-qwen3-moe-mixed-experts-parent")
def experts_by_parent(folder: Path) -> Expected:
    """MIXED_PRECISION that names the experts of a layer by their parent."""
    layers: Json = {f"model.layers.{index}.mlp.experts": W4A16_NVFP4 for index in (0, 1)}
    for index in (0, 1):
        layers |= {f"model.layers.{index}.self_attn.{kind}_proj": FP8 for kind in "qkvo"}
    routers = [f"model.layers.{index}.mlp.gate" for index in (0, 1)]
    return write(
        folder,
        qwen3_moe(),
        {"experts": nvfp4, "self_attn": static_fp8},
        _mixed(layers, ["lm_head", *routers]),
    )


@layout("modelopt-mixed-fused-names")
def fused_names(folder: Path) -> Expected:
    """MIXED_PRECISION that names the layers as engines fuse them."""
    layers: Json = {}
    for index in (0, 1):
        prefix = f"model.layers.{index}."
        layers |= {prefix + name: FP8 for name in ("self_attn.qkv_proj", "self_attn.o_proj")}
        layers |= {prefix + name: NVFP4 for name in ("mlp.gate_up_proj", "mlp.down_proj")}
    return write(
        folder,
        llama(),
        {"self_attn": static_fp8, "mlp": static_nvfp4},
        _mixed(layers, ["lm_head"]),
    )


@layout("nvidia-qwen3.6-27b-nvfp4")
def container(folder: Path) -> Expected:
    """A vision-language container: FP8 attention, weight-only NVFP4 in MLP and head.

    Scales of inputs lie beside some weights whose inputs stay in 16 bits, and are not used.
    """

    def with_input_scale(weight: Tensor) -> Stored:
        parts, dense = nvfp4(weight)
        return {**parts, "input_scale": torch.tensor(0.01)}, dense

    prefix = "model.language_model.layers."
    layers: Json = {
        f"{prefix}0.linear_attn.{kind}": FP8 for kind in ("in_proj_qkv", "in_proj_z", "out_proj")
    }
    layers |= {f"{prefix}1.self_attn.{kind}_proj": FP8 for kind in "qkvo"}
    for index in (0, 1):
        layers |= {f"{prefix}{index}.mlp.{kind}_proj": W4A16_NVFP4 for kind in MLP_KINDS}
    layers["lm_head"] = W4A16_NVFP4
    arguments = {"dynamic": False, "num_bits": 8, "type": "float"}
    groups = {
        "group_0": {
            "input_activations": arguments,
            "weights": arguments,
            "targets": [name for name, own in layers.items() if own == FP8],
        },
        "group_1": {
            "weights": {**arguments, "num_bits": 4, "group_size": 16},
            "targets": [name for name, own in layers.items() if own != FP8],
        },
    }
    return write(
        folder,
        qwen3_5(experts=False),
        {
            r"language_model.*attn.*(qkv|_z|out_proj|[qkvo]_proj)$": static_fp8,
            r"language_model.*mlp": with_input_scale,
            "lm_head": nvfp4,
        },
        {**_mixed(layers, ["mtp*", "mtp.layers.0*"]), "config_groups": groups},
    )


@layout("nvidia-qwen3.6-35b-a3b-nvfp4")
def container_of_experts(folder: Path) -> Expected:
    """The same of experts, which their parent names; those of the MTP layer stay in 16 bits."""
    prefix = "model.language_model.layers."
    layers: Json = {f"{prefix}{index}.mlp.experts": W4A16_NVFP4 for index in (0, 1)}
    layers |= {f"{prefix}1.self_attn.{kind}_proj": FP8 for kind in "qkvo"}
    return write(
        folder,
        qwen3_5(experts=True),
        {r"^mtp": None, r"mlp\.experts": nvfp4, r"language_model.*self_attn.*proj": static_fp8},
        _mixed(layers, ["lm_head", "model.visual*", "mtp*"]),
    )


@layout("nvidia-qwen3.8-flash-next-nvfp4")
def experts_of_mtp_in_blocks(folder: Path) -> Expected:
    """NVFP4 experts; those of the MTP layer are FP8 in blocks, with ``weight_scale_inv``."""
    layers: Json = {f"model.language_model.layers.{index}.mlp.experts": NVFP4 for index in (0, 1)}
    layers["mtp.layers.0.mlp.experts"] = {"quant_algo": "FP8_BLOCK_SCALES", "group_size": 128}
    return write(
        folder,
        qwen3_5(experts=True),
        {
            r"^mtp.*experts\.": partial(fp8_block, scale_dtype=torch.bfloat16),
            r"mlp\.experts": static_nvfp4,
        },
        _mixed(layers, ["lm_head", "*.embed_tokens", "*attn*", "*shared_expert*", "*.mlp.gate"]),
    )


@layout("nvidia-minimax-m3-nvfp4")
def mxfp8_as_it_was(folder: Path) -> Expected:
    """NVFP4 experts; all else stays the vendor's MXFP8, whose scales are ``weight_scale_inv``."""
    layers: Json = {}
    for index in (0, 1):
        prefix = f"model.layers.{index}."
        layers |= {f"{prefix}self_attn.{kind}_proj": {"quant_algo": "MXFP8"} for kind in "qkvo"}
        for expert in range(4):
            layers |= {f"{prefix}mlp.experts.{expert}.{kind}_proj": NVFP4 for kind in MLP_KINDS}
    routers = [f"model.layers.{index}.mlp.gate" for index in (0, 1)]
    config = {
        "exclude_modules": ["lm_head", "vision_tower", *routers],
        "kv_cache_quant_algo": None,
        "quant_algo": "MIXED_PRECISION",
        "quant_method": "modelopt",
        "quantized_layers": layers,
    }
    return write(
        folder,
        qwen3_moe(),
        {"experts": static_nvfp4, "self_attn": partial(mxfp8, scale_name="weight_scale_inv")},
        config,
        files={"hf_quant_config.json": {"producer": PRODUCER, "quantization": config}},
    )


MLP_KINDS = ("gate", "up", "down")

"""Small models in 16 bits as published ones lie on disk, and how they are written quantized."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from support.published import Expected

Json = dict[str, Any]
Stored = tuple[dict[str, Tensor], Tensor]
"""The tensors of a layer by suffix, and the f32 matrix that they stand for.

A suffix with ``../`` in front belongs to the module above the layer.
"""
Quantizer = Callable[[Tensor], Stored]
Model = tuple[Json, dict[str, Tensor]]
"""The config, and the tensors in 16 bits by name."""

SIZES = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
ATTENTION = {"q_proj": (256, 256), "k_proj": (128, 256), "v_proj": (128, 256), "o_proj": (256, 256)}
MLP = {"gate_proj": (384, 256), "up_proj": (384, 256), "down_proj": (256, 384)}
EXPERT = {"gate_proj": (128, 256), "up_proj": (128, 256), "down_proj": (256, 128)}
NORMS = ("input_layernorm", "post_attention_layernorm")


def llama() -> Model:
    """Return a Llama of two layers."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "intermediate_size": 384,
        **SIZES,
    }
    shapes = _language_model(lambda layer: {f"mlp.{kind}": shape for kind, shape in MLP.items()})
    return config, random_tensors(shapes)


def qwen3_moe() -> Model:
    """Return a Qwen3 MoE of two layers with four experts each."""
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        **SIZES,
    }

    def mlp(layer: int) -> dict[str, tuple[int, ...]]:
        experts = {
            f"mlp.experts.{expert}.{kind}": shape
            for expert in range(4)
            for kind, shape in EXPERT.items()
        }
        return {"mlp.gate": (4, 256), **experts}

    shapes = _language_model(mlp)
    for layer in range(2):
        for kind in ("q_norm", "k_norm"):
            shapes[f"model.layers.{layer}.self_attn.{kind}.weight"] = (64,)
    return config, random_tensors(shapes)


def deepseek_v4() -> Model:
    """Return a DeepSeek-V4 of two layers and one for MTP, by the names of DeepSeek's own files."""
    config = {
        **SIZES,
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "num_key_value_heads": 1,
        "head_dim": 128,
        "moe_intermediate_size": 128,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 128,
        "o_lora_rank": 128,
        "o_groups": 2,
        "qk_rope_head_dim": 32,
        "index_head_dim": 64,
        "index_n_heads": 2,
        "index_topk": 16,
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
        "mlp_layer_types": ["hash_moe", "moe"],
    }
    shapes: dict[str, tuple[int, ...]] = {
        "embed.weight": (512, 256),
        "head.weight": (512, 256),
        "norm.weight": (256,),
        **_hyper_connection("hc_head", 4),
        "mtp.0.e_proj.weight": (256, 256),
    }
    for prefix in ("layers.0.", "layers.1.", "mtp.0."):
        shapes |= {prefix + name: shape for name, shape in _V4_LAYER.items()}
    for prefix, ratio, width in (("layers.0.", 128, 128), ("layers.1.", 4, 256)):
        shapes |= _compressor(f"{prefix}attn.compressor.", ratio, width, head_dim=128)
    shapes |= {
        **_compressor("layers.1.attn.indexer.compressor.", 4, 128, head_dim=64),
        "layers.1.attn.indexer.weights_proj.weight": (2, 256),
        "layers.1.attn.indexer.wq_b.weight": (128, 128),
        "layers.1.ffn.gate.bias": (4,),
    }
    tensors = random_tensors(shapes)
    experts_of_token = torch.arange(1024).reshape(512, 2) % 4
    return config, {**tensors, "layers.0.ffn.gate.tid2eid": experts_of_token}


def _hyper_connection(name: str, rows: int) -> dict[str, tuple[int, ...]]:
    scales = 1 if rows == 4 else 3
    return {f"{name}_fn": (rows, 1024), f"{name}_base": (rows,), f"{name}_scale": (scales,)}


def _compressor(
    prefix: str, ratio: int, width: int, *, head_dim: int
) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}ape": (ratio, width),
        f"{prefix}norm.weight": (head_dim,),
        f"{prefix}wgate.weight": (width, 256),
        f"{prefix}wkv.weight": (width, 256),
    }


_V4_LAYER: dict[str, tuple[int, ...]] = {
    "attn.attn_sink": (4,),
    "attn.kv_norm.weight": (128,),
    "attn.q_norm.weight": (128,),
    "attn.wkv.weight": (128, 256),
    "attn.wo_a.weight": (256, 256),
    "attn.wo_b.weight": (256, 256),
    "attn.wq_a.weight": (128, 256),
    "attn.wq_b.weight": (512, 128),
    "attn_norm.weight": (256,),
    "ffn_norm.weight": (256,),
    "ffn.gate.weight": (4, 256),
    **_hyper_connection("hc_attn", 24),
    **_hyper_connection("hc_ffn", 24),
    **{
        f"ffn.{expert}.{kind}.weight": (256, 128) if kind == "w2" else (128, 256)
        for expert in (*(f"experts.{index}" for index in range(4)), "shared_experts")
        for kind in ("w1", "w2", "w3")
    },
}


def _language_model(
    mlp: Callable[[int], Mapping[str, tuple[int, ...]]],
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a decoder of two layers; ``mlp``: of what is beside its attention."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (512, 256),
        "model.norm.weight": (256,),
        "lm_head.weight": (512, 256),
    }
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}{norm}.weight": (256,) for norm in NORMS}
        shapes |= {f"{prefix}self_attn.{kind}.weight": each for kind, each in ATTENTION.items()}
        shapes |= {f"{prefix}{kind}.weight": shape for kind, shape in mlp(layer).items()}
    return shapes


def random_tensors(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return bf16 tensors of ``shapes``: ones for norms, and random matrices."""
    return dict(_random_tensors(tuple(shapes.items())))


@lru_cache(maxsize=4)
def _random_tensors(shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.ones(shape).bfloat16()
        if len(shape) == 1
        else (torch.randn(shape, generator=generator) * (0.6 / math.sqrt(shape[-1]))).bfloat16()
        for name, shape in shapes
    }


def write(
    folder: Path,
    model: Model,
    quantizers: Mapping[str, Quantizer | None],
    quantization_config: Json | None,
    *,
    files: Mapping[str, Json] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> Expected:
    """Write ``model`` to ``folder`` with some of its layers quantized, and return these dequantized.

    Args:
        folder: to make.
        model: in 16 bits.
        quantizers: by a regex that is searched in the name of a matrix without ``.weight``; the
            first that matches wins. A matrix that none matches, or None, stays in 16 bits.
        quantization_config: of config.json, if it has one.
        files: other JSON files, by name; they may replace config.json.
        tensors: more tensors, e.g. scales of the KV cache.
    """
    config, weights = model
    stored: dict[str, Tensor] = dict(tensors or {})
    expected: Expected = {}
    for name, weight in weights.items():
        layer = name.removesuffix(".weight")
        quantizer = next(
            (make for pattern, make in quantizers.items() if re.search(pattern, layer)), None
        )
        if quantizer is None or weight.dim() != 2 or name == layer:
            stored[name] = weight
            continue
        parts, expected[layer] = quantizer(weight.float())
        for suffix, part in parts.items():
            owner = layer.rpartition(".")[0] if suffix.startswith("../") else layer
            stored[f"{owner}.{suffix.removeprefix('../')}"] = part
    folder.mkdir(parents=True)
    contiguous = {name: tensor.contiguous().clone() for name, tensor in stored.items()}
    save_file(contiguous, folder / "model.safetensors", {"format": "pt"})
    if quantization_config is not None:
        config = {**config, "quantization_config": quantization_config}
    for file, content in {"config.json": config, **(files or {})}.items():
        (folder / file).write_text(json.dumps(content, indent=1))
    return expected

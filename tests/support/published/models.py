"""Small models in 16 bits as published ones lie on disk, and how they are written quantized."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
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
    return config, _random(shapes)


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
    return config, _random(shapes)


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


def _random(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return bf16 tensors of ``shapes``: ones for norms, and random matrices."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.ones(shape).bfloat16()
        if len(shape) == 1
        else (torch.randn(shape, generator=generator) * (0.6 / math.sqrt(shape[-1]))).bfloat16()
        for name, shape in shapes.items()
    }


def write(
    folder: Path,
    model: Model,
    quantizers: Mapping[str, Quantizer],
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
            first that matches wins, and a matrix that none matches stays in 16 bits.
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
        if quantizer is None or weight.dim() != 2:
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

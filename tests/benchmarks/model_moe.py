"""A checkpoint of Qwen3-30B-A3B's shape, cut to some layers, with random weights and the published
names of tensors: FP8_DYNAMIC, W4A16 in groups of 128, or FP8 in blocks of 128 x 128.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from model_8b import QUANTIZED, quantized_weight
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, INNER, EXPERTS, TOP_K, VOCABULARY = 2048, 768, 128, 8, 151936
HEADS, KV_HEADS, HEAD_DIM = 32, 4, 128
KINDS = ("fp8", "w4a16", "fp8_block")
ATTENTION = {
    "q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "o_proj": (HIDDEN, HEADS * HEAD_DIM),
}
EXPERT = {
    "gate_proj": (INNER, HIDDEN),
    "up_proj": (INNER, HIDDEN),
    "down_proj": (HIDDEN, INNER),
}


def write_checkpoint(folder: Path, kind: str, *, layers: int = 12, device: str = "cuda") -> None:
    """Write one, a layer a file. ``kind``: one of `KINDS`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "dtype": "bfloat16",
        "num_hidden_layers": layers,
        "hidden_size": HIDDEN,
        "intermediate_size": 6144,
        "moe_intermediate_size": INNER,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY,
        "hidden_act": "silu",
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "quantization_config": _quantization(kind),
    }
    (folder / "config.json").write_text(json.dumps(config))
    index: dict[str, str] = {}

    def save(file: str, tensors: dict[str, Tensor]) -> None:
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, folder / file)
        index.update(dict.fromkeys(tensors, file))

    embedding = torch.randn(VOCABULARY, HIDDEN, device=device, dtype=torch.bfloat16)
    save(
        "model-ends.safetensors",
        {
            "model.embed_tokens.weight": embedding,
            "lm_head.weight": embedding * 0.02,
            "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
        },
    )
    for layer in range(layers):
        save(f"model-{layer:05d}.safetensors", dict(_layer(layer, kind, device)))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )


def _quantization(kind: str) -> dict[str, object]:
    if kind == "fp8_block":
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head"],
        }
    format, weights, inputs = QUANTIZED[kind]
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "config_groups": {"group_0": group},
    }


def _layer(layer: int, kind: str, device: str) -> Iterator[tuple[str, Tensor]]:
    prefix = f"model.layers.{layer}"
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{prefix}.{name}.weight", torch.ones(HIDDEN, dtype=torch.bfloat16)
    for name in ("q_norm", "k_norm"):
        yield f"{prefix}.self_attn.{name}.weight", torch.ones(HEAD_DIM, dtype=torch.bfloat16)
    router = torch.randn(EXPERTS, HIDDEN, device=device, dtype=torch.bfloat16) * 0.02
    yield f"{prefix}.mlp.gate.weight", router
    linears = {f"{prefix}.self_attn.{name}": shape for name, shape in ATTENTION.items()}
    for expert in range(EXPERTS):
        linears |= {
            f"{prefix}.mlp.experts.{expert}.{name}": shape for name, shape in EXPERT.items()
        }
    for name, shape in linears.items():
        for part, tensor in quantized_weight(kind, *shape, device):
            yield f"{name}.{part}", tensor

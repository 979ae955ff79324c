"""A checkpoint of Llama-3.1-8B's shape with random weights, in bf16, FP8_DYNAMIC or W4A16: a model
hub for benchmarks that need only the shape.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

SIZES = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
LINEARS = {
    **{
        "self_attn.q_proj": (4096, 4096),
        "self_attn.k_proj": (1024, 4096),
        "self_attn.v_proj": (1024, 4096),
        "self_attn.o_proj": (4096, 4096),
    },
    **{
        "mlp.gate_proj": (14336, 4096),
        "mlp.up_proj": (14336, 4096),
        "mlp.down_proj": (4096, 14336),
    },
}
_INT4 = {
    "num_bits": 4,
    "type": "int",
    "symmetric": True,
    "strategy": "group",
    "group_size": 128,
    "dynamic": False,
}
_FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
_TOKENS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
QUANTIZED = {
    "bf16": None,
    "fp8": ("float-quantized", _FP8, _TOKENS),
    "w4a16": ("pack-quantized", _INT4, None),
}


def write_checkpoint(folder: Path, kind: str, *, layers: int = 32, device: str = "cuda") -> None:
    """Write one as compressed-tensors, two layers a file. ``kind``: a key of `QUANTIZED`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        **{
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "num_hidden_layers": layers,
            **SIZES,
        },
        **{
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    }
    if quantized := QUANTIZED[kind]:
        format, weights, inputs = quantized
        config["quantization_config"] = {
            **{
                "quant_method": "compressed-tensors",
                "format": format,
                "quantization_status": "compressed",
                "ignore": ["lm_head"],
            },
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": weights,
                    "input_activations": inputs,
                    "output_activations": None,
                }
            },
        }
    (folder / "config.json").write_text(json.dumps(config))
    index: dict[str, str] = {}

    def save(file: str, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, folder / file, {"format": "pt"})
        index.update(dict.fromkeys(tensors, file))

    embedding = torch.randn(SIZES["vocab_size"], 4096, device=device, dtype=torch.bfloat16)
    ends = {
        "model.embed_tokens.weight": embedding,
        "lm_head.weight": embedding * 0.02,
        "model.norm.weight": torch.ones(4096, dtype=torch.bfloat16),
    }
    save("model-ends.safetensors", {name: tensor.cpu() for name, tensor in ends.items()})
    for first in range(0, layers, 2):
        tensors: dict[str, Tensor] = {}
        for layer in range(first, min(first + 2, layers)):
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"model.layers.{layer}.{name}.weight"] = torch.ones(
                    4096, dtype=torch.bfloat16
                )
            for name, shape in LINEARS.items():
                tensors |= {
                    f"model.layers.{layer}.{name}.{part}": tensor.cpu()
                    for part, tensor in quantized_weight(kind, *shape, device)
                }
        save(f"model-{first:05d}.safetensors", tensors)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )


def quantized_weight(
    kind: str, rows: int, columns: int, device: str
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a random layer by the ends of their names."""
    if kind == "w4a16":
        yield (
            "weight_packed",
            torch.randint(
                -(2**31), 2**31 - 1, (rows, columns // 8), dtype=torch.int32, device=device
            ),
        )
        yield (
            "weight_scale",
            (torch.rand(rows, columns // 128, device=device) * 0.005).to(torch.bfloat16),
        )
        yield "weight_shape", torch.tensor([rows, columns])
    elif kind == "fp8":
        yield "weight", _random_fp8(rows, columns, device)
        yield "weight_scale", torch.rand(rows, 1, device=device) * 0.0002
    elif kind == "fp8_block":
        yield "weight", _random_fp8(rows, columns, device)
        blocks = torch.rand(-(-rows // 128), -(-columns // 128), device=device)
        yield "weight_scale_inv", blocks * 0.0002
    else:
        yield "weight", torch.randn(rows, columns, device=device, dtype=torch.bfloat16) * 0.02


def _random_fp8(rows: int, columns: int, device: str) -> Tensor:
    values = torch.randn(rows, columns, device=device) * 100
    return values.clamp(-448, 448).to(torch.float8_e4m3fn)

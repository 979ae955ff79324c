"""Checkpoints of the shapes of published models, cut to some layers, with random weights and the
published names of tensors, to measure with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from model_8b import QUANTIZED, quantized_weight
from safetensors.torch import save_file
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
MTP_NORMS = ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
ADDED = ("o_proj", "out_proj", "down_proj")  # layers whose outputs are added to the residual


@dataclass
class Layer:
    """The tensors of one layer, by name without the layer's prefix."""

    linears: dict[str, tuple[int, int]]
    """Quantized layers."""
    plain: Shapes
    """What stays in 16 bits; vectors are ones."""
    stacks: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    """Experts in one tensor, [experts, N, K], in MXFP4."""


@dataclass
class Shape:
    """A model."""

    config: dict[str, Any]
    layers: int
    """How many there are if nothing else is asked for."""
    layer: Callable[[int], Layer]
    kept: tuple[str, ...] = ("lm_head",)
    """Linear layers that stay in 16 bits, as configs name them."""
    layer_types: tuple[str, ...] = ()
    """Of the first layers; the others repeat them."""
    scheme: str | None = None
    """In which it is written, whatever is asked for."""


def _experts(count: int, hidden: int, inner: int) -> dict[str, tuple[int, int]]:
    each = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    return {
        f"mlp.experts.{expert}.{name}": shape
        for expert in range(count)
        for name, shape in each.items()
    }


def _mlp(hidden: int, inner: int, prefix: str = "mlp") -> dict[str, tuple[int, int]]:
    return {
        f"{prefix}.gate_proj": (inner, hidden),
        f"{prefix}.up_proj": (inner, hidden),
        f"{prefix}.down_proj": (hidden, inner),
    }


def _attention(
    hidden: int, heads: int, kv_heads: int, width: int, *, gated: bool = False
) -> dict[str, tuple[int, int]]:
    queries, keys = heads * width, kv_heads * width
    return {
        "self_attn.q_proj": (queries * (2 if gated else 1), hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
    }


def _norms(hidden: int, *names: str) -> Shapes:
    return {f"{name}.weight": (hidden,) for name in names}


NORMS = ("input_layernorm", "post_attention_layernorm")
COMMON = {
    "dtype": "bfloat16",
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def qwen3_moe() -> Shape:
    """Qwen3-30B-A3B."""
    hidden, inner, experts = 2048, 768, 128

    def layer(_: int) -> Layer:
        linears = _attention(hidden, 32, 4, 128) | _experts(experts, hidden, inner)
        norms = _norms(128, "self_attn.q_norm", "self_attn.k_norm") | _norms(hidden, *NORMS)
        return Layer(linears, {**norms, "mlp.gate.weight": (experts, hidden)})

    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **COMMON,
        **{"hidden_size": hidden, "intermediate_size": 6144, "vocab_size": 151936},
        **{"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128},
        **{"moe_intermediate_size": inner, "num_experts": experts, "num_experts_per_tok": 8},
        **{"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
        **{"hidden_act": "silu", "rope_theta": 1e6},
    }
    return Shape(config, 12, layer, ("lm_head", "re:.*mlp.gate$"))


def qwen3_5_moe() -> Shape:
    """The language model of Qwen3.5-35B-A3B: three gated delta nets, then attention."""
    hidden, inner, experts = 2048, 512, 256

    def layer(index: int) -> Layer:
        linears = _experts(experts, hidden, inner) | _mlp(hidden, inner, "mlp.shared_expert")
        plain: Shapes = {
            **_norms(hidden, *NORMS),
            "mlp.gate.weight": (experts, hidden),
            "mlp.shared_expert_gate.weight": (1, hidden),
        }
        if index % 4 == 3:
            linears |= _attention(hidden, 16, 2, 256, gated=True)
            plain |= _norms(256, "self_attn.q_norm", "self_attn.k_norm")
            return Layer(linears, plain)
        linears |= {
            "linear_attn.in_proj_qkv": (8192, hidden),
            "linear_attn.in_proj_z": (4096, hidden),
            "linear_attn.out_proj": (hidden, 4096),
        }
        plain |= {
            "linear_attn.in_proj_a.weight": (32, hidden),
            "linear_attn.in_proj_b.weight": (32, hidden),
            "linear_attn.conv1d.weight": (8192, 1, 4),
            "linear_attn.A_log": (32,),
            "linear_attn.dt_bias": (32,),
            "linear_attn.norm.weight": (128,),
        }
        return Layer(linears, plain)

    config = {
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "model_type": "qwen3_5_moe_text",
        **COMMON,
        **{"hidden_size": hidden, "vocab_size": 248320, "hidden_act": "silu"},
        **{"num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256},
        **{"moe_intermediate_size": inner, "num_experts": experts, "num_experts_per_tok": 8},
        **{"shared_expert_intermediate_size": inner, "linear_conv_kernel_dim": 4},
        **{"linear_num_key_heads": 16, "linear_num_value_heads": 32},
        **{"linear_key_head_dim": 128, "linear_value_head_dim": 128},
        "rope_parameters": {
            **{"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
        },
    }
    kept = ("lm_head", "re:.*mlp.gate$", "re:.*shared_expert_gate$", "re:.*in_proj_[ab]$")
    types = (*["linear_attention"] * 3, "full_attention")
    return Shape(config, 12, layer, kept, layer_types=types)


def gpt_oss() -> Shape:
    """gpt-oss-20b, always with MXFP4 experts."""
    hidden, experts = 2880, 32

    def layer(_: int) -> Layer:
        plain: Shapes = {
            **_norms(hidden, *NORMS),
            "self_attn.sinks": (64,),
            "mlp.router.weight": (experts, hidden),
            "mlp.router.bias": (experts,),
            "mlp.experts.gate_up_proj_bias": (experts, 2 * hidden),
            "mlp.experts.down_proj_bias": (experts, hidden),
        }
        for name, (rows, columns) in _attention(hidden, 64, 8, 64).items():
            plain |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
        stacks = {
            "mlp.experts.gate_up_proj": (experts, 2 * hidden, hidden),
            "mlp.experts.down_proj": (experts, hidden, hidden),
        }
        return Layer({}, plain, stacks)

    config = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        **COMMON,
        **{"hidden_size": hidden, "intermediate_size": hidden, "vocab_size": 201088},
        **{"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64},
        **{"num_local_experts": experts, "num_experts_per_tok": 4, "sliding_window": 128},
        **{"swiglu_limit": 7.0, "attention_bias": True, "rms_norm_eps": 1e-5},
        "rope_parameters": {
            **{"rope_type": "yarn", "rope_theta": 150000, "factor": 32.0, "truncate": False},
            **{"beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 4096},
        },
        "max_position_embeddings": 131072,
    }
    types = "sliding_attention", "full_attention"
    return Shape(config, 24, layer, layer_types=types, scheme="mxfp4")


def gemma3() -> Shape:
    """The language model of Gemma-3-12B."""
    hidden, inner = 3840, 15360

    def layer(_: int) -> Layer:
        norms = (*NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
        plain = _norms(hidden, *norms) | _norms(256, "self_attn.q_norm", "self_attn.k_norm")
        return Layer(_attention(hidden, 16, 8, 256) | _mlp(hidden, inner), plain)

    config = {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        **COMMON,
        **{"hidden_size": hidden, "intermediate_size": inner, "vocab_size": 262208},
        **{"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256},
        **{"query_pre_attn_scalar": 256, "sliding_window": 1024, "sliding_window_pattern": 6},
        **{"hidden_activation": "gelu_pytorch_tanh", "rope_theta": 1e6},
        "rope_local_base_freq": 10000.0,
        "tie_word_embeddings": True,
        "max_position_embeddings": 131072,
    }
    return Shape(config, 48, layer)


def deepseek_v2() -> Shape:
    """DeepSeek-V2-Lite: MLA without a query latent, one dense layer, shared experts. The dense MLP
    stays in 16 bits: its 10 944 rows are no whole number of blocks, and vLLM refuses such.
    """
    hidden, inner, experts = 2048, 1408, 64

    def layer(index: int) -> Layer:
        linears: dict[str, tuple[int, int]] = {
            "self_attn.q_proj": (16 * 192, hidden),
            "self_attn.kv_a_proj_with_mqa": (512 + 64, hidden),
            "self_attn.kv_b_proj": (16 * 256, 512),
            "self_attn.o_proj": (hidden, 16 * 128),
        }
        plain = _norms(hidden, *NORMS) | _norms(512, "self_attn.kv_a_layernorm")
        if index == 0:
            dense = {f"{name}.weight": shape for name, shape in _mlp(hidden, 10944).items()}
            return Layer(linears, plain | dense)
        linears |= _experts(experts, hidden, inner) | _mlp(hidden, 2 * inner, "mlp.shared_experts")
        return Layer(linears, {**plain, "mlp.gate.weight": (experts, hidden)})

    config = {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        **COMMON,
        **{"hidden_size": hidden, "intermediate_size": 10944, "vocab_size": 102400},
        **{"num_attention_heads": 16, "num_key_value_heads": 16, "hidden_act": "silu"},
        **{"kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128},
        **{"qk_rope_head_dim": 64, "v_head_dim": 128, "first_k_dense_replace": 1},
        **{"n_routed_experts": experts, "n_shared_experts": 2, "num_experts_per_tok": 6},
        **{"moe_intermediate_size": inner, "moe_layer_freq": 1, "routed_scaling_factor": 1.0},
        **{"topk_method": "greedy", "norm_topk_prob": False, "n_group": 1, "topk_group": 1},
        **{"scoring_func": "softmax", "rope_theta": 10000},
    }
    dense = (f"model.layers.0.{name}" for name in _mlp(hidden, 10944))
    return Shape(config, 27, layer, ("lm_head", "re:.*mlp.gate$", *dense))


SHAPES: dict[str, Callable[[], Shape]] = {
    "moe": qwen3_moe,
    "qwen3_5_moe": qwen3_5_moe,
    "gpt_oss": gpt_oss,
    "gemma3": gemma3,
    "deepseek_v2": deepseek_v2,
}


def write_checkpoint(
    folder: Path, name: str, kind: str, *, layers: int = 0, device: str = "cuda", mtp: bool = False
) -> None:
    """Write the shape ``name`` of `SHAPES` in ``kind``, ``fp8``, ``w4a16`` or ``fp8_block``, a
    layer a file.

    With ``mtp`` it has a layer that drafts, as Qwen3.5 does. All layers add next to nothing, and
    the token after each one is that of a permutation: what is drafted is right.
    """
    shape = SHAPES[name]()
    layers = layers or shape.layers
    folder.mkdir(parents=True, exist_ok=True)
    config = {**shape.config, "num_hidden_layers": layers}
    if types := shape.layer_types:
        config["layer_types"] = [types[index % len(types)] for index in range(layers)]
    if mtp:
        config["mtp_num_hidden_layers"] = 1
        shape.kept += ("mtp.fc",)
    config["quantization_config"] = _quantization(shape.scheme or kind, shape)
    (folder / "config.json").write_text(json.dumps(config))
    index: dict[str, str] = {}

    def save(file: str, tensors: dict[str, Tensor]) -> None:
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, folder / file)
        index.update(dict.fromkeys(tensors, file))

    size = config["vocab_size"], config["hidden_size"]
    embedding = torch.randn(*size, device=device, dtype=torch.bfloat16)
    ends = {
        "model.embed_tokens.weight": embedding * (0.02 if config["tie_word_embeddings"] else 1),
        "model.norm.weight": torch.ones(size[1], dtype=torch.bfloat16),
    }
    if not config["tie_word_embeddings"]:
        order = torch.randperm(len(embedding), device=device) if mtp else slice(None)
        ends["lm_head.weight"] = embedding[order] * 0.02
    save("model-ends.safetensors", ends)
    blocks = [(f"model.layers.{number}.", shape.layer(number)) for number in range(layers)]
    if mtp:
        fc = torch.cat([torch.eye(size[1]), torch.zeros(size[1], size[1])], dim=1)
        norms = {f"mtp.{norm}.weight": torch.ones(size[1]) for norm in MTP_NORMS}
        parts = {"mtp.fc.weight": fc, **norms}
        save("model-mtp.safetensors", {part: each.bfloat16() for part, each in parts.items()})
        attends = len(shape.layer_types) - 1
        blocks.append(("mtp.layers.0.", shape.layer(attends)))
    for number, (prefix, layer) in enumerate(blocks):
        tensors = _tensors(layer, kind, device, added=1e-4 if mtp else 1.0)
        save(f"model-{number:05d}.safetensors", {prefix + part: t for part, t in tensors})
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )


def _quantization(kind: str, shape: Shape) -> dict[str, object]:
    if kind == "mxfp4":
        kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]
        return {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    if kind == "fp8_block":
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": [name for name in shape.kept if not name.startswith("re:")],
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
        "ignore": list(shape.kept),
        "config_groups": {"group_0": group},
    }


def _tensors(
    layer: Layer, kind: str, device: str, *, added: float = 1.0
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of ``layer``, of which what is added to the residual times ``added``."""
    for name, shape in layer.plain.items():
        vector = len(shape) == 1
        tensor = torch.ones(shape) if vector else torch.randn(shape, device=device) * 0.02
        yield name, tensor.to(torch.bfloat16)
    for name, (rows, columns) in layer.linears.items():
        for part, tensor in quantized_weight(kind, rows, columns, device):
            is_scaled = name.endswith(ADDED) and "scale" in part
            yield f"{name}.{part}", tensor * added if is_scaled else tensor
    for name, (experts, rows, columns) in layer.stacks.items():
        groups = (experts, rows, columns // 32)
        bits = torch.randint(0, 256, (*groups, 16), dtype=torch.uint8, device=device)
        yield f"{name}_blocks", bits
        # 2^-9 to 2^-5: weights of about 0.02
        exponents = torch.randint(118, 122, groups, dtype=torch.uint8, device=device)
        yield f"{name}_scales", exponents

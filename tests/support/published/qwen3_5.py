"""A small Qwen3.5 container, dense or of experts, with the layer for multi-token prediction."""

from __future__ import annotations

from support.published.models import ATTENTION, EXPERT, NORMS, SIZES, Model, random_tensors

Shapes = dict[str, tuple[int, ...]]
LINEAR_ATTENTION: Shapes = {
    "A_log": (4,),
    "conv1d.weight": (512, 1, 4),
    "dt_bias": (4,),
    "in_proj_a.weight": (4, 256),
    "in_proj_b.weight": (4, 256),
    "in_proj_qkv.weight": (512, 256),
    "in_proj_z.weight": (256, 256),
    "norm.weight": (64,),
    "out_proj.weight": (256, 256),
}
BLOCK = {  # of the vision tower: rows and columns
    "attn.proj": (64, 64),
    "attn.qkv": (192, 64),
    "mlp.linear_fc1": (128, 64),
    "mlp.linear_fc2": (64, 128),
}
TEXT = {
    **{name: size for name, size in SIZES.items() if name != "architectures"},
    "layer_types": ["linear_attention", "full_attention"],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 64,
    "mtp_num_hidden_layers": 1,
    "rope_parameters": {
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000.0,
        "rope_type": "default",
    },
}
VISION = {
    "depth": 1,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "num_position_embeddings": 16,
    "out_hidden_size": 256,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


def qwen3_5(*, experts: bool) -> Model:
    """Return a Qwen3.5 of two layers, one with linear attention."""
    kind = "qwen3_5_moe" if experts else "qwen3_5"
    sizes = {"intermediate_size": 256}
    if experts:
        sizes = {
            "moe_intermediate_size": 128,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "shared_expert_intermediate_size": 128,
        }
    config = {
        "architectures": [f"Qwen3_5{'Moe' if experts else ''}ForConditionalGeneration"],
        "model_type": kind,
        "image_token_id": 5,
        "video_token_id": 6,
        "vision_start_token_id": 7,
        "vision_end_token_id": 8,
        "tie_word_embeddings": False,
        "text_config": {**TEXT, **sizes, "model_type": f"{kind}_text"},
        "vision_config": {**VISION, "model_type": f"{kind}_vision"},
    }
    language = "model.language_model."
    shapes: Shapes = {
        "lm_head.weight": (512, 256),
        f"{language}embed_tokens.weight": (512, 256),
        f"{language}norm.weight": (256,),
        "mtp.fc.weight": (256, 512),
        **{f"mtp.{each}.weight": (256,) for each in MTP_NORMS},
    }
    linear = {f"linear_attn.{name}": shape for name, shape in LINEAR_ATTENTION.items()}
    layers = {f"{language}layers.0.": linear, f"{language}layers.1.": _attention()}
    for prefix, attention in {**layers, "mtp.layers.0.": _attention()}.items():
        parts = {**attention, **_mlp(experts=experts)}
        shapes |= {prefix + name: shape for name, shape in parts.items()}
    return config, random_tensors({**shapes, **_tower()})


MTP_NORMS = ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")


def _attention() -> Shapes:
    shapes = {**ATTENTION, "q_proj": (512, 256), "q_norm": (64,), "k_norm": (64,)}
    return {f"self_attn.{name}.weight": shape for name, shape in shapes.items()}


def _mlp(*, experts: bool) -> Shapes:
    norms = {f"{norm}.weight": (256,) for norm in NORMS}
    if not experts:
        wide = {"gate_proj": (256, 256), "up_proj": (256, 256), "down_proj": (256, 256)}
        return {**norms, **{f"mlp.{name}.weight": shape for name, shape in wide.items()}}
    each = (*(f"experts.{index}" for index in range(4)), "shared_expert")
    return {
        **norms,
        "mlp.gate.weight": (4, 256),
        "mlp.shared_expert_gate.weight": (1, 256),
        **{f"mlp.{one}.{kind}.weight": shape for one in each for kind, shape in EXPERT.items()},
    }


def _tower() -> Shapes:
    matrices = {
        **{f"blocks.0.{name}": shape for name, shape in BLOCK.items()},
        "merger.linear_fc1": (256, 256),
        "merger.linear_fc2": (256, 256),
        "patch_embed.proj": (64, 3, 2, 14, 14),
    }
    shapes: Shapes = {"model.visual.pos_embed.weight": (16, 64)}
    for name, shape in matrices.items():
        shapes |= {f"model.visual.{name}.weight": shape, f"model.visual.{name}.bias": shape[:1]}
    for norm in ("blocks.0.norm1", "blocks.0.norm2", "merger.norm"):
        shapes |= {f"model.visual.{norm}.{part}": (64,) for part in ("weight", "bias")}
    return shapes

"""Small models with the names of Moonshot's Kimi."""

from __future__ import annotations

from support.published.models import EXPERT, MLP, NORMS, SIZES, Model, random_tensors


def kimi_k2() -> Model:
    """Return a Kimi K2, which is a DeepSeek-V3: one dense layer, one with four experts."""
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "kimi_k2",
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        "intermediate_size": 384,
        "moe_intermediate_size": 128,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32,
        **{key: size for key, size in SIZES.items() if key != "head_dim"},
        "num_key_value_heads": 4,
    }
    return config, random_tensors(_kimi_layers("", "mlp", tuple(EXPERT)))


def kimi_k25() -> Model:
    """Return a Kimi K2.5: the language model of K2 beside a vision tower and a projector."""
    return _kimi_container("kimi_k25", "mlp", tuple(EXPERT))


def kimi_k3() -> Model:
    """Return a Kimi K3, whose experts have the names of Mixtral."""
    return _kimi_container("kimi_k3", "block_sparse_moe", ("w1", "w3", "w2"))


def _kimi_container(kind: str, moe: str, experts: tuple[str, ...]) -> Model:
    text, _ = kimi_k2()
    config = {
        "architectures": ["KimiForConditionalGeneration"],
        "model_type": kind,
        "text_config": text,
        "vision_config": {"hidden_size": 64},
        "tie_word_embeddings": False,
    }
    shapes = {
        **_kimi_layers("language_model.", moe, experts),
        "vision_tower.encoder.blocks.0.mlp.fc0.weight": (128, 64),
        "vision_tower.encoder.blocks.0.wo.weight": (64, 64),
        "mm_projector.linear_1.weight": (256, 64),
    }
    return config, random_tensors(shapes)


def _kimi_layers(prefix: str, moe: str, experts: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    attention: dict[str, tuple[int, ...]] = {
        "q_a_proj": (64, 256),
        "q_a_layernorm": (64,),
        "q_b_proj": (256, 64),
        "kv_a_proj_with_mqa": (96, 256),
        "kv_a_layernorm": (64,),
        "kv_b_proj": (256, 64),
        "o_proj": (256, 128),
    }
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}model.embed_tokens.weight": (512, 256),
        f"{prefix}model.norm.weight": (256,),
        f"{prefix}lm_head.weight": (512, 256),
    }
    mixture: dict[str, tuple[int, ...]] = {"gate": (4, 256), "gate.e_score_correction_bias": (4,)}
    mixture |= {f"shared_experts.{kind}": shape for kind, shape in EXPERT.items()}
    for expert in range(4):
        pairs = zip(experts, EXPERT.values(), strict=True)
        mixture |= {f"experts.{expert}.{kind}": shape for kind, shape in pairs}
    for layer in range(2):
        start = f"{prefix}model.layers.{layer}."
        shapes |= {f"{start}{norm}.weight": (256,) for norm in NORMS}
        shapes |= {f"{start}self_attn.{kind}.weight": shape for kind, shape in attention.items()}
        name, parts = (moe, mixture) if layer else ("mlp", MLP)
        for kind, shape in parts.items():
            end = "" if kind.endswith("bias") else ".weight"
            shapes[f"{start}{name}.{kind}{end}"] = shape
    return shapes

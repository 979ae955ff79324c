"""Small random models of many architectures, as transformers publishes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 64,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
WIDTH = {"moe_intermediate_size": 24}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2]}
VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 14,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
NO_HEAD_DIM = {key: value for key, value in SIZES.items() if key != "head_dim"}
MODELS = {  # architecture -> model type and config
    "LlamaForCausalLM": ("llama", SIZES),
    "Qwen3ForSequenceClassification": ("qwen3", {**SIZES, "num_labels": 1}),
    "Qwen3Model": ("qwen3", SIZES),
    "Phi3ForCausalLM": ("phi3", {**NO_HEAD_DIM, "bos_token_id": 1, "eos_token_id": 2}),
    "MixtralForCausalLM": ("mixtral", {**SIZES, **EXPERTS}),  # w1, w2, w3
    "GptOssForCausalLM": ("gpt_oss", {**SIZES, **EXPERTS}),  # stacks, gate and up alternate
    "GraniteMoeForCausalLM": ("granitemoe", {**SIZES, **EXPERTS}),
    "JambaForCausalLM": (
        "jamba",
        {
            **NO_HEAD_DIM,
            "num_experts": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 16,
            "use_mamba_kernels": False,
        },
    ),
    "Gemma3ForConditionalGeneration": (
        "gemma3",
        {
            "text_config": {**SIZES, "tie_word_embeddings": True},
            "vision_config": {"model_type": "siglip_vision_model", **TOWER},
            "mm_tokens_per_image": 4,
            "image_token_index": 7,
            "tie_word_embeddings": True,
        },
    ),
    "Qwen3VLForConditionalGeneration": (
        "qwen3_vl",
        {"text_config": {**SIZES, "rope_parameters": ROPE}, "vision_config": VISION},
    ),
    "FalconH1ForCausalLM": (  # attention and a state space in every layer
        "falcon_h1",
        {**SIZES, "mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16, "mamba_d_state": 8},
    ),
    "Qwen3VLMoeForConditionalGeneration": (  # stacks that transformers transposes
        "qwen3_vl_moe",
        {
            "text_config": {**SIZES, **EXPERTS, **WIDTH, "rope_parameters": ROPE},
            "vision_config": VISION,
        },
    ),
    "Qwen3_5MoeForConditionalGeneration": (
        "qwen3_5_moe",
        {
            "text_config": {
                **SIZES,
                **EXPERTS,
                **WIDTH,
                "shared_expert_intermediate_size": 24,
                "layer_types": ["linear_attention", "full_attention"],
                "linear_num_value_heads": 2,
                "linear_num_key_heads": 1,
                "linear_key_head_dim": 16,
                "linear_value_head_dim": 16,
            },
            "vision_config": VISION,
        },
    ),
}


def publish(architecture: str, folder: Path) -> tuple[Path, Any]:
    """Write a small checkpoint as transformers publishes it; return its folder and its model."""
    kind, values = MODELS[architecture]
    config = AutoConfig.for_model(kind, **values)
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(folder)
    return folder, model

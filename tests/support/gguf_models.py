"""Small random models that are written as GGUF, and the condition of tests that ask llama.cpp."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from support import EXAMPLE

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 128, "num_experts_per_tok": 2}
GEMMA = {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 64}
MODELS = {  # class -> what its config says beside the sizes
    "Llama": {"head_dim": 64, "rope_parameters": LLAMA3, "attention_bias": True},
    "Mistral": {"head_dim": 64, "sliding_window": None},
    "Mixtral": {"head_dim": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2": {},
    "Qwen3": {"head_dim": 64, "tie_word_embeddings": True},
    "Qwen2Moe": {**EXPERTS, "shared_expert_intermediate_size": 256},
    "Qwen3Moe": {**EXPERTS, "head_dim": 64, "norm_topk_prob": True},
    "Gemma": {"head_dim": 64},
    "Gemma2": GEMMA,
    "Gemma3": {**GEMMA, "layer_types": ["sliding_attention"] * 2},
    "Phi3": {"original_max_position_embeddings": 2048},
    "GptOss": {
        "head_dim": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is for Linux only"
)


def publish(folder: Path, name: str, **changes: object) -> Any:
    """Write a small model of the class ``name`` with the example's tokenizer; return it in f32."""
    config_class = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
    values = {**SIZES, **MODELS[name], **changes}
    config = getattr(transformers, config_class)(**values)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter + 0.05 * torch.randn_like(parameter)).bfloat16())
    model.bfloat16().save_pretrained(folder)
    for file in (*EXAMPLE.glob("*token*"), EXAMPLE / "chat_template.jinja"):
        shutil.copy(file, folder)
    return model.float()

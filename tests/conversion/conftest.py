"""Checkpoints that a test of conversion may break."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from support.conversion import (
    MXFP4,
    edit,
)
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from qtool.formats import WRITABLE, QuantizedModule, tensor_name
from qtool.scheme import SCHEMES
from qtool.weight import quantize


@pytest.fixture
def copy(sample, tmp_path):
    """A function: the name of a sample to a copy of it that a test may break."""
    return lambda name: Path(shutil.copytree(sample(name), tmp_path / "copy"))


@pytest.fixture
def gpt_oss(tmp_path):
    """A small gpt-oss as OpenAI publishes it, its experts in MXFP4."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "head_dim": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = GptOssConfig(
        num_hidden_layers=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=4096,
        sliding_window=32,
        **sizes,
    )
    GptOssForCausalLM(config).bfloat16().save_pretrained(tmp_path / "gpt-oss")

    def pack(tensors):
        for name in [
            name for name in tensors if name.endswith(("gate_up_proj", "experts.down_proj"))
        ]:
            experts = tensors.pop(name).transpose(1, 2)
            weight = quantize(experts.flatten(0, 1).contiguous(), SCHEMES["MXFP4A16"])
            module = QuantizedModule(
                name, SCHEMES["MXFP4A16"], weight.shape, {}, experts=experts.shape[0]
            )
            tensors |= {
                tensor_name(module, suffix): tensor.clone()
                for suffix, tensor in WRITABLE[MXFP4].write(module, weight).items()
            }

    skipped = [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ]
    own = {"quant_method": "mxfp4", "modules_to_not_convert": skipped}
    return edit(tmp_path / "gpt-oss", pack, lambda config: config.update(quantization_config=own))


@pytest.fixture
def block_fp8(tmp_path):
    """A small Llama in DeepSeek's format, whose keys and values end in the middle of a block."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 384,
        "intermediate_size": 512,
        "num_attention_heads": 12,
        "num_key_value_heads": 6,
        "num_hidden_layers": 2,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=4096, **sizes)).bfloat16().save_pretrained(
        tmp_path / "llama"
    )

    def pack(tensors):
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            weight = quantize(tensors[name], SCHEMES["FP8_BLOCK"])
            tensors |= {name: weight.data, f"{name}_scale_inv": weight.scale.float()}

    own = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    }
    return edit(tmp_path / "llama", pack, lambda config: config.update(quantization_config=own))

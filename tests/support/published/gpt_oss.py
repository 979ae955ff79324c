"""gpt-oss as OpenAI publishes it: MXFP4 experts, all of a layer in one tensor."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from support.published import Expected, layout
from support.published.floats import mxfp4
from support.published.models import ATTENTION, NORMS, SIZES, random_tensors, write

EXPERTS = {"gate_up_proj": (4, 256, 256), "down_proj": (4, 256, 128)}
CONFIG = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    **SIZES,
    "intermediate_size": 128,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 128,
    "attention_bias": True,
}


def blocks(stack: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return the tensors of a stack [E, N, K] by the end of their names, and what they mean, the
    experts one below another.
    """
    experts, rows, columns = stack.shape
    parts, dense = mxfp4(stack.reshape(-1, columns).float())
    groups = (experts, rows, columns // 32)
    return {
        "_blocks": parts["weight"].reshape(*groups, 16),
        "_scales": parts["weight_scale"].reshape(groups),
    }, dense


@layout("openai-gpt-oss")
def gpt_oss(folder: Path) -> Expected:
    """MXFP4 experts in stacks, blocks and scales beside each other."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (512, 256),
        "model.norm.weight": (256,),
        "lm_head.weight": (512, 256),
    }
    stacks: dict[str, tuple[int, ...]] = {}
    for index in range(2):
        start = f"model.layers.{index}."
        shapes |= {f"{start}{norm}.weight": (256,) for norm in NORMS}
        shapes[f"{start}self_attn.sinks"] = (4,)
        shapes |= {f"{start}mlp.router.weight": (4, 256), f"{start}mlp.router.bias": (4,)}
        for kind, shape in ATTENTION.items():
            shapes[f"{start}self_attn.{kind}.weight"] = shape
            shapes[f"{start}self_attn.{kind}.bias"] = shape[:1]
        for kind, shape in EXPERTS.items():
            stacks[f"{start}mlp.experts.{kind}"] = shape
            shapes[f"{start}mlp.experts.{kind}_bias"] = shape[:2]
    expected: Expected = {}
    tensors: dict[str, Tensor] = {}
    for name, stack in random_tensors(stacks).items():
        parts, expected[name] = blocks(stack.to(torch.float32))
        tensors |= {name + suffix: part for suffix, part in parts.items()}
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]
    config = {"quant_method": "mxfp4", "modules_to_not_convert": skipped}
    write(folder, (CONFIG, random_tensors(shapes)), {}, config, tensors=tensors)
    return expected

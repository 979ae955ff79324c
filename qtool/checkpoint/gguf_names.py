"""The architectures of GGUF files that qtool reads and writes: their tensors in the names of
transformers, what llama.cpp's converter does to them, and what llama.cpp computes without being
told.

Source: gguf 0.19, `tensor_mapping.py`; llama.cpp, `convert_hf_to_gguf.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
MLP = {
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NORM = {"ffn_norm": "post_attention_layernorm"}
FOUR_NORMS = {  # Gemma 2 and 3
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
ROUTER = {"ffn_gate_inp": "mlp.gate"}
SHARED_EXPERT = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
"""Tensors that stack the experts of a layer -> the layer of each."""
GATE_UP = "gate_up_proj"
"""The tensor in which transformers stacks the gate and up projections of all experts."""
SINKS = "self_attn.sinks"
ROTATED = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
"""Layers whose rows rotary embeddings rotate -> the field of the config that counts their heads."""
LLAMA3_FACTORS = "rope_freqs.weight"
LONG_FACTORS = {
    "rope_factors_long.weight": "long_factor",
    "rope_factors_short.weight": "short_factor",
}
"""Tensors of factors -> their fields in the scaling of Phi 3."""
ROPE_FACTORS = (LLAMA3_FACTORS, *LONG_FACTORS)
"""Tensors that become part of the config."""
LAYER_TENSOR = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.(.+)\.(weight|bias)")
EXPERT_TENSOR = re.compile(r"(ffn_(?:gate|up|down))\.(0|[1-9][0-9]{0,3})")
"""One expert of a layer, as files of Mixtral were until April 2024: ``ffn_gate.3``."""
MODEL_TENSOR = re.compile(r"(.+)\.(weight|bias)")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A family of models as GGUF files have it."""

    name: str
    """In GGUF's words, e.g. ``qwen3moe``."""
    model_type: str
    """In transformers' words, e.g. ``qwen3_moe``."""
    class_name: str
    layer: Mapping[str, str]
    """The tensors of a layer -> its modules, without experts."""
    experts: Literal["apart", "stacked"] | None = None
    """Whether transformers' files have each expert apart, or all in one tensor of inputs by outputs
    in which the rows of gate and up alternate.
    """
    experts_module: str = "mlp.experts"
    """The module of a layer that has its experts."""
    expert_layers: Mapping[str, str] = field(default_factory=lambda: EXPERTS)
    """The tensors of `EXPERTS` -> what transformers calls the layer of each expert."""
    is_permuted: bool = False
    """Whether the rows of q and k are in the order of ggml's rotary embedding."""
    norm_shift: float = 0.0
    """What the converter adds to the weights of norms."""
    activations: tuple[str, ...] = ("silu",)
    """What transformers' configs call the activation of the MLP, the usual name first."""
    normalizes_experts: bool | None = None
    """Whether llama.cpp divides the weights of the chosen experts by their sum; None where the
    config has no choice.
    """
    full_attention_every: int | None = None
    """Every how many layers one has full attention and the others a window; None where all have
    full attention.
    """
    layers_of_27b: int | None = None
    """The number of layers that makes llama.cpp scale queries by the width of all heads."""
    model: Mapping[str, str] = field(default_factory=lambda: MODEL)
    """The tensors outside of layers -> modules."""

    @property
    def is_gemma(self) -> bool:
        """Whether it is a generation of Gemma."""
        return self.name in ("gemma", "gemma2", "gemma3")

    def norm_shift_of(self, stem: str) -> float:
        """Return what the converter adds to the numbers of ``stem``, e.g. ``attn_norm``."""
        return self.norm_shift if stem.endswith("norm") else 0.0

    def permuted_heads(self, stem: str) -> str | None:
        """Return the field of the config that counts the heads in which the converter permutes the
        rows of ``stem``, e.g. ``attn_q``; None when it leaves them in their order.
        """
        return ROTATED.get(stem) if self.is_permuted else None


ARCHITECTURES: Mapping[str, Architecture] = {
    each.name: each
    for each in (
        Architecture(
            name="llama",
            model_type="llama",
            class_name="LlamaForCausalLM",
            layer={**ATTENTION, **NORM, **MLP},
            is_permuted=True,
        ),
        Architecture(
            name="qwen2",
            model_type="qwen2",
            class_name="Qwen2ForCausalLM",
            layer={**ATTENTION, **NORM, **MLP},
        ),
        Architecture(
            name="qwen3",
            model_type="qwen3",
            class_name="Qwen3ForCausalLM",
            layer={**ATTENTION, **QK_NORMS, **NORM, **MLP},
        ),
        Architecture(
            name="qwen2moe",
            model_type="qwen2_moe",
            class_name="Qwen2MoeForCausalLM",
            layer={**ATTENTION, **NORM, **ROUTER, **SHARED_EXPERT},
            experts="apart",
            normalizes_experts=False,
        ),
        Architecture(
            name="qwen3moe",
            model_type="qwen3_moe",
            class_name="Qwen3MoeForCausalLM",
            layer={**ATTENTION, **QK_NORMS, **NORM, **ROUTER},
            experts="apart",
            normalizes_experts=True,
        ),
        Architecture(
            name="gemma",
            model_type="gemma",
            class_name="GemmaForCausalLM",
            layer={**ATTENTION, **NORM, **MLP},
            norm_shift=1.0,
            activations=("gelu_pytorch_tanh", "gelu"),
        ),
        Architecture(
            name="gemma2",
            model_type="gemma2",
            class_name="Gemma2ForCausalLM",
            layer={**ATTENTION, **FOUR_NORMS, **MLP},
            norm_shift=1.0,
            activations=("gelu_pytorch_tanh",),
            full_attention_every=2,
            layers_of_27b=46,
        ),
        Architecture(
            name="gemma3",
            model_type="gemma3_text",
            class_name="Gemma3ForCausalLM",
            layer={**ATTENTION, **QK_NORMS, **FOUR_NORMS, **MLP},
            norm_shift=1.0,
            activations=("gelu_pytorch_tanh",),
            full_attention_every=6,
            layers_of_27b=62,
        ),
        Architecture(
            name="phi3",
            model_type="phi3",
            class_name="Phi3ForCausalLM",
            layer={
                "attn_norm": "input_layernorm",
                "attn_qkv": "self_attn.qkv_proj",
                "attn_output": "self_attn.o_proj",
                **NORM,
                "ffn_up": "mlp.gate_up_proj",
                "ffn_down": "mlp.down_proj",
            },
        ),
        Architecture(
            name="gpt-oss",
            model_type="gpt_oss",
            class_name="GptOssForCausalLM",
            layer={
                **ATTENTION,
                "post_attention_norm": "post_attention_layernorm",
                "attn_sinks": SINKS,
                "ffn_gate_inp": "mlp.router",
            },
            experts="stacked",
            full_attention_every=2,
        ),
    )
}
WITH_EXPERTS: Mapping[str, Architecture] = {
    "llama": Architecture(
        name="llama",
        model_type="mixtral",
        class_name="MixtralForCausalLM",
        layer={**ATTENTION, **NORM, "ffn_gate_inp": "block_sparse_moe.gate"},
        experts="apart",
        experts_module="block_sparse_moe.experts",
        expert_layers={"ffn_gate_exps": "w1", "ffn_up_exps": "w3", "ffn_down_exps": "w2"},
        is_permuted=True,
    )
}
"""Architectures that are another class where they have experts."""
MODEL_TYPES: Mapping[str, Architecture] = {
    each.model_type: each for each in (*ARCHITECTURES.values(), *WITH_EXPERTS.values())
}


@dataclass(frozen=True)
class Target:
    """Where a tensor of a GGUF file belongs."""

    name: str
    """Of the tensor in transformers' names; for experts, of their module."""
    stem: str
    """Its own name without its layer, e.g. ``attn_q``."""
    expert_layer: str = ""
    """One of `Architecture.expert_layers`, e.g. ``gate_proj``, where it stacks experts."""
    suffix: str = "weight"


def stem_of(tensor: str) -> str:
    """Return the name of ``tensor`` without layer and suffix: ``attn_q`` of
    ``blk.0.attn_q.weight``.
    """
    found = LAYER_TENSOR.fullmatch(tensor)
    return found[2] if found else tensor.rpartition(".")[0]


def target_of(architecture: Architecture, tensor: str) -> Target | None:
    """Return where ``tensor`` belongs; None when the architecture has no such tensor."""
    found = LAYER_TENSOR.fullmatch(tensor)
    if found is None:
        return _target_outside(architecture, tensor)
    number, stem, suffix = found.groups()
    prefix = f"model.layers.{number}"
    if stem in architecture.layer:
        module = architecture.layer[stem]
        # a parameter of its module, not a module
        name = f"{prefix}.{module}" if module == SINKS else f"{prefix}.{module}.{suffix}"
        return Target(name, stem, "", suffix)
    if architecture.experts is None:
        return None
    module, layers = f"{prefix}.{architecture.experts_module}", architecture.expert_layers
    if stem in layers:
        return Target(module, stem, layers[stem], suffix)
    expert = EXPERT_TENSOR.fullmatch(stem)
    if expert is None or architecture.experts == "stacked":
        return None
    return Target(f"{module}.{expert[2]}.{layers[f'{expert[1]}_exps']}.{suffix}", stem, "", suffix)


def _target_outside(architecture: Architecture, tensor: str) -> Target | None:
    """Return where ``tensor``, which is of no layer, belongs; None when nowhere."""
    found = MODEL_TENSOR.fullmatch(tensor)
    if found is None or found[1] not in architecture.model:
        return None
    stem, suffix = found.groups()
    return Target(f"{architecture.model[stem]}.{suffix}", stem, "", suffix)

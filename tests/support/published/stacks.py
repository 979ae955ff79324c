"""Quantized stacks of experts, one tensor for all experts of a layer: ModelOpt's, in the order of
Llama 4, and those of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from support.published import Expected, layout
from support.published.floats import fp8_block, fp8_tensor, nvfp4
from support.published.models import SIZES, Json, Quantizer, Stored, random_tensors, write

FP8 = torch.float8_e4m3fn
LAYERS = r"layers\.\d.*(self_attn|shared_expert|mlp)"
KINDS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
VISION: Json = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
LLAMA_4: Json = {
    "architectures": ["Llama4ForConditionalGeneration"],
    "model_type": "llama4",
    "text_config": {
        **SIZES,
        "model_type": "llama4_text",
        "intermediate_size": 128,
        "intermediate_size_mlp": 384,
        "interleave_moe_layer_step": 1,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "no_rope_layers": [1, 0],
        "attention_chunk_size": 128,
    },
    "vision_config": {
        **VISION,
        "model_type": "llama4_vision_model",
        "vision_output_dim": 64,
        "projector_input_dim": 64,
        "projector_output_dim": 64,
    },
}
GEMMA_4: Json = {
    **SIZES,
    "architectures": ["Gemma4ForCausalLM"],
    "model_type": "gemma4_text",
    "global_head_dim": 128,
    "hidden_size_per_layer_input": 0,
    "intermediate_size": 256,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 64,
    "tie_word_embeddings": True,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 128,
}
MISTRAL_SMALL_4: Json = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "model_type": "mistral3",
    "text_config": {
        **{name: size for name, size in SIZES.items() if name != "head_dim"},
        "model_type": "mistral4",
        "intermediate_size": 384,
        "moe_intermediate_size": 128,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "q_lora_rank": 128,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "num_key_value_heads": 4,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "original_max_position_embeddings": 256,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 32},
}
Stack = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]
"""Makes of [E, N, K] the tensors by what stands behind the name of the stack, and their meaning."""


def _of_all(stack: Tensor, quantizer: Quantizer) -> tuple[dict[str, Tensor], Tensor]:
    """Round all experts as one matrix."""
    parts, dense = quantizer(stack.flatten(0, 1))
    stored = {
        "" if suffix == "weight" else f"_{suffix}": part.unflatten(0, stack.shape[:2])
        if part.dim()
        else part
        for suffix, part in parts.items()
    }
    return stored, dense.reshape(stack.shape)


def _of_each(
    stack: Tensor, quantizer: Quantizer, names: Mapping[str, str]
) -> tuple[dict[str, Tensor], Tensor]:
    """Round one expert after another; ``names``: what transformers calls their tensors."""
    stored, dense = zip(*map(quantizer, stack), strict=True)
    tensors = {
        names[suffix]: torch.stack([parts[suffix] for parts in stored]) for suffix in stored[0]
    }
    return tensors, torch.stack(dense)


def _write(
    folder: Path,
    config: Json,
    quantization_config: Json,
    stack: Stack,
    *,
    others: Mapping[str, Quantizer],
    is_transposed: bool,
    is_text_alone: bool = False,
) -> Expected:
    """Write a model of ``config`` whose experts lie in stacks; see `support.published.models.write`.

    Args:
        folder: to make.
        config: of the model.
        quantization_config: of config.json.
        stack: what it does to the experts.
        others: what it does to the other layers.
        is_transposed: whether experts lie [inputs, outputs].
        is_text_alone: whether only the language model is there, by its own names.
    """
    weights = random_tensors(_shapes(config, is_text_alone=is_text_alone))
    tensors: dict[str, Tensor] = {}
    expected: Expected = {}
    for name in [name for name in weights if weights[name].dim() == 3 and ".experts." in name]:
        matrices = weights.pop(name).float()
        parts, dense = stack(matrices.mT.contiguous() if is_transposed else matrices)
        for suffix, part in parts.items():
            tensors[name + suffix] = part.mT if is_transposed and part.dim() == 3 else part
        holder, _, projection = name.rpartition(".")
        for expert, matrix in enumerate(dense):
            kinds = KINDS[projection]
            for kind, rows in zip(kinds, matrix.chunk(len(kinds)), strict=True):
                expected[f"{holder}.{expert}.{kind}"] = rows
    model = config, weights
    return expected | write(folder, model, others, quantization_config, tensors=tensors)


def _shapes(config: Json, *, is_text_alone: bool = False) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of a model, by their names in files."""
    import transformers

    settings = transformers.AutoConfig.for_model(**config)
    model_class = getattr(transformers, config["architectures"][0])
    if is_text_alone:
        settings, model_class = settings.get_text_config(), transformers.Llama4ForCausalLM
    with torch.device("meta"):
        model = model_class(settings)
    shared = () if not settings.tie_word_embeddings else ("lm_head.weight",)
    shapes = {}
    for name, tensor in model.state_dict().items():
        if name in shared:
            continue
        if config is MISTRAL_SMALL_4:
            name = name.removeprefix("model.").replace("language_model.", "language_model.model.")
            name = name.replace("lm_head", "language_model.lm_head")
        shapes[name] = tuple(tensor.shape)
    return shapes


def _modelopt(algorithm: Json) -> Json:
    return {
        "quant_method": "modelopt",
        **algorithm,
        "ignore": [
            "language_model.lm_head",
            "language_model.model.layers.*.feed_forward.router",
            "multi_modal_projector*",
            "vision_model*",
        ],
        "producer": {"name": "modelopt", "version": "0.33.0"},
    }


def _cached(weight: Tensor, quantizer: Quantizer, kind: str) -> Stored:
    parts, dense = quantizer(weight)
    return {**parts, f"{kind}_scale": torch.tensor(0.02)}, dense


@layout("nvidia-llama-4-fp8")
def llama_4_fp8(folder: Path) -> Expected:
    """Experts in stacks of inputs by outputs, one scale for all experts; the language model alone."""
    static = partial(fp8_tensor, input_scale=0.01)
    config = _modelopt({"quant_algo": "FP8"})
    config["ignore"] = ["lm_head", "model.layers.*.feed_forward.router"]
    config["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    caches = {rf"{kind}_proj": partial(_cached, quantizer=static, kind=kind) for kind in "kv"}
    return _write(
        folder,
        LLAMA_4,
        config,
        partial(_of_all, quantizer=static),
        others={**caches, LAYERS: static},
        is_transposed=True,
        is_text_alone=True,
    )


@layout("nvidia-llama-4-nvfp4")
def llama_4_nvfp4(folder: Path) -> Expected:
    """The same as NVFP4: pairs and groups of inputs, with the outputs side by side."""
    static = partial(nvfp4, input_amax=4.0)
    return _write(
        folder,
        LLAMA_4,
        _modelopt({"quant_algo": "NVFP4", "group_size": 16}),
        partial(_of_all, quantizer=static),
        others={"vision": None, LAYERS: static},
        is_transposed=True,
    )


@layout("mistral-small-4-fp8")
def mistral_small_4(folder: Path) -> Expected:
    """Experts in stacks, each with one scale for its weights and one for its inputs."""

    def static(weight: Tensor) -> Stored:
        parts, dense = fp8_tensor(weight, scale_name="weight_scale_inv")
        return {**parts, "activation_scale": torch.tensor(0.01)}, dense

    def expert(weight: Tensor) -> Stored:
        parts, dense = static(weight)
        return {**parts, "weight_scale_inv": parts["weight_scale_inv"].reshape(1, 1)}, dense

    names = {
        "weight": "",
        "weight_scale_inv": "_scale_inv",
        "activation_scale": "_activation_scale",
    }
    return _write(
        folder,
        MISTRAL_SMALL_4,
        {
            "activation_scheme": "static",
            "dequantize": False,
            "modules_to_not_convert": [
                "model.vision_tower",
                "model.multi_modal_projector",
                "lm_head",
            ],
            "quant_method": "fp8",
            "weight_block_size": None,
        },
        partial(_of_each, quantizer=expert, names=names),
        others={"vision_tower": None, r"mlp\.gate$": None, LAYERS: static},
        is_transposed=False,
    )


@layout("transformers-fp8-experts")
def gemma_4_fp8(folder: Path) -> Expected:
    """Experts in stacks, in blocks; the scales of other layers are called ``scale``."""
    return _write(
        folder,
        GEMMA_4,
        {
            "activation_scheme": "dynamic",
            "dequantize": False,
            "modules_to_convert": None,
            "modules_to_not_convert": ["lm_head"],
            "quant_method": "fp8",
            "scale_fmt": "float",
            "weight_block_size": [128, 128],
        },
        partial(
            _of_each,
            quantizer=fp8_block,
            names={"weight": "", "weight_scale_inv": "_scale_inv"},
        ),
        others={LAYERS: partial(fp8_block, scale_name="scale")},
        is_transposed=False,
    )

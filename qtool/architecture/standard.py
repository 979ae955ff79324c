"""Decoders built like Llama: headers alone tell whether config and tensors are one model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from qtool.checkpoint import Checkpoint
from qtool.checkpoint.config_values import is_dtype, is_flag, is_positive, is_size
from qtool.checkpoint.strict_json import Json
from qtool.formats import Layout, unquantized_tensors
from qtool.modules import is_mtp_layer

Shape = tuple[int, ...]
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
EXPERT_SIZES = ("moe_intermediate_size", "num_experts_per_tok")
LLAMA3_ROPE = (
    "factor",
    "high_freq_factor",
    "low_freq_factor",
    "original_max_position_embeddings",
)
ROTARY_BUFFER = "rotary_emb.inv_freq"  # old versions of transformers saved it


def is_standard(checkpoint: Checkpoint, layout: Layout | None) -> bool:
    """Whether ``checkpoint`` is of such an architecture, with nothing unusual in its config, and
    has the tensors that the config describes, no more and no less.
    """
    config = checkpoint.config
    quantization = config.get("quantization_config")
    if quantization is not None and not isinstance(quantization, Mapping):
        return False
    if CLASSES.get(str(config.get("model_type"))) not in (config.get("architectures") or ()):
        return False
    if not _has_usual_fields(config) or not _has_usual_rope(config):
        return False
    expected = dict(_tensors(config))
    found = dict(_found(checkpoint, layout))
    if checkpoint.tied_embeddings:
        found.pop("lm_head.weight", None)
    else:
        expected["lm_head.weight"] = (config["vocab_size"], config["hidden_size"])
    return expected == found


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _is_token(value: object) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(type(each) is int for each in values)


def _are_layer_types(value: object) -> bool:
    return isinstance(value, list) and {*value} <= {"full_attention", "sliding_attention"}


FIELDS: Mapping[str, Callable[[object], bool]] = {  # transformers checks their types
    **dict.fromkeys((*SIZES, *EXPERT_SIZES), is_size),
    **dict.fromkeys(("num_experts", "num_local_experts", "decoder_sparse_step"), is_size),
    **dict.fromkeys(("head_dim", "max_position_embeddings", "sliding_window"), is_size),
    **dict.fromkeys(("initializer_range", "router_aux_loss_coef"), _is_number),
    **dict.fromkeys(("pretraining_tp", "max_window_layers", "chunk_size_feed_forward"), _is_number),
    **dict.fromkeys(("attention_dropout", "rms_norm_eps"), _is_number),
    **dict.fromkeys(("rope_theta", "partial_rotary_factor"), is_positive),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), _is_token),
    **dict.fromkeys(("dtype", "torch_dtype"), is_dtype),
    **dict.fromkeys(("attention_bias", "mlp_bias", "tie_word_embeddings", "use_cache"), is_flag),
    **dict.fromkeys(("use_sliding_window", "norm_topk_prob", "output_router_logits"), is_flag),
    **dict.fromkeys(("output_hidden_states", "output_attentions", "return_dict"), is_flag),
    "hidden_act": lambda value: value == "silu",
    "transformers_version": lambda value: isinstance(value, str),
    "layer_types": _are_layer_types,
    "mlp_only_layers": lambda value: value == [],
}
NULLABLE = frozenset(
    {
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "head_dim",
        "layer_types",
        "mlp_only_layers",
        "pad_token_id",
        "pretraining_tp",
        "sliding_window",
        "torch_dtype",
        "transformers_version",
    }
)
UNUSUAL = frozenset(
    {
        "auto_map",
        "id2label",
        "is_encoder_decoder",
        "label2id",
        "per_layer_config",
        "problem_type",
        "text_config",
        "llm_config",
    }
)


def _has_usual_fields(config: Json) -> bool:
    if UNUSUAL & {key for key, value in config.items() if value not in (None, False)}:
        return False
    sizes = (*SIZES, *(EXPERT_SIZES if config["model_type"] == "qwen3_moe" else ()))
    if any(config.get(key) is None for key in sizes):
        return False
    for key, value in config.items():
        if key in FIELDS and not (value is None and key in NULLABLE) and not FIELDS[key](value):
            return False
    kinds = config.get("layer_types")
    if kinds is not None and len(kinds) != config["num_hidden_layers"]:
        return False
    heads = config["num_attention_heads"]
    is_whole = not config["hidden_size"] % heads and not heads % config["num_key_value_heads"]
    return is_whole and config.get("decoder_sparse_step", 1) == 1


def _has_usual_rope(config: Json) -> bool:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", "default")
    if not is_positive(rope.get("rope_theta", 1)):
        return False
    if kind == "llama3":
        return all(is_positive(rope.get(key)) for key in LLAMA3_ROPE)
    return bool(kind == "default")


def _tensors(config: Json) -> Iterator[tuple[str, Shape]]:
    """Yield the tensors that ``config`` describes, except the output head."""
    hidden = config["hidden_size"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    yield "model.norm.weight", (hidden,)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        for name, shape in (*_attention(config), *_mlp(config)):
            yield f"{prefix}.{name}", shape


def _attention(config: Json) -> Iterator[tuple[str, Shape]]:
    kind, hidden, heads = config["model_type"], config["hidden_size"], config["num_attention_heads"]
    default = 128 if kind in ("qwen3", "qwen3_moe") else hidden // heads
    head_dim = config.get("head_dim") or default
    rows = {
        "q_proj": heads * head_dim,
        "k_proj": config["num_key_value_heads"] * head_dim,
        "v_proj": config["num_key_value_heads"] * head_dim,
    }
    has_bias = config.get("attention_bias") is True and kind not in ("mistral", "qwen2")
    for name, size in rows.items():
        yield f"self_attn.{name}.weight", (size, hidden)
        if has_bias or kind == "qwen2":
            yield f"self_attn.{name}.bias", (size,)
    yield "self_attn.o_proj.weight", (hidden, rows["q_proj"])
    if has_bias:
        yield "self_attn.o_proj.bias", (hidden,)
    if kind in ("qwen3", "qwen3_moe"):
        yield "self_attn.q_norm.weight", (head_dim,)
        yield "self_attn.k_norm.weight", (head_dim,)


def _mlp(config: Json) -> Iterator[tuple[str, Shape]]:
    hidden = config["hidden_size"]
    if config["model_type"] != "qwen3_moe":
        has_bias = config["model_type"] == "llama" and config.get("mlp_bias") is True
        yield from _gated("mlp", hidden, config["intermediate_size"], has_bias=has_bias)
        return
    experts = config.get("num_local_experts") or config.get("num_experts") or 128
    yield "mlp.gate.weight", (experts, hidden)
    for expert in range(experts):
        name = f"mlp.experts.{expert}"
        yield from _gated(name, hidden, config["moe_intermediate_size"], has_bias=False)


def _gated(name: str, hidden: int, inner: int, *, has_bias: bool) -> Iterator[tuple[str, Shape]]:
    for part in ("gate_proj", "up_proj", "down_proj"):
        rows, columns = (hidden, inner) if part == "down_proj" else (inner, hidden)
        yield f"{name}.{part}.weight", (rows, columns)
        if has_bias:
            yield f"{name}.{part}.bias", (rows,)


def _found(checkpoint: Checkpoint, layout: Layout | None) -> Iterator[tuple[str, Shape]]:
    """Yield the tensors that there are, quantized layers as the matrices they stand for."""
    for name, shape in model_tensors(checkpoint, layout).items():
        if not is_mtp_layer(checkpoint, name) and not name.endswith(ROTARY_BUFFER):
            yield name, shape


def model_tensors(checkpoint: Checkpoint, layout: Layout | None) -> dict[str, Shape]:
    """Return the shapes of a model's tensors, quantized layers as the matrices they stand for."""
    shapes = {
        name: checkpoint.tensors[name].shape for name in unquantized_tensors(checkpoint, layout)
    }
    for name, module in layout.modules.items() if layout else ():
        if module.experts > 1:  # as transformers stacks them: inputs before outputs
            rows, columns = module.shape
            shapes[name] = (module.experts, columns, rows // module.experts)
            if bias := module.tensors.get("bias"):
                shapes[f"{name}_bias"] = bias.shape
            continue
        shapes[f"{name}.weight"] = module.shape
        if bias := module.tensors.get("bias"):
            shapes[f"{name}.bias"] = bias.shape
    return shapes

"""config.json and generation_config.json of a GGUF file, from its metadata.

Sources: llama.cpp, `convert_hf_to_gguf.py` and `llama-model.cpp`; transformers 5.17,
`integrations/ggml.py`.
"""

from __future__ import annotations

import math
from array import array

from qtool.checkpoint.gguf_fields import Fields, short
from qtool.checkpoint.gguf_header import GgufHeader
from qtool.checkpoint.gguf_names import ARCHITECTURES, WITH_EXPERTS, Architecture
from qtool.checkpoint.gguf_rope import rope_fields
from qtool.checkpoint.gguf_types import QUANTIZED
from qtool.checkpoint.gguf_values import Value
from qtool.checkpoint.strict_json import JsonDict, refused

SAMPLING_PREFIX = "general.sampling."
SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
"""Keys of ``general.sampling`` -> fields of generation_config.json."""
# texts of control tokens that end an answer, which llama.cpp finds by their text as well
ENDS = frozenset(
    {
        *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>"),
        *("<|return|>", "<|call|>", "<|end_of_text|>"),
    }
)
CONTROL = 3  # in tokenizer.ggml.token_type


def architecture_of(header: GgufHeader) -> Architecture:
    """Return the architecture that ``header`` names.

    Raises: CheckpointRefused, when qtool does not read it.
    """
    file = header.files[0]
    name = header.metadata.get("general.architecture")
    if not isinstance(name, str):
        raise refused(
            "E_GGUF_ARCHITECTURE",
            f"{file}: general.architecture is {name!r:.40}, and must name the architecture",
        )
    if name not in ARCHITECTURES:
        raise refused(
            "E_GGUF_ARCHITECTURE",
            f"{file} is of the architecture `{name[:80]}`, which qtool does not read from GGUF",
            f"llama.cpp may load it; qtool reads {', '.join(ARCHITECTURES)}, and other "
            "architectures from safetensors",
        )
    has_experts = bool(header.metadata.get(f"{name}.expert_count"))
    return WITH_EXPERTS.get(name, ARCHITECTURES[name]) if has_experts else ARCHITECTURES[name]


def config_of(header: GgufHeader, architecture: Architecture) -> JsonDict:
    """Return config.json as transformers writes it.

    Raises: CheckpointRefused, for keys that qtool does not know and values that do not fit.
    """
    fields = Fields(header, architecture)
    embeddings = fields.tensor("token_embd.weight")
    config: JsonDict = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        **fields.values(),
        "vocab_size": embeddings.shape[0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "hidden_act": architecture.activations[0],
        **_tokens(header),
        "dtype": _dtype(header),
    }
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    config.update(rope_fields(fields, config))
    config.update(_family(fields, config))
    if any(tensor.type in QUANTIZED for tensor in header.tensors.values()):
        config["quantization_config"] = {"quant_method": "gguf"}
    return config


def generation_config_of(header: GgufHeader) -> JsonDict:
    """Return generation_config.json: the tokens that end an answer, and how tokens are drawn."""
    config = _tokens(header)
    ends = _ends(header)
    if ends:
        config["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    for key, name in SAMPLING.items():
        value = header.metadata.get(f"{SAMPLING_PREFIX}{key}")
        if value is not None:
            config[name] = _sampling_number(header, key, value)
            config["do_sample"] = True
    return config


def notes_on_sampling(header: GgufHeader) -> tuple[str, ...]:
    """Return in a line which of the file's settings for sampling are not used."""
    keys = [key for key in header.metadata if key.startswith(SAMPLING_PREFIX)]
    unused = sorted(key for key in keys if key.removeprefix(SAMPLING_PREFIX) not in SAMPLING)
    return (f"settings for sampling that are not used: {', '.join(unused)}",) if unused else ()


def _sampling_number(header: GgufHeader, key: str, value: Value) -> float:
    """Return ``value``. Raises: CheckpointRefused, when it is not what ``key`` takes."""
    if type(value) is int or (key != "top_k" and type(value) is float and math.isfinite(value)):
        assert isinstance(value, int | float)
        return short(value)
    raise refused(
        "E_GGUF_KEY",
        f"{header.files[0]}: `{SAMPLING_PREFIX}{key}` is {value!r:.80}, and must be "
        f"{'a whole number' if key == 'top_k' else 'a finite number'}",
    )


def _ends(header: GgufHeader) -> list[int]:
    """Return the tokens that end an answer."""
    named = [header.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    ends = [end for end in named if type(end) is int]
    return [*dict.fromkeys([*ends, *_ends_by_text(header)])]


def _ends_by_text(header: GgufHeader) -> list[int]:
    """Return the control tokens that end an answer by their text."""
    tokens = header.metadata.get("tokenizer.ggml.tokens", ())
    types = header.metadata.get("tokenizer.ggml.token_type", ())
    if not isinstance(tokens, tuple) or not isinstance(types, array):
        return []
    pairs = enumerate(zip(tokens, types, strict=False))
    return [number for number, (text, kind) in pairs if kind == CONTROL and text in ENDS]


def _tokens(header: GgufHeader) -> JsonDict:
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
    found = {
        name: header.metadata.get(f"tokenizer.ggml.{key}_token_id") for key, name in names.items()
    }
    tokens = {name: value for name, value in found.items() if type(value) is int}
    # the defaults of classes may lie beyond a small vocabulary
    return {"pad_token_id": None, **tokens}


def _dtype(header: GgufHeader) -> str:
    kinds = [tensor.type for tensor in header.tensors.values() if len(tensor.shape) > 1]
    if any(kind in QUANTIZED or kind == "BF16" for kind in kinds):
        return "bfloat16"
    return "float16" if "F16" in kinds else "float32"


def _family(fields: Fields, config: JsonDict) -> JsonDict:
    """Return what only some architectures have in their config."""
    name = fields.architecture.name
    if fields.architecture.experts and not config.get("num_experts"):
        raise fields.refused("expert_count", "the number of experts")
    if fields.architecture.model_type == "mixtral":
        return _mixture_fields(config)
    if name == "llama":
        return _llama(fields, config)
    if name in ("qwen3moe", "qwen2moe"):
        return {
            "moe_intermediate_size": fields.experts("blk.0.ffn_gate_exps.weight").shape[1],
            "norm_topk_prob": fields.architecture.normalizes_experts,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            **_shared_expert(fields),
        }
    if fields.architecture.is_gemma:
        return _gemma(fields, config)
    if name == "gpt-oss":
        return {**_mixture_fields(config), "attention_bias": True}
    return {}


def _mixture_fields(config: JsonDict) -> JsonDict:
    """Return the fields that Mixtral and gpt-oss, whose MLPs are all experts, call otherwise."""
    return {
        "num_local_experts": config.pop("num_experts"),
        "intermediate_size": config.pop("moe_intermediate_size", config["intermediate_size"]),
    }


def _llama(fields: Fields, config: JsonDict) -> JsonDict:
    config.pop("num_experts", None)  # 0
    config.pop("num_experts_per_tok", None)
    if config.get("sliding_window"):
        return {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    tensors = fields.header.tensors
    return {
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
    }


def _shared_expert(fields: Fields) -> JsonDict:
    tensor = fields.header.tensors.get("blk.0.ffn_gate_shexp.weight")
    return {"shared_expert_intermediate_size": tensor.shape[0]} if tensor else {}


def _gemma(fields: Fields, config: JsonDict) -> JsonDict:
    name = fields.architecture.name
    found: JsonDict = {"hidden_activation": config["hidden_act"]}
    if name == "gemma":
        return found
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    is_27b = config["num_hidden_layers"] == fields.architecture.layers_of_27b
    found["query_pre_attn_scalar"] = hidden // heads if is_27b else config["head_dim"]
    windowed = _windowed(fields, config["num_hidden_layers"])
    kinds = ("full_attention", "sliding_attention")
    found["layer_types"] = [kinds[each] for each in windowed]
    if name == "gemma3":
        theta = config.pop("rope_theta", 1_000_000.0)
        scaling = config.pop("rope_scaling", None) or {"rope_type": "default"}
        local = config.pop("rope_local_base_freq", 10_000.0)
        found["rope_parameters"] = {
            "full_attention": {**scaling, "rope_theta": theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }
    return found


def _windowed(fields: Fields, count: int) -> list[bool]:
    """Return whether each of ``count`` layers of a Gemma sees a window alone."""
    every = fields.architecture.full_attention_every
    said = fields.found.get("attention.sliding_window_pattern", every)
    if isinstance(said, array) and len(said) == count:
        return [*map(bool, said)]
    if type(said) is int and said > 0:
        return [bool((layer + 1) % said) for layer in range(count)]
    raise fields.refused("attention.sliding_window_pattern", "a number, or one for each layer")

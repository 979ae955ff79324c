"""Checks the values of config.json: sizes, constants, rotary embeddings and dtypes.

transformers checks most of them too, but not all, and only once torch is imported. A null is the
default of the class.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from qtool.checkpoint.strict_json import Json, refused
from qtool.errors import CheckpointRefused

MAX_SIZE = 1 << 31
MAX_LAYERS = 1 << 16  # each becomes an object
SIZES = frozenset(
    {
        "head_dim",
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "v_head_dim",
        "vocab_size",
    }
)
COUNTS = frozenset(  # zero where a model has none
    {
        "decoder_sparse_step",
        "first_k_dense_replace",
        "kv_lora_rank",
        "moe_intermediate_size",
        "n_group",
        "n_routed_experts",
        "n_shared_experts",
        "num_experts",
        "num_experts_per_tok",
        "num_local_experts",
        "q_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "shared_expert_intermediate_size",
        "topk_group",
    }
)
EPSILONS = frozenset({"rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps"})
POSITIVE = frozenset({"query_pre_attn_scalar", "rope_theta", "rope_local_base_freq"})
FLAGS = frozenset({"attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window"})
NAMES = frozenset({"hidden_act", "hidden_activation", "model_type"})
ROPE = ("rope_parameters", "rope_scaling")
ROPE_NUMBERS = frozenset(
    {
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "factor",
        "high_freq_factor",
        "low_freq_factor",
        "original_max_position_embeddings",
        "partial_rotary_factor",
        "rope_theta",
    }
)
DTYPES = frozenset(
    {
        "auto",
        "bfloat16",
        "double",
        "float",
        "float16",
        "float32",
        "float64",
        "float8_e4m3fn",
        "half",
    }
)
TOKENS = ("bos_token_id", "eos_token_id")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
HINT = "take config.json from the model's source"


def check_config_values(path: Path, config: Json) -> None:
    """Refuse ``config``, read from ``path``, for a value that no model has.

    Raises: CheckpointRefused, with the field and its value.
    """
    _check_finite(path, config)
    for part in _parts(config):
        for key, value in part.items():
            if value is not None and (wanted := _wanted(key, value)):
                raise bad_field(path, key, value, wanted)
        for key in ROPE:
            _check_rope(path, key, part.get(key))
        _check_experts(path, part)
        _check_layers(path, part)
        _check_tokens(path, part)


def _parts(config: Json) -> Iterator[Json]:
    """Yield the config of the model, and those of its language model."""
    yield config
    for key in ("text_config", "llm_config"):
        if isinstance(config.get(key), Mapping):
            yield config[key]


def _wanted(key: str, value: object) -> str:
    """Return what ``key`` must be; empty when ``value`` is that."""
    for keys, holds, wanted in CHECKS:
        if key in keys:
            return "" if holds(value) else wanted
    return ""


def is_size(value: object, *, least: int = 1) -> bool:
    """Whether ``value`` is a whole number from ``least`` on, or one for each layer."""
    values = value if isinstance(value, list) and value else [value]
    return all(type(each) is int and least <= each < MAX_SIZE for each in values)


def _is_count(value: object) -> bool:
    return is_size(value, least=0)


def is_positive(value: object) -> bool:
    """Whether ``value`` is a finite number greater than zero."""
    return type(value) in (int, float) and 0 < value < math.inf  # type: ignore[operator]


def _is_epsilon(value: object) -> bool:
    return type(value) is float and 0 < value < 1


def is_dtype(value: object) -> bool:
    """Whether ``value`` names a dtype that weights may have."""
    return isinstance(value, str) and value.removeprefix("torch.") in DTYPES


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def is_flag(value: object) -> bool:
    """Whether ``value`` is true or false."""
    return isinstance(value, bool)


CHECKS: tuple[tuple[frozenset[str], Callable[[object], bool], str], ...] = (
    (SIZES, is_size, f"a whole number from 1 to {MAX_SIZE - 1:,}"),
    (COUNTS, _is_count, f"a whole number from 0 to {MAX_SIZE - 1:,}"),
    (EPSILONS, _is_epsilon, "a number between 0 and 1"),
    (POSITIVE, is_positive, "a number greater than zero"),
    (FLAGS, is_flag, "true or false"),
    (NAMES, _is_name, "a name"),
    (frozenset({"dtype", "torch_dtype"}), is_dtype, "the dtype of weights, such as bfloat16"),
)


def _check_finite(path: Path, value: object, key: str = "config") -> None:
    """Refuse NaN, and infinity except in the time step limits of Mamba."""
    if isinstance(value, Mapping):
        for name, each in value.items():
            _check_finite(path, each, name)
    elif isinstance(value, list):
        for each in value:
            _check_finite(path, each, key)
    elif isinstance(value, float) and (
        math.isnan(value) or (math.isinf(value) and not key.startswith("time_step"))
    ):
        raise bad_field(path, key, value, "a finite number")


def _check_rope(path: Path, key: str, rope: object) -> None:
    """Refuse impossible values of a rotary embedding; there may be one for each kind of layer."""
    if rope is None:
        return
    if not isinstance(rope, Mapping):
        raise bad_field(path, key, rope, "an object")
    for name, value in rope.items():
        if isinstance(value, Mapping):
            _check_rope(path, f"{key}.{name}", value)
        elif name in ROPE_NUMBERS and value is not None and not is_positive(value):
            raise bad_field(path, f"{key}.{name}", value, "a number greater than zero")
        elif name in ("short_factor", "long_factor"):
            if not isinstance(value, list) or not all(map(is_positive, value)):
                raise bad_field(path, f"{key}.{name}", value, "a list of numbers greater than zero")
        elif name in ("rope_type", "type") and not _is_name(value):
            raise bad_field(path, f"{key}.{name}", value, "a name")


def _check_experts(path: Path, config: Json) -> None:
    chosen = config.get("num_experts_per_tok")
    for key in EXPERTS:
        count = config.get(key)
        if type(count) is not int or count == 0:
            continue
        if type(chosen) is int and not 0 < chosen <= count:
            raise bad_field(path, "num_experts_per_tok", chosen, f"from 1 to {key}, {count:,}")
        groups = config.get("n_group")
        if type(groups) is int and groups and count % groups:
            raise bad_field(path, "n_group", groups, f"a divisor of {key}, {count:,}")
    groups, chosen = config.get("n_group"), config.get("topk_group")
    if type(groups) is int and groups and type(chosen) is int and not 0 < chosen <= groups:
        raise bad_field(path, "topk_group", chosen, f"from 1 to n_group, {groups:,}")


def _check_layers(path: Path, config: Json) -> None:
    count = config.get("num_hidden_layers")
    if type(count) is int and count > MAX_LAYERS:
        raise bad_field(path, "num_hidden_layers", count, f"at most {MAX_LAYERS:,}")
    heads, shared = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if type(heads) is int and type(shared) is int and heads % shared:
        raise bad_field(path, "num_key_value_heads", shared, f"a divisor of the {heads:,} heads")
    kinds = config.get("layer_types")
    if kinds is None:
        return
    if not isinstance(kinds, list) or not all(map(_is_name, kinds)):
        raise bad_field(path, "layer_types", kinds, "a list of names")
    if type(count) is int and len(kinds) < count:
        raise bad_field(path, "layer_types", kinds, f"a name for each of {count:,} layers")
    window = config.get("sliding_window")
    if "sliding_attention" in kinds and "sliding_window" in config and not is_size(window):
        raise bad_field(path, "sliding_window", window, "the number of tokens in a window")


def _check_tokens(path: Path, config: Json) -> None:
    """Refuse what is not a token id. -1 is no token; an id beyond the vocabulary never comes."""
    for key in TOKENS:
        value = config.get(key)
        for token in value if isinstance(value, list) else [value]:
            if token is None:
                continue
            if type(token) is not int or token < -1:
                raise bad_field(path, key, value, "a token id")


def bad_field(
    path: Path, key: str, value: object, wanted: str, hint: str = HINT
) -> CheckpointRefused:
    """Return the error for a field of the config ``path`` that must be ``wanted``."""
    found = reprlib.repr(value)
    return refused("E_CONFIG_FIELD", f"{path}: `{key}` is {found}, and must be {wanted}", hint)

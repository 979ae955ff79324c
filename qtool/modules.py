"""What the name of a tensor or module tells: its layer, its role in the model, and whether it is a
scale of the KV cache.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from qtool.checkpoint.model import FLOAT_DTYPES, Checkpoint, TensorInfo

HEADS = frozenset({"lm_head", "head", "embed_out", "output_layer", "output", "score"})
# of Gemma 3n and 4, before the first layer: calibration layer by layer does not reach it
LAYER_EMBEDDINGS = frozenset({"per_layer_model_projection"})
# and what has `embed` in its name
EMBEDDINGS = frozenset({"wte", "wpe", "relative_attention_bias", "shared"})
ROUTERS = frozenset({"gate", "router", "shared_expert_gate", "classifier"})
OTHER_TOWERS = frozenset(
    {
        "visual",
        "vision_tower",
        "vision_model",
        "audio_tower",
        "multi_modal_projector",
        "mm_projector",
        "mtp",
        "speech_encoder",
    }
)
TRANSPOSED = ("gpt2", "gpt_bigcode", "imagegpt")  # their projections are Conv1D, [K, N]
# last parts of names: of the KV cache, on modules that hold other things
CACHE_SCALES = ("k_scale", "v_scale", "q_scale", "kv_scale")
CACHE_BIASES = ("k_bias", "v_bias")
NOT_TEXT = "not part of the language model"
CACHE_PROJECTIONS = {"k_proj": "k", "v_proj": "v", "q_proj": "q"}
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""A layer that engines run -> the layers of a checkpoint that they merge into it, in order."""
MERGED_INTO = {shard: fused for fused, shards in FUSED.items() for shard in shards}
DECODERS = ("language_model.model.", "model.language_model.", "model.")
"""What the names of the decoder's modules begin with, by version of transformers and by engine."""
LAYER_NUMBER = re.compile(r"\.(\d+)\.")
DECODER_LAYER_NUMBER = re.compile(r"\.layers\.(\d+)\.")
TABLE_SHARD = re.compile(r"\.shard_\d+$")
ONE_EXPERT = re.compile(r"(.*\.experts)\.\d+\.")


@dataclass(frozen=True)
class CacheScale:
    """The name of a scale of the KV cache, taken apart."""

    module: str
    """The attention module, e.g. ``model.layers.0.self_attn``."""
    kind: Literal["k", "v", "q", "kv"]
    """Of keys, values, queries, or of keys and values together."""
    spelling: Literal["scale", "proj.scale", "proj.output_scale"]
    """How the rest of the name is written.

    ``k_scale`` (or ``kv_scale``), as LLM Compressor and vLLM have it; ``k_proj.k_scale``, as
    ModelOpt; ``k_proj.output_scale``, as Quark and old versions of compressed-tensors.
    """
    on_attn: bool = False
    """Whether ``attn``, the attention kernel's own module in vLLM, stands after the module."""


def parse_cache_scale(name: str) -> CacheScale | None:
    """Return what the tensor ``name`` scales in the KV cache; None for any other tensor."""
    owner, _, suffix = name.rpartition(".")
    if not owner:
        return None
    parent, _, projection = owner.rpartition(".")
    projects = CACHE_PROJECTIONS.get(projection)
    if suffix == "output_scale":
        return _cache_scale(parent, projects, "proj.output_scale") if projects else None
    if suffix == "kv_scale":
        return _cache_scale(owner, "kv", "scale")
    if suffix not in CACHE_SCALES:
        return None
    if projects:
        return _cache_scale(parent, suffix[0], "proj.scale")
    return _cache_scale(owner, suffix[0], "scale")


def is_cache_tensor(name: str) -> bool:
    """Whether the tensor ``name`` is of the KV cache, on whatever module it lies."""
    return last_part(name) in CACHE_BIASES or parse_cache_scale(name) is not None


def has_key_scales(names: Iterable[str]) -> bool:
    """Whether one of the tensors ``names`` scales cached keys, alone or with the values."""
    scales = map(parse_cache_scale, names)
    return any("k" in scale.kind for scale in scales if scale)


def _cache_scale(module: str, kind: str, spelling: str) -> CacheScale:
    attention = module.removesuffix(".attn")
    return CacheScale(attention, kind, spelling, attention != module)  # type: ignore[arg-type]


def layer_number(name: str) -> int | None:
    """Return the first number in ``name``, of whatever stack of layers; None outside of them."""
    found = LAYER_NUMBER.search(name)
    return int(found[1]) if found else None


def decoder_layer_number(name: str) -> int | None:
    """Return the number of the layer in ``layers`` that ``name`` is in; None outside of them."""
    found = DECODER_LAYER_NUMBER.search(name)
    return int(found[1]) if found else None


def is_mtp_layer(checkpoint: Checkpoint, name: str) -> bool:
    """Whether the tensor or module ``name`` is in a decoder layer after the last: such layers are
    for multi-token prediction (MTP), and transformers does not load them.
    """
    layer = decoder_layer_number(name)
    count = checkpoint.text_config.get("num_hidden_layers")
    return layer is not None and isinstance(count, int) and layer >= count


def layer_name(name: str) -> str:
    """Return ``name`` up to its first number, e.g. ``model.layers.0``; empty outside the layers."""
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return ""


def last_part(name: str) -> str:
    """Return the last part of a dotted name: the kind of layer, e.g. ``down_proj``."""
    return name.rpartition(".")[2]


def is_head(name: str) -> bool:
    """Whether the module ``name`` is an output head."""
    return last_part(name) in HEADS


def is_router(name: str) -> bool:
    """Whether the module ``name`` chooses experts, or is part of what does."""
    return not ROUTERS.isdisjoint(name.split("."))


def tower_of(name: str) -> str:
    """Return the part of ``name`` that is not the language model, e.g. ``visual``; else empty."""
    return next((part for part in name.split(".") if part in OTHER_TOWERS), "")


def is_expert(name: str) -> bool:
    """Whether the module ``name`` is part of one expert, as ``mlp.experts.0.down_proj``."""
    return expert_stack(name) is not None


def expert_stack(name: str) -> str | None:
    """Return the module that holds all experts, of which ``name`` is part of one."""
    found = ONE_EXPERT.match(name)
    return found[1] if found else None


def is_embedding(name: str) -> bool:
    """Whether the module ``name`` looks rows up instead of multiplying."""
    part = last_part(table_of_shard(name) or name)
    return part in EMBEDDINGS or ("embed" in part and part not in HEADS)


def table_of_shard(name: str) -> str | None:
    """Return the table that the module ``name`` is a shard of, as `ngram_embedding.shard_0` of
    Qwen3.8; None for other modules.
    """
    table = TABLE_SHARD.sub("", name)
    return table if table != name and is_embedding(table) else None


@lru_cache(maxsize=64)  # lists of names ask one after the other
def other_names(name: str) -> tuple[str, ...]:
    """Return the names that other tools have for the module ``name``: of the layer that it is
    merged into, and below another prefix of the decoder.
    """
    parent, dot, last = name.rpartition(".")
    names = [name, *((f"{parent}{dot}{MERGED_INTO[last]}",) if last in MERGED_INTO else ())]
    prefix = next((each for each in DECODERS if name.startswith(each)), "")
    if name.removeprefix(prefix).startswith(("layers.", "embed_tokens")):
        others = [each for each in DECODERS if each != prefix]
        names += [other + each.removeprefix(prefix) for other in others for each in names]
    return tuple(names[1:])


def stays_unquantized(name: str) -> bool:
    """Whether recipes leave the layer ``name`` in 16 bits: a head, a router, another tower."""
    return (
        is_head(name)
        or is_router(name)
        or bool(tower_of(name))
        or is_embedding(name)
        or last_part(name) in LAYER_EMBEDDINGS
    )


def is_linear(tensor: TensorInfo) -> bool:
    """Whether ``tensor`` is the 16 or 32 bit weight of a linear layer, as far as name and shape
    tell.
    """
    return (
        tensor.name.endswith(".weight")
        and len(tensor.shape) == 2
        and tensor.dtype in FLOAT_DTYPES
        and not is_embedding(tensor.name.removesuffix(".weight"))
    )


def skip_reason(checkpoint: Checkpoint, name: str) -> str:
    """Return why the linear layer ``name`` usually stays in 16 bits; empty when nothing about it
    says so.
    """
    if is_head(name):
        return "tied to the embeddings" if checkpoint.tied_embeddings else "output head"
    if is_router(name):
        return "router of experts"
    if tower_of(name):
        return NOT_TEXT
    if last_part(name) in LAYER_EMBEDDINGS:
        return "makes embeddings for every layer"
    return "Conv1D, not Linear" if checkpoint.config.get("model_type") in TRANSPOSED else ""

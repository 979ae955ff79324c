"""Compare config.json with the tensors: layers, embeddings, norms and projections.

Only names of the standard architectures are compared: they leave no doubt what a tensor is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from qtool.checkpoint.strict_json import Json, refused

if TYPE_CHECKING:
    from qtool.checkpoint.model import Checkpoint, TensorInfo

STACKS = ("model.", "model.language_model.", "language_model.model.")
HEADS, KV_HEADS = "num_attention_heads head_dim", "num_key_value_heads head_dim"
# end of a tensor's name -> code, then each dimension as a product of config fields
Rules = Mapping[str, tuple[str, ...]]
MODEL_RULES: Rules = {
    "embed_tokens.weight": ("E_EMBEDDING_SHAPE", "vocab_size", "hidden_size"),
    "norm.weight": ("E_NORM_SHAPE", "hidden_size"),
}
LAYER_RULES: Rules = {
    "input_layernorm.weight": ("E_NORM_SHAPE", "hidden_size"),
    "post_attention_layernorm.weight": ("E_NORM_SHAPE", "hidden_size"),
    "self_attn.q_proj.weight": ("E_ATTENTION_SHAPE", HEADS, "hidden_size"),
    "self_attn.k_proj.weight": ("E_ATTENTION_SHAPE", KV_HEADS, "hidden_size"),
    "self_attn.v_proj.weight": ("E_ATTENTION_SHAPE", KV_HEADS, "hidden_size"),
    "self_attn.o_proj.weight": ("E_ATTENTION_SHAPE", "hidden_size", HEADS),
    "mlp.gate_proj.weight": ("E_MLP_SHAPE", "intermediate_size", "hidden_size"),
    "mlp.up_proj.weight": ("E_MLP_SHAPE", "intermediate_size", "hidden_size"),
    "mlp.down_proj.weight": ("E_MLP_SHAPE", "hidden_size", "intermediate_size"),
}
# one weight in each element; I8 and U8 may hold two
UNPACKED = frozenset({"F16", "BF16", "F32", "F64", "F8_E4M3"})
# a config with another field of such a name (`swa_num_attention_heads`, `intermediate_size_mlp`)
# has layers of several kinds
UNUSUAL = {
    re.compile("heads|head_dim"): (
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "pruned_heads",
    ),
    re.compile("intermediate|wide"): (
        "intermediate_size",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
    ),
    re.compile("hidden_size|embed_dim|embedding_size"): ("hidden_size",),
    re.compile("num_layers|n_layers"): ("num_hidden_layers",),
}
OTHER_TOWERS = re.compile("linear_|mamba_|ssm_|vision|audio|mm_|index_|hidden_size_per_layer_input")
# fields and tensors of layers for multi-token prediction (MTP) have one of these in their names
MTP = re.compile("nextn|mtp|^num_layers|^n_layers|eh_proj|enorm|hnorm")
HINT = (
    "config.json and the weights are of different models, or one was edited: take both from the "
    "same place"
)


def check_config(checkpoint: Checkpoint) -> None:
    """Compare config and tensors of a decoder; whatever is unusual is let pass.

    Raises: CheckpointRefused, when a layer is missing or a tensor has not the shape that the
        config's fields give it.
    """
    stack = _stack_of(checkpoint)
    if stack is None or not _is_standard(checkpoint):
        return
    sizes = _sizes(checkpoint.text_config)
    layers = _decoder_layers(checkpoint, stack, sizes.get("num_hidden_layers", 0))
    sizes = {**_head_dim(checkpoint.tensors, layers, sizes), **sizes}
    _check_shapes(checkpoint, stack, MODEL_RULES, sizes)
    for layer in layers:
        _check_shapes(checkpoint, layer, LAYER_RULES, sizes)


def _stack_of(checkpoint: Checkpoint) -> str | None:
    """Return what the names of the decoder's tensors begin with."""
    for stack in STACKS:
        if any(name.startswith(f"{stack}layers.") for name in checkpoint.tensors):
            return stack
    return None


def _decoder_layers(checkpoint: Checkpoint, stack: str, count: int) -> list[str]:
    """Return what the names of each of ``count`` layers begin with; after them may come layers for
    multi-token prediction.
    """
    layers = _layer_numbers(checkpoint, f"{stack}layers.")
    present = sorted(layer for layer in layers if layer < count)
    if len(present) < count:
        missing = next(
            expected for expected, layer in enumerate([*present, -1]) if expected != layer
        )
        message = (
            f"num_hidden_layers is {count:,}, {len(present):,} of these layers are there and "
            f"`{stack}layers.{missing}.*` is not"
        )
        raise _broken("E_LAYER_MISSING", checkpoint, message)
    if count and (beyond := [layer for layer in layers if layer >= count]):
        _check_extra_layer(checkpoint, f"{stack}layers.{min(beyond)}.", count)
    return [f"{stack}layers.{layer}." for layer in present]


def _check_extra_layer(checkpoint: Checkpoint, layer: str, count: int) -> None:
    """Refuse a layer after the last of ``count`` that is not for multi-token prediction."""
    texts = (checkpoint.config, checkpoint.text_config)
    in_config = any(MTP.search(key) for text in texts for key in text)
    names = [name for name in checkpoint.tensors if name.startswith(layer)]
    if not in_config and not any(MTP.search(name) for name in names):
        message = f"num_hidden_layers is {count:,}, and there is `{names[0]}` as well"
        raise _broken("E_LAYER_EXTRA", checkpoint, message)


def _is_standard(checkpoint: Checkpoint) -> bool:
    """Whether the names mean what they mean in transformers: a generating decoder of its own
    classes, of layers that are all alike.
    """
    config = checkpoint.config
    architectures = config.get("architectures") or [""]
    generates = all(
        re.fullmatch(
            r"(?!.*(Eagle|Medusa|MTP|Draft)).*(ForCausalLM|ForConditionalGeneration)", name
        )
        for name in architectures
    )
    texts = (config, checkpoint.text_config)
    return generates and not any(
        text.get(key)
        for text in texts
        for key in ("auto_map", "is_encoder_decoder", "block_configs", "per_layer_config")
    )


def _sizes(config: Json) -> dict[str, int]:
    """Return the config's positive integers, without those that other fields may overrule."""
    sizes = {key: value for key, value in config.items() if type(value) is int and value > 0}
    keys = {*config}
    for value in config.values():
        if isinstance(value, Mapping):
            keys |= value.keys()
    for pattern, usual in UNUSUAL.items():
        if any(_is_unusual(key, pattern, usual) for key in keys):
            sizes = {key: value for key, value in sizes.items() if key not in usual}
    return sizes


def _is_unusual(key: str, pattern: re.Pattern[str], usual: Collection[str]) -> bool:
    return bool(pattern.search(key)) and key not in usual and not OTHER_TOWERS.match(key)


def _layer_numbers(checkpoint: Checkpoint, prefix: str) -> set[int]:
    start = len(prefix)
    numbers = {
        name[start:].partition(".")[0] for name in checkpoint.tensors if name.startswith(prefix)
    }
    for number in numbers:
        if not re.fullmatch("0|[1-9][0-9]{0,8}", number):
            raise _broken(
                "E_LAYER_NUMBER",
                checkpoint,
                f"`{prefix}{number[:100]}.*` is the name of no layer: 0, 1, 2 ... are",
            )
    return {int(number) for number in numbers}


def _head_dim(
    tensors: Mapping[str, TensorInfo], decoder: Iterable[str], sizes: Mapping[str, int]
) -> dict[str, int]:
    """Return the size of a head where ``k_proj`` shows it: the config may leave it to the class,
    which need not take hidden_size / heads.
    """
    heads = sizes.get("num_key_value_heads")
    keys = next(
        (key for layer in decoder if (key := tensors.get(f"{layer}self_attn.k_proj.weight"))), None
    )
    if not heads or keys is None or not keys.shape or _is_flat(tensors, keys):
        return {}
    return {"head_dim": keys.shape[0] // heads} if keys.shape[0] % heads == 0 else {}


def _is_flat(tensors: Mapping[str, TensorInfo], tensor: TensorInfo) -> bool:
    """Whether ``tensor`` is of bitsandbytes: codes of a flattened matrix, in bytes of any dtype."""
    return f"{tensor.name}.absmax" in tensors


def _check_shapes(
    checkpoint: Checkpoint, prefix: str, rules: Rules, sizes: Mapping[str, int]
) -> None:
    """Check the tensors that ``prefix`` and the ends of names in ``rules`` name."""
    for suffix, (code, *dimensions) in rules.items():
        tensor = checkpoint.tensors.get(prefix + suffix)
        if tensor is None or tensor.dtype not in UNPACKED or _is_flat(checkpoint.tensors, tensor):
            continue
        expected = _expected_shape(tensor, dimensions, sizes)
        if not _fits(tensor.shape, expected):
            names = sorted({*" ".join(dimensions).split()} & sizes.keys())
            said = ", ".join(f"{name} {sizes[name]:,}" for name in names)
            shape = ", ".join("?" if size is None else str(size) for size in expected)
            message = (
                f"with {said}, `{tensor.name}` must be [{shape}], and it is {list(tensor.shape)} "
                f"in {tensor.file.name}"
            )
            raise _broken(code, checkpoint, message)


def _expected_shape(
    tensor: TensorInfo, dimensions: Iterable[str], sizes: Mapping[str, int]
) -> list[int | None]:
    """Return the size of each dimension; None where the config leaves it open."""
    expected: list[int | None] = []
    for fields in dimensions:
        names = fields.split()
        is_known = sizes.keys() >= {*names}
        expected.append(math.prod(sizes[name] for name in names) if is_known else None)
    if tensor.shape and _may_have(tensor.name, tensor.shape[0], expected[0]):
        expected[0] = tensor.shape[0]
    return expected


def _may_have(name: str, rows: int, expected: int | None) -> bool:
    """Whether a tensor may have more rows than expected: the vocabulary may be padded, queries may
    come with a gate each.
    """
    if expected is None:
        return False
    if "embed_tokens" in name:
        return rows >= expected
    return "q_proj" in name and rows == 2 * expected


def _fits(shape: tuple[int, ...], expected: list[int | None]) -> bool:
    return len(shape) == len(expected) and all(
        size in (None, found) for size, found in zip(expected, shape, strict=True)
    )


def _broken(code: str, checkpoint: Checkpoint, message: str) -> Exception:
    return refused(code, f"{checkpoint.origin('config.json')}: {message}", HINT)

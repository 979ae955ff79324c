"""GGUF files written without qtool: by the package gguf, from a small checkpoint in safetensors, as
llama.cpp's converter does it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.constants import GGMLQuantizationType as Type
from safetensors.torch import load_file

BLOCK_SCALES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
}
"""Types that gguf does not round to, and where their F16 scales lie: their blocks are random."""
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4", *BLOCK_SCALES)
UNQUANTIZED = ("F32", "F16", "BF16")
Rounding = Callable[[np.ndarray[Any, Any], str], np.ndarray[Any, Any]]
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "gpt_oss": "gpt-oss",
}
EXPERT = re.compile(r"(.*\.(?:mlp|block_sparse_moe)\.experts)\.(\d+)\.(\w+)\.weight")


def blocks(rows: np.ndarray[Any, Any], type: str) -> np.ndarray[Any, Any]:
    """Return ``rows`` [..., K] in the blocks of ``type``: random ones where gguf cannot round."""
    kind = Type[type]
    if type not in BLOCK_SCALES:
        return gguf.quants.quantize(rows, kind)
    size, size_bytes = gguf.GGML_QUANT_SIZES[kind]
    shape = (*rows.shape[:-1], rows.shape[-1] // size, size_bytes)
    random = np.random.default_rng(shape)
    data = random.integers(0, 256, shape, dtype=np.uint8)
    scale = 0.02 / 16 if type in ("Q4_K", "Q5_K", "Q2_K", "Q3_K") else 0.02 / 64
    for at in BLOCK_SCALES[type]:
        steps = random.uniform(scale / 4, scale, shape[:-1]).astype(np.float16) / np.float16(8)
        data[..., at : at + 2] = steps[..., None].view(np.uint8)
    return data.reshape(*rows.shape[:-1], -1)


def write_gguf(
    source: Path,
    target: Path,
    type: str = "Q8_0",
    *,
    types: Mapping[str, str] | None = None,
    extra: Mapping[str, Any] | None = None,
    vectors: Mapping[str, Any] | None = None,
    splits: int = 0,
    experts_apart: bool = False,
    rounding: Rounding = blocks,
) -> dict[str, np.ndarray[Any, Any]]:
    """Write the checkpoint ``source`` to ``target``; return what gguf dequantizes each tensor to.

    Args:
        source: a folder with config.json, safetensors files and perhaps a byte-level tokenizer.
        target: the file.
        type: of the matrices whose rows have whole blocks; the others are F16.
        types: of some tensors, by a regular expression for their GGUF names.
        extra: more metadata.
        vectors: more tensors, of F32.
        splits: the most tensors in one file; 0 for a single file.
        rounding: makes blocks of the rows of a quantized type.
        experts_apart: whether each expert is a tensor, as in files of early 2024.
    """
    config = json.loads((source / "config.json").read_text())
    arch = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(target, arch, split_max_tensors=splits)
    _write_metadata(writer, config, arch)
    _write_tokenizer(writer, source)
    for key, value in (extra or {}).items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}
        add[value.__class__](key, value)
    found = {}
    for name, values in _tensors(source, config, arch):
        kind = next(
            (kind for pattern, kind in (types or {}).items() if re.search(pattern, name)), type
        )
        size, _ = gguf.GGML_QUANT_SIZES[Type[kind]]
        if values.ndim == 1 or "norm" in name or (name.endswith("bias")):
            kind = "F32"
        elif values.shape[-1] % size:
            kind = "F16"
        round_to = rounding if kind not in UNQUANTIZED else blocks
        data = round_to(values, kind)
        found[name] = gguf.quants.dequantize(data, Type[kind])
        for part, part_data in _parts(name, data) if experts_apart else [(name, data)]:
            writer.add_tensor(part, part_data, raw_dtype=Type[kind])
    for name, numbers in (vectors or {}).items():
        writer.add_tensor(name, np.array(numbers, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


def _parts(name: str, data: np.ndarray[Any, Any]) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Yield the experts of a stack by their old names, and all else as it is."""
    if "_exps" not in name:
        yield name, data
        return
    for expert, each in enumerate(data):
        yield name.replace("_exps", f".{expert}"), each


def _write_metadata(writer: gguf.GGUFWriter, config: Mapping[str, Any], arch: str) -> None:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope.get("rope_theta", 10_000.0))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(config["vocab_size"])
    if experts := config.get("num_experts") or config.get("num_local_experts"):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if size := config.get("moe_intermediate_size"):
        writer.add_expert_feed_forward_length(size)
    if arch in ("gemma2", "gemma3", "gpt-oss"):
        writer.add_sliding_window(config["sliding_window"])
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _write_tokenizer(writer: gguf.GGUFWriter, source: Path) -> None:
    if not (source / "tokenizer.json").exists():
        return
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    config = json.loads((source / "tokenizer_config.json").read_text())
    vocab = dict(tokenizer["model"]["vocab"])
    special = {each["content"]: each for each in tokenizer["added_tokens"]}
    vocab |= {content: each["id"] for content, each in special.items()}
    tokens = sorted(vocab, key=lambda token: vocab[token])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in merges])
    writer.add_bos_token_id(vocab[config["bos_token"]])
    writer.add_eos_token_id(vocab[config["eos_token"]])
    writer.add_pad_token_id(vocab[config["pad_token"]])
    writer.add_add_bos_token(False)
    if (source / "chat_template.jinja").exists():
        writer.add_chat_template((source / "chat_template.jinja").read_text())


def _tensors(
    source: Path, config: Mapping[str, Any], arch: str
) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        found |= load_file(file)
    names = gguf.get_tensor_name_map(
        next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch),
        config["num_hidden_layers"],
    )
    for name, values in _stacked(found, config).items():
        array = values.float().numpy()
        stem, dot, suffix = name.rpartition(".")
        if suffix not in ("weight", "bias"):
            stem, dot, suffix = name, ".", "weight"
        known = names.get_name(stem)
        assert known, name
        if arch == "llama" and known.endswith(("attn_q", "attn_k")):
            heads = config["num_attention_heads" if known.endswith("q") else "num_key_value_heads"]
            halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            array = array + 1
        if name.endswith("shared_expert_gate.weight"):
            array = array[0]
        yield f"{known}{dot}{suffix}", np.ascontiguousarray(array)


def _stacked(
    found: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Return the tensors with the experts of a layer in one, gate and up apart."""
    result: dict[str, Any] = {}
    for name, values in found.items():
        if match := EXPERT.fullmatch(name):
            stack = result.setdefault(f"{match[1]}.{match[3]}.weight", {})
            stack[int(match[2])] = values
        elif ".experts.gate_up_proj" in name:
            for part, kind in enumerate(("gate_proj", "up_proj")):
                each = values[..., part::2]
                each = each if name.endswith("bias") else each.transpose(1, 2)
                ending = "bias" if name.endswith("bias") else "weight"
                result[name.partition("gate_up_proj")[0] + f"{kind}.{ending}"] = each
        elif name.endswith(".experts.down_proj"):
            result[f"{name}.weight"] = values.transpose(1, 2)
        elif name.endswith(".experts.down_proj_bias"):
            result[name.replace("_bias", ".bias")] = values
        else:
            result[name] = values
    return {
        name: torch.stack([each[expert] for expert in sorted(each)])
        if isinstance(each, dict)
        else each
        for name, each in result.items()
    }

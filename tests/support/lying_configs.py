"""Model folders that each hold one lie: a value in a config that no model has, a tensor that is
missing or relabelled, a quantization config of another checkpoint.

`make_bases` writes true checkpoints of a few small layers; `LIES` tells, for each, what is changed.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from qtool.formats import WRITABLE, QuantizedModule
from qtool.scheme import scheme_from
from qtool.weight import Activation, quantize
from support import EXAMPLE

SMALL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 4096,
    "max_position_embeddings": 512,
    "pad_token_id": 3,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
}
MODELS: Mapping[str, tuple[str, dict[str, Any]]] = {  # base -> model type, its own fields
    "llama": ("llama", {}),
    "tied": ("qwen3", {"tie_word_embeddings": True}),
    "mixture": (
        "qwen3_moe",
        {"num_experts": 4, "moe_intermediate_size": 128, "num_experts_per_tok": 2},
    ),
    "sliding": (
        "gemma3_text",
        {
            "sliding_window": 64,
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 32,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "mla": (
        "deepseek_v3",
        {
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "moe_intermediate_size": 128,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
            "kv_lora_rank": 64,
            "q_lora_rank": 64,
            "qk_rope_head_dim": 32,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
            "num_key_value_heads": 4,
            "head_dim": 32,
        },
    ),
}
QUANTIZED: Mapping[str, tuple[str, str, str]] = {  # base -> its source, format, scheme
    "ct-int4": ("llama", "compressed-tensors", "W4A16"),
    "ct-fp8": ("llama", "compressed-tensors", "FP8_DYNAMIC"),
    "ct-int8": ("llama", "compressed-tensors", "W8A8"),
    "ct-nvfp4": ("llama", "compressed-tensors", "NVFP4A16"),
    "ct-mxfp4": ("llama", "compressed-tensors", "MXFP4A16"),
    "gptq": ("llama", "gptq", "W4A16"),
    "awq": ("llama", "awq", "W4A16_ASYM"),
    "modelopt-fp8": ("llama", "modelopt", "FP8"),
    "modelopt-nvfp4": ("llama", "modelopt", "NVFP4A16"),
    "fp8-block": ("llama", "fp8_block", "FP8_BLOCK"),
    "mixture-int4": ("mixture", "compressed-tensors", "W4A16"),
    "mixture-gptq": ("mixture", "gptq", "W4A16"),
}


def make_bases(folder: Path) -> dict[str, Path]:
    """Write every base below ``folder``, and return where each is."""
    bases = {}
    for name, (model_type, fields) in MODELS.items():
        bases[name] = _write_model(folder / name, model_type, {**SMALL, **fields})
    for name, (source, target, scheme) in QUANTIZED.items():
        bases[name] = _write_quantized(folder / name, bases[source], target, scheme)
    return bases


def _write_model(folder: Path, model_type: str, fields: dict[str, Any]) -> Path:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(EXAMPLE / file, folder / file)
    generation = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 3}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def _write_quantized(folder: Path, source: Path, target: str, scheme_name: str) -> Path:
    """Round the layers of ``source`` to nearest, and write them in the format ``target``."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    scheme = scheme_from(scheme_name)
    tensors = load_file(source / "model.safetensors")
    modules = []
    unquantized = []
    for name in [name for name in tensors if name.endswith(".weight")]:
        module_name = name.removesuffix(".weight")
        if tensors[name].dim() != 2 or "embed" in name:
            continue
        if not module_name.endswith("_proj"):
            unquantized.append(module_name)
            continue
        weight = quantize(tensors.pop(name), scheme)
        if scheme.activations and scheme.activations.needs_data:
            weight = replace(weight, activation=Activation(scheme.activations, torch.ones(())))
        variant = "gptq" if target == "gptq" else ""
        module = QuantizedModule(module_name, scheme, tuple(weight.shape), {}, variant)
        modules.append(module)
        parts = WRITABLE[target].write(module, weight)
        tensors |= {f"{module_name}.{suffix}": part.contiguous() for suffix, part in parts.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    files = WRITABLE[target].quantization_config(modules, unquantized, None)
    for file, keys in files.items():
        path = folder / file
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**before, **keys}))
    return folder


# What a lie changes

Change = Callable[[Path], object]
NAN, INFINITY = float("nan"), float("inf")
BEYOND = "1e999 as it is"  # JSON that reads as infinity
REMOVED = "removed"


def config(*keys: object, file: str = "config.json", value: object) -> Change:
    """Return what sets the field at ``keys`` of a JSON file."""

    def change(folder: Path) -> None:
        whole = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        part = whole
        for key in keys[:-1]:
            part = part[key]
        if value is REMOVED:
            part.pop(keys[-1], None)
        else:
            part[keys[-1]] = value
        rewrite(folder / file, json.dumps(whole).replace(json.dumps(BEYOND), "1e999").encode())

    return change


def rewrite(path: Path, content: bytes) -> None:
    """Replace a file that may be a link to the base's."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


Entry = dict[str, Any]  # dtype, shape, data


def tensors(edit: Callable[[dict[str, Entry]], object]) -> Change:
    """Return what edits the tensors of the one safetensors file, true or not."""

    def change(folder: Path) -> None:
        entries = read_entries(folder / "model.safetensors")
        edit(entries)
        write_entries(folder / "model.safetensors", entries)

    return change


def read_entries(path: Path) -> dict[str, Entry]:
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    return {
        name: {
            "dtype": entry["dtype"],
            "shape": entry["shape"],
            "data": content[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]],
        }
        for name, entry in header.items()
    }


def write_entries(path: Path, entries: Mapping[str, Entry]) -> None:
    header = {}
    end = 0
    for name, entry in entries.items():
        offsets = [end, end + len(entry["data"])]
        header[name] = {"dtype": entry["dtype"], "shape": entry["shape"], "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(header).encode()
    data = b"".join(entry["data"] for entry in entries.values())
    rewrite(path, len(text).to_bytes(8, "little") + text + data)


def relabel(suffix: str, dtype: str) -> Change:
    """Return what gives the first tensor that ends with ``suffix`` another dtype of its width."""
    return tensors(lambda entries: entries[_named(entries, suffix)].update(dtype=dtype))


def reshape(suffix: str, shape: Callable[[list[int]], list[int]]) -> Change:
    def edit(entries: dict[str, Entry]) -> None:
        entry = entries[_named(entries, suffix)]
        entry["shape"] = shape(entry["shape"])

    return tensors(edit)


def without(suffix: str) -> Change:
    return tensors(lambda entries: entries.pop(_named(entries, suffix)))


def renamed(suffix: str, new: str) -> Change:
    def edit(entries: dict[str, Entry]) -> None:
        name = _named(entries, suffix)
        entries[name.removesuffix(suffix) + new] = entries.pop(name)

    return tensors(edit)


def filled(suffix: str, value: bytes, *, whole: bool = False) -> Change:
    """Return what puts ``value`` at the start, or everywhere, in a tensor."""

    def edit(entries: dict[str, Entry]) -> None:
        entry = entries[_named(entries, suffix)]
        size = len(entry["data"])
        entry["data"] = (
            value * (size // len(value)) if whole else value + entry["data"][len(value) :]
        )

    return tensors(edit)


def extra(
    name: str, dtype: str = "BF16", shape: tuple[int, ...] = (8, 8), width: int = 2
) -> Change:
    data = bytes(math.prod(shape) * width)
    return tensors(
        lambda entries: entries.update({name: {"dtype": dtype, "shape": shape, "data": data}})
    )


def _named(entries: Mapping[str, Entry], suffix: str) -> str:
    return next(name for name in entries if name.endswith(suffix))


def indexed(make: Callable[[list[str]], Mapping[str, object]]) -> Change:
    """Return what renames the file to a shard, and adds an index made of the names of tensors."""

    def change(folder: Path) -> None:
        names = list(read_entries(folder / "model.safetensors"))
        (folder / "model.safetensors").rename(folder / SHARD)
        rewrite(
            folder / "model.safetensors.index.json",
            json.dumps({"weight_map": make(names)}).encode(),
        )

    return change


SHARD = "model-00001-of-00001.safetensors"


def doubled(folder: Path) -> None:
    """Put one tensor in a second shard as well."""
    entries = read_entries(folder / "model.safetensors")
    name = next(iter(entries))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    write_entries(folder / "model-00002-of-00002.safetensors", {name: entries[name]})


def truncated(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    rewrite(folder / "model.safetensors", content[:-100])


def make_folder(base: Path, folder: Path, change: Change) -> Path:
    """Write ``base`` again as links, changed."""
    folder.mkdir()
    for file in base.iterdir():
        os.link(file, folder / file.name)
    change(folder)
    return folder


def _all_of(nonsense: Mapping[str, object], *keys: object, **where: str) -> dict[str, Change]:
    """Return a lie for each value of the field at ``keys``."""
    name = ".".join(map(str, keys))
    return {
        f"{name}: {label}": config(*keys, value=value, **where) for label, value in nonsense.items()
    }


WRONG: Mapping[str, object] = {
    "NaN": NAN,
    "Infinity": INFINITY,
    "1e999": BEYOND,
    "-1": -1,
    "0": 0,
    "1.5": 1.5,
    "a string": "64",
    "true": True,
    "a list": [],
    "an object": {},
    "2**31": 2**31,
    "2**63": 2**63,
    "2**64": 2**64,
}
ABSENT: Mapping[str, object] = {"null": None, "removed": REMOVED}
WRONG_SIZES = {**WRONG, **ABSENT, "3": 3, "2**40": 2**40}
WRONG_NUMBERS = {label: WRONG[label] for label in ("NaN", "1e999", "-1", "0", "a string", "a list")}
WRONG_COUNTS = {
    label: value for label, value in WRONG_SIZES.items() if label not in ("0", "removed", "null")
}

MODEL_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


def _model_lies() -> dict[str, Change]:
    """Return lies about a decoder like Llama, whatever format its layers are in."""
    lies: dict[str, Change] = {}
    for name in MODEL_SIZES:
        lies |= _all_of(WRONG_SIZES, name)
    lies |= _all_of({**WRONG, **ABSENT}, "max_position_embeddings")
    lies |= _all_of({**WRONG, **ABSENT}, "rms_norm_eps")
    lies |= _all_of({**WRONG_NUMBERS, **ABSENT}, "rope_parameters", "rope_theta")
    lies |= _all_of({"a string": "default", "a list": [], "true": True}, "rope_parameters")
    lies |= _all_of(
        {"unknown": "nope", "a number": 1, "linear": "linear", "yarn": "yarn"},
        "rope_parameters",
        "rope_type",
    )
    for value in ("llama3", "linear", "dynamic", "yarn"):
        for label, factor in WRONG_NUMBERS.items():
            lies[f"rope {value}, factor: {label}"] = config(
                "rope_parameters",
                value={"rope_type": value, "rope_theta": 1e4, "factor": factor, **LLAMA3},
            )
    lies |= _all_of({"unknown": "nope", "a string": "8", "a list": [1]}, "rope_scaling")
    lies |= _all_of(WRONG_NUMBERS, "rope_theta")
    for key in ("dtype", "torch_dtype"):
        values = ("nn", "load", "Tensor", "", "int4", "bf16", 16, ["bfloat16"], "__name__", "qint8")
        lies |= _all_of({f"{value!r}": value for value in values}, key)
    lies |= _all_of({"a string": "LlamaForCausalLM", "numbers": [1], "true": True}, "architectures")
    lies |= _all_of({"BERT": ["BertModel"], "Qwen2": ["Qwen2ForCausalLM"]}, "architectures")
    types = ("nope", "bert", "qwen2", "gpt2", "mixtral", 5, None, "", REMOVED, ["llama"])
    lies |= _all_of({f"{value!r}": value for value in types}, "model_type")
    lies |= _all_of({"a string": "yes", "1": 1, "a list": [], "null": None}, "tie_word_embeddings")
    for key in ("bos_token_id", "eos_token_id"):
        values = ("a", 1.5, NAN, [[]], -5, {}, True)
        lies |= _all_of({f"{value!r}": value for value in values}, key)
    lies |= _all_of({"a string": "a", "1.5": 1.5, "an object": {}}, "pad_token_id")
    lies |= _all_of({"unknown": "nope", "a number": 5, "null": None}, "hidden_act")
    lies |= _all_of({"true": True, "a string": "true", "1": 1}, "attention_bias")
    lies |= _all_of({"true": True, "a string": "true"}, "mlp_bias")
    lies |= _all_of({"NaN": NAN, "a string": "a", "a list": []}, "attention_dropout")
    lies |= _all_of({"NaN": NAN, "a string": "a"}, "initializer_range")
    lies |= _all_of({"a string": "no", "2": 2}, "use_cache")
    lies |= _all_of({"a string": "x", "a list": [], "an object": {}}, "text_config")
    lies["head_dim x 2 and heads / 2"] = lambda folder: (
        config("head_dim", value=64)(folder),
        config("num_attention_heads", value=3)(folder),
    )
    for suffix in (
        "model.norm.weight",
        "lm_head.weight",
        "embed_tokens.weight",
        "layers.1.input_layernorm.weight",
        "layers.0.post_attention_layernorm.weight",
    ):
        lies[f"missing {suffix}"] = without(suffix)
    lies["norm renamed"] = renamed("model.norm.weight", "model.norm.gamma")
    lies["an extra tensor"] = extra("model.layers.0.self_attn.extra.weight")
    lies["an extra tensor at the top"] = extra("extra")
    lies["an extra bias"] = extra("model.layers.1.self_attn.o_proj.bias", shape=(128,))
    lies["an extra layer"] = extra("model.layers.2.input_layernorm.weight", shape=(128,))
    lies["embeddings transposed"] = reshape("embed_tokens.weight", lambda shape: shape[::-1])
    lies["norm of two dimensions"] = reshape("model.norm.weight", lambda shape: [1, *shape])
    for dtype in ("F16", "I16", "U16"):
        lies[f"embeddings are {dtype}"] = relabel("embed_tokens.weight", dtype)
        lies[f"norm is {dtype}"] = relabel("model.norm.weight", dtype)
    lies["index names another file"] = indexed(
        lambda names: dict.fromkeys(names, "other.safetensors")
    )
    lies["index names a file above"] = indexed(lambda names: dict.fromkeys(names, f"../{SHARD}"))
    lies["index misses a tensor"] = indexed(lambda names: dict.fromkeys(names[1:], SHARD))
    lies["index has a tensor more"] = indexed(lambda names: dict.fromkeys([*names, "x"], SHARD))
    lies["index of numbers"] = indexed(lambda names: dict.fromkeys(names, 1))
    lies["a tensor in two shards"] = doubled
    lies["truncated"] = truncated
    lies["tokenizer with tokens beyond"] = beyond_tokenizer
    lies["tokenizer with an added token beyond"] = beyond_added
    lies |= generation_lies()
    return lies


LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


def generation_lies() -> dict[str, Change]:
    """Return lies in generation_config.json."""
    fields: dict[str, tuple[object, ...]] = {
        "temperature": ("hot", NAN, -1, INFINITY, []),
        "top_p": ("x", NAN, 2, -1),
        "top_k": ("x", NAN, -5, 1.5),
        "eos_token_id": ("x", 1.5),
        "repetition_penalty": ("x", NAN, 0),
        "max_new_tokens": ("x", -1),
        "do_sample": ("x",),
    }
    lies = {}
    for key, values in fields.items():
        for value in values:
            lies[f"generation {key}: {value!r}"] = config(
                key, file="generation_config.json", value=value
            )
    lies["generation_config is a list"] = lambda folder: rewrite(
        folder / "generation_config.json", b"[]"
    )
    lies["generation_config is no JSON"] = lambda folder: rewrite(
        folder / "generation_config.json", b"{"
    )
    return lies


def beyond_tokenizer(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["zzzz"] = 5000
    rewrite(folder / "tokenizer.json", json.dumps(tokenizer).encode())


def beyond_added(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    token = {**tokenizer["added_tokens"][0], "id": 4100, "content": "more", "special": False}
    tokenizer["added_tokens"].append(token)
    rewrite(folder / "tokenizer.json", json.dumps(tokenizer).encode())


def with_numbers(suffix: str, dtype: str, numbers: Callable[[int], object]) -> Change:
    """Return what gives the first tensor that ends with ``suffix`` other numbers: ``numbers`` takes
    how many, and returns an array.
    """

    def edit(entries: dict[str, Entry]) -> None:
        import torch

        entry = entries[_named(entries, suffix)]
        values = torch.as_tensor(numbers(math.prod(entry["shape"])))
        values = values.to({"F16": torch.float16, "BF16": torch.bfloat16}[dtype])
        entry.update(dtype=dtype, data=values.view(torch.uint8).numpy().tobytes())

    return tensors(edit)


def special_token(folder: Path) -> None:
    """Give the tokenizer a special token beyond the embeddings, as that of Gemma 3 1B has one."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    token = {**tokenizer["added_tokens"][0], "id": 4096, "content": "<image>", "special": True}
    tokenizer["added_tokens"].append(token)
    rewrite(folder / "tokenizer.json", json.dumps(tokenizer).encode())


def _bell(size: float) -> Callable[[int], object]:
    return lambda count: np.random.default_rng(0).normal(0, size, count)


ODD: Mapping[str, tuple[str, Change]] = {  # what looks like a lie and is published -> base, change
    "eos beyond": ("llama", config("eos_token_id", value=128_002)),
    "bos beyond": ("sliding", config("bos_token_id", value=10**6)),
    "eos beyond for sampling": (
        "llama",
        config("eos_token_id", file="generation_config.json", value=[-1, 10**6]),
    ),
    "special token beyond": ("sliding", special_token),
    "head in the other dtype": ("llama", with_numbers("lm_head.weight", "F16", _bell(0.02))),
    "layer never used": ("llama", with_numbers("up_proj.weight", "BF16", _bell(1e-13))),
    "signs": ("llama", with_numbers("up_proj.weight", "F16", lambda n: np.arange(n) % 3 - 1)),
    "sparsity without targets": (
        "ct-int4",
        config("quantization_config", "sparsity_config", value={"format": "dense", "targets": []}),
    ),
    "scale zero": ("awq", filled("q_proj.scales", b"\0\0")),
    "scale zero of a tensor": ("modelopt-fp8", filled("q_proj.weight_scale", b"\0\0")),
}


def _plain_lies() -> dict[str, Change]:
    """Return lies about a model in 16 bits."""
    lies: dict[str, Change] = {}
    for part in ("k_proj", "v_proj", "gate_proj", "down_proj"):
        lies[f"missing {part}"] = without(
            f"layers.1.{'mlp' if ('o_' not in part and 'gate' in part) or 'down' in part else 'self_attn'}.{part}.weight"
        )
        lies[f"{part} transposed"] = reshape(f"{part}.weight", lambda shape: shape[::-1])
        lies[f"{part} is flat"] = reshape(f"{part}.weight", lambda shape: [shape[0] * shape[1]])
    for dtype in ("I16", "U16"):
        lies[f"q_proj is {dtype}"] = relabel("q_proj.weight", dtype)
    for kind, said in CONFIGS.items():
        lies[f"says {kind} over 16 bits"] = config("quantization_config", value=said)
    lies["quantization_config is a string"] = config("quantization_config", value="gptq")
    lies["quantization_config is a list"] = config("quantization_config", value=[])
    lies["quantization_config is empty"] = config("quantization_config", value={})
    return lies


CONFIGS: Mapping[str, object] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "fp8 blocks": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "mxfp4": {"quant_method": "mxfp4"},
    "torchao": {"quant_method": "torchao", "quant_type": {"default": "int8wo"}},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "unknown": {"quant_method": "nope"},
    "no method": {"bits": 4},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128},
            }
        },
    },
}


def _packed_lies(base: str) -> dict[str, Change]:
    """Return lies about the quantized layers of a base."""
    lies: dict[str, Change] = {
        "no quantization_config": config("quantization_config", value=REMOVED)
    }
    for kind, said in CONFIGS.items():
        if kind.split()[0] != base.split("-")[0]:
            lies[f"says {kind}"] = config("quantization_config", value=said)
    lies["layer 1's q_proj in 16 bits is missing"] = tensors(
        lambda entries: [
            entries.pop(name) for name in list(entries) if "layers.1.self_attn.q_proj" in name
        ]
    )
    for suffix, own in RELABELLED[base].items():
        lies[f"missing {suffix}"] = without(f"q_proj.{suffix}")
        same_width = next(dtypes for dtypes in WIDTHS if own in dtypes)
        for dtype in [dtype for dtype in same_width if dtype != own]:
            lies[f"{suffix} is {dtype}"] = relabel(f"q_proj.{suffix}", dtype)
            lies[f"all {suffix} are {dtype}"] = relabel_all(f".{suffix}", dtype)
        lies[f"{suffix} transposed"] = reshape(f"down_proj.{suffix}", lambda shape: shape[::-1])
        lies[f"{suffix} of one dimension more"] = reshape(
            f"q_proj.{suffix}", lambda shape: [1, *shape]
        )
    return lies


def relabel_all(suffix: str, dtype: str) -> Change:
    return tensors(
        lambda entries: [
            entry.update(dtype=dtype) for name, entry in entries.items() if name.endswith(suffix)
        ]
    )


BYTES = ("I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0")
WORDS = ("F32", "I32", "U32")
HALVES = ("F16", "BF16", "I16")
WIDTHS = (BYTES, WORDS, HALVES, ("I64", "F64", "U64"))
RELABELLED: Mapping[str, Mapping[str, str]] = {  # base -> suffix -> its dtype
    "ct-int4": {"weight_packed": "I32", "weight_scale": "BF16", "weight_shape": "I64"},
    "ct-fp8": {"weight": "F8_E4M3", "weight_scale": "BF16"},
    "ct-int8": {"weight": "I8", "weight_scale": "BF16"},
    "ct-nvfp4": {"weight_packed": "U8", "weight_scale": "F8_E4M3", "weight_global_scale": "F32"},
    "ct-mxfp4": {"weight_packed": "U8", "weight_scale": "U8"},
    "gptq": {"qweight": "I32", "qzeros": "I32", "scales": "BF16", "g_idx": "I32"},
    "awq": {"qweight": "I32", "qzeros": "I32", "scales": "BF16"},
    "modelopt-fp8": {"weight": "F8_E4M3", "weight_scale": "F32", "input_scale": "F32"},
    "modelopt-nvfp4": {"weight": "U8", "weight_scale": "F8_E4M3", "weight_scale_2": "F32"},
    "fp8-block": {"weight": "F8_E4M3", "weight_scale_inv": "F32"},
}
FIELDS: Mapping[str, Mapping[tuple[object, ...], tuple[object, ...]]] = {  # base -> field -> values
    "gptq": {
        ("bits",): (3, 8, 0, -4, "4", NAN, None, 2**31, 5),
        ("group_size",): (64, 0, -5, "128", NAN, 1.5, 2**31, None),
        ("sym",): ("yes", None, 2),
        ("checkpoint_format",): ("nope", 5, "gptq_v2"),
        ("desc_act",): ("yes", 2),
        ("lm_head",): (True, "x"),
        ("dynamic",): ([], "x", {"-:.*": {}}, {"(": {}}, {"+:.*q_proj": {"bits": 8}}),
    },
    "awq": {
        ("bits",): (3, 8, 0, "4", NAN, None),
        ("group_size",): (64, 0, -5, "128", NAN, None),
        ("zero_point",): (False, "yes", None),
        ("version",): ("nope", 5, "gemv"),
        ("modules_to_not_convert",): ("x", 5, ["mlp"], [5]),
    },
    "fp8-block": {
        ("weight_block_size",): ([64, 64], [128], [0, 0], "128", [NAN, NAN], None, [-1, 128]),
        ("activation_scheme",): ("static", "nope", 5),
        ("fmt",): ("e5m2", 5),
        ("modules_to_not_convert",): (["mlp"], 5, "x"),
    },
    "modelopt-fp8": {
        ("quant_algo",): ("NVFP4", "nope", 5, None, "INT4_AWQ"),
        ("ignore",): (["*q_proj*"], 5, "x"),
    },
    "modelopt-nvfp4": {
        ("quant_algo",): ("FP8", "nope", None, "MXFP8"),
        ("config_groups", "group_0", "weights", "group_size"): (32, 0, "16", NAN),
    },
    **{
        base: {
            ("config_groups", "group_0", "weights", "num_bits"): (
                2,
                3,
                8 if bits == 4 else 4,
                0,
                "4",
                NAN,
                None,
                16,
            ),
            ("config_groups", "group_0", "weights", "type"): (
                "int" if kind == "float" else "float",
                "nope",
                5,
                None,
            ),
            ("config_groups", "group_0", "weights", "strategy"): (
                "nope",
                5,
                "block",
                "tensor",
                "channel" if bits == 4 else "group",
            ),
            ("config_groups", "group_0", "weights", "group_size"): (64, 0, -5, "128", NAN),
            ("config_groups", "group_0", "weights", "symmetric"): (False, "yes", None),
            ("config_groups", "group_0", "targets"): (
                [],
                ["Conv"],
                "Linear",
                5,
                ["re:("],
                ["re:.*q_proj"],
            ),
            ("config_groups",): ({}, [], None, {"group_0": 5}),
            ("format",): ("nope", 5, "float-quantized" if bits == 4 else "pack-quantized"),
            ("ignore",): (["re:.*q_proj"], ["re:("], 5, "lm_head", []),
            ("quant_method",): ("gptq", "nope", 5, None),
            ("kv_cache_scheme",): ("fp8", 5, {"num_bits": 8, "type": "float"}),
        }
        for base, bits, kind in (
            ("ct-int4", 4, "int"),
            ("ct-fp8", 8, "float"),
            ("ct-int8", 8, "int"),
            ("ct-nvfp4", 4, "float"),
            ("ct-mxfp4", 4, "float"),
        )
    },
}


def _config_lies(base: str) -> dict[str, Change]:
    lies = {}
    for keys, values in FIELDS[base].items():
        name = ".".join(map(str, keys))
        for value in values:
            lies[f"{name}: {value!r}"] = config("quantization_config", *keys, value=value)
    return lies


def _mixture_lies() -> dict[str, Change]:
    lies: dict[str, Change] = {}
    for name in ("num_local_experts", "num_experts_per_tok", "moe_intermediate_size"):
        lies |= _all_of({**WRONG, "5": 5, "3": 3, "null": None}, name)
    for label, value in (("0", 0), ("7", 7), ("NaN", NAN), ("a string", "1")):
        lies[f"decoder_sparse_step: {label}"] = config("decoder_sparse_step", value=value)
    lies |= _all_of({"[0]": [0], "a string": "x", "[7]": [7]}, "mlp_only_layers")
    lies |= _all_of({"a string": "x", "1": 1}, "norm_topk_prob")
    lies["an expert less"] = tensors(
        lambda entries: [entries.pop(name) for name in list(entries) if ".experts.3." in name]
    )
    lies["missing router"] = without("layers.1.mlp.gate.weight")
    lies["router transposed"] = reshape("mlp.gate.weight", lambda shape: shape[::-1])
    lies["q_norm is missing"] = without("q_norm.weight")
    return lies


def _other_lies() -> dict[tuple[str, str], Change]:
    lies: dict[tuple[str, str], Change] = {}
    for label, change in {
        **_all_of({**WRONG, "null": None}, "sliding_window"),
        **_all_of({**WRONG_NUMBERS, "null": None}, "query_pre_attn_scalar"),
        **_all_of(
            {
                "unknown": ["nope", "full_attention"],
                "one": ["full_attention"],
                "three": ["full_attention"] * 3,
                "numbers": [1, 2],
                "a string": "full_attention",
                "an object": {},
            },
            "layer_types",
        ),
        **_all_of({"NaN": NAN, "0": 0, "a string": "x"}, "final_logit_softcapping"),
        "missing norm": without("layers.1.pre_feedforward_layernorm.weight"),
    }.items():
        lies["sliding", label] = change
    for name in (
        "n_routed_experts",
        "kv_lora_rank",
        "q_lora_rank",
        "qk_rope_head_dim",
        "v_head_dim",
    ):
        for label, change in _all_of(WRONG_COUNTS, name).items():
            lies["mla", label] = change
    for name in ("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"):
        for label, change in _all_of({**WRONG, "3": 3}, name).items():
            lies["mla", label] = change
    lies["mla", "missing kv_b_proj"] = without("layers.1.self_attn.kv_b_proj.weight")
    return lies


def _all_lies() -> dict[tuple[str, str], Change]:
    """Return every lie by base and name."""
    lies: dict[tuple[str, str], Change] = {}
    parts = {
        "llama": {**_model_lies(), **_plain_lies()},
        "tied": {
            "missing embeddings": without("embed_tokens.weight"),
            **_all_of({"false": False}, "tie_word_embeddings"),
        },
        "mixture": _mixture_lies(),
        "mixture-int4": _mixture_lies(),
        "mixture-gptq": _mixture_lies(),
    }
    for base in RELABELLED:
        own = {**_packed_lies(base), **_config_lies(base)}
        parts[base] = {**own, **(_model_lies() if base in ("ct-fp8", "gptq") else {})}
    for base, changes in parts.items():
        lies |= {(base, label): change for label, change in changes.items()}
    return {**lies, **_other_lies()}


LIES = _all_lies()


HARMLESS: Mapping[str, str] = {  # pattern of "base: name" -> why it may pass
    r".*(head_dim|max_position_embeddings|rms_norm_eps|rope_theta): (removed|null)": "the default of the class, and the true value",
    r".*num_experts_per_tok: 3": "a legal number of experts",
    r".*mlp_only_layers: \[7\]": "there is no such layer",
    r".*index misses a tensor": "the file has it, and the header tells of it",
    r".*architectures: (BERT|Qwen2)": "the class is chosen by model_type, as transformers does",
    r"gptq: no quantization_config": "quantize_config.json says the same",
    r"ct-\w+: (says (compressed-tensors|fp8)|.*(strategy|group_size|num_bits|targets|ignore|format|type|kv_cache_scheme): .*)": "the tensors decide, and a warning tells of the difference",
    r"(gptq|awq|fp8-block|modelopt-\w+): (?!says|all|missing)\w+(\.\w+)*: .*": "the tensors decide, and a warning tells of the difference",
    r".*: missing (weight_shape|g_idx)": "the other tensors tell the same",
    r".*: (weight_shape|g_idx|\w*scale\w*) (transposed|of one dimension more)": "one way to read it is left",
    r".*: (weight|weight_packed|weight_global_scale|weight_scale_2|input_scale) transposed": "it is square, or a scalar",
    r"ct-mxfp4: .*F8_E8M0": "the same numbers under their own name",
}


def harmless_reason(base: str, name: str) -> str:
    """Return why the lie may pass; empty when it must be refused."""
    for pattern, reason in HARMLESS.items():
        if re.fullmatch(pattern, f"{base}: {name}"):
            return reason
    return ""

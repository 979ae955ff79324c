"""Model folders that each hold one lie: a value in a config that no model has, a tensor that is
missing or relabelled, a quantization config of another checkpoint.

`make_bases` writes true checkpoints of a few small layers; `LIES` tells, for each, what is changed.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

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


def _fields() -> dict[tuple[str, str], Change]:
    """Return every size of every base with every value that no model has."""
    nonsense = {
        "NaN": NAN,
        "Infinity": INFINITY,
        "1e999": BEYOND,
        "-1": -1,
        "0": 0,
        "1.5": 1.5,
        "a string": "64",
        "true": True,
        "null": None,
        "a list": [],
        "an object": {},
        "2**31": 2**31,
        "2**63": 2**63,
        "2**64": 2**64,
    }
    usual = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "max_position_embeddings",
        "rms_norm_eps",
    )
    fields = {
        "llama": usual,
        "mixture": ("num_local_experts", "num_experts_per_tok", "moe_intermediate_size"),
        "sliding": ("sliding_window", "query_pre_attn_scalar"),
        "mla": (
            "n_routed_experts",
            "kv_lora_rank",
            "q_lora_rank",
            "qk_rope_head_dim",
            "v_head_dim",
            "n_group",
            "topk_group",
            "first_k_dense_replace",
            "n_shared_experts",
        ),
        "ct-fp8": usual,
        "ct-int4": usual,
        "gptq": usual,
        "mixture-int4": ("num_local_experts", "num_experts_per_tok", "moe_intermediate_size"),
    }
    found = {}
    for base, names in fields.items():
        for name in names:
            for label, value in nonsense.items():
                found[base, f"{name} is {label}"] = config(name, value=value)
    for base, names in fields.items():
        values = {**SMALL, **(MODELS[QUANTIZED[base][0] if base in QUANTIZED else base][1])}
        values["num_local_experts"] = 4
        for name in names:
            if isinstance(true := values.get(name), int):
                for label, value in {
                    "+1": true + 1,
                    "-1": true - 1,
                    "x2": true * 2,
                    "half": true // 2,
                }.items():
                    found[base, f"{name} is off: {label}"] = config(name, value=value)
    return found

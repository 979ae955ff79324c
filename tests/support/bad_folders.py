"""Model folders that must be refused, made by hand: what writes each, the code it is refused with,
and what the message must say.

`BAD_FOLDERS` is the table. The first part breaks files, headers, JSON and shards; the second lets
config and tensors disagree; the third breaks quantized layers, which `qtool.formats.detect` finds.
"""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

BITS = {
    "BF16": 16,
    "F16": 16,
    "F32": 32,
    "I32": 32,
    "I64": 64,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F4": 4,
}
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
Builder = Callable[[Path], object]


def safetensors(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """The bytes of a file with any header, true or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: object, shape: object, start: object, end: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def true_file(tensors: Tensors, values: Mapping[str, bytes] | None = None) -> bytes:
    """The bytes of a file with these tensors, zero but for ``values``."""
    header, data = {}, b""
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * BITS[dtype] // 8
        header[name] = entry(dtype, shape, len(data), len(data) + size)
        data += (values or {}).get(name, bytes(size))
    return safetensors(header, data)


def files(config: object = None, **contents: object) -> Builder:
    """A builder of a folder of ``contents``: bytes as they are, all else as JSON; `__` in a name
    stands for a dot.
    """

    def build(folder: Path) -> None:
        for name, content in {"config__json": {} if config is None else config, **contents}.items():
            file = folder / name.replace("__", ".")
            file.write_bytes(
                content if isinstance(content, bytes) else json.dumps(content).encode()
            )

    return build


def weights(header: object, data: bytes = b"", **more: Any) -> Builder:
    return files(model__safetensors=safetensors(header, data, **more))


def one(**changes: object) -> Builder:
    """A builder of a file with one tensor of four bytes, some of whose fields are changed."""
    return weights({"a.weight": {**entry("U8", [4], 0, 4), **changes}}, bytes(4))


def text_file(text: bytes) -> Builder:
    return files(model__safetensors=text)


def config_file(text: bytes) -> Builder:
    return files(config=text, model__safetensors=GOOD_FILE)


def index(weight_map: object, **shards: object) -> Builder:
    return files(model__safetensors__index__json={"weight_map": weight_map}, **shards)


def replaced(name: str, make: Callable[[Path], object]) -> Builder:
    """A builder of a good folder whose file ``name`` is something else."""

    def build(folder: Path) -> None:
        files(model__safetensors=GOOD_FILE)(folder)
        (folder / name).unlink()
        make(folder / name)

    return build


def listen(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the path of a socket may have 100 bytes
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(here)


def sparse(name: str, start: bytes, size: int) -> Builder:
    """A builder of a good folder with one huge file that takes no space."""

    def build(folder: Path) -> None:
        files(model__safetensors=GOOD_FILE)(folder)
        with (folder / name).open("wb") as file:
            file.write(start)
            file.truncate(size)

    return build


GOOD = {"a.weight": entry("BF16", [2, 3], 0, 12), "b.weight": entry("F32", [1], 12, 16)}
GOOD_FILE = safetensors(GOOD, bytes(16))
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
HTML = b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>"

# A decoder and its config

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    **{
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "vocab_size": 100,
        "intermediate_size": 96,
    },
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
}


def llama_tensors() -> dict[str, tuple[str, tuple[int, ...]]]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (100, 64),
        "model.norm.weight": (64,),
    }
    for layer in range(2):
        path = f"model.layers.{layer}"
        shapes |= {
            f"{path}.input_layernorm.weight": (64,),
            f"{path}.post_attention_layernorm.weight": (64,),
        }
        shapes |= {
            f"{path}.self_attn.{name}_proj.weight": shape
            for name, shape in zip("qkvo", ((64, 64), (32, 64), (32, 64), (64, 64)), strict=True)
        }
        shapes |= {
            f"{path}.mlp.gate_proj.weight": (96, 64),
            f"{path}.mlp.up_proj.weight": (96, 64),
            f"{path}.mlp.down_proj.weight": (64, 96),
        }
    return {name: ("BF16", shape) for name, shape in shapes.items()}


def llama(
    config: Mapping[str, object] | None = None, without: str = "", **shapes: tuple[int, ...]
) -> Builder:
    """A builder of a small Llama: config fields changed, tensors that contain ``without`` left out,
    shapes changed (`__` stands for a dot).
    """
    tensors = {
        name: tensor
        for name, tensor in llama_tensors().items()
        if not without or without not in name
    }
    tensors |= {name.replace("__", "."): ("BF16", shape) for name, shape in shapes.items()}
    return files(config={**LLAMA, **(config or {})}, model__safetensors=true_file(tensors))


# One quantized layer of 128 outputs and 256 inputs in each format

LAYER = "model.layers.0.mlp.up_proj"
LAYERS: dict[
    str, tuple[dict[str, Any], dict[str, tuple[str, tuple[int, ...]]]]
] = {  # format -> quantization config, tensors
    "gptq": (
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 128,
            "sym": True,
            "checkpoint_format": "gptq",
        },
        {
            "qweight": ("I32", (32, 128)),
            "qzeros": ("I32", (2, 16)),
            "scales": ("F16", (2, 128)),
            "g_idx": ("I32", (256,)),
        },
    ),
    "awq": (
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": 128,
            "zero_point": True,
            "version": "gemm",
        },
        {"qweight": ("I32", (256, 16)), "qzeros": ("I32", (2, 16)), "scales": ("F16", (2, 128))},
    ),
    "int4": (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {
                "g": {
                    "targets": ["Linear"],
                    "weights": {
                        "num_bits": 4,
                        "type": "int",
                        "strategy": "group",
                        "group_size": 128,
                    },
                }
            },
        },
        {
            "weight_packed": ("I32", (128, 32)),
            "weight_scale": ("BF16", (128, 2)),
            "weight_shape": ("I64", (2,)),
        },
    ),
    "fp8": (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {
                "g": {
                    "targets": ["Linear"],
                    "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
                }
            },
        },
        {"weight": ("F8_E4M3", (128, 256)), "weight_scale": ("BF16", (128, 1))},
    ),
    "nvfp4": (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {
                "g": {
                    "targets": ["Linear"],
                    "weights": {
                        "num_bits": 4,
                        "type": "float",
                        "strategy": "tensor_group",
                        "group_size": 16,
                    },
                }
            },
        },
        {
            "weight_packed": ("U8", (128, 128)),
            "weight_scale": ("F8_E4M3", (128, 16)),
            "weight_global_scale": ("F32", (1,)),
        },
    ),
    "modelopt": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "producer": {"name": "modelopt"}},
        {
            "weight": ("U8", (128, 128)),
            "weight_scale": ("F8_E4M3", (128, 16)),
            "weight_scale_2": ("F32", ()),
            "input_scale": ("F32", ()),
        },
    ),
    "torchao": (
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}},
        {"_weight_qdata": ("I8", (128, 256)), "_weight_scale": ("BF16", (128, 1))},
    ),
}


def quantized(
    kind: str,
    config: Mapping[str, object] | None = None,
    **tensors: tuple[str, tuple[int, ...]] | None,
) -> Builder:
    """A builder of one layer of format ``kind``: config fields and tensors changed, those that are
    None left out.
    """
    said, parts = LAYERS[kind]
    parts = {suffix: tensor for suffix, tensor in {**parts, **tensors}.items() if tensor}
    values = (
        {f"{LAYER}.weight_shape": (128).to_bytes(8, "little") + (256).to_bytes(8, "little")}
        if "weight_shape" in parts
        else {}
    )
    content = true_file({f"{LAYER}.{suffix}": tensor for suffix, tensor in parts.items()}, values)
    return files(
        config={"quantization_config": {**said, **(config or {})}}, model__safetensors=content
    )


def group(kind: str, **changes: object) -> dict[str, object]:
    """The config group of a compressed-tensors layer, its weights changed."""
    weights = LAYERS[kind][0]["config_groups"]["g"]["weights"]
    return {"config_groups": {"g": {"targets": ["Linear"], "weights": {**weights, **changes}}}}


BAD_FOLDERS: dict[str, tuple[Builder, str, tuple[str, ...]]] = {
    # Files
    "no folder": (lambda folder: folder.rmdir(), "E_NO_MODEL", ("no such folder",)),
    "a file": (
        lambda folder: (folder.rmdir(), folder.write_text("")),
        "E_NOT_A_FOLDER",
        ("is a file",),
    ),
    "empty folder": (lambda folder: None, "E_NOT_A_MODEL", ("no config.json",)),
    "Mistral's own format": (
        lambda folder: (folder / "params.json").write_text('{"dim": 256}'),
        "E_NOT_A_MODEL",
        ("params.json", "Mistral"),
    ),
    "name too long": (
        index({"a": "x" * 4000 + ".safetensors"}),
        "E_INDEX_PATH",
        ("index.json", "`a`"),
    ),
    "no weights": (files(), "E_NO_WEIGHTS", ("no safetensors file",)),
    "only pickles": (files(pytorch_model__bin=b"\x80"), "E_PICKLE", ("pytorch_model.bin",)),
    "only GGUF, cut off": (files(model__gguf=b"GGUF"), "E_TRUNCATED", ("model.gguf",)),
    "pickle under another name": (
        text_file(b"PK\x03\x04" + bytes(100)),
        "E_PICKLE",
        ("model.safetensors", "104 bytes"),
    ),
    "FIFO": (
        replaced("model.safetensors", os.mkfifo),
        "E_NOT_A_FILE",
        ("model.safetensors", "a FIFO"),
    ),
    "FIFO as config": (
        replaced("config.json", os.mkfifo),
        "E_NOT_A_FILE",
        ("config.json", "a FIFO"),
    ),
    "socket": (
        replaced("model.safetensors", listen),
        "E_NOT_A_FILE",
        ("model.safetensors", "a socket"),
    ),
    "device": (
        replaced("model.safetensors", lambda path: path.symlink_to("/dev/zero")),
        "E_NOT_A_FILE",
        ("model.safetensors", "a device"),
    ),
    "folder as file": (
        replaced("model.safetensors", Path.mkdir),
        "E_NOT_A_FILE",
        ("model.safetensors", "a folder"),
    ),
    "broken link": (
        replaced("model.safetensors", lambda path: path.symlink_to("../blobs/none")),
        "E_BROKEN_LINK",
        ("model.safetensors", "../blobs/none"),
    ),
    "link in a circle": (
        replaced("config.json", lambda path: path.symlink_to(path.name)),
        "E_BROKEN_LINK",
        ("config.json",),
    ),
    "LFS pointer": (text_file(LFS), "E_LFS_POINTER", ("model.safetensors", "Git LFS")),
    "HTML page": (text_file(HTML), "E_NOT_SAFETENSORS", ("model.safetensors", "HTML page")),
    # Headers
    "empty file": (text_file(b""), "E_HEADER_SHORT", ("model.safetensors", "0 bytes")),
    "header of nothing": (
        weights(b""),
        "E_HEADER_EMPTY",
        ("model.safetensors", "header of 0 bytes"),
    ),
    "header beyond the file": (
        weights(GOOD, bytes(16), length=1 << 40),
        "E_HEADER_LENGTH",
        ("model.safetensors", "1,099,511,627,776"),
    ),
    "header with space in front": (
        weights(b" " + json.dumps(GOOD).encode(), bytes(16)),
        "E_HEADER_START",
        ("model.safetensors", "brace"),
    ),
    "huge header": (
        sparse("model.safetensors", (1 << 38).to_bytes(8, "little"), 1 << 39),
        "E_JSON_SIZE",
        ("model.safetensors", "274,877,906,944"),
    ),
    "metadata of a number": (
        weights({"__metadata__": {"step": 1}, **GOOD}, bytes(16)),
        "E_HEADER_METADATA",
        ("model.safetensors", "'step': 1"),
    ),
    "name with a terminal command": (
        weights({"a\x1b[31m": entry("U8", [4], 0, 4)}, bytes(4)),
        "E_HEADER_NAME",
        ("model.safetensors", "x1b"),
    ),
    "entry that is a list": (
        weights({"a": ["U8", [4], 0, 4]}, bytes(4)),
        "E_HEADER_ENTRY",
        ("model.safetensors", "`a`"),
    ),
    "entry with another field": (
        one(scale=1.5),
        "E_HEADER_FIELDS",
        ("model.safetensors", "`a.weight`", "scale"),
    ),
    "unknown dtype": (
        one(dtype="F128"),
        "E_HEADER_DTYPE",
        ("model.safetensors", "`a.weight`", "'F128'"),
    ),
    "negative shape": (
        one(shape=[-2, -2]),
        "E_HEADER_SHAPE",
        ("model.safetensors", "`a.weight`", "[-2, -2]"),
    ),
    "shape of numbers with thousands of digits": (
        one(shape=[10**4000] * 4),
        "E_HEADER_SHAPE",
        ("model.safetensors", "`a.weight`"),
    ),
    "backward offsets": (
        one(data_offsets=[4, 0]),
        "E_HEADER_OFFSETS",
        ("model.safetensors", "`a.weight`", "[4, 0]"),
    ),
    "shape and bytes differ": (
        one(shape=[5]),
        "E_HEADER_SIZE",
        ("`a.weight`", "5 bytes", "given 4"),
    ),
    "half a byte": (
        one(dtype="F4", shape=[7]),
        "E_HEADER_BITS",
        ("model.safetensors", "`a.weight`", "[7]"),
    ),
    "truncated": (
        text_file(GOOD_FILE[:-1]),
        "E_TRUNCATED",
        ("model.safetensors", "`b.weight`", "[12, 16]", "15 bytes"),
    ),
    "overlap": (
        weights({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, bytes(6)),
        "E_OVERLAP",
        ("`b` at byte", "`a`"),
    ),
    "hole": (
        weights({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 5, 9)}, bytes(9)),
        "E_HOLE",
        ("`b` at byte", "`a`"),
    ),
    "bytes behind": (
        text_file(GOOD_FILE + b"x"),
        "E_TRAILING_BYTES",
        ("model.safetensors", "1 bytes"),
    ),
    "no tensor": (
        weights({"__metadata__": {"format": "pt"}}),
        "E_NO_TENSORS",
        ("model.safetensors",),
    ),
    # JSON
    "config that is cut": (config_file(b'{"a": 1'), "E_JSON_SYNTAX", ("config.json", "char 7")),
    "config of nothing": (config_file(b""), "E_JSON_EMPTY", ("config.json", "0 bytes")),
    "config that is a page": (config_file(HTML), "E_JSON_HTML", ("config.json",)),
    "config that is a list": (config_file(b"[]"), "E_JSON_TYPE", ("config.json", "list")),
    "config in Latin-1": (
        config_file(b'{"author": "Ren\xe9"}'),
        "E_JSON_ENCODING",
        ("config.json", "byte 15"),
    ),
    "config with half a character": (
        config_file(b'{"author": "\\ud800"}'),
        "E_JSON_SURROGATE",
        ("config.json", "U+D800"),
    ),
    "config that repeats itself": (
        config_file(b'{"a": 1, "a": 2}'),
        "E_JSON_DUPLICATE",
        ("config.json", "`a`"),
    ),
    "config of brackets": (
        config_file(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
        "E_JSON_DEEP",
        ("config.json", "400,006 bytes"),
    ),
    "config with an endless number": (
        config_file(b'{"a": ' + b"9" * 5_000 + b"}"),
        "E_JSON_NUMBER",
        ("config.json", "4300 digits"),
    ),
    "config of gigabytes": (
        sparse("config.json", b"", 1 << 40),
        "E_JSON_SIZE",
        ("config.json", "1,099,511,627,776"),
    ),
    "config of millions": (
        config_file(b'{"a":[' + b"{}," * 9_000_000 + b"0]}"),
        "E_JSON_VALUES",
        ("config.json", "18,000,003"),
    ),
    "architectures that are a number": (
        config_file(b'{"architectures": [7]}'),
        "E_CONFIG_FIELD",
        ("config.json", "`architectures`", "[7]"),
    ),
    # Index and shards
    "index without a map": (
        files(model__safetensors__index__json={"metadata": {}}),
        "E_INDEX_MAP",
        ("index.json", "`weight_map`"),
    ),
    "index to a number": (index({"a": 1}), "E_INDEX_TYPE", ("index.json", "`a`", "in 1,")),
    "index to the parent": (
        index({"a": "../other.safetensors"}),
        "E_INDEX_PATH",
        ("index.json", "`a`", "../other.safetensors"),
    ),
    "index to a pickle": (
        index({"a": "pytorch_model.bin"}),
        "E_INDEX_SUFFIX",
        ("index.json", "`a`", "pytorch_model.bin"),
    ),
    "index of another tensor": (
        index({"c": "x.safetensors"}, x__safetensors=GOOD_FILE),
        "E_INDEX_TENSOR",
        ("index.json", "`c`", "x.safetensors"),
    ),
    "missing shard": (
        index({"a": "model-2.safetensors"}),
        "E_MISSING_SHARD",
        ("model-2.safetensors",),
    ),
    "tensor in two shards": (
        files(x_1__safetensors=GOOD_FILE, x_2__safetensors=GOOD_FILE),
        "E_DUPLICATE",
        ("`a.weight`", "x_1.safetensors", "x_2"),
    ),
    # Config against tensors
    "layer missing": (
        llama(without="layers.1."),
        "E_LAYER_MISSING",
        ("config.json", "num_hidden_layers is 2", "model.layers.1."),
    ),
    "layer missing in the middle": (
        llama(without="layers.0."),
        "E_LAYER_MISSING",
        ("config.json", "model.layers.0."),
    ),
    "billions of layers": (
        llama({"num_hidden_layers": 10**15}),
        "E_CONFIG_FIELD",
        ("`num_hidden_layers`", "1000000000000000"),
    ),
    "layer with two numbers": (
        llama(model__layers__01__self_attn__q_proj__weight=(64, 64)),
        "E_LAYER_NUMBER",
        ("model.layers.01.",),
    ),
    "vocabulary too small": (
        llama({"vocab_size": 101}),
        "E_EMBEDDING_SHAPE",
        ("model.embed_tokens.weight", "vocab_size 101", "[100, 64]"),
    ),
    "embeddings of another model": (
        llama(model__embed_tokens__weight=(100, 32)),
        "E_EMBEDDING_SHAPE",
        ("hidden_size 64", "[100, 32]"),
    ),
    "norm of another model": (
        llama(model__norm__weight=(128,)),
        "E_NORM_SHAPE",
        ("`model.norm.weight`", "hidden_size 64", "[128]"),
    ),
    "heads of another model": (
        llama({"num_key_value_heads": 4}),
        "E_ATTENTION_SHAPE",
        ("layers.0.self_attn.k_proj", "[64, 64]", "[32, 64]"),
    ),
    "MLP of another model": (
        llama({"intermediate_size": 128}),
        "E_MLP_SHAPE",
        ("layers.0.mlp.gate_proj", "intermediate_size 128", "[96, 64]"),
    ),
    # Quantized layers
    "config that was lost": (
        files(model__safetensors=true_file({f"{LAYER}.qweight": ("I32", (32, 128))})),
        "E_NO_QUANT_CONFIG",
        (LAYER,),
    ),
    "unknown method": (
        quantized("gptq", {"quant_method": "secret"}),
        "E_QUANT_METHOD",
        ("`secret`",),
    ),
    "Marlin": (
        quantized("gptq", {"checkpoint_format": "marlin"}),
        "E_KERNEL_LAYOUT",
        ("`marlin`",),
    ),
    "AWQ for one kernel": (quantized("awq", {"version": "gemv"}), "E_KERNEL_LAYOUT", ("`gemv`",)),
    "sparse": (
        quantized("fp8", {"sparsity_config": {"format": "sparse-24-bitmask"}}),
        "E_SPARSE",
        ("sparse-24-bitmask",),
    ),
    "unknown ModelOpt algorithm": (
        quantized("modelopt", {"quant_algo": "NVFP3"}),
        "E_QUANT_ALGORITHM",
        (LAYER, "`NVFP3`"),
    ),
    "unknown torchao class": (
        quantized("torchao", {"quant_type": {"default": {"_type": "Other"}}}),
        "E_QUANT_CLASS",
        ("`Other`",),
    ),
    "packed words of bytes": (
        quantized("gptq", qweight=("I8", (32, 128))),
        "E_TENSOR_DTYPE",
        (f"{LAYER}.qweight", "I8 [32, 128]"),
    ),
    "a plain weight beside a packed one": (
        quantized("int4", weight=("BF16", (128, 256))),
        "E_TWO_WEIGHTS",
        (f"`{LAYER}.weight`", f"`{LAYER}.weight_packed`"),
    ),
    "no scales": (quantized("gptq", scales=None), "E_MISSING_TENSOR", (f"{LAYER}.scales",)),
    "no zeros": (quantized("awq", qzeros=None), "E_MISSING_TENSOR", (f"{LAYER}.qzeros",)),
    "no words": (
        quantized("int4", weight_packed=None),
        "E_MISSING_TENSOR",
        (f"{LAYER}.weight_packed",),
    ),
    "no global scale": (
        quantized("nvfp4", weight_global_scale=None),
        "E_MISSING_TENSOR",
        (f"{LAYER}.weight_global_scale",),
    ),
    "no input scale": (
        quantized("modelopt", input_scale=None),
        "E_MISSING_TENSOR",
        (f"{LAYER}.input_scale",),
    ),
    "g_idx of another length": (
        quantized("gptq", g_idx=("I32", (300,))),
        "E_G_IDX_LENGTH",
        (f"{LAYER}.g_idx", "[300]"),
    ),
    "zeros of another width": (
        quantized("gptq", qzeros=("I32", (2, 90))),
        "E_ZERO_SHAPE",
        (f"{LAYER}.qzeros", "[2, 90]"),
    ),
    "no groups": (
        quantized("gptq", qzeros=("I32", (0, 16)), scales=("F16", (0, 128))),
        "E_SCALE_SHAPE",
        ("[0, 128]",),
    ),
    "AWQ scales too wide": (
        quantized("awq", scales=("F16", (2, 256))),
        "E_TENSOR_SHAPE",
        (f"{LAYER}.qweight", "256 outputs"),
    ),
    "AWQ zeros of one group": (
        quantized("awq", qzeros=("I32", (1, 16))),
        "E_ZERO_SHAPE",
        (f"{LAYER}.qzeros", "[1, 16]"),
    ),
    "scales of too few rows": (
        quantized("int4", weight_scale=("BF16", (64, 2))),
        "E_SCALE_SHAPE",
        (f"{LAYER}.weight_scale", "[64, 2]"),
    ),
    "scales of integers": (
        quantized("fp8", weight_scale=("I32", (128, 1))),
        "E_SCALE_SHAPE",
        (f"{LAYER}.weight_scale", "I32"),
    ),
    "one scale for channels": (
        quantized("fp8", weight_scale=("BF16", (1,))),
        "E_SCALE_SHAPE",
        (f"{LAYER}.weight_scale", "128 rows"),
    ),
    "weight_shape that lies": (
        quantized("int4", weight_packed=("I32", (128, 31))),
        "E_WEIGHT_SHAPE",
        (f"{LAYER}.weight_packed", "[128, 31]"),
    ),
    "blocks that do not fit": (
        quantized("fp8", group("fp8", strategy="block", block_structure=[64, 64])),
        "E_SCALE_SHAPE",
        (f"{LAYER}.weight_scale", "64 x 64"),
    ),
    "unknown strategy": (
        quantized("fp8", group("fp8", strategy="spiral")),
        "E_QUANT_STRATEGY",
        (LAYER, "`spiral`"),
    ),
    "config of nonsense": (
        quantized("fp8", group("fp8", num_bits="eight")),
        "E_QUANT_CONFIG",
        ("`num_bits`", "'eight'"),
    ),
    "bits that are none": (quantized("fp8", group("fp8", num_bits=9)), "E_QUANT_CONFIG", ("fp9",)),
    "no config group": (quantized("fp8", {"config_groups": {}}), "E_QUANT_TARGET", (LAYER,)),
    "preset as a group": (
        quantized("fp8", {"config_groups": {"FP8": ["Linear"]}}),
        "E_QUANT_PRESET",
        ("`FP8`",),
    ),
    "layer that the mixture forgets": (
        quantized(
            "modelopt",
            {"quant_algo": "MIXED_PRECISION", "quantized_layers": {}},
            weight_scale=("U8", (128, 8)),  # of NVFP4 the tensors tell all
        ),
        "E_QUANT_TARGET",
        (LAYER, "quantized_layers"),
    ),
    "ModelOpt groups that do not divide": (
        quantized("modelopt", weight_scale=("F8_E4M3", (128, 15))),
        "E_SCALE_SHAPE",
        ("weight_scale", "[128, 15]"),
    ),
    "torchao scales in a row": (
        quantized("torchao", _weight_scale=("BF16", (1, 128))),
        "E_SCALE_SHAPE",
        ("_weight_scale", "[1, 128]"),
    ),
}

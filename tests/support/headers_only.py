"""Checkpoints of every format that are only headers, configs and zeros."""

from __future__ import annotations

import json
import struct

from qtool.checkpoint.reader import open_checkpoint

BITS = {
    "F64": 64,
    "F32": 32,
    "BF16": 16,
    "F16": 16,
    "I64": 64,
    "I32": 32,
    "I8": 8,
    "U8": 8,
    "F8_E4M3": 8,
}
ATTENTION = {"q_proj": (256, 256), "k_proj": (256, 256), "v_proj": (256, 256), "o_proj": (256, 256)}
MLP = {"gate_proj": (512, 256), "up_proj": (512, 256), "down_proj": (256, 512)}
LAYER = {f"self_attn.{kind}": shape for kind, shape in ATTENTION.items()} | {
    f"mlp.{kind}": shape for kind, shape in MLP.items()
}
MODEL = {f"model.layers.0.{kind}": shape for kind, shape in LAYER.items()}
EXPERTS = {
    f"model.layers.0.mlp.experts.{expert}.{kind}": shape
    for expert in range(2)
    for kind, shape in MLP.items()
}
HEAD = {"lm_head": (512, 256)}


def write(folder, tensors, **config):
    """A checkpoint of ``tensors``, name -> (dtype, shape) or (dtype, shape, bytes), else zeros that
    cost no disk.
    """
    header, end, data = {}, 0, {}
    for name, (dtype, shape, *content) in tensors.items():
        size = BITS[dtype] // 8
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        data[end] = content[0] if content else b""
        end += size
    text = json.dumps(header).encode()
    folder.mkdir(parents=True, exist_ok=True)
    defaults = {
        "model_type": "llama",
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(defaults | config))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for offset, content in data.items():
            file.seek(8 + len(text) + offset)
            file.write(content)
    return open_checkpoint(folder)


def plain(name, shape):
    return {f"{name}.weight": ("BF16", shape)}


def scalar(value):
    return "F32", (1,), struct.pack("<f", value)


class Ct:
    """Compressed-tensors, one group for all modules unless ``groups`` says otherwise."""

    def __init__(self, weights, inputs=None, *, suffixes, targets=("Linear",), **config):
        self.suffixes = suffixes
        base = {
            "num_bits": 8,
            "type": "int",
            "symmetric": True,
            "strategy": "channel",
            "group_size": None,
            "dynamic": False,
        }
        group = {
            "targets": list(targets),
            "weights": base | weights,
            "input_activations": inputs and (base | inputs),
        }
        self.config = {
            "quant_method": "compressed-tensors",
            "config_groups": {"g": group},
            "ignore": ["lm_head"],
        } | config

    def module(self, name, shape):
        return {
            f"{name}.{suffix}": tensor for suffix, tensor in self.suffixes(name, *shape).items()
        }


def packed(bits=4, group=128, *, symmetric=True, inputs=None, padded=False, **config):
    def suffixes(name, rows, columns):
        words = -(-columns // (32 // bits)) if padded else -(-columns * bits // 32)
        groups = -(-columns // group)
        shape = (rows.to_bytes(8, "little") + columns.to_bytes(8, "little"),)
        found = {
            "weight_packed": ("I32", (rows, words)),
            "weight_scale": ("BF16", (rows, groups)),
            "weight_shape": ("I64", (2,), *shape),
        }
        return (
            found
            if symmetric
            else found | {"weight_zero_point": ("I32", (-(-rows * bits // 32), groups))}
        )

    return Ct(
        {"num_bits": bits, "strategy": "group", "group_size": group, "symmetric": symmetric},
        inputs,
        suffixes=suffixes,
        **config,
    )


TOKEN8 = {"strategy": "token", "dynamic": True}
TOKEN_FP8 = TOKEN8 | {"type": "float"}


def int8(bits=8, inputs=TOKEN8, *, symmetric=True, group=None, **config):
    def suffixes(name, rows, columns):
        scale = ("BF16", (rows, columns // group if group else 1))
        found = {"weight": ("I8", (rows, columns)), "weight_scale": scale}
        if not symmetric:
            found["weight_zero_point"] = ("I8", scale[1])
        if inputs and not inputs["dynamic"]:
            found["input_scale"] = ("BF16", (1,))
        return found

    weights = {"num_bits": bits, "symmetric": symmetric} | (
        {"strategy": "group", "group_size": group} if group else {}
    )
    return Ct(weights, inputs, suffixes=suffixes, **config)


def fp8(strategy="channel", inputs=TOKEN_FP8, *, scale=lambda name: 1.0, block=128, **config):
    def suffixes(name, rows, columns):
        scales = {
            "channel": ("BF16", (rows, 1)),
            "tensor": scalar(scale(name)),
            "block": ("BF16", (-(-rows // block), -(-columns // block))),
        }
        return {"weight": ("F8_E4M3", (rows, columns)), "weight_scale": scales[strategy]}

    weights = {"type": "float", "strategy": strategy} | (
        {"block_structure": [block, block]} if strategy == "block" else {}
    )
    return Ct(weights, inputs, suffixes=suffixes, **config)


def fp8_group(**config):
    def suffixes(name, rows, columns):
        return {
            "weight": ("F8_E4M3", (rows, columns)),
            "weight_scale": ("U8", (rows, columns // 32)),
        }

    group = {"type": "float", "strategy": "group", "group_size": 32}
    return Ct(group, group | {"dynamic": True}, suffixes=suffixes, **config)


def mxfp4(inputs=None, **config):
    def suffixes(name, rows, columns):
        return {
            "weight_packed": ("U8", (rows, columns // 2)),
            "weight_scale": ("U8", (rows, columns // 32)),
        }

    group = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
    return Ct(group, inputs and group | {"dynamic": True}, suffixes=suffixes, **config)


def nvfp4(scale=lambda name: 1.0, *, inputs=True, **config):
    def suffixes(name, rows, columns):
        found = {
            "weight_packed": ("U8", (rows, columns // 2)),
            "weight_scale": ("F8_E4M3", (rows, columns // 16)),
        }
        return (
            found
            | {"weight_global_scale": scalar(scale(name))}
            | ({"input_global_scale": scalar(1.0)} if inputs else {})
        )

    group = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    return Ct(group, group | {"dynamic": "local"} if inputs else None, suffixes=suffixes, **config)


class Gptq:
    def __init__(self, bits=4, group=128, order=lambda name: 0, **config):
        self.bits, self.group, self.order = bits, group, order
        self.config = {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group,
            "desc_act": False,
            "sym": True,
            "checkpoint_format": "gptq",
        } | config

    def module(self, name, shape):
        rows, columns = shape
        groups = columns // self.group
        return {
            f"{name}.qweight": ("I32", (columns * self.bits // 32, rows)),
            f"{name}.qzeros": ("I32", (groups, rows * self.bits // 32)),
            f"{name}.scales": ("F16", (groups, rows)),
            f"{name}.g_idx": ("I32", (columns,), self.order(name).to_bytes(4, "little")),
        }


class Awq:
    def __init__(self, group=128, **config):
        self.group = group
        self.config = {
            "quant_method": "awq",
            "bits": 4,
            "group_size": group,
            "zero_point": True,
            "version": "gemm",
        } | config

    def module(self, name, shape):
        rows, columns = shape
        found = {"qweight": (columns, rows // 8), "qzeros": (columns // self.group, rows // 8)}
        words = {f"{name}.{suffix}": ("I32", size) for suffix, size in found.items()}
        return words | {f"{name}.scales": ("F16", (columns // self.group, rows))}


class Fp8:
    """The `fp8` method, one scale for each matrix."""

    def __init__(self, scale_name="weight_scale", **config):
        self.scale_name = scale_name
        self.config = {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "modules_to_not_convert": ["lm_head"],
        } | config

    def module(self, name, shape):
        is_fbgemm = self.config["quant_method"] == "fbgemm_fp8"
        scale = ("F32", (shape[0], 1)) if is_fbgemm else scalar(1.0)
        return {f"{name}.weight": ("F8_E4M3", shape), f"{name}.{self.scale_name}": scale}


class ModelOpt:
    def __init__(self, algorithm, scale=lambda name: 1.0, **config):
        self.algorithm, self.scale = algorithm, scale
        base = {
            "quant_method": "modelopt",
            "quant_algo": algorithm,
            "producer": {"name": "modelopt"},
            "ignore": ["lm_head"],
        }
        self.config = base | config

    def module(self, name, shape):
        rows, columns = shape
        fp8, half = ("F8_E4M3", shape), ("U8", (rows, columns // 2))
        tensors = {
            "FP8": {
                "weight": fp8,
                "weight_scale": scalar(self.scale(name)),
                "input_scale": scalar(1.0),
            },
            "FP8_PER_CHANNEL_PER_TOKEN": {"weight": fp8, "weight_scale": ("F32", (rows,))},
            "FP8_PB_WO": {
                "weight": fp8,
                "weight_scale": ("F32", (rows // 64, 1, columns // 64, 1)),
            },
            "MXFP8": {"weight": fp8, "weight_scale": ("U8", (rows, columns // 32))},
            "MXFP4": {"weight": half, "weight_scale": ("U8", (rows, columns // 32))},
            "W4A16_NVFP4": {
                "weight": half,
                "weight_scale": ("F8_E4M3", (rows, columns // 16)),
                "weight_scale_2": scalar(self.scale(name)),
            },
            "W4A16_AWQ": {
                "weight": ("U8", (rows // 2, columns)),
                "weight_scale": ("F32", (rows, columns // 128)),
            },
        }[self.algorithm]
        return {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}


def build(
    folder, format, *, shapes=MODEL, but=(), others=None, tensors=None, model=None, sidecar=False
):
    """A checkpoint of ``shapes`` in ``format``; modules ``but`` stay in 16 bits, those in
    ``others`` have formats of their own.
    """
    found = {"model.norm.weight": ("BF16", (256,))}
    if "model.embed_tokens" not in shapes:
        found["model.embed_tokens.weight"] = ("BF16", (512, 256))
    for name, shape in shapes.items():
        if any(part in name for part in but):
            found |= plain(name, shape)
        else:
            other = next((other for part, other in (others or {}).items() if part in name), format)
            found |= other.module(name, shape)
    config = {} if sidecar else {"quantization_config": format.config}
    folder.mkdir(parents=True, exist_ok=True)
    if sidecar:
        (folder / "hf_quant_config.json").write_text(
            json.dumps({"producer": {"name": "modelopt"}, "quantization": format.config})
        )
    return write(folder, found | (tensors or {}), **config, **(model or {}))

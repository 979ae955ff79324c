"""compressed-tensors, by LLM Compressor and by publishers who write it with tools of their own."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from support.published import Expected, layout
from support.published.floats import fp8_block, fp8_channel, fp8_tensor, mxfp4, mxfp8, nvfp4
from support.published.integers import int8, packed
from support.published.kimi import kimi_k2, kimi_k3, kimi_k25
from support.published.models import Stored, llama, qwen3_moe, write

LAYERS = r"layers\.\d+\.(self_attn|mlp)\.\w+$"
EXPERTS = r"\.experts\."
PACKED_FP4 = ("weight_packed", "weight_scale")
TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True}
FP8_TOKEN = {**TOKEN, "type": "float"}


def arguments(bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    """Return `QuantizationArgs` as LLM Compressor writes them."""
    base = {"actorder": None, "block_structure": None, "dynamic": False, "group_size": None}
    own = {"num_bits": bits, "strategy": strategy, "symmetric": True, "type": "int"}
    return {**base, "observer": "minmax", "observer_kwargs": {}, **own, **more}


def group(weights: dict[str, Any], inputs: Any = None, *targets: str) -> dict[str, Any]:
    """Return a config group."""
    return {
        "targets": list(targets or ("Linear",)),
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
    }


def config(format: str, *groups: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return a quantization config with ``groups``."""
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {f"group_{index}": each for index, each in enumerate(groups)},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        **more,
    }


W4 = arguments(4, "group", group_size=128)
W4A16 = config("pack-quantized", group(W4))


def nvfp4_ct(weight: Tensor, *, input_amax: float | None = None) -> Stored:
    """NVFP4 as compressed-tensors keeps it: global scales that divide."""
    parts, dense = nvfp4(weight)
    divisor = 1 / parts["weight_scale_2"]
    found = {
        "weight_packed": parts["weight"],
        "weight_scale": parts["weight_scale"],
        "weight_global_scale": divisor.reshape(1),
    }
    if input_amax is not None:
        found["input_global_scale"] = torch.tensor([2688 / input_amax])
    return found, dense


@layout("redhat-llama-3.1-w4a16")
def w4a16(folder: Path) -> Expected:
    """W4A16 in groups of 128."""
    return write(folder, llama(), {LAYERS: packed}, W4A16)


@layout("redhat-w4a16-asym")
def w4a16_asym(folder: Path) -> Expected:
    """W4A16 with zero points, by AWQ in LLM Compressor."""
    weights = arguments(4, "group", group_size=128, symmetric=False)
    quantizer = partial(packed, symmetric=False)
    return write(folder, llama(), {LAYERS: quantizer}, config("pack-quantized", group(weights)))


@layout("redhat-w8a16")
def w8a16(folder: Path) -> Expected:
    """W8A16 with one scale for each row."""
    return write(
        folder,
        llama(),
        {LAYERS: partial(packed, bits=8, group=None)},
        config("pack-quantized", group(arguments(8, "channel"))),
    )


@layout("redhat-w8a8-int8")
def w8a8(folder: Path) -> Expected:
    """W8A8 in integers, inputs rounded for each token."""
    inputs = {**TOKEN, "type": "int"}
    return write(
        folder,
        llama(),
        {LAYERS: int8},
        config("int-quantized", group(arguments(8, "channel"), inputs)),
    )


@layout("redhat-fp8-dynamic")
def fp8_dynamic(folder: Path) -> Expected:
    """FP8 with one scale for each row, inputs rounded for each token."""
    weights = arguments(8, "channel", type="float")
    return write(
        folder, llama(), {LAYERS: fp8_channel}, config("float-quantized", group(weights, FP8_TOKEN))
    )


@layout("neuralmagic-llama-3.1-fp8")
def fp8_static(folder: Path) -> Expected:
    """FP8 with one scale for each matrix and each input, under the key of older files."""
    weights = arguments(8, "tensor", type="float")
    inputs = arguments(8, "tensor", type="float")
    model, tensors = llama()
    return write(
        folder,
        (
            {**model, "compression_config": config("float-quantized", group(weights, inputs))},
            tensors,
        ),
        {LAYERS: partial(fp8_tensor, input_scale=0.02, shape=(1,))},
        None,
    )


@layout("redhat-fp8-block")
def fp8_blocks(folder: Path) -> Expected:
    """FP8 in blocks of 128 x 128."""
    weights = arguments(8, "block", type="float", block_structure=[128, 128])
    inputs = {**FP8_TOKEN, "strategy": "group", "group_size": 128}
    quantizer = partial(fp8_block, scale_name="weight_scale", scale_dtype=torch.bfloat16)
    return write(
        folder, llama(), {LAYERS: quantizer}, config("float-quantized", group(weights, inputs))
    )


@layout("redhat-nvfp4")
def nvfp4_w4a4(folder: Path) -> Expected:
    """NVFP4 weights and inputs."""
    weights = arguments(4, "tensor_group", type="float", group_size=16)
    inputs = {**weights, "dynamic": "local"}
    return write(
        folder,
        llama(),
        {LAYERS: partial(nvfp4_ct, input_amax=4.0)},
        config("nvfp4-pack-quantized", group(weights, inputs)),
    )


@layout("redhat-nvfp4a16")
def nvfp4_w4a16(folder: Path) -> Expected:
    """NVFP4 weights alone."""
    weights = arguments(4, "tensor_group", type="float", group_size=16)
    return write(
        folder, llama(), {LAYERS: nvfp4_ct}, config("nvfp4-pack-quantized", group(weights))
    )


@layout("redhat-qwen3-mxfp4")
def mxfp4_ct(folder: Path) -> Expected:
    """MXFP4 weights alone."""
    weights = arguments(4, "group", type="float", group_size=32, scale_dtype="torch.uint8")
    return write(
        folder,
        llama(),
        {LAYERS: partial(mxfp4, names=PACKED_FP4)},
        config("mxfp4-pack-quantized", group(weights)),
    )


@layout("redhat-qwen3-mxfp8")
def mxfp8_ct(folder: Path) -> Expected:
    """MXFP8 weights and inputs."""
    weights = arguments(8, "group", type="float", group_size=32, scale_dtype="torch.uint8")
    inputs = {**weights, "dynamic": True}
    return write(
        folder, llama(), {LAYERS: mxfp8}, config("mxfp8-quantized", group(weights, inputs))
    )


@layout("redhat-w4afp8")
def w4afp8(folder: Path) -> Expected:
    """Packed int4 with FP8 inputs, experts alone."""
    return write(
        folder,
        qwen3_moe(),
        {EXPERTS: packed},
        config(
            "pack-quantized",
            group(W4, FP8_TOKEN),
            ignore=["lm_head", "re:.*self_attn.*", "re:.*gate$"],
        ),
    )


@layout("redhat-w4a8-int8-codes")
def w4a8(folder: Path) -> Expected:
    """int4 with a code in each byte, for CPUs."""
    inputs = {**TOKEN, "type": "int"}
    return write(
        folder,
        llama(),
        {LAYERS: partial(int8, bits=4, group=128)},
        config("int-quantized", group(W4, inputs)),
    )


@layout("redhat-fp8-attention-nvfp4-mlp")
def mixed(folder: Path) -> Expected:
    """Two groups by patterns: FP8 attention, NVFP4 MLP."""
    fp8 = arguments(8, "channel", type="float")
    fp4 = arguments(4, "tensor_group", type="float", group_size=16)
    groups = (
        group(fp8, FP8_TOKEN, "re:.*self_attn.*"),
        group(fp4, {**fp4, "dynamic": "local"}, "re:.*mlp.*"),
    )
    quantizers = {"self_attn": fp8_channel, "mlp": partial(nvfp4_ct, input_amax=4.0)}
    return write(folder, llama(), quantizers, config("mixed-precision", *groups))


@layout("minimax-m3-w4a16-embedding")
def embedding(folder: Path) -> Expected:
    """A group for the class `Embedding`: 8 bits beside layers of 4."""
    eight = arguments(8, "group", group_size=128)
    groups = (group(eight, None, "Embedding"), group(W4))
    quantizers = {"embed_tokens": partial(packed, bits=8), LAYERS: packed}
    return write(folder, llama(), quantizers, config("pack-quantized", *groups))


@layout("llm-compressor-embedding-4bit")
def embedding_of_other_groups(folder: Path) -> Expected:
    """Embeddings of 4 bits in groups of 64 beside layers in groups of 128."""
    fine = arguments(4, "group", group_size=64)
    groups = (group(fine, None, "Embedding"), group(W4))
    quantizers = {"embed_tokens": partial(packed, group=64), LAYERS: packed}
    return write(folder, llama(), quantizers, config("pack-quantized", *groups))


@layout("llm-compressor-embedding-alone")
def embedding_alone(folder: Path) -> Expected:
    """Embeddings of 4 bits, and nothing else."""
    fine = arguments(4, "group", group_size=64)
    return write(
        folder,
        llama(),
        {"embed_tokens": partial(packed, group=64)},
        config("pack-quantized", group(fine, None, "Embedding"), ignore=[]),
    )


@layout("llm-compressor-quantized-head")
def quantized_head(folder: Path) -> Expected:
    """The head with a target and a group of its own."""
    groups = (group(arguments(8, "channel"), None, "re:.*lm_head"), group(W4))
    quantizers = {"lm_head": partial(packed, bits=8, group=None), LAYERS: packed}
    return write(folder, llama(), quantizers, config("pack-quantized", *groups, ignore=[]))


@layout("g_idx-of-minus-one")
def g_idx_in_order(folder: Path) -> Expected:
    """`weight_g_idx` of -1: stored, and the inputs are in order."""

    def quantizer(weight: Tensor) -> Stored:
        return packed(weight, g_idx=torch.full((weight.shape[1],), -1, dtype=torch.int32))

    weights = arguments(4, "group", group_size=128, actorder="group")
    return write(folder, llama(), {LAYERS: quantizer}, config("pack-quantized", group(weights)))


@layout("weight_shape-in-int32")
def short_shapes(folder: Path) -> Expected:
    """`weight_shape` in int32, for codes of 3 bits that leave the inputs open."""
    weights = arguments(3, "group", group_size=128)
    return write(
        folder,
        llama(),
        {
            "q_proj": partial(packed, bits=3, shape_dtype=torch.float32),
            "k_proj": partial(packed, bits=3, shape_dtype=torch.bfloat16),
            LAYERS: partial(packed, bits=3, shape_dtype=torch.int32),
        },
        config("pack-quantized", group(weights)),
    )


@layout("targets-by-names-of-engines")
def names_of_engines(folder: Path) -> Expected:
    """Targets by the layers that engines fuse, and by the class that holds experts."""
    eight = arguments(8, "channel")
    attention = (
        *(f"model.layers.{layer}.self_attn.qkv_proj" for layer in range(2)),
        *(f"language_model.model.layers.{layer}.self_attn.o_proj" for layer in range(2)),
    )
    groups = (group(eight, None, *attention), group(W4, None, "RoutedExperts"))
    quantizers = {"self_attn": partial(packed, bits=8, group=None), EXPERTS: packed}
    return write(folder, qwen3_moe(), quantizers, config("pack-quantized", *groups))


KIMI = arguments(4, "group", group_size=32)
KIMI_IGNORED = [
    "re:.*self_attn.*",
    "re:.*shared_experts.*",
    r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
]


@layout("moonshot-kimi-k2-thinking")
def kimi_k2_thinking(folder: Path) -> Expected:
    """int4 experts in groups of 32; routers are no layers and are not in the list."""
    return write(
        folder,
        kimi_k2(),
        {r"mlp\.experts\.": partial(packed, group=32)},
        config("pack-quantized", group(KIMI), ignore=["lm_head", *KIMI_IGNORED]),
    )


@layout("moonshot-kimi-k2.5")
def kimi_k2_5(folder: Path) -> Expected:
    """The same in a container: vision tower and projector beside the language model."""
    ignored = [*KIMI_IGNORED, "re:.*lm_head.*", "re:vision_tower.*", "re:mm_projector.*"]
    return write(
        folder,
        kimi_k25(),
        {r"mlp\.experts\.": partial(packed, group=32)},
        config("pack-quantized", group(KIMI), ignore=ignored),
    )


@layout("moonshot-kimi-k2.5-short-list")
def kimi_k2_5_short_list(folder: Path) -> Expected:
    """The same with head, tower and projector missing from the list."""
    return write(
        folder,
        kimi_k25(),
        {r"mlp\.experts\.": partial(packed, group=32)},
        config("pack-quantized", group(KIMI), ignore=KIMI_IGNORED),
    )


@layout("moonshot-kimi-k3")
def kimi_k3_mxfp4(folder: Path) -> Expected:
    """MXFP4 experts called w1, w2 and w3; arguments without a strategy."""
    weights = {"num_bits": 4, "type": "float", "group_size": 32, "strategy": "group"}
    ignored = [*KIMI_IGNORED, "re:.*lm_head.*", "re:.*vision_tower.*", "re:.*mm_projector.*"]
    return write(
        folder,
        kimi_k3(),
        {r"\.experts\.\d+\.w\d": partial(mxfp4, names=PACKED_FP4)},
        config("mxfp4-pack-quantized", group(weights), ignore=ignored),
    )

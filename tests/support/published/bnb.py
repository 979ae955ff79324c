"""bitsandbytes, as transformers and unsloth save it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from support.published import Expected, layout
from support.published.models import Stored, llama, qwen3_moe, write

LAYERS = r"layers\.\d+\.(self_attn|mlp)\.\w+$"
NF4 = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]
FP4 = [sign * number / 12 for sign in (1, -1) for number in (0, 0.0625, 8, 12, 4, 6, 2, 3)]


def four_bits(
    weight: Tensor, kind: str = "nf4", block: int = 64, *, nested: bool = False, storage: Any = None
) -> Stored:
    """Blocks of the flattened matrix, the high nibble first."""
    book = np.array(NF4 if kind == "nf4" else FP4, np.float32)
    blocks = weight.numpy().astype(np.float32).reshape(-1, block)
    absmax = np.abs(blocks).max(axis=1)
    ratio = blocks / absmax[:, None]
    codes = np.abs(ratio[..., None] - book).argmin(axis=-1).astype(np.uint8).reshape(-1, 2)
    packed = torch.from_numpy(codes[:, :1] << 4 | codes[:, 1:])
    state = {
        "quant_type": kind,
        "blocksize": block,
        "dtype": "bfloat16",
        "shape": list(weight.shape),
    }
    parts: dict[str, np.ndarray[Any, Any]] = {"absmax": absmax}
    if nested:
        parts, absmax, offset = quantized_scales(absmax)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    dense = (book[codes].reshape(-1, block) * absmax[:, None]).reshape(weight.shape)
    parts |= {"quant_map": book}
    parts |= {f"quant_state.bitsandbytes__{kind}": np.frombuffer(json.dumps(state).encode(), "u1")}
    stored = {f"weight.{suffix}": torch.tensor(part) for suffix, part in parts.items()}
    return {
        "weight": packed.flatten().view(storage or torch.uint8)[:, None],
        **stored,
    }, torch.from_numpy(dense)


def quantized_scales(absmax: Any) -> tuple[dict[str, Any], Any, float]:
    """Return the tensors of scales as codes of 8 bits in blocks of 256, what these stand for, and
    their mean.
    """
    numbers = np.linspace(-1, 1, 256, dtype=np.float32)
    offset = absmax.mean(dtype=np.float32)
    each = np.pad(absmax - offset, (0, -len(absmax) % 256)).reshape(-1, 256)
    nested = np.abs(each).max(axis=1)
    codes = np.abs((each / nested[:, None])[..., None] - numbers).argmin(axis=-1).astype(np.uint8)
    dense = (numbers[codes] * nested[:, None]).flatten()[: len(absmax)] + offset
    codes = codes.flatten()[: len(absmax)]
    parts = {"absmax": codes, "nested_absmax": nested, "nested_quant_map": numbers}
    return parts, dense, float(offset)


def int8(weight: Tensor, *, order: bool = True) -> Stored:
    """LLM.int8: one scale for each row, which is its largest number."""
    largest = weight.abs().amax(dim=1)
    codes = (weight * (127 / largest[:, None])).round().to(torch.int8)
    parts = {"weight": codes, "SCB": largest}
    if order:
        parts["weight_format"] = torch.zeros((), dtype=torch.uint8)
    return parts, codes.float() * largest[:, None] * np.float32(1 / 127)


def config(**fields: Any) -> dict[str, Any]:
    """Return a quantization config as transformers writes it."""
    defaults = {
        "quant_method": "bitsandbytes",
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
    }
    return defaults | fields


@layout("unsloth-bnb-4bit")
def dynamic_nf4(folder: Path) -> Expected:
    """NF4 whose scales are quantized, with some layers in 16 bits."""
    skipped = ["lm_head", "model.layers.1.mlp.down_proj"]
    quantizers = {r"layers\.1\.mlp\.down": None, LAYERS: partial(four_bits, nested=True)}
    named = config(bnb_4bit_use_double_quant=True, llm_int8_skip_modules=skipped)
    return write(folder, llama(), quantizers, named)


@layout("bnb-qwen3-moe")
def experts(folder: Path) -> Expected:
    """NF4 of single experts, as transformers 4 quantized them."""
    quantizers = {r"self_attn\.[qkvo]_proj|experts": four_bits}
    return write(folder, qwen3_moe(), quantizers, config())


@layout("bnb-fp4-bf16-storage")
def fp4_as_bf16(folder: Path) -> Expected:
    """FP4 of bitsandbytes, its bytes called bf16 (QLoRA with FSDP)."""
    quantizer = partial(four_bits, kind="fp4", storage=torch.bfloat16)
    named = config(bnb_4bit_quant_type="fp4", bnb_4bit_quant_storage="bfloat16")
    return write(folder, llama(), {LAYERS: quantizer}, named)


@layout("bnb-llm-int8")
def llm_int8(folder: Path) -> Expected:
    """LLM.int8: int8 by rows; inputs stay in 16 bits here."""
    named = config(load_in_4bit=False, load_in_8bit=True)
    return write(folder, llama(), {LAYERS: int8}, named)


@layout("bnb-without-method")
def without_method(folder: Path) -> Expected:
    """LLM.int8 by transformers before 4.30: the config does not name its method."""
    named = {"load_in_8bit": True, "llm_int8_threshold": 6.0}
    return write(folder, llama(), {LAYERS: partial(int8, order=False)}, named)

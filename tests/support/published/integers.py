"""Rounding to integers and packing them as publishers do it, written without qtool: tensors and
their meaning.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from support.published.models import Stored

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # the column that each nibble of a word holds


@dataclass(frozen=True)
class Rounded:
    """A matrix [N, K] in integers, with G groups of neighbouring inputs."""

    codes: Tensor
    """From zero, int64 [N, K]."""
    scale: Tensor
    """[N, G]."""
    zero: Tensor
    """The code that stands for 0.0, int64 [N, G]."""
    dense: Tensor
    """What it stands for, f32 [N, K]."""


def rounded(
    weight: Tensor,
    bits: int,
    group: int | None,
    *,
    symmetric: bool,
    dtype: torch.dtype = torch.float16,
    groups_of_inputs: Tensor | None = None,
) -> Rounded:
    """Round ``weight`` in groups of ``group`` inputs, which ``groups_of_inputs`` [K] scatters."""
    rows, columns = weight.shape
    size = group or columns
    owner = torch.arange(columns) // size if groups_of_inputs is None else groups_of_inputs.long()
    order = torch.argsort(owner, stable=True)
    blocks = weight[:, order].reshape(rows, -1, size)
    top = 2**bits - 1
    if symmetric:
        scale = blocks.abs().amax(-1) / (2 ** (bits - 1) - 1)
        zero = torch.full_like(scale, 2 ** (bits - 1))
        scale = scale.to(dtype)
    else:
        low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
        scale = ((high - low) / top).to(dtype)
        zero = torch.round(-low / scale.float()).clamp(0, top)
    step = scale.float()[:, owner]
    offset = zero[:, owner]
    codes = (torch.round(weight / step) + offset).clamp(0, top)
    return Rounded(codes.long(), scale, zero.long(), (codes - offset) * step)


def words(codes: Tensor, bits: int) -> Tensor:
    """Return each row of ``codes`` as one string of bits, lowest first, in int32."""
    rows, columns = codes.shape
    if 32 % bits == 0:
        each = 32 // bits
        padded = torch.nn.functional.pad(codes, (0, -columns % each)).reshape(rows, -1, each)
        return _as_int32((padded << (torch.arange(each) * bits)).sum(-1))
    string = ((codes.unsqueeze(-1) >> torch.arange(bits)) & 1).reshape(rows, columns * bits)
    padded = torch.nn.functional.pad(string, (0, -string.shape[1] % 32))
    return _as_int32((padded.reshape(rows, -1, 32) << torch.arange(32)).sum(-1))


def _as_int32(whole: Tensor) -> Tensor:
    return torch.where(whole >= 1 << 31, whole - (1 << 32), whole).to(torch.int32)


def gptq(
    weight: Tensor,
    bits: int = 4,
    group: int | None = 128,
    *,
    symmetric: bool = True,
    zero_minus_one: bool = True,
    g_idx: bool = True,
    act_order: bool = False,
) -> Stored:
    """GPTQ: codes packed along the inputs, zeros along the outputs, in v1 less one."""
    columns = weight.shape[1]
    owner = torch.arange(columns) // (group or columns)
    if act_order:
        owner = owner[torch.randperm(columns, generator=torch.Generator().manual_seed(1))]
    found = rounded(weight, bits, group, symmetric=symmetric, groups_of_inputs=owner)
    zero = (found.zero - int(zero_minus_one)) & (2**bits - 1)
    parts = {
        "qweight": words(found.codes, bits).T,
        "qzeros": words(zero.T, bits),
        "scales": found.scale.T,
    }
    if g_idx:
        parts["g_idx"] = owner.to(torch.int32)
    return parts, found.dense


def awq(weight: Tensor, group: int | None = 128, *, symmetric: bool = False) -> Stored:
    """AWQ `gemm`: 4-bit codes packed along the outputs, in an order of their own."""
    found = rounded(weight, 4, group, symmetric=symmetric)

    def packed(codes: Tensor) -> Tensor:
        eights = codes.T.reshape(codes.shape[1], -1, 8)[:, :, AWQ_ORDER]
        return words(eights.flatten(1), 4)

    parts = {"qweight": packed(found.codes), "qzeros": packed(found.zero), "scales": found.scale.T}
    return parts, found.dense


def packed(
    weight: Tensor,
    bits: int = 4,
    group: int | None = 128,
    *,
    symmetric: bool = True,
    shape_dtype: torch.dtype = torch.int64,
    g_idx: Tensor | None = None,
) -> Stored:
    """compressed-tensors `pack-quantized`: codes along the inputs, zeros along the outputs."""
    found = rounded(weight, bits, group, symmetric=symmetric, dtype=torch.bfloat16)
    parts = {
        "weight_packed": words(found.codes, bits),
        "weight_scale": found.scale,
        "weight_shape": torch.tensor(weight.shape).to(shape_dtype),
    }
    if not symmetric:
        parts["weight_zero_point"] = words(found.zero.T, bits).T
    if g_idx is not None:
        parts["weight_g_idx"] = g_idx
    return parts, found.dense


def int8(weight: Tensor, bits: int = 8, group: int | None = None) -> Stored:
    """compressed-tensors `int-quantized`: a signed code in each byte."""
    found = rounded(weight, bits, group, symmetric=True, dtype=torch.bfloat16)
    signed = (found.codes - 2 ** (bits - 1)).to(torch.int8)
    return {"weight": signed, "weight_scale": found.scale}, found.dense


def intx(weight: Tensor, bits: int = 4, group: int | None = 32, *, zeros: bool = True) -> Stored:
    """torchao's IntxUnpackedToInt8Tensor: a signed code in each byte, with zero points."""
    found = rounded(weight, bits, group, symmetric=True, dtype=torch.bfloat16)
    parts = {
        "_weight_qdata": (found.codes - 2 ** (bits - 1)).to(torch.int8),
        "_weight_scale": found.scale,
    }
    if zeros:
        parts["_weight_zero_point"] = torch.zeros(found.scale.shape, dtype=torch.int8)
    return parts, found.dense

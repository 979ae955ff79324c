"""Tensors from files, and the packings that several formats share (torch)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qtool.formats.layout import QuantizedModule, refused
from qtool.weight import pack_pairs

if TYPE_CHECKING:
    from qtool.checkpoint import Checkpoint

__all__ = ["load", "pack_pairs", "permutation", "read_tensor", "signed", "unpack_bits"]

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}


def read_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """Return the tensor ``name``. Raises: CheckpointRefused, when torch has no such dtype or the file is shorter than it was."""
    info = checkpoint.tensors[name]
    if info.dtype not in TORCH_DTYPES:
        raise refused("E_DTYPE", f"`{name}` is {info.dtype}, which qtool does not read")
    data = torch.empty(info.size_bytes, dtype=torch.uint8)
    with info.file.open("rb") as file:
        file.seek(info.offset)
        if file.readinto(data.numpy().data) != info.size_bytes:
            raise refused("E_TRUNCATED", f"{info.file} ends inside `{name}`")
    return data.view(TORCH_DTYPES[info.dtype]).reshape(info.shape)


def load(checkpoint: Checkpoint, module: QuantizedModule) -> dict[str, Tensor]:
    """Return all tensors of ``module`` but its bias, by suffix."""
    return {suffix: read_tensor(checkpoint, tensor.name) for suffix, tensor in module.tensors.items() if suffix != "bias"}


def unpack_bits(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the ``count`` codes that each row of ``words``, int32 [R, W], holds, lowest bits first, as uint8 [R, count].

    The row is one string of bits (dense), or each word holds 32 // bits whole codes (padded: compressed-tensors before 0.18, for 3, 5, 6 and
    7 bits); the width tells which, and dense wins where a short row leaves it open.
    """
    rows, width = words.shape
    if width == -(-count * bits // 32):
        data = words.flatten().view(torch.uint8).reshape(rows, -1)
        data = torch.nn.functional.pad(data, (0, -data.shape[1] % bits)).reshape(rows, -1, bits)  # eight codes in `bits` bytes
        codes = [data[..., i * bits // 8] >> (i * bits % 8) for i in range(8)]
        for i in range(8):
            if i * bits % 8 + bits > 8:
                codes[i] = codes[i] | (data[..., i * bits // 8 + 1] << (8 - i * bits % 8))
    elif width == -(-count // (32 // bits)):
        codes = [(words >> (i * bits)).to(torch.uint8) for i in range(32 // bits)]
    else:
        raise refused("E_TENSOR_SHAPE", f"{width} words hold no {count} codes of {bits} bits")
    return torch.stack(codes, dim=-1).reshape(rows, -1)[:, :count].bitwise_and(2**bits - 1).contiguous()


def signed(codes: Tensor, bits: int) -> Tensor:
    """Return offset-binary ``codes``, uint8, as the signed int8 values they stand for."""
    return codes.sub(2 ** (bits - 1)).view(torch.int8)


def permutation(g_idx: Tensor, groups: int) -> Tensor | None:
    """Return the order that sorts inputs by group, int32 [K]; None when they are in order already. ``g_idx`` [K] is each input's group."""
    columns = g_idx.numel()
    size = -(-columns // groups)
    if groups == 1 or torch.equal(g_idx.long(), torch.arange(columns) // size):
        return None
    in_range = bool(((g_idx >= 0) & (g_idx < groups)).all())
    if not in_range or not bool((torch.bincount(g_idx.long(), minlength=groups) == size).all()):
        raise refused("E_G_IDX", f"g_idx does not put {size} of {columns} inputs into each of {groups} groups")
    return torch.argsort(g_idx, stable=True).to(torch.int32)

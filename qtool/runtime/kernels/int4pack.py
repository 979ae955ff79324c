"""Weights of at most 4 bits through ATen's int4 multiplication.

For many tokens, and with AMX, weights are dequantized block by block instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from qtool.codes import unpack_pairs
from qtool.runtime.kernels import Device, LinearSpec, no_aten_product
from qtool.weight import QuantizedWeight

MANY = 80  # tokens
# outputs that the operator packs together for AVX512, the second half in the high nibbles
BLOCK = 64
GROUP_SIZES = (32, 64, 128, 256)
ROWS = 4 * BLOCK  # packed at a time


def unsupported_reason(spec: LinearSpec, device: Device) -> str | None:
    """Support weight-only integers of 2, 3 and 4 bits with bfloat16 inputs.

    Scales are by channel, by tensor or by the groups that the operator knows.
    """
    weights = spec.scheme.weights
    if reason := no_aten_product(spec):
        return reason
    if weights.format not in ("int2", "int3", "int4") or weights.granularity == "block":
        return f"weights {weights}: supports int2, int3 and int4 by group, channel or tensor"
    if weights.group_size not in (None, *GROUP_SIZES):
        return f"needs groups of 32, 64, 128 or 256, found {weights.group_size}"
    return None


def pack(spec: LinearSpec, weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return ``codes`` in blocks, and ``scale_and_zero`` [G, N, 2]; N and K are filled up.

    The second of each pair is what code 0 stands for.
    """
    (outputs, inputs), width = spec.shape, _width(spec)
    fill, short = -inputs % width, -outputs % BLOCK
    packed = torch.empty(outputs + short, (inputs + fill) // 2, dtype=torch.uint8)
    for start in range(0, outputs, ROWS):  # the operator asks for int32, eight times as large
        rows = weight.data[start : start + ROWS]
        codes = unpack_pairs(rows) if rows.dtype == torch.uint8 else rows + 8
        codes = pad(codes, (0, fill, 0, -rows.shape[0] % BLOCK)).int()
        packed[start : start + codes.shape[0]] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
            codes, 1
        )
    scale = weight.scale.float().expand(outputs, (inputs + fill) // width)
    zero = torch.zeros_like(scale) if weight.zero is None else weight.zero * -scale
    tables = pad(torch.stack((scale, zero)), (0, 0, 0, short))
    return {
        "codes": packed,
        "scale_and_zero": tables.permute(2, 1, 0).to(
            torch.bfloat16, memory_format=torch.contiguous_format
        ),
    }


def apply(spec: LinearSpec, x: Tensor, packed: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
    """Multiply with 4-bit codes."""
    outputs, width = spec.shape[0], _width(spec)
    if x.shape[1] % width:
        x = pad(x, (0, -x.shape[1] % width))
    if (
        x.shape[0] >= MANY
        and torch.cpu._is_amx_tile_supported()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    ):
        y = _by_blocks(x, packed["codes"], packed["scale_and_zero"])
    else:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, packed["codes"], width, packed["scale_and_zero"]
        )
    y = y[:, :outputs].contiguous()
    return y if bias is None else y + bias


def _width(spec: LinearSpec) -> int:
    """Return the group size; with one scale a row, the largest that divides K."""
    return spec.scheme.weights.group_size or max(32, math.gcd(spec.shape[1], 256))


def _by_blocks(x: Tensor, codes: Tensor, scale_and_zero: Tensor) -> Tensor:
    """Return ``x`` times the weight, [M, N]; dequantizes a few blocks of outputs at a time."""
    groups, outputs, _ = scale_and_zero.shape
    inputs, step = x.shape[1], 4 * BLOCK
    y = x.new_empty(x.shape[0], outputs)
    starts = range(0, outputs, step)
    blocks = torch.split(codes.view(-1, inputs, BLOCK // 2), 4)
    for start, block in zip(starts, blocks, strict=True):
        pairs = block.transpose(0, 1).contiguous()
        values = torch.stack((pairs & 15, pairs >> 4), dim=2).view(torch.int8).sub_(8).to(x.dtype)
        scale, zero = scale_and_zero[:, None, start : start + step].permute(3, 0, 1, 2).contiguous()
        weight = torch.addcmul(zero, values.view(groups, inputs // groups, -1), scale)
        torch.mm(x, weight.view(inputs, -1), out=y[:, start : start + step])
    return y

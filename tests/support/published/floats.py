"""Rounding to FP8 and FP4 as publishers do it, written without qtool: tensors and their meaning."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from support.published.models import Stored

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
FP8_MAX = 448.0
FP4_MAX = 6.0


def _to_fp8(values: Tensor) -> Tensor:
    return values.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def _to_codes(values: Tensor) -> Tensor:
    """Return the nearest E2M1 codes, uint8."""
    nearest = (values.abs().unsqueeze(-1) - E2M1).abs().argmin(-1)
    return (nearest | (values < 0).long() * 8).to(torch.uint8)


def _of_codes(codes: Tensor) -> Tensor:
    magnitude = E2M1[(codes & 7).long()]
    return torch.where(codes > 7, -magnitude, magnitude)


def _pairs(codes: Tensor) -> Tensor:
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def fp8_tensor(
    weight: Tensor,
    *,
    input_scale: float | None = None,
    scale_name: str = "weight_scale",
    shape: tuple[int, ...] = (),
) -> Stored:
    """One f32 scale for the matrix, and one for its input if ``input_scale`` is given."""
    scale = weight.abs().max() / FP8_MAX
    codes = _to_fp8(weight / scale)
    parts = {"weight": codes, scale_name: scale.reshape(shape)}
    if input_scale is not None:
        parts["input_scale"] = torch.tensor(input_scale).reshape(shape)
    return parts, codes.float() * scale


def fp8_channel(weight: Tensor, *, scale_name: str = "weight_scale", flat: bool = False) -> Stored:
    """One f32 scale for each output, [N, 1] or ``flat`` [N]."""
    scale = weight.abs().amax(1, keepdim=True) / FP8_MAX
    codes = _to_fp8(weight / scale)
    return (
        {"weight": codes, scale_name: scale.flatten() if flat else scale},
        codes.float() * scale,
    )


def fp8_block(
    weight: Tensor,
    block: tuple[int, int] = (128, 128),
    *,
    scale_name: str = "weight_scale_inv",
    scale_dtype: torch.dtype = torch.float32,
) -> Stored:
    """One scale for each ``block`` of outputs and inputs; float8_e8m0fnu means powers of two."""
    (rows, columns), (height, width) = weight.shape, block
    down, across = math.ceil(rows / height), math.ceil(columns / width)
    padded = torch.zeros(down * height, across * width)
    padded[:rows, :columns] = weight
    scale = padded.reshape(down, height, across, width).abs().amax((1, 3)) / FP8_MAX
    if scale_dtype == torch.float8_e8m0fnu:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    scale = scale.to(scale_dtype)
    spread = scale.float().repeat_interleave(height, 0).repeat_interleave(width, 1)
    codes = _to_fp8(weight / spread[:rows, :columns])
    return (
        {"weight": codes, scale_name: scale},
        codes.float() * spread[:rows, :columns],
    )


def _exponents(weight: Tensor, largest: float) -> Tensor:
    """Return the powers of two of each 32 inputs, as exponents, f32 [N, K / 32, 1]."""
    amax = weight.reshape(weight.shape[0], -1, 32).abs().amax(-1, keepdim=True)
    return torch.floor(torch.log2(amax)) - math.floor(math.log2(largest))


def _e8m0(exponents: Tensor, dtype: torch.dtype) -> Tensor:
    return (exponents.squeeze(-1) + 127).to(torch.uint8).view(dtype)


def mxfp8(
    weight: Tensor, *, scale_name: str = "weight_scale", scale_dtype: torch.dtype = torch.uint8
) -> Stored:
    """FP8 with a power of two for each 32 inputs."""
    exponents = _exponents(weight, FP8_MAX)
    step = torch.exp2(exponents)
    codes = _to_fp8(weight.reshape(weight.shape[0], -1, 32) / step)
    return (
        {"weight": codes.flatten(1), scale_name: _e8m0(exponents, scale_dtype)},
        (codes.float() * step).flatten(1),
    )


def mxfp4(
    weight: Tensor,
    *,
    names: tuple[str, str] = ("weight", "weight_scale"),
    dtype: torch.dtype = torch.uint8,
    scale_dtype: torch.dtype = torch.uint8,
) -> Stored:
    """FP4 in pairs, with a power of two for each 32 inputs."""
    exponents = _exponents(weight, FP4_MAX)
    step = torch.exp2(exponents)
    codes = _to_codes(weight.reshape(weight.shape[0], -1, 32) / step)
    return (
        {
            names[0]: _pairs(codes.flatten(1)).view(dtype),
            names[1]: _e8m0(exponents, scale_dtype),
        },
        (_of_codes(codes) * step).flatten(1),
    )


def nvfp4(weight: Tensor, *, input_amax: float | None = None) -> Stored:
    """FP4 in pairs as ModelOpt writes it: an e4m3 scale for each 16 inputs, times an f32 one."""
    scale2 = weight.abs().max() / (FP8_MAX * FP4_MAX)
    groups = weight.reshape(weight.shape[0], -1, 16)
    scale = _to_fp8(groups.abs().amax(-1) / FP4_MAX / scale2)
    step = (scale.float() * scale2).unsqueeze(-1)
    codes = _to_codes(groups / step)
    parts = {"weight": _pairs(codes.flatten(1)), "weight_scale": scale, "weight_scale_2": scale2}
    if input_amax is not None:
        parts["input_scale"] = torch.tensor(input_amax / (FP8_MAX * FP4_MAX))
    return parts, (_of_codes(codes) * step).flatten(1)

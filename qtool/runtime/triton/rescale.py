"""Scaling the sums of a matmul of codes: times the scales of row and column, plus the bias."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SIZE = 1024  # outputs of one program


@triton.jit
def _rescale(  # type: ignore[no-untyped-def]
    sums,
    rows,
    columns,
    bias,
    out,
    width,
    has_bias: tl.constexpr,
    size: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * size + tl.arange(0, size)
    inside = column < width
    value = tl.load(sums + row * width + column, mask=inside).to(tl.float32)
    value = value * tl.load(rows + row) * tl.load(columns + column, mask=inside)
    if has_bias:
        value += tl.load(bias + column, mask=inside).to(tl.float32)
    tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=inside)


def rescale(
    sums: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return ``sums * rows * columns + bias`` in ``dtype``.

    Args:
        sums: int32, f32 or bf16 [M, N], contiguous.
        rows: f32 [M, 1].
        columns: f32 [N].
        bias: [N], or None.
        dtype: of the result.
    """
    height, width = sums.shape
    out = torch.empty_like(sums, dtype=dtype)
    _rescale[(height, triton.cdiv(width, SIZE))](
        sums=sums,
        rows=rows,
        columns=columns,
        bias=out if bias is None else bias,
        out=out,
        width=width,
        has_bias=bias is not None,
        size=SIZE,
    )
    return out

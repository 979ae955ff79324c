"""Weight-only int8 with one scale a row through ATen, for CPUs that `onednn` does not support."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from qtool.runtime.kernels import Device, LinearSpec, no_aten_product
from qtool.weight import QuantizedWeight

# the operator reads so many inputs at a time, even beyond the last, and faults if unaligned
STEP = 16


def unsupported_reason(spec: LinearSpec, device: Device) -> str | None:
    """Support weight-only integers of 5 to 8 bits by channel or tensor, with bfloat16 inputs."""
    weights = spec.scheme.weights
    if reason := no_aten_product(spec):
        return reason
    if (
        weights.format not in ("int5", "int6", "int7", "int8")
        or weights.granularity not in ("channel", "tensor")
        or not weights.symmetric
    ):
        return f"weights {weights}: supports int5 to int8 by channel or tensor, without zero points"
    return None


def pack(spec: LinearSpec, weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return ``codes``, int8 with K filled up, and ``scale``, bfloat16 [N]."""
    return {
        "codes": _steps(weight.data),
        "scale": weight.scale[:, 0]
        .expand(spec.shape[0])
        .to(torch.bfloat16, memory_format=torch.contiguous_format),
    }


def apply(spec: LinearSpec, x: Tensor, packed: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
    """Multiply with int8 codes."""
    y: Tensor = torch.ops.aten._weight_int8pack_mm(_steps(x), packed["codes"], packed["scale"])
    return y if bias is None else y + bias


def _steps(x: Tensor) -> Tensor:
    """Return ``x`` [R, K] with K filled up to whole steps, aligned."""
    if missing := -x.shape[1] % STEP:
        return pad(x, (0, missing))
    return x.clone() if x.data_ptr() % 32 else x

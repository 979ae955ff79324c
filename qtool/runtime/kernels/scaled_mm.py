"""PyTorch's own matmuls of codes: `torch._scaled_mm` for fp8, `torch._int_mm` for int8."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from qtool.codes import to_fp8
from qtool.runtime.kernels import Device, LinearSpec, device_of
from qtool.scheme import Activations, Scheme
from qtool.weight import QuantizedWeight, divided, largest

# cuBLAS is faster with one scale for the whole matrix than with one for each row, until writing the
# sums and scaling them afterwards costs more.
MANY_TOKENS = 512
FEWEST_INT8 = 32  # `torch._int_mm` needs more than 16 tokens
# of weights and of inputs
GRANULARITIES = frozenset(itertools.product(("tensor", "channel"), ("tensor", "token")))


def unsupported_reason(spec: LinearSpec, device: Device) -> str | None:
    """Support fp8 weights with fp8 inputs, and int8 weights with int8 inputs.

    There is one scale for each output and each token, or for all of them.
    """
    if reason := _unsupported_scheme(spec.scheme):
        return reason
    format, (rows, columns) = spec.scheme.weights.format, spec.shape
    oldest, multiple = (89, 16) if format == "fp8" else (75, 8)
    if device.capability < oldest:
        return f"{device} is older than sm_{oldest}, the first with {format} matmuls"
    if rows % multiple or columns % multiple:
        return f"{rows} outputs of {columns} inputs are not multiples of {multiple}"
    return None


def _unsupported_scheme(scheme: Scheme) -> str | None:
    weights, inputs = scheme.weights, scheme.activations
    if inputs is None:
        return "inputs stay in 16 bits"
    if weights.format not in ("fp8", "int8") or weights.format != inputs.format:
        return f"weights are {weights.format} and inputs {inputs.format}"
    if (weights.granularity, inputs.granularity) not in GRANULARITIES:
        return (
            f"weights have a scale for each {weights.granularity}, inputs for each "
            f"{inputs.granularity}"
        )
    if not (weights.symmetric and inputs.symmetric):
        return "zero points"
    return None


def pack(spec: LinearSpec, weight: QuantizedWeight) -> dict[str, Tensor]:
    """Keep codes and scales; rows that all have one scale keep one, if the input has one too."""
    inputs, scale = spec.scheme.activations, weight.scale.float().expand(spec.shape[0], 1).flatten()
    if (
        inputs
        and inputs.granularity == "tensor"
        and inputs.format == "fp8"
        and bool((scale == scale[0]).all())
    ):
        scale = scale[:1].clone()
    packed = {"data": weight.data, "scale": scale, "one": torch.ones((), device=scale.device)}
    if weight.activation is not None and weight.activation.scale is not None:
        packed["input_scale"] = weight.activation.scale.float().reshape(())
    return packed


def apply(spec: LinearSpec, x: Tensor, packed: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
    """Round the input to codes, multiply them, and scale the sums."""
    inputs = spec.scheme.activations
    assert inputs is not None
    scale_of_input = packed.get("input_scale")
    if inputs.granularity == "tensor" and scale_of_input is None:
        scale_of_input = scale_of_all(x, inputs)
    codes, row_scale = rounded_rows(x, inputs, scale_of_input)
    if packed["scale"].numel() == 1:
        assert scale_of_input is not None
        return _fp8_sums(codes, packed["data"].T, scale_of_input, packed["scale"], bias, x.dtype)
    return apply_codes(spec, codes, row_scale, packed, bias)


def apply_codes(
    spec: LinearSpec,
    codes: Tensor,
    row_scale: Tensor,
    packed: Mapping[str, Tensor],
    bias: Tensor | None,
) -> Tensor:
    """Multiply the codes, and scale the sums."""
    scale, one, weight, dtype = packed["scale"], packed["one"], packed["data"].T, spec.dtype
    if codes.dtype == torch.int8:
        return rescaled(_int8_sums(codes, weight), row_scale, scale, bias, dtype)
    if (
        codes.shape[0] > MANY_TOKENS
        and dtype == torch.bfloat16
        and device_of(codes.device).capability >= 90
    ):
        return _fp8_sums(codes, weight, row_scale, scale[None], bias, dtype)
    # float16 ends at 65504, and sums of codes do not
    wide = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    return rescaled(_fp8_sums(codes, weight, one, one, None, wide), row_scale, scale, bias, dtype)


def scale_of_all(x: Tensor, inputs: Activations) -> Tensor:
    """Return the scale, a scalar, that rounds all of ``x`` to ``inputs``."""
    return divided(x.abs().amax().float(), largest(inputs))


def rounded_rows(
    x: Tensor, inputs: Activations, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the codes of ``x`` [M, K], fp8 or int8, and their scales, f32 [M, 1].

    They are those of `fake_quantize_input`; the scale of each row is ``scale``, if given.
    """
    if x.is_cuda:
        from qtool.runtime.triton.row_quantize import quantize_rows

        return quantize_rows(
            x, "fp8" if inputs.format == "fp8" else "int8", None if scale is None else scale.float()
        )
    wide = x.float()
    if scale is None:
        scale = divided(wide.abs().amax(1, keepdim=True), largest(inputs))
    scale = torch.where(scale > 0, scale, 1.0).expand(x.shape[0], 1).contiguous()
    ratio = wide / scale
    if inputs.format == "fp8":
        return to_fp8(ratio), scale
    return ratio.round_().clamp_(-128, 127).to(torch.int8), scale


def rescaled(
    sums: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return ``sums * rows * columns + bias``, for f32 ``rows`` [M, 1] and ``columns`` [N]."""
    if sums.is_cuda:
        from qtool.runtime.triton.rescale import rescale

        return rescale(sums, rows, columns, bias, dtype)
    y = sums.float() * rows * columns
    return (y if bias is None else y + bias).to(dtype)


def _fp8_sums(
    codes: Tensor,
    weight: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return torch._scaled_mm(
        codes,
        weight,
        scale_a=scale_a,
        scale_b=scale_b,
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=True,
    )


def _int8_sums(codes: Tensor, weight: Tensor) -> Tensor:
    tokens = codes.shape[0]
    if tokens > 16:
        return torch._int_mm(codes, weight)
    return torch._int_mm(functional.pad(codes, (0, 0, 0, FEWEST_INT8 - tokens)), weight)[:tokens]

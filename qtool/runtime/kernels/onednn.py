"""Integer weights through oneDNN's int8 multiplication, one product for each group of inputs.

Weights of fewer bits become int8. Inputs that stay in 16 bits are rounded to 16-bit integers, with
one scale a token, and multiplied as two 8-bit digits. That changes an input by at most
sqrt(K) / 65000 of its norm, less than rounding the output to bfloat16 does.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qtool.codes import unpack_pairs
from qtool.runtime.kernels import Device, LinearSpec, not_bfloat16
from qtool.scheme import Activations
from qtool.weight import QuantizedWeight, dequantize, largest

TINY = torch.finfo(torch.float32).tiny
# inputs are uint8 around it: only AMX multiplies int8 with int8, others take a reference path a
# thousand times slower
MIDDLE = 128
LARGEST = 32639  # 127 * 257: both digits stay in a byte


def unsupported_reason(spec: LinearSpec, device: Device) -> str | None:
    """Support integer weights in groups or with one scale a row.

    Inputs are bfloat16, rounded to integers by token or tensor, or not at all.
    """
    weights, activations = spec.scheme.weights, spec.scheme.activations
    if not torch.cpu._is_vnni_supported():  # without it, pairs of products saturate at 16 bits
        return "needs a CPU with AVX512 VNNI"
    if reason := not_bfloat16(spec):
        return reason
    if not weights.format.startswith("int") or weights.granularity == "block":
        return f"weights {weights}: supports integers by group, channel or tensor"
    if activations and not (
        activations.format.startswith("int") and activations.granularity in ("token", "tensor")
    ):
        return f"inputs {activations}: supports integers by token or tensor"
    return None


def pack(spec: LinearSpec, weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return the tensors of `apply`.

    - ``codes<g>``: the codes of each group in the order of oneDNN.
    - ``scale`` and, with zero points, ``offset``: f32 [G, N].
    - ``input_scale`` and ``input_zero``, if static.
    - ``row_sum``: [N], of the weight, if inputs have zero points.
    """
    codes = (
        unpack_pairs(weight.data).to(torch.int8) - 8
        if weight.data.dtype == torch.uint8
        else weight.data
    )
    groups = torch.split(codes, _width(spec), dim=1)
    scale = weight.scale.float().expand(spec.shape[0], -1)
    packed = {
        f"codes{index}": torch.ops.onednn.qlinear_prepack(group.contiguous(), None)
        for index, group in enumerate(groups)
    }
    packed["scale"] = scale.T.contiguous()
    if weight.zero is not None:
        packed["offset"] = (scale * -weight.zero.float()).T.contiguous()
    if weight.activation:
        static = {"input_scale": weight.activation.scale, "input_zero": weight.activation.zero}
        packed |= {
            name: tensor.float().reshape(1, 1)
            for name, tensor in static.items()
            if tensor is not None
        }
        if not weight.activation.format.symmetric or weight.activation.zero is not None:
            packed["row_sum"] = dequantize(weight).sum(1)
    return packed


def apply(spec: LinearSpec, x: Tensor, packed: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
    """Multiply integers, add up the groups in f32, then scale."""
    activations = spec.scheme.activations
    if activations is None:
        scale = (x.abs().amax(1, keepdim=True).float() / LARGEST).clamp_(min=TINY)
        number = (x / scale).round_().to(torch.int32) + (MIDDLE * 256 + MIDDLE)
        high, low = _multiply(
            spec, torch.cat((number >> 8, number & 255)).to(torch.uint8), packed
        ).chunk(2)
        y = low.add_(high, alpha=256)
    else:
        codes, scale, zero = _codes(
            x, activations, packed.get("input_scale"), packed.get("input_zero")
        )
        y = _multiply(spec, codes, packed)
        if zero is not None:
            y.addcmul_(zero, packed["row_sum"], value=-1)
    y = y.mul_(scale) if bias is None else torch.addcmul(bias.float(), y, scale)
    return y.to(x.dtype)


def _width(spec: LinearSpec) -> int:
    return spec.scheme.weights.group_size or spec.shape[1]


def _multiply(spec: LinearSpec, codes: Tensor, packed: Mapping[str, Tensor]) -> Tensor:
    """Return uint8 ``codes`` [R, K] less `MIDDLE`, times the weight, f32 [R, N]."""
    # its overloads are named below: finding one by its arguments is slow
    operator = torch.ops.onednn.qlinear_pointwise
    groups = [group.contiguous() for group in torch.split(codes, _width(spec), dim=1)]
    no_zero = torch.zeros(spec.shape[0], dtype=torch.int64)
    factors = [
        (group, 1.0, MIDDLE, packed[f"codes{index}"], packed["scale"][index], no_zero)
        for index, group in enumerate(groups)
    ]
    y: Tensor = operator.default(*factors[0], None, 1.0, 0, torch.float32, "none", [], "")
    for others in factors[1:]:
        operator.binary(*others, y, None, 1.0, 0, torch.float32, 1.0, 0, "sum", 1.0, "none", [], "")
    if "offset" in packed:
        sums = torch.stack([group.sum(1) - MIDDLE * group.shape[1] for group in groups], dim=1)
        y.addmm_(sums.float(), packed["offset"])
    return y


def _codes(
    x: Tensor, activation: Activations, scale: Tensor | None, zero: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return `MIDDLE` plus the codes of ``x``, uint8 [M, K], and their scale and zero point.

    They are those of `fake_quantize_input`.
    """
    top = int(largest(activation))
    over = (0, 1) if activation.granularity == "tensor" else 1
    if not activation.symmetric and zero is None:
        low = x.amin(over, keepdim=True).float().clamp(max=0)
        high = x.amax(over, keepdim=True).float().clamp(min=0)
        scale = ((high - low) / (2 * top + 1)).clamp(min=TINY)
        zero = (-top - 1 - low / scale).round()
    elif scale is None:
        scale = (x.abs().amax(over, keepdim=True).float() / top).clamp_(min=TINY)
    codes = (x / scale).round_()
    if zero is not None:
        codes += zero
    return codes.clamp_(-top - 1, top).add_(MIDDLE).to(torch.uint8), scale, zero

"""The definition of a quantized product: round the input, dequantize the weight, multiply.

It supports every layer; the other kernels are tested against it.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional

from qtool.runtime.kernels import Device, LinearSpec
from qtool.weight import QuantizedWeight, dequantize, fake_quantize_input, uneven_block


def unsupported_reason(spec: LinearSpec, device: Device) -> str | None:
    """Support every layer."""
    return None


def pack(spec: LinearSpec, weight: QuantizedWeight) -> dict[str, Tensor]:
    """Keep the tensors as they are."""
    static = weight.activation
    tensors = {
        "data": weight.data,
        "scale": weight.scale,
        "scale2": weight.scale2,
        "zero": weight.zero,
        "codebook": weight.codebook,
        "offset": weight.offset,
        "input_scale": static.scale if static else None,
        "input_zero": static.zero if static else None,
    }
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def apply(spec: LinearSpec, x: Tensor, packed: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
    """Multiply by the dequantized weight."""
    block = uneven_block(spec.scheme.weights, spec.shape)
    if block and packed["scale"].shape[0] == spec.shape[0]:
        block = (1, block[1])  # each row has scales of its own, as `scaled_by_row` gives them
    weight = QuantizedWeight(
        packed["data"],
        packed["scale"],
        packed.get("scale2"),
        packed.get("zero"),
        block=block,
        codebook=packed.get("codebook"),
        offset=packed.get("offset"),
    )
    if spec.scheme.activations:
        x = fake_quantize_input(
            x, spec.scheme.activations, packed.get("input_scale"), packed.get("input_zero")
        )
    return functional.linear(x, dequantize(weight, x.dtype), bias)

"""Experts on a GPU, in Triton: two products over choices that are sorted by expert.

The kernels are those of single layers: a block of choices has one expert, and so the rows of one
weight. The first product also applies the gate. Codes of 8 bits, weight-only schemes of 4 and 8
bits, and FP8 in blocks of 128 x 128; other inputs are rounded before, and keep their 16 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Literal

from torch import Tensor

from qtool.runtime.experts.gates import Gate
from qtool.runtime.experts.grouped import ExpertsSpec, ExpertWeights
from qtool.runtime.experts.packing import (
    input_scales,
    part,
    scales_of_rows,
    stack,
    stack_bias,
    unsupported_inputs,
)
from qtool.runtime.experts.routing import Blocks, SharedExpert
from qtool.runtime.kernels import Device, LinearSpec
from qtool.runtime.kernels import triton_w8a8 as w8a8
from qtool.runtime.kernels import triton_weight_only as weight_only
from qtool.runtime.triton.routing import add_up, sort_choices
from qtool.runtime.triton.row_quantize import quantize_rows
from qtool.runtime.triton.tiles import Tile
from qtool.weight import QuantizedWeight, fake_quantize_input

Product = Literal["codes", "blocks", "weight_only"]

# most choices for each expert, on average -> how the two products are cut; 0: any number. Found on
# an H200 with the shape of Qwen3-30B-A3B, by tests/benchmarks/experts_on_gpu.py
# The same numbers stand in all tables, with blocks of the same size.
Table = Mapping[int, tuple[Tile, Tile]]
_CODES: Table = {
    12: (Tile(64, 16, 256, 0, 4, 3, pdl=True), Tile(64, 16, 128, 0, 4, 3, pdl=True)),
    32: (Tile(128, 32, 128, 0, 4, 3, pdl=True), Tile(128, 32, 128, 0, 4, 3, pdl=True)),
    96: (Tile(128, 64, 128, 0, 4, 3), Tile(128, 64, 128, 0, 4, 3)),
    0: (Tile(256, 128, 128, 0, 8, 4), Tile(128, 128, 128, 0, 4, 3)),
}
_BLOCKS: Table = {
    12: (Tile(128, 16, 128, 0, 4, 3, pdl=True), Tile(128, 16, 128, 0, 4, 3, pdl=True)),
    32: (Tile(128, 32, 128, 0, 4, 3, pdl=True), Tile(128, 32, 128, 0, 4, 3, pdl=True)),
    96: (Tile(64, 64, 128, 0, 4, 3), Tile(64, 64, 128, 0, 4, 3)),
    0: (Tile(64, 128, 128, 0, 4, 3), Tile(64, 128, 128, 0, 4, 3)),
}
_WEIGHT_ONLY: Table = {
    12: (Tile(128, 16, 256, 0, 4, 3, pdl=True), Tile(128, 16, 256, 0, 4, 3, pdl=True)),
    32: (Tile(128, 32, 256, 0, 4, 3, pdl=True), Tile(128, 32, 256, 0, 4, 3, pdl=True)),
    96: (Tile(256, 64, 256, 0, 8, 3), Tile(128, 64, 256, 0, 8, 2)),
    0: (Tile(256, 128, 256, 0, 8, 2), Tile(256, 128, 256, 0, 8, 2)),
}
# wider weights: a step of as many bytes
_WEIGHT_ONLY_WIDE: Table = {
    most: (replace(up, k=128), replace(down, k=128)) for most, (up, down) in _WEIGHT_ONLY.items()
}


def tiles(spec: LinearSpec) -> Table:
    """Return how both products are cut where one expert is ``spec``."""
    product = _product(spec)
    if product == "weight_only":
        is_narrow = spec.scheme.weights.bits == 4
        return _WEIGHT_ONLY if is_narrow else _WEIGHT_ONLY_WIDE
    return _CODES if product == "codes" else _BLOCKS


def unsupported_reason(spec: ExpertsSpec, device: Device) -> str | None:
    """Support what the kernels of single layers do, and FP8 in blocks with inputs in groups."""
    for linear in (spec.up, spec.down):
        if reason := _unsupported_linear(linear, device):
            return reason
    return None


def _unsupported_linear(spec: LinearSpec, device: Device) -> str | None:
    if device.capability != 90:
        return f"it is written for sm_90, not {device}"
    product = _product(spec)
    if product == "blocks":
        return w8a8.unsupported_reason(spec, device)
    if product != "weight_only":
        return None
    reason = unsupported_inputs(spec.scheme.activations)
    return reason or weight_only.unsupported_reason(_without_inputs(spec), device)


@lru_cache(maxsize=1024)
def _product(spec: LinearSpec) -> Product:
    """Return which kernel multiplies such layers."""
    if w8a8.in_blocks(spec):
        return "blocks"
    return "codes" if w8a8.unsupported_reason(spec, Device("cuda", 90)) is None else "weight_only"


def _without_inputs(spec: LinearSpec) -> LinearSpec:
    return replace(spec, scheme=replace(spec.scheme, activations=None), static_input=False)


def pack(spec: ExpertsSpec, weights: ExpertWeights) -> dict[str, Tensor]:
    """Return the tensors of both products, ``up_`` or ``down_`` before their names."""
    gate = _fused(spec.gate)
    packed: dict[str, Tensor | None] = {}
    for name, linear, parts, bias, turns in (
        ("up", spec.up, weights.up, weights.up_bias, gate),
        ("down", spec.down, weights.down, weights.down_bias, None),
    ):
        scales = input_scales(parts)
        tensors = _pack_linear(linear, stack(parts, turns), spec.count)
        tensors |= {"bias": stack_bias(bias, turns), "input_scale": scales}
        packed |= {f"{name}_{key}": value for key, value in tensors.items()}
    return {name: tensor for name, tensor in packed.items() if tensor is not None}


def _pack_linear(spec: LinearSpec, weight: QuantizedWeight, count: int) -> dict[str, Tensor | None]:
    product = _product(spec)
    if product == "blocks":
        return {"data": weight.data, "scale": weight.scale.float().T.contiguous()}
    whole = replace(spec, shape=(count * spec.shape[0], spec.shape[1]))
    if product == "codes":
        return {**w8a8.pack(replace(whole, static_input=False), weight)}
    return {**weight_only.pack(_without_inputs(whole), weight)}


def _fused(gate: Gate) -> Gate | None:
    """Return the gate if the first product applies it, which wants gate and up by turns."""
    return None if gate.kind == "other" else gate


def apply(
    spec: ExpertsSpec,
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    packed: Mapping[str, Tensor],
    shared: SharedExpert | None = None,
) -> Tensor:
    """Multiply all choices with the experts, apply the gate between, and add up."""
    each = experts.numel() / spec.count
    (up, _), (_, down) = (_tiles(linear, each) for linear in (spec.up, spec.down))
    blocks = sort_choices(experts, spec.count, up.m, pdl=True)
    gate = _fused(spec.gate)
    inner = _multiply(spec.up, x, experts, packed, "up", up, blocks, gate)
    if gate is None:
        inner = spec.gate.own(inner).contiguous()
    y = _multiply(spec.down, inner, experts, packed, "down", down, blocks.of_own_rows())
    return add_up(y, weights, shared, pdl=True)


def _tiles(spec: LinearSpec, each: float) -> tuple[Tile, Tile]:
    """Return how both products are cut for ``each`` choices of an expert on average."""
    table = tiles(spec)
    return table[next((most for most in table if each <= most), 0)]


def _multiply(
    spec: LinearSpec,
    x: Tensor,
    experts: Tensor,
    packed: Mapping[str, Tensor],
    name: str,
    tile: Tile,
    blocks: Blocks,
    gate: Gate | None = None,
) -> Tensor:
    """Round the input and multiply with the weights ``name``."""
    product = _product(spec)
    inputs = spec.scheme.activations
    tensors = part(packed, name)
    static, bias = tensors.get("input_scale"), tensors.get("bias")
    if static is not None and static.numel() > 1:
        # each expert rounds its tokens with a scale of its own
        x = x.repeat_interleave(blocks.top_k, 0)
        blocks = blocks.of_own_rows()
    if inputs:
        static = scales_of_rows(static, experts.reshape(-1), inputs)
    if product == "weight_only":
        if inputs:
            x = fake_quantize_input(x, inputs, static).contiguous()
        return weight_only.multiply_blocks(
            _without_inputs(spec), x, tensors, bias, tile, blocks, gate
        )
    if product == "blocks":
        codes, scale = w8a8.quantize_groups(x, w8a8.BLOCK)
    else:
        format: Literal["fp8", "int8"] = "fp8" if spec.scheme.weights.format == "fp8" else "int8"
        codes, scale = quantize_rows(x, format, static, pdl=True)
    return w8a8.multiply_blocks(
        codes, scale, tensors, bias, spec.shape, spec.dtype, tile, blocks, gate
    )

"""Experts on a CPU: native.c takes all experts of a step in one call for each product."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from qtool.runtime.c_library import workspace
from qtool.runtime.experts.grouped import ExpertsSpec, ExpertWeights
from qtool.runtime.experts.packing import input_scales, scales_of_rows, unsupported_inputs
from qtool.runtime.experts.routing import SharedExpert, add_shared
from qtool.runtime.kernels import Device, LinearSpec, native
from qtool.weight import QuantizedWeight, fake_quantize_input

# what `Job` points to in the packed tensors of a product; `table` is the same for all experts
_TENSORS = ("codes", "scale", "zero", "offset", "table", "row_scale")
# codes of a product -> the jobs of its experts, without tokens
_jobs: Mapping[Tensor, ctypes.Array[native.Job]] = WeakTensorKeyDictionary()


def unsupported_reason(spec: ExpertsSpec, device: Device) -> str | None:
    """Support what native.c does: also integers with integers, as oneDNN takes no experts."""
    for linear in (spec.up, spec.down):
        reason = native.unsupported_product(linear)
        if reason := reason or unsupported_inputs(linear.scheme.activations):
            return reason
    return None


def pack(spec: ExpertsSpec, weights: ExpertWeights) -> dict[str, Tensor]:
    """Return what `native.pack` does, [experts, ...], ``up_`` or ``down_`` before the names."""
    packed: dict[str, Tensor | None] = {"up_bias": weights.up_bias, "down_bias": weights.down_bias}
    for name, linear, parts in (("up", spec.up, weights.up), ("down", spec.down, weights.down)):
        packed[f"{name}_input_scale"] = input_scales(parts)
        for key, tensor in _pack_each(linear, parts).items():
            packed[f"{name}_{key}"] = tensor
    return {name: tensor for name, tensor in packed.items() if tensor is not None}


def _pack_each(spec: LinearSpec, weights: list[QuantizedWeight]) -> dict[str, Tensor]:
    """Pack the weights of all experts side by side; empties ``weights``."""
    whole: dict[str, Tensor] = {}
    for expert in range(len(weights)):
        packed = native.pack(spec, weights[expert])
        for name in _TENSORS:
            if name not in packed:
                continue
            if name not in whole:
                whole[name] = packed[name].new_empty(len(weights), *packed[name].shape)
            whole[name][expert] = packed[name]
    weights.clear()
    return whole


def apply(
    spec: ExpertsSpec,
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    packed: Mapping[str, Tensor],
    shared: SharedExpert | None = None,
) -> Tensor:
    """Multiply the tokens of all experts, apply the gate between, and add up in f32."""
    top_k = experts.shape[1]
    counts = torch.bincount(experts.reshape(-1), minlength=spec.count).tolist()
    # experts with few tokens first, as native.c wants them
    chosen = sorted((count, expert) for expert, count in enumerate(counts) if count)
    rank = torch.empty(spec.count, dtype=torch.long)
    rank[[expert for _, expert in chosen]] = torch.arange(len(chosen))
    order = torch.sort(rank[experts.reshape(-1)], stable=True).indices
    sorted_experts = experts.reshape(-1)[order]
    gate_up = _product(spec.up, "up", x[order // top_k], sorted_experts, chosen, packed)
    inner = spec.gate.own(gate_up).contiguous()
    y = _product(spec.down, "down", inner, sorted_experts, chosen, packed)
    parts = y.float() * weights.reshape(-1, 1)[order].float()
    in_place = torch.empty_like(parts).index_copy_(0, order, parts)
    total = in_place.view(-1, top_k, y.shape[1]).sum(1)
    return add_shared(total, shared).to(x.dtype)


def _product(
    spec: LinearSpec,
    name: str,
    x: Tensor,
    experts: Tensor,
    chosen: list[tuple[int, int]],
    packed: Mapping[str, Tensor],
) -> Tensor:
    """Multiply rows ``x`` [rows, K], in the order of ``chosen``: (rows, expert)."""
    library = native.native_library()
    assert not isinstance(library, str)
    if inputs := spec.scheme.activations:
        scale = scales_of_rows(packed.get(f"{name}_input_scale"), experts, inputs)
        x = fake_quantize_input(x, inputs, scale).contiguous()
    y = x.new_empty(x.shape[0], spec.shape[0])
    known = _jobs_of(spec, name, packed)
    jobs = (native.Job * len(chosen))()
    bias = packed.get(f"{name}_bias")
    row = 0
    threads = torch.get_num_threads()
    outputs, columns = spec.shape
    x_start = x.data_ptr()
    y_start = y.data_ptr()
    size = x.element_size()
    for index, (count, expert) in enumerate(chosen):
        jobs[index] = known[expert]
        job = jobs[index]
        job.x, job.y = x_start + row * columns * size, y_start + row * outputs * size
        job.tokens = count
        job.threads = threads
        row += count
    jobs[0].workspace = workspace(library.experts_size(jobs, len(jobs))).data_ptr()
    library.experts(jobs, len(jobs))
    return y if bias is None else y + bias[experts].to(y.dtype)


def _jobs_of(spec: LinearSpec, name: str, packed: Mapping[str, Tensor]) -> ctypes.Array[native.Job]:
    """Return the jobs of all experts, made once."""
    tensors = {key: packed[f"{name}_{key}"] for key in _TENSORS if f"{name}_{key}" in packed}
    codes = tensors["codes"]
    if codes not in _jobs:
        jobs = (native.Job * codes.shape[0])()
        for expert in range(codes.shape[0]):
            each = {key: tensor[expert] for key, tensor in tensors.items()}
            jobs[expert] = native.job_of(spec, each)
        _jobs[codes] = jobs  # type: ignore[index]
    return _jobs[codes]

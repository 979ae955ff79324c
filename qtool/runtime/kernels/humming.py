"""humming-kernels: weights of 2 to 8 bits in any scheme, times 16-bit inputs, or fp8 and int8 ones.
It compiles for the layer as it loads.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qtool.formats.packing import offset_binary, pack_bits, words_from_data
from qtool.runtime.kernels import Device, LinearSpec, device_of
from qtool.runtime.kernels.scaled_mm import rounded_rows, scale_of_all
from qtool.scheme import Weights
from qtool.weight import QuantizedWeight, fake_quantize_input

# N and K are padded to it; the tiles of every schedule divide it or come in multiples that humming
# fits itself
TILE = 128
GROUP_SIZES = (16, 32, 64, 128)
# as humming calls them
NAMES = {
    "fp8": "float8e4m3",
    "fp4": "float4e2m1",
    "e4m3": "float8e4m3",
    "e8m0": "float8e8m0",
    "int8": "int8",
}
# tokens: one schedule to each, where humming by itself would compile 33
STEPS = (
    8,
    16,
    32,
    64,
    96,
    128,
    192,
    256,
    512,
    1024,
    2048,
    4096,
)
# what tests/benchmarks/sweep_humming.py found; it names the GPU
MEASURED = Path(__file__).with_name("humming_schedules.json")
# as many as its own layers have; each layer needs its own, since two GEMMs in a row may overlap
LOCKS = 2048


def unsupported_reason(spec: LinearSpec, device: Device) -> str | None:
    """Take weights in channels, groups of 16 to 128 and blocks of 128 x 128, for which humming can
    be compiled here.
    """
    weights, (rows, columns) = spec.scheme.weights, spec.shape
    oldest = 80 if spec.dtype == torch.bfloat16 else 75
    if device.capability < oldest:
        return f"{device} is older than sm_{oldest}, the first for {spec.dtype}"
    if spec.dtype not in (torch.bfloat16, torch.float16):
        return f"inputs are {spec.dtype}"
    if weights.granularity == "group" and weights.group_size not in GROUP_SIZES:
        return f"groups of {weights.group_size} inputs"
    if weights.block not in (None, (128, 128)):
        return f"blocks of {weights.block}"
    if rows % 8 or columns % 8:
        return f"{rows} outputs of {columns} inputs are not multiples of 8"
    return _missing()


@lru_cache(maxsize=1)
def _missing() -> str | None:
    """Return what keeps humming from being used here.

    It compiles with NVRTC or `nvcc`, and needs the headers of CUDA and of CCCL.
    """
    if importlib.util.find_spec("humming") is None:
        return "humming-kernels is not installed: pip install 'qtool[cuda]'"
    try:
        from humming.jit import KernelRuntime
        from humming.utils.cuda import filter_cuda_paths

        KernelRuntime._get_compiler().signature()
        filter_cuda_paths(required_headers=["cuda_runtime.h", "cuda/std/cstdint"])
    except Exception as error:  # whatever is wrong with a CUDA installation
        return f"humming-kernels cannot compile here: {error}"
    return None


def multiplies_codes(spec: LinearSpec, capability: int) -> bool:
    """Return whether humming multiplies by the rounded input itself, 8 bits wide.

    Else the input is rounded and stays 16 bits wide.
    """
    weights, inputs = spec.scheme.weights, spec.scheme.activations
    if (
        inputs is None
        or inputs.format not in ("fp8", "int8")
        or inputs.scale != "float"
        or spec.shape[1] % 16
    ):
        return False
    if not (inputs.symmetric and weights.symmetric) or (inputs.format == "fp8" and capability < 89):
        return False
    if inputs.granularity == "group":
        return (
            weights.format == "fp8"
            and weights.granularity == "block"
            and inputs.group_size == 128
            and not spec.shape[1] % 128
        )
    if weights.format == "int4":
        return (weights.group_size or 32) >= 32
    return weights.format == inputs.format and weights.granularity in ("channel", "tensor")


def pack(spec: LinearSpec, weight: QuantizedWeight) -> dict[str, Tensor]:
    """Lay the weight out as humming reads it, and compile a kernel for each of `STEPS`, or find it
    in humming's cache on disk.
    """
    from humming.kernel.humming import HummingKernel

    packed = lay_out(spec, weight)
    config, schedules = _config(spec, weight.data.device, "weight_scale_2" in packed)
    HummingKernel.prepare_kernels(
        config.to_str(), tuning_config=schedules, device=weight.data.device
    )
    return packed


def lay_out(spec: LinearSpec, weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return the tensors of `apply`: what `humming_forward` takes by name, and what is left
    to us.
    """
    from humming.transform import prepare_fp16_e8m0_scale, transform_humming_tensors

    device = weight.data.device
    tensors = canonical(spec, weight)
    extra = {
        "row_scale": tensors.pop("row_scale", None),
        "locks": torch.zeros(LOCKS, dtype=torch.int32, device=device),
    }
    if weight.activation is not None:
        extra |= {"static_scale": weight.activation.scale, "static_zero": weight.activation.zero}
    # it may add a second scale
    _, tensors = prepare_fp16_e8m0_scale(
        _config(spec, device, "weight_scale_2" in tensors)[0], tensors
    )
    packed: dict[str, Tensor] = transform_humming_tensors(
        _config(spec, device, "weight_scale_2" in tensors)[0], tensors, already_padded=True
    )
    return packed | {name: tensor for name, tensor in extra.items() if tensor is not None}


def canonical(spec: LinearSpec, weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return the tensors that humming documents, padded to whole tiles.

    ``weight``: int32 [N, K * bits / 32], lowest bits first, integers offset-binary. ``zero_point``:
        the same along N, [N * bits / 32, K / g].
    ``weight_scale_2``: NVFP4's multiplier, f32 [1]; where rows differ, ``row_scale`` [N] is left to
        multiply the output.
    """
    weights, (rows, columns) = spec.scheme.weights, spec.shape
    more_rows, more_columns = -rows % TILE, -columns % TILE
    integer, bits = weights.format.startswith("int"), weights.bits
    data = weight.data if integer else weight.data.view(torch.uint8)
    data = functional.pad(data, (0, more_columns // (2 if bits == 4 else 1), 0, more_rows))
    tensors = {"weight": words_from_data(data, bits) if integer else pack_bits(data, 8)}
    more_groups = (
        0
        if weights.group_size is None
        else (columns + more_columns) // weights.group_size - weight.scale.shape[1]
    )
    edge = (0, more_groups, 0, more_rows)
    if weights.granularity == "block":
        tensors["weight_scale"] = weight.scale.float()
    elif weights.scale == "float":
        tensors["weight_scale"] = functional.pad(weight.scale.to(spec.dtype), edge)
    else:
        value = 127 if weights.scale == "e8m0" else 0  # 127 is the exponent of 1.0
        tensors["weight_scale"] = functional.pad(
            weight.scale.view(torch.uint8), edge, value=value
        ).view(weight.scale.dtype)
    if weight.zero is not None:
        zero = functional.pad(offset_binary(weight.zero, bits), edge)
        tensors["zero_point"] = pack_bits(zero.T.contiguous(), bits).T.contiguous()
    if weight.scale2 is not None:
        largest = weight.scale2.amax().reshape(1)
        tensors["weight_scale_2"] = largest
        if bool((weight.scale2 != largest).any()):
            tensors["row_scale"] = (weight.scale2 / largest).to(spec.dtype)
    return tensors


@lru_cache(maxsize=1024)
def _config(spec: LinearSpec, device: torch.device, two_scales: bool) -> tuple[Any, str]:
    """Return humming's description of such layers and the schedules of `STEPS`; ``two_scales``: one
    of the whole weight multiplies the others.
    """
    from humming.schema import HummingInputSchema, HummingWeightSchema
    from humming.transform import prepare_layer_config
    from humming.tune import get_heuristics_config

    weights, inputs = spec.scheme.weights, spec.scheme.activations
    height, width = weights.block or (0, weights.group_size or 0)
    stored = HummingWeightSchema(
        b_dtype=NAMES.get(weights.format)
        if not weights.format.startswith("int")
        else f"u{weights.format}",
        bs_dtype=NAMES.get(weights.scale),
        weight_scale_group_size=width,
        weight_scale_group_size_n=height,
        weight_scale_2_type="tensor" if two_scales else None,
        has_zero_point=not weights.symmetric,
    )
    rounded = HummingInputSchema()
    if inputs and multiplies_codes(spec, device_of(device).capability):
        rounded = HummingInputSchema(
            a_dtype=NAMES[inputs.format], input_scale_group_size=inputs.group_size or 0
        )
    config = prepare_layer_config(
        *spec.shape,
        stored,
        rounded,
        pad_n_to_multiple=TILE,
        pad_k_to_multiple=TILE,
        torch_dtype=spec.dtype,
        device=device,
    )
    found = (
        measured(
            str(device_of(device)), torch.cuda.get_device_properties(device).multi_processor_count
        )
        if config.a_dtype.num_bits == 16
        else ()
    )
    options = partial(
        launch_options, input_bits=config.a_dtype.num_bits, capability=device_of(device).capability
    )
    schedules: list[list[Any]] = []
    for low, high in pairwise((0, *STEPS)):
        schedule = next(
            (entry.schedule for entry in found if entry.takes(weights, spec.shape, high)), None
        )
        schedule = {
            **(schedule or get_heuristics_config(config, shape_m=high, device=device)),
            **options(high),
        }
        schedule = json.loads(json.dumps(schedule))  # humming has tuples where the table has lists
        if schedules and schedules[-1][2] == schedule:
            schedules[-1][1] = high  # humming must not compile one kernel in two threads
        else:
            schedules.append([low, high, schedule])
    schedules[-1][1] = 1 << 30
    return config, json.dumps(schedules)


def launch_options(tokens: int, *, input_bits: int, capability: int) -> dict[str, bool]:
    """Return what to add to a schedule: where that gained time, about 2 us on an H200, a launch
    starts while the kernel before it ends.

    Before humming has waited for that one, it reads only weights; with 8-bit inputs and one scale
    for all, also that scale, too early.
    """
    return (
        {"use_pdl": True} if 16 < tokens <= 1024 and input_bits == 16 and capability >= 90 else {}
    )


@dataclass(frozen=True)
class Measured:
    """A schedule that was faster than the one humming would choose, with 16-bit inputs.

    ``kind`` of shape: see `shape_class`.
    """

    weights: str
    kind: str
    above: int
    up_to: int
    """Tokens."""
    schedule: Mapping[str, Any]

    def takes(self, weights: Weights, shape: tuple[int, int], tokens: int) -> bool:
        """Return whether it is for up to ``tokens`` and such a layer, whose sides its tiles must
        divide.
        """
        from qtool.runtime.triton.tiles import shape_class  # Triton comes with every torch for CUDA

        rows, columns = (size + -size % TILE for size in shape)
        _, tile_rows, tile_columns = self.schedule["block_shape"]
        fits = (
            not rows % (tile_rows * self.schedule.get("multi_cast_size_a", 1))
            and not columns % tile_columns
        )
        return (
            fits
            and (str(weights), shape_class(rows, columns)) == (self.weights, self.kind)
            and self.above < tokens <= self.up_to
        )


@cache
def measured(device: str, multiprocessors: int) -> tuple[Measured, ...]:
    """Return what was measured on such a GPU."""
    table = json.loads(MEASURED.read_text())
    if (table["device"], table["multiprocessors"]) != (device, multiprocessors):
        return ()
    return tuple(
        Measured(*(entry[name] for name in ("weights", "kind", "above", "up_to", "schedule")))
        for entry in table["schedules"]
    )


def apply(spec: LinearSpec, x: Tensor, packed: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
    """Multiply by the packed weight; the input becomes codes and scales first, or is rounded in
    place of its own dtype.
    """
    from humming.forward import humming_forward

    tensors, inputs = dict(packed), spec.scheme.activations
    row_scale, static_scale, static_zero = (
        tensors.pop(name, None) for name in ("row_scale", "static_scale", "static_zero")
    )
    config, schedules = _config(spec, x.device, "weight_scale_2" in tensors)
    if inputs and config.a_dtype.num_bits == 8:
        size = inputs.group_size or x.shape[1]
        if inputs.granularity == "tensor" and static_scale is None:
            static_scale = scale_of_all(x, inputs)
        codes, scale = rounded_rows(x.reshape(-1, size), inputs, static_scale)
        x, tensors["input_scale"] = codes.reshape(x.shape), scale.reshape(x.shape[0], -1)
    elif inputs:
        x = fake_quantize_input(x, inputs, static_scale, static_zero)
    y: Tensor = humming_forward(config, x, tuning_config=schedules, **tensors)
    if row_scale is not None:
        y = y * row_scale
    return y if bias is None else y + bias

"""humming-kernels: weights of 2 to 8 bits in any scheme, times inputs of 16 bits, fp8 or int8.

humming compiles a kernel for each layer while it loads.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qtool.formats.packing import offset_binary, pack_bits, words_from_data
from qtool.runtime.kernels import Device, LinearSpec, device_of
from qtool.runtime.kernels.scaled_mm import rounded_rows, scale_of_all
from qtool.scheme import CODEBOOKS, Activations, Weights
from qtool.weight import QuantizedWeight, fake_quantize_input

# N and K are padded to a multiple of this. The tiles of every schedule divide it, or humming fits
# them itself.
TILE = 128
GROUP_SIZES = (16, 32, 64, 128)
# our names of formats -> humming's
NAMES = {
    "fp8": "float8e4m3",
    "fp4": "float4e2m1",
    "e4m3": "float8e4m3",
    "e8m0": "float8e8m0",
    "int8": "int8",
}
# numbers of tokens with a schedule of their own; humming alone would compile 33
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
# found with tests/benchmarks/sweep_humming.py; the file names the GPU
MEASURED = Path(__file__).with_name("humming_schedules.json")
# as many as humming's own layers have; no two layers share them, since two GEMMs may overlap
LOCKS = 2048
# the first capability whose tensor cores multiply such inputs
OLDEST = {"fp8": 89, "int8": 0}


def unsupported_reason(spec: LinearSpec, device: Device) -> str | None:
    """Support channels, groups of 16 to 128 and blocks of 128 x 128, if humming compiles here."""
    weights, (rows, columns) = spec.scheme.weights, spec.shape
    if weights.format in CODEBOOKS:
        return f"codes of {weights.format} are indices of a table"
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
    return _unusable_reason()


@lru_cache(maxsize=1)
def _unusable_reason() -> str | None:
    """Return why humming cannot be used on this machine; None when it can.

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
    """Return whether humming multiplies the rounded input as codes of 8 bits.

    Otherwise the input is rounded and keeps its 16 bits.
    """
    weights, inputs = spec.scheme.weights, spec.scheme.activations
    if inputs is None or not _has_plain_codes(inputs) or not weights.symmetric:
        return False
    if spec.shape[1] % 16 or capability < OLDEST[inputs.format]:
        return False
    if inputs.granularity == "group":
        in_blocks = (weights.format, weights.granularity) == ("fp8", "block")
        return in_blocks and inputs.group_size == 128 and spec.shape[1] % 128 == 0
    if weights.format == "int4":
        return (weights.group_size or 32) >= 32
    return weights.format == inputs.format and weights.granularity in ("channel", "tensor")


def _has_plain_codes(inputs: Activations) -> bool:
    """Whether inputs are rounded to 8-bit codes with float scales, without zero points."""
    return inputs.format in OLDEST and inputs.scale == "float" and inputs.symmetric


def pack(spec: LinearSpec, weight: QuantizedWeight) -> dict[str, Tensor]:
    """Lay the weight out as humming reads it, and compile its kernels.

    There is a kernel for each of `STEPS`, compiled or found in humming's cache on disk.
    """
    from humming.kernel.humming import HummingKernel

    packed = lay_out(spec, weight)
    config, schedules = _config(spec, weight.data.device, "weight_scale_2" in packed)
    HummingKernel.prepare_kernels(
        config.to_str(), tuning_config=schedules, device=weight.data.device
    )
    return packed


def lay_out(spec: LinearSpec, weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return the tensors for `apply`: the arguments of `humming_forward`, and those of ours."""
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

    - ``weight``: int32 [N, K * bits / 32], lowest bits first, integers offset-binary.
    - ``zero_point``: packed likewise along N, [N * bits / 32, K / g].
    - ``weight_scale_2``: NVFP4's multiplier, f32 [1].
    - ``row_scale``: where NVFP4's multipliers differ, [N], to multiply the output with.
    """
    weights, (rows, columns) = spec.scheme.weights, spec.shape
    more_rows, more_columns = -rows % TILE, -columns % TILE
    edge = (0, 0, 0, more_rows)
    if weights.group_size is not None:
        groups = (columns + more_columns) // weights.group_size
        edge = (0, groups - weight.scale.shape[1], 0, more_rows)
    tensors = {
        "weight": _pack_codes(weights, weight.data, more_rows, more_columns),
        "weight_scale": _padded_scale(spec, weight.scale, edge),
    }
    if weight.zero is not None:
        zero = functional.pad(offset_binary(weight.zero, weights.bits), edge)
        tensors["zero_point"] = pack_bits(zero.T.contiguous(), weights.bits).T.contiguous()
    if weight.scale2 is not None:
        largest = weight.scale2.amax().reshape(1)
        tensors["weight_scale_2"] = largest
        if bool((weight.scale2 != largest).any()):
            tensors["row_scale"] = (weight.scale2 / largest).to(spec.dtype)
    return tensors


def _pack_codes(weights: Weights, data: Tensor, more_rows: int, more_columns: int) -> Tensor:
    """Return codes as 32-bit words, with zeros for the rows and columns that fill the tiles."""
    per_byte = 2 if weights.bits == 4 else 1
    padding = (0, more_columns // per_byte, 0, more_rows)
    if weights.format.startswith("int"):
        return words_from_data(functional.pad(data, padding), weights.bits)
    return pack_bits(functional.pad(data.view(torch.uint8), padding), 8)


def _padded_scale(spec: LinearSpec, scale: Tensor, edge: tuple[int, int, int, int]) -> Tensor:
    weights = spec.scheme.weights
    if weights.granularity == "block":
        return scale.float()
    if weights.scale == "float":
        return functional.pad(scale.to(spec.dtype), edge)
    value = 127 if weights.scale == "e8m0" else 0  # 127 is the exponent of 1.0
    return functional.pad(scale.view(torch.uint8), edge, value=value).view(scale.dtype)


@lru_cache(maxsize=1024)
def _config(spec: LinearSpec, device: torch.device, two_scales: bool) -> tuple[Any, str]:
    """Return humming's description of such layers and the schedules of `STEPS`, as JSON.

    Args:
        spec: the layers.
        device: where they run.
        two_scales: whether a scale of the whole weight multiplies the others.
    """
    from humming.schema import HummingInputSchema, HummingWeightSchema
    from humming.transform import prepare_layer_config

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
    return config, json.dumps(_schedules(spec, config, device))


def _schedules(spec: LinearSpec, config: Any, device: torch.device) -> list[list[object]]:
    """Return ``[above, up to, schedule]`` for the numbers of tokens in `STEPS`."""
    schedules: list[list[object]] = []
    for low, high in pairwise((0, *STEPS)):
        schedule = _schedule(spec, config, device, high)
        if schedules and schedules[-1][2] == schedule:
            schedules[-1][1] = high  # humming must not compile one kernel in two threads
        else:
            schedules.append([low, high, schedule])
    schedules[-1][1] = 1 << 30
    return schedules


def _schedule(spec: LinearSpec, config: Any, device: torch.device, tokens: int) -> object:
    """Return the schedule for up to ``tokens`` tokens: the one measured, or else humming's."""
    from humming.tune import get_heuristics_config

    input_bits = config.a_dtype.num_bits
    target = device_of(device)
    found: tuple[Measured, ...] = ()
    if input_bits == 16:
        properties = torch.cuda.get_device_properties(device)
        found = measured(str(target), properties.multi_processor_count)
    fitting = (
        entry.schedule for entry in found if entry.takes(spec.scheme.weights, spec.shape, tokens)
    )
    schedule = next(fitting, None) or get_heuristics_config(config, shape_m=tokens, device=device)
    options = launch_options(tokens, input_bits=input_bits, capability=target.capability)
    # humming has tuples where the table has lists
    return json.loads(json.dumps({**schedule, **options}))


def launch_options(tokens: int, *, input_bits: int, capability: int) -> dict[str, bool]:
    """Return what to add to a schedule: to start while the kernel before it ends, where that helps.

    It saves about 2 us on an H200. humming reads only weights before it waits for that kernel, but
    with 8-bit inputs and one scale for all it reads that scale too early.
    """
    helps = 16 < tokens <= 1024 and input_bits == 16 and capability >= 90
    return {"use_pdl": True} if helps else {}


@dataclass(frozen=True)
class Measured:
    """A schedule that was faster than humming's own, with 16-bit inputs."""

    weights: str
    kind: str
    """Of the shape, see `shape_class`."""
    above: int
    """It is for more tokens than this."""
    up_to: int
    """It is for at most this many tokens."""
    schedule: Mapping[str, Any]

    def takes(self, weights: Weights, shape: tuple[int, int], tokens: int) -> bool:
        """Whether it is for up to ``tokens`` tokens and such a layer, and its tiles fit that."""
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
    """Return the schedules that were measured on such a GPU."""
    table = json.loads(MEASURED.read_text())
    if (table["device"], table["multiprocessors"]) != (device, multiprocessors):
        return ()
    return tuple(
        Measured(*(entry[name] for name in ("weights", "kind", "above", "up_to", "schedule")))
        for entry in table["schedules"]
    )


def apply(spec: LinearSpec, x: Tensor, packed: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
    """Multiply by the packed weight; the input is rounded first, to codes or in its own dtype."""
    from humming.forward import humming_forward

    tensors, inputs = dict(packed), spec.scheme.activations
    row_scale, static_scale, static_zero = (
        tensors.pop(name, None) for name in ("row_scale", "static_scale", "static_zero")
    )
    config, schedules = _config(spec, x.device, "weight_scale_2" in tensors)
    if inputs and config.a_dtype.num_bits == 8:
        x, tensors["input_scale"] = _round_input(x, inputs, static_scale)
    elif inputs:
        x = fake_quantize_input(x, inputs, static_scale, static_zero)
    y: Tensor = humming_forward(config, x, tuning_config=schedules, **tensors)
    if row_scale is not None:
        y = y * row_scale
    return y if bias is None else y + bias


def _round_input(
    x: Tensor, inputs: Activations, static_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the codes of ``x`` [M, K] and their scales, [M, K / g]."""
    if inputs.granularity == "tensor" and static_scale is None:
        static_scale = scale_of_all(x, inputs)
    size = inputs.group_size or x.shape[1]
    codes, scale = rounded_rows(x.reshape(-1, size), inputs, static_scale)
    return codes.reshape(x.shape), scale.reshape(x.shape[0], -1)

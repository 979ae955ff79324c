"""Weights of any format, decoded in registers and multiplied in bfloat16 with AMX or AVX512.

native.c is compiled on first use, see `c_library`. Inputs are rounded first if the scheme says so.
``QTOOL_NO_AMX=1`` leaves AMX out.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from qtool.codes import FP4_SCALES, FP4_VALUES, unpack_pairs
from qtool.runtime.c_library import BASE_FLAGS, fields, load_library, openmp, workspace
from qtool.runtime.kernels import Device, LinearSpec, not_bfloat16, onednn, units_of_rows
from qtool.weight import QuantizedWeight, fake_quantize_input, spread

SOURCE = Path(__file__).with_suffix(".c")
STRIP, CHUNK = 32, 128  # outputs and inputs that native.c takes at a time
PIECE = 8 * STRIP  # outputs that are packed at a time
CODES = {torch.uint8: 0, torch.int8: 1, torch.float8_e4m3fn: 2}  # `enum codes`
# `enum scales`
SCALES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float8_e4m3fn: 3,
    torch.float8_e8m0fnu: 4,
}


def unsupported_reason(spec: LinearSpec, device: Device) -> str | None:
    """Support what native.c does, but leave to oneDNN what is faster there."""
    weights, activations = spec.scheme.weights, spec.scheme.activations
    if onednn.unsupported_reason(spec, device) is None:
        if activations:
            return f"inputs {activations}: leaves integers with integers to onednn"
        slow = not torch.cpu._is_avx512_bf16_supported()
        if slow and weights.bits > 4 and weights.granularity in ("channel", "tensor"):
            return f"weights {weights}: leaves them to onednn without AVX512_BF16"
    return unsupported_product(spec)


def unsupported_product(spec: LinearSpec) -> str | None:
    """Support all weights with bfloat16 inputs, rounded or not."""
    if not torch.cpu._is_avx512_supported():
        return "needs a CPU with AVX512"
    if reason := not_bfloat16(spec):
        return reason
    width = _width(spec)
    if width < spec.shape[1] and width % 16:
        return f"weights {spec.scheme.weights}: supports groups of a multiple of 16 inputs"
    library = native_library()
    return library if isinstance(library, str) else None


def pack(spec: LinearSpec, weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return the tensors that native.c reads.

    - ``codes``, in its order. NaN codes of fp8 are not looked for: they count as 480.
    - ``scale``, ``zero`` and ``offset`` of groups, their dtype kept; scales of GGUF that are
      products, f32, become f16 in units of ``row_scale``.
    - ``row_scale``, f32.
    - ``table``, what 4-bit codes stand for.
    - ``input_scale`` and ``input_zero``, if static.
    """
    outputs = spec.shape[0]
    packed = {"codes": _pack_codes(spec, weight), **_pack_scales(spec, weight)}
    if spec.scheme.weights.bits < 5:
        packed["table"] = _code_values(spec, weight, in_groups="scale" in packed)
    static = weight.activation
    others = {
        "zero": None if weight.zero is None else _by_strips(spec, weight.zero.expand(outputs, -1)),
        "input_scale": static.scale if static else None,
        "input_zero": static.zero if static else None,
    }
    return packed | {name: tensor for name, tensor in others.items() if tensor is not None}


def _pack_codes(spec: LinearSpec, weight: QuantizedWeight) -> Tensor:
    """Return all codes in the order of native.c, packed some rows at a time."""
    nibbles = spec.scheme.weights.bits < 5
    if weight.codebook is not None:
        zero = int(weight.codebook.abs().argmin())
    else:
        counts_from_0 = weight.scale.dtype in FP4_SCALES or weight.offset is not None
        zero = 0 if counts_from_0 else 8
    parts = (_codes(piece, nibbles, zero) for piece in torch.split(weight.data, PIECE))
    first = next(parts)
    codes = first.new_empty(-(-spec.shape[0] // STRIP), *first.shape[1:])
    for index, part in enumerate(itertools.chain((first,), parts)):
        start = index * PIECE // STRIP
        codes[start : start + part.shape[0]] = part
    return codes


def _pack_scales(spec: LinearSpec, weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return the ``row_scale``, and the ``scale`` of groups if a row has several."""
    outputs = spec.shape[0]
    bits = spread(weight.scale.view(_bits(weight.scale)), outputs, weight.tile[0], dim=0)
    scale = bits.view(weight.scale.dtype).expand(outputs, -1)
    row_scale = torch.ones(outputs) if weight.scale2 is None else weight.scale2.float()
    packed = {}
    offset = weight.offset
    if scale.shape[1] == 1 and offset is None:
        row_scale = row_scale * scale[:, 0].float()
    else:
        if scale.dtype == torch.float32 and _is_product(spec):
            units = units_of_rows(scale, offset)
            row_scale = row_scale * units
            scale = (scale / units[:, None]).half()
            offset = None if offset is None else (offset.float() / units[:, None]).half()
        packed["scale"] = _by_strips(spec, scale if scale.dtype in SCALES else scale.float())
    if offset is not None:
        packed["offset"] = _by_strips(spec, offset)
    packed["row_scale"] = pad(row_scale, (0, -outputs % STRIP))
    return packed


def _is_product(spec: LinearSpec) -> bool:
    """Whether scales in f32 are products of a few bits: the layer is of a K type of GGUF."""
    weights = spec.scheme.weights
    return weights.offset or (weights.format in ("int3", "int6") and weights.group_size == 16)


def _code_values(spec: LinearSpec, weight: QuantizedWeight, *, in_groups: bool) -> Tensor:
    """Return what each 4-bit code stands for; with fp4 in groups, times each possible scale."""
    scale_dtype = weight.scale.dtype
    if weight.codebook is not None:
        return weight.codebook
    if weight.offset is not None and weight.data.dtype == torch.uint8:
        return torch.arange(16.0)
    if scale_dtype not in FP4_SCALES:
        return torch.arange(-8.0, 8.0)
    values = torch.tensor(FP4_VALUES)
    if not in_groups:
        return values
    every_scale = torch.arange(256, dtype=torch.uint8).view(scale_dtype).float()
    return torch.outer(every_scale, values).to(spec.dtype)


def apply(spec: LinearSpec, x: Tensor, packed: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
    """Multiply; weights are decoded on the way."""
    library = native_library()
    assert not isinstance(library, str)
    if spec.scheme.activations:
        x = fake_quantize_input(
            x, spec.scheme.activations, packed.get("input_scale"), packed.get("input_zero")
        ).contiguous()
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    y = x.new_empty(x.shape[0], spec.shape[0])
    job = job_of(spec, packed)
    job.tokens, job.threads = x.shape[0], torch.get_num_threads()
    job.x, job.y = x.data_ptr(), y.data_ptr()
    if bias is not None:
        job.bias = bias.data_ptr()
    job.workspace = workspace(library.size(job)).data_ptr()
    library.linear(job)
    return y


def job_of(spec: LinearSpec, packed: Mapping[str, Tensor]) -> Job:
    """Return a job with all that is known of a layer before there are tokens."""
    library = native_library()
    assert not isinstance(library, str)
    job = Job(
        parallel=library.parallel,
        outputs=spec.shape[0],
        inputs=spec.shape[1],
        group=_stored_width(spec),
        groups=packed["scale"].shape[1] if "scale" in packed else 1,
        code_kind=CODES[packed["codes"].dtype],
        scale_kind=SCALES[packed["scale"].dtype] if "scale" in packed else 0,
        amx=library.amx,
    )
    for name in ("codes", "scale", "zero", "offset", "table", "row_scale"):
        if name in packed:
            setattr(job, name, packed[name].data_ptr())
    return job


def _width(spec: LinearSpec) -> int:
    """Return how many inputs share a scale."""
    weights = spec.scheme.weights
    return min(
        spec.shape[1], weights.block[1] if weights.block else weights.group_size or spec.shape[1]
    )


def _stored_width(spec: LinearSpec) -> int:
    """Return how many inputs share a packed scale: whole chunks, or a power of two below one."""
    width = _width(spec)
    if width >= spec.shape[1]:
        return -(-spec.shape[1] // CHUNK) * CHUNK
    return width if width % CHUNK == 0 else math.gcd(width, CHUNK)


def _bits(tensor: Tensor) -> torch.dtype:
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]


def _by_strips(spec: LinearSpec, entries: Tensor) -> Tensor:
    """Return ``entries`` [N, G], one for each group, as [S, packed groups, 32]."""
    width, stored = _width(spec), _stored_width(spec)
    chunks = -(-spec.shape[1] // CHUNK)
    count = chunks * CHUNK // stored if stored < CHUNK else -(-chunks * CHUNK // stored)
    bits = entries.contiguous().view(_bits(entries))
    if stored < width:
        bits = bits.repeat_interleave(width // stored, dim=1)[:, :count]
    # a byte of 0 is 2^-127, and subnormals are slow
    one = 127 if entries.dtype == torch.float8_e8m0fnu else 0
    bits = pad(bits, (0, count - bits.shape[1], 0, -bits.shape[0] % STRIP), value=one)
    return bits.view(-1, STRIP, count).transpose(1, 2).contiguous().view(entries.dtype)


def _codes(data: Tensor, nibbles: bool, zero: int) -> Tensor:
    """Return ``data`` [R, K] in the order of native.c, [R/32, C, 32, 64 or 128].

    ``zero`` is the nibble that stands for 0.
    """
    if nibbles:
        data = unpack_pairs(data) if data.dtype == torch.uint8 else (data + 8).view(torch.uint8)
    bits = pad(
        data.view(torch.uint8),
        (0, -data.shape[1] % CHUNK, 0, -data.shape[0] % STRIP),
        value=zero if nibbles else 0,
    )
    # of the 128 codes of a row
    parts = {torch.uint8: (4, 32), torch.int8: (2, 4, 16), torch.float8_e4m3fn: (2, 2, 32)}[
        data.dtype
    ]
    rows = bits.view(-1, STRIP, bits.shape[1] // CHUNK, *parts).transpose(1, 2)
    if nibbles:
        rows = rows[..., ::2, :] | rows[..., 1::2, :] << 4
    return rows.transpose(-1, -2).flatten(3).contiguous().view(data.dtype)


class Job(ctypes.Structure):
    """`struct job` of native.c."""

    _fields_ = [
        *fields(ctypes.c_void_p, "x codes scale zero offset table row_scale bias y workspace"),
        *fields(ctypes.c_void_p, "parallel"),
        *fields(ctypes.c_int64, "tokens outputs inputs group groups"),
        *fields(ctypes.c_int32, "code_kind scale_kind threads amx"),
    ]


class NativeLibrary:
    """The compiled native.c, and the OpenMP of torch, whose threads it uses."""

    def __init__(self, path: Path) -> None:
        native = ctypes.CDLL(str(path))
        self.size, self.linear = native.qtool_workspace, native.qtool_linear
        self.size.argtypes, self.size.restype = [ctypes.POINTER(Job)], ctypes.c_int64
        self.linear.argtypes, self.linear.restype = [ctypes.POINTER(Job)], None
        self.experts_size, self.experts = native.qtool_experts_workspace, native.qtool_experts
        jobs = ctypes.POINTER(Job)
        self.experts_size.argtypes, self.experts_size.restype = (
            [jobs, ctypes.c_int64],
            ctypes.c_int64,
        )
        self.experts.argtypes, self.experts.restype = [jobs, ctypes.c_int64], None
        self.amx = int(os.environ.get("QTOOL_NO_AMX") != "1" and native.qtool_amx())
        self.parallel = openmp()


@cache
def native_library() -> NativeLibrary | str:
    """Compile and load native.c; or return why that fails."""
    bf16 = ("-mavx512bf16",) if torch.cpu._is_avx512_bf16_supported() else ()
    return load_library(SOURCE, (*BASE_FLAGS, *bf16), NativeLibrary)

"""Integers in groups of 16 or 32 times inputs that are rounded to 8 bits in groups of 32, by
AVX512_VNNI: what llama.cpp computes of most GGUF types.

int8_groups.c is compiled on first use, see `c_library`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from qtool.codes import unpack_pairs
from qtool.runtime.c_library import BASE_FLAGS, fields, load_library, openmp, workspace
from qtool.runtime.kernels import Device, LinearSpec, not_bfloat16
from qtool.scheme import GGUF_INPUTS
from qtool.weight import QuantizedWeight

SOURCE = Path(__file__).with_suffix(".c")
STRIP, GROUP = 16, 32  # outputs that int8_groups.c takes together; inputs under one scale
SCALES = {torch.float32: 0, torch.float16: 1}  # `enum scales`


def unsupported_reason(spec: LinearSpec, device: Device) -> str | None:
    """Support integers of 2 to 8 bits in groups of 16 or 32, with or without an offset."""
    weights, inputs = spec.scheme.weights, spec.scheme.activations
    if not torch.cpu._is_vnni_supported():
        return "needs a CPU with AVX512 VNNI"
    if reason := not_bfloat16(spec):
        return reason
    if inputs != GGUF_INPUTS:
        return f"inputs {inputs or '16 bits'}: supports int8 in groups of {GROUP}"
    in_groups = weights.format.startswith("int") and weights.group_size in (GROUP // 2, GROUP)
    if not in_groups or not (weights.symmetric or weights.offset):
        return f"weights {weights}: supports integers in groups of 16 or {GROUP}"
    if weights.bits == 4 and weights.group_size != GROUP:
        return f"weights {weights}: supports 4 bits in groups of {GROUP}"
    if spec.shape[1] % GROUP:
        return f"{spec.shape[1]} inputs: supports a multiple of {GROUP}"
    library = int8_library()
    return library if isinstance(library, str) else None


def pack(spec: LinearSpec, weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return the tensors that int8_groups.c reads: ``codes``, ``scale`` and ``offset`` in its
    order, f16 where that is what they are, else f32.
    """
    parts = {"scale": weight.scale} | ({} if weight.offset is None else {"offset": weight.offset})
    is_half = all(part.dtype == torch.float16 for part in parts.values())
    dtype = torch.float16 if is_half else torch.float32
    scales = {name: _by_strips(part.to(dtype)) for name, part in parts.items()}
    return {"codes": _pack_codes(spec, weight), **scales}


def _pack_codes(spec: LinearSpec, weight: QuantizedWeight) -> Tensor:
    """Return the codes [S, K / 32, 256 or 512], unsigned."""
    nibbles = spec.scheme.weights.bits == 4
    if weight.data.dtype == torch.uint8:
        codes = unpack_pairs(weight.data)
    else:
        codes = weight.data.view(torch.uint8) + _excess(spec)
    codes = pad(codes, (0, 0, 0, -codes.shape[0] % STRIP))
    # a word holds four inputs of one output
    words = codes.view(-1, STRIP, codes.shape[1] // GROUP, GROUP // 4, 4).permute(0, 2, 3, 1, 4)
    if nibbles:
        words = words[:, :, ::2] | words[:, :, 1::2] << 4
    return words.flatten(2).contiguous()


def _excess(spec: LinearSpec) -> int:
    """Return what codes that are stored unsigned are too large by."""
    weights = spec.scheme.weights
    if weights.bits != 4:
        return 128
    return 0 if weights.offset else 8


def _by_strips(entries: Tensor) -> Tensor:
    """Return ``entries`` [N, G] as [S, G, 16]."""
    entries = pad(entries, (0, 0, 0, -entries.shape[0] % STRIP))
    return entries.view(-1, STRIP, entries.shape[1]).transpose(1, 2).contiguous()


def apply(spec: LinearSpec, x: Tensor, packed: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
    """Round the input, and multiply it."""
    library = int8_library()
    assert not isinstance(library, str)
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    y = x.new_empty(x.shape[0], spec.shape[0])
    scale, offset = packed["scale"], packed.get("offset")
    weights = spec.scheme.weights
    job = Job(
        x=x.data_ptr(),
        codes=packed["codes"].data_ptr(),
        scale=scale.data_ptr(),
        offset=None if offset is None else offset.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        y=y.data_ptr(),
        parallel=library.parallel,
        tokens=x.shape[0],
        outputs=spec.shape[0],
        inputs=spec.shape[1],
        group=weights.group_size,
        nibbles=weights.bits == 4,
        scale_kind=SCALES[scale.dtype],
        threads=torch.get_num_threads(),
        excess=_excess(spec),
    )
    job.workspace = workspace(library.size(job)).data_ptr()
    library.linear(job)
    return y


class Job(ctypes.Structure):
    """`struct job` of int8_groups.c."""

    _fields_ = [
        *fields(ctypes.c_void_p, "x codes scale offset bias y workspace parallel"),
        *fields(ctypes.c_int64, "tokens outputs inputs group"),
        *fields(ctypes.c_int32, "nibbles scale_kind threads excess"),
        *fields(ctypes.c_int64, "start end next"),
    ]


class Int8Library:
    """The compiled int8_groups.c."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self.size, self.linear = library.int8_workspace, library.int8_linear
        self.size.argtypes, self.size.restype = [ctypes.POINTER(Job)], ctypes.c_int64
        self.linear.argtypes, self.linear.restype = [ctypes.POINTER(Job)], None
        self.parallel = openmp()


@cache
def int8_library() -> Int8Library | str:
    """Compile and load int8_groups.c; or return why that fails."""
    return load_library(SOURCE, (*BASE_FLAGS, "-mavx512vnni"), Int8Library)

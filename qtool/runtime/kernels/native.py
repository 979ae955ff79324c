"""Weights of any format in bfloat16 products, decoded in registers and multiplied with AMX or
AVX512: native.c, compiled on first use.

Inputs are rounded first where the scheme says so, as the definition does. The machine code lies in
``qtool`` of the user's cache folder, by what made it. ``QTOOL_NO_AMX=1`` leaves AMX out.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import itertools
import math
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from qtool.runtime.kernels import Device, LinearSpec, not_bfloat16, onednn
from qtool.weight import (
    FP4_SCALES,
    FP4_VALUES,
    QuantizedWeight,
    fake_quantize_input,
    spread,
    unpack_pairs,
)

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = (
    "-std=gnu11",
    "-O3",
    "-mavx512f",
    "-mavx512bw",
    "-mavx512vl",
    "-mavx512dq",
    "-mavx512bf16",
    "-mfma",
    "-shared",
    "-fPIC",
)
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
    """Take weights of every format, with bfloat16 inputs that are rounded or not, except integers
    with integers, which oneDNN multiplies.
    """
    if not torch.cpu._is_avx512_bf16_supported():
        return "needs a CPU with AVX512_BF16"
    if reason := not_bfloat16(spec):
        return reason
    width = _width(spec)
    if width < spec.shape[1] and width % 16:
        return f"weights {spec.scheme.weights}: takes groups of a multiple of 16 inputs"
    if spec.scheme.activations and onednn.unsupported_reason(spec, device) is None:
        return f"inputs {spec.scheme.activations}: leaves integers with integers to onednn"
    library = _library()
    return library if isinstance(library, str) else None


def pack(spec: LinearSpec, weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return ``codes`` in native.c's order, f32 ``row_scale``, by group ``scale``, its dtype kept,
    and ``zero``, and the ``table`` of 4-bit codes.

    ``input_scale`` and ``input_zero`` come along where they are static. Codes of NaN are not looked
    for: fp8 has 480 there.
    """
    outputs, nibbles, is_fp4 = (
        spec.shape[0],
        spec.scheme.weights.bits < 5,
        weight.scale.dtype in FP4_SCALES,
    )
    parts = (
        _codes(piece, nibbles, 0 if is_fp4 else 8) for piece in torch.split(weight.data, PIECE)
    )
    first = next(parts)
    codes = first.new_empty(-(-outputs // STRIP), *first.shape[1:])
    for index, part in enumerate(itertools.chain((first,), parts)):
        start = index * PIECE // STRIP
        codes[start : start + part.shape[0]] = part
    packed = {"codes": codes}
    scale = (
        spread(weight.scale.view(_bits(weight.scale)), outputs, weight.tile[0], dim=0)
        .view(weight.scale.dtype)
        .expand(outputs, -1)
    )
    row_scale = torch.ones(outputs) if weight.scale2 is None else weight.scale2.float()
    if scale.shape[1] == 1:
        row_scale = row_scale * scale[:, 0].float()
    else:
        packed["scale"] = _by_strips(spec, scale if scale.dtype in SCALES else scale.float())
    if nibbles:
        values = torch.tensor(FP4_VALUES) if is_fp4 else torch.arange(-8.0, 8.0)
        if "scale" in packed and is_fp4:
            every_scale = torch.arange(256, dtype=torch.uint8).view(weight.scale.dtype).float()
            values = torch.outer(every_scale, values).to(spec.dtype)
        packed["table"] = values
    packed["row_scale"] = pad(row_scale, (0, -outputs % STRIP))
    static = weight.activation
    others = {
        "zero": None if weight.zero is None else _by_strips(spec, weight.zero.expand(outputs, -1)),
        "input_scale": static.scale if static else None,
        "input_zero": static.zero if static else None,
    }
    return packed | {name: tensor for name, tensor in others.items() if tensor is not None}


def apply(spec: LinearSpec, x: Tensor, packed: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
    """Multiply by weights that are decoded as they are met."""
    library = _library()
    assert not isinstance(library, str)
    if spec.scheme.activations:
        x = fake_quantize_input(
            x, spec.scheme.activations, packed.get("input_scale"), packed.get("input_zero")
        ).contiguous()
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    y = x.new_empty(x.shape[0], spec.shape[0])
    job = _Job(
        parallel=library.parallel,
        tokens=x.shape[0],
        outputs=spec.shape[0],
        inputs=spec.shape[1],
        group=_stored_width(spec),
        groups=packed["scale"].shape[1] if "scale" in packed else 1,
        code_kind=CODES[packed["codes"].dtype],
        scale_kind=SCALES[packed["scale"].dtype] if "scale" in packed else 0,
        threads=torch.get_num_threads(),
        amx=library.amx,
    )
    for name, tensor in {"x": x, "bias": bias, "y": y, **packed}.items():
        if tensor is not None and name not in ("input_scale", "input_zero"):
            setattr(job, name, tensor.data_ptr())
    job.workspace = _workspace(library.size(job)).data_ptr()
    library.linear(job)
    return y


def _width(spec: LinearSpec) -> int:
    """Return how many inputs share a scale."""
    weights = spec.scheme.weights
    return min(
        spec.shape[1], weights.block[1] if weights.block else weights.group_size or spec.shape[1]
    )


def _stored_width(spec: LinearSpec) -> int:
    """Return how many inputs share a scale as it is packed: a power of two in a chunk, or whole
    chunks.
    """
    width = _width(spec)
    if width >= spec.shape[1]:
        return -(-spec.shape[1] // CHUNK) * CHUNK
    return width if width % CHUNK == 0 else math.gcd(width, CHUNK)


def _bits(tensor: Tensor) -> torch.dtype:
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]


def _by_strips(spec: LinearSpec, entries: Tensor) -> Tensor:
    """Return ``entries`` [N, G], one a group, as [S, groups as they are packed, 32]."""
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
    """Return ``data`` [R, K] in the order that native.c says: [R/32, C, 32, 64 or 128]; ``zero`` is
    the nibble that stands for 0.
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


class _Job(ctypes.Structure):
    """`struct job` of native.c."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in (
                "x",
                "codes",
                "scale",
                "zero",
                "table",
                "row_scale",
                "bias",
                "y",
                "workspace",
                "parallel",
            )
        ),
        *((name, ctypes.c_int64) for name in ("tokens", "outputs", "inputs", "group", "groups")),
        *((name, ctypes.c_int32) for name in ("code_kind", "scale_kind", "threads", "amx")),
    ]


_of_thread = threading.local()


def _workspace(size: int) -> Tensor:
    """Return at least ``size`` bytes that are this thread's, aligned as tensors are, to 64; kept,
    since fresh memory is slow.
    """
    memory: Tensor | None = getattr(_of_thread, "memory", None)
    if memory is None or memory.numel() < size:
        memory = _of_thread.memory = torch.empty(size, dtype=torch.uint8)
    return memory


class _Library:
    """The compiled native.c, and the OpenMP that torch runs on, whose threads it borrows."""

    def __init__(self, path: Path) -> None:
        native = ctypes.CDLL(str(path))
        self.size, self.linear = native.qtool_workspace, native.qtool_linear
        self.size.argtypes, self.size.restype = [ctypes.POINTER(_Job)], ctypes.c_int64
        self.linear.argtypes, self.linear.restype = [ctypes.POINTER(_Job)], None
        self.amx = int(os.environ.get("QTOOL_NO_AMX") != "1" and native.qtool_amx())
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        self.parallel = ctypes.cast(torch_cpu.GOMP_parallel, ctypes.c_void_p)


@cache
def _library() -> _Library | str:
    """Compile and load native.c; or return why that cannot be."""
    compiler = shlex.split(os.environ.get("CC", "")) or [
        next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), "cc")
    ]
    if shutil.which(compiler[0]) is None:
        return "no C compiler: install gcc or clang, or set CC"
    try:
        return _Library(_compiled(compiler))
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or "").strip().splitlines()
        return (
            f"the C compiler `{shlex.join(compiler)}` failed: "
            f"{next((line for line in lines if 'error' in line), 'no message')[:200]}"
        )
    except (OSError, AttributeError) as error:
        return f"native.c did not load: {error}"


def _compiled(compiler: list[str]) -> Path:
    """Return native.c as a shared library, from the cache folder if it is there."""
    version = subprocess.run(
        [*compiler, "--version"], check=True, capture_output=True, text=True
    ).stdout
    made_of = [SOURCE.read_text(), *FLAGS, *compiler, version]
    name = f"native-{hashlib.sha256(chr(0).join(made_of).encode()).hexdigest()[:16]}.so"
    cache_home = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(cache_home) if cache_home else Path("~/.cache").expanduser()) / "qtool"
    if (folder / name).is_file():
        return folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=name, delete=False) as file:
            target = Path(file.name)
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="qtool-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        target = folder / f"{name}.new"
    try:
        subprocess.run(
            [*compiler, *FLAGS, "-o", str(target), str(SOURCE)],
            check=True,
            capture_output=True,
            text=True,
        )
        return target.replace(folder / name)  # two processes at once write the same thing
    finally:
        target.unlink(missing_ok=True)

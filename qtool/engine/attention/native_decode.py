"""Attention of tokens that decode, on a CPU: native_decode.c reads the pages where they lie, and is
compiled on first use, see `runtime.c_library`.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from qtool.engine.attention.pages import LOG2_E, KVPages, Packed
from qtool.runtime.c_library import BASE_FLAGS, fields, load_library, openmp

SOURCE = Path(__file__).with_suffix(".c")
WIDEST, MOST_SHARED = 256, 32  # numbers of a head; heads of queries that share one of keys


def applies(q: Tensor, kv: KVPages, softcap: float | None, sinks: Tensor | None) -> bool:
    """Whether native_decode.c computes such an attention here."""
    is_plain = not softcap and sinks is None and not kv.keeps_latents
    if not is_plain or {q.dtype, kv.k.dtype, kv.v.dtype} != {torch.bfloat16}:
        return False
    widths = q.shape[2], kv.v.shape[3]
    fits = all(width % 16 == 0 and width <= WIDEST for width in widths)
    if not fits or q.shape[1] // kv.k.shape[1] > MOST_SHARED:
        return False
    return isinstance(decode_library(), DecodeLibrary)


def decode(
    q: Tensor,
    kv: KVPages,
    packed: Packed,
    out: Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> int:
    """Fill ``out`` [T, heads, v_head_dim] for the decodes, see `interface.attend`; return how many
    they are, 0 where native_decode.c does not compute such an attention.
    """
    if not packed.decodes or not applies(q, kv, softcap, sinks):
        return 0
    library = decode_library()
    assert isinstance(library, DecodeLibrary)
    q = q[: packed.decodes].contiguous()
    assert out.is_contiguous() and kv.k.is_contiguous() and kv.v.is_contiguous()
    library.attend(
        Job(
            q=q.data_ptr(),
            k=kv.k.data_ptr(),
            v=kv.v.data_ptr(),
            table=packed.table.data_ptr(),
            rows=packed.rows.data_ptr(),
            positions=packed.positions.data_ptr(),
            out=out.data_ptr(),
            parallel=library.parallel,
            stride_k_page=kv.k.stride(0),
            stride_v_page=kv.v.stride(0),
            columns=packed.table.stride(0),
            tokens=packed.decodes,
            heads=q.shape[1],
            kv_heads=kv.k.shape[1],
            width=q.shape[2],
            v_width=out.shape[2],
            window=window or 0,
            threads=torch.get_num_threads(),
            factor=scaling * LOG2_E,
        )
    )
    return packed.decodes


class Job(ctypes.Structure):
    """`struct job` of native_decode.c."""

    _fields_ = [
        *fields(ctypes.c_void_p, "q k v table rows positions out parallel"),
        *fields(ctypes.c_int64, "stride_k_page stride_v_page columns tokens heads kv_heads"),
        *fields(ctypes.c_int64, "width v_width window"),
        ("threads", ctypes.c_int32),
        ("factor", ctypes.c_float),
        ("next", ctypes.c_int64),
    ]


class DecodeLibrary:
    """The compiled native_decode.c."""

    def __init__(self, path: Path) -> None:
        self.attend = ctypes.CDLL(str(path)).qtool_decode_attention
        self.attend.argtypes = [ctypes.POINTER(Job)]
        self.attend.restype = None
        self.parallel = openmp()


@cache
def decode_library() -> DecodeLibrary | str:
    """Compile and load native_decode.c; or return why that fails."""
    if not torch.cpu._is_avx512_supported():
        return "needs a CPU with AVX512"
    return load_library(SOURCE, BASE_FLAGS, DecodeLibrary)

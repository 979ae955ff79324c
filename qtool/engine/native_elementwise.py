"""Norms, rotary embedding and gated activations of decoder layers on a CPU, in bf16, as
`elementwise` has them for a GPU: one call each of native_elementwise.c, which is compiled on first
use, see `runtime.c_library`.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from qtool.engine.attention.pages import KVPages, Packed
from qtool.engine.norm_kind import NO_KIND, NormKind
from qtool.runtime.c_library import BASE_FLAGS, fields, load_library, openmp

SOURCE = Path(__file__).with_suffix(".c")
Weights = tuple[Tensor, Tensor | None]  # weight and bias of a norm


def applies(*tensors: Tensor | None) -> bool:
    """Whether native_elementwise.c runs here and takes ``tensors``: bf16, the last stride is 1."""
    for tensor in tensors:
        if tensor is not None and (tensor.dtype != torch.bfloat16 or tensor.stride(-1) != 1):
            return False
    return isinstance(elementwise_library(), ElementwiseLibrary)


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    norm: Weights | None,
    kind: NormKind | None,
    *,
    after: Weights | None = None,
    after_kind: NormKind | None = None,
    factor: float = 1.0,
    other: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the norm of ``residual + other + factor * after(x)``, and the sum; both [T, H].

    Args:
        x: the last output of a layer, [T, H].
        residual: the hidden states before it, [T, H], contiguous; None: ``x`` is the sum, and
            ``after``, ``factor`` and ``other`` are not read.
        norm: weight and bias, [H]; None: the norm is the sum itself.
        kind: the kind of ``norm``.
        after: weight and bias of the norm of ``x``, [H].
        after_kind: the kind of ``after``.
        factor: what ``x`` is multiplied with, after its norm.
        other: what is added to ``residual``, [T, H], contiguous.
    """
    library = _library()
    tokens, width = x.shape
    x = x.contiguous()
    assert residual is None or residual.is_contiguous()
    assert other is None or other.is_contiguous()
    total = x if residual is None else torch.empty_like(residual)
    out = total if norm is None else torch.empty_like(total)
    (weight, bias), (after_weight, after_bias) = norm or (None, None), after or (None, None)
    library.add_norm(
        AddNorm(
            library.job(tokens, width),
            *map(_address, (x, residual, other, after_weight, after_bias, weight, bias)),
            total.data_ptr(),
            out.data_ptr(),
            Kind(*(after_kind or NO_KIND)),
            Kind(*(kind or NO_KIND)),
            factor,
        )
    )
    return out, total


def gated(x: Tensor, at: tuple[int, int], width: int, activation: str) -> Tensor:
    """Return ``activation(gate) * up`` [T, width].

    Args:
        x: gate and up of each token, [T, ...].
        at: where gate and up begin in a row of ``x``.
        width: of gate and of up.
        activation: of the gate, "silu" or "gelu_tanh".
    """
    library = _library()
    out = x.new_empty(x.shape[0], width)
    address = x.data_ptr()
    size = x.element_size()
    library.gated(
        Gated(
            library.job(x.shape[0], width),
            address + at[0] * size,
            address + at[1] * size,
            out.data_ptr(),
            x.stride(0),
            activation == "gelu_tanh",
        )
    )
    return out


def rotate_and_write(
    qkv: Tensor,
    at: tuple[int, int, int],
    heads: int,
    stride_q_head: int,
    norms: tuple[Tensor, Tensor, NormKind] | None,
    angles: tuple[Tensor, Tensor] | None,
    rotated: int,
    kv: KVPages,
    packed: Packed,
    *,
    interleaved: bool,
) -> Tensor:
    """Norm and rotate queries and keys, and store keys and values. Return the queries [T, heads,
    D]; see `fused_attention.rotate_and_write`.

    Args:
        qkv: queries, keys and values of each token, [T, ...].
        at: where queries, keys and values begin in a row.
        heads: of queries.
        stride_q_head: outputs from one head's queries to the next's.
        norms: the weights of the norms of queries and keys, [D] or [heads, D] and [kv_heads, D],
            and their kind.
        angles: cosines and sines, [T, at least rotated / 2].
        rotated: how many of a head's channels rotate, from the first.
        kv: pages in bf16, contiguous.
        packed: where the tokens lie in the pages.
        interleaved: whether neighbouring channels rotate together.
    """
    library = _library()
    _, kv_heads, _, width = kv.k.shape
    tokens = qkv.shape[0]
    size = qkv.element_size()
    address = qkv.data_ptr()
    out = qkv.new_empty(tokens, heads, width)
    q_norm, k_norm, kind = norms or (None, None, NO_KIND)
    cos, sin = angles or (None, None)
    library.rotate_and_write(
        Rotate(
            library.job(tokens, (heads + 2 * kv_heads) * width),
            *(address + start * size for start in at),
            *map(_address, (q_norm, k_norm, cos, sin, out, kv.k, kv.v)),
            *map(_address, (packed.table, packed.rows, packed.positions)),
            *(qkv.stride(0), stride_q_head, heads, kv_heads, width, rotated),
            0 if cos is None else cos.shape[-1],
            packed.table.stride(0),
            q_norm is not None and q_norm.dim() == 2,
            interleaved,
            Kind(*kind),
        )
    )
    return out


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class Kind(ctypes.Structure):
    """`kind` of native_elementwise.c."""

    _fields_ = [("eps", ctypes.c_float), *fields(ctypes.c_int32, "plus_one late centered")]


class Job(ctypes.Structure):
    """`struct job` of native_elementwise.c."""

    _fields_ = [
        ("parallel", ctypes.c_void_p),
        *fields(ctypes.c_int64, "tokens numbers"),
        ("threads", ctypes.c_int32),
        ("next", ctypes.c_int64),
        ("work", ctypes.c_void_p),
    ]


class AddNorm(ctypes.Structure):
    """`struct add_norm` of native_elementwise.c."""

    _fields_ = [
        ("job", Job),
        *fields(ctypes.c_void_p, "x residual other after after_bias weight bias total out"),
        *fields(Kind, "after_kind kind"),
        ("factor", ctypes.c_float),
    ]


class Gated(ctypes.Structure):
    """`struct gated` of native_elementwise.c."""

    _fields_ = [
        ("job", Job),
        *fields(ctypes.c_void_p, "gate up out"),
        ("stride", ctypes.c_int64),
        ("is_gelu", ctypes.c_int32),
    ]


class Rotate(ctypes.Structure):
    """`struct rotate` of native_elementwise.c."""

    _fields_ = [
        ("job", Job),
        *fields(ctypes.c_void_p, "q k v q_norm k_norm cos sin out k_pages v_pages"),
        *fields(ctypes.c_void_p, "table rows positions"),
        *fields(ctypes.c_int64, "stride stride_q_head heads kv_heads width rotated"),
        *fields(ctypes.c_int64, "angles columns"),
        *fields(ctypes.c_int32, "norm_each interleaved"),
        ("kind", Kind),
    ]


class ElementwiseLibrary:
    """The compiled native_elementwise.c."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self.add_norm, self.gated = library.qtool_add_norm, library.qtool_gated
        self.rotate_and_write = library.qtool_rotate_and_write
        for function, kind in (
            (self.add_norm, AddNorm),
            (self.gated, Gated),
            (self.rotate_and_write, Rotate),
        ):
            function.argtypes = [ctypes.POINTER(kind)]
            function.restype = None
        self.parallel = openmp()

    def job(self, tokens: int, numbers: int) -> Job:
        """Return what all jobs begin with."""
        return Job(self.parallel, tokens, numbers, torch.get_num_threads())


def _library() -> ElementwiseLibrary:
    library = elementwise_library()
    assert isinstance(library, ElementwiseLibrary)
    return library


@cache
def elementwise_library() -> ElementwiseLibrary | str:
    """Compile and load native_elementwise.c; or return why that fails."""
    if not torch.cpu._is_avx512_supported():
        return "needs a CPU with AVX512"
    return load_library(SOURCE, BASE_FLAGS, ElementwiseLibrary)

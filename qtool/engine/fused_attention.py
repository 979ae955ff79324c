"""The attention of a decoder layer with few launches: one matmul for queries, keys and values,
`rotate_and_write`, attention, a matmul.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from qtool.engine import native_elementwise
from qtool.engine.attention.interface import (
    RECORDING,
    attend,
    packed_tokens,
    pages_of,
    write,
)
from qtool.engine.attention.pages import KVPages, LayerGeometry, Packed
from qtool.engine.joined import Linear, check_parts, codes_of, multiply, side_by_side
from qtool.engine.norms import Codes, Norm, NotFused, rounded

# Which channels rotate together, and where models keep the angle of pair ``i`` of ``n``.
Angles = Literal[
    "twice",  # channels i and n + i; the angles stand twice, one after another
    "once",  # the same channels; the angles stand once
    "interleaved",  # channels 2 i and 2 i + 1; the angles stand twice, one after another
    # channels 2 i and 2 i + 1; each angle stands twice, side by side; products are not rounded
    "repeated",
    "parted",  # channels 2 i and 2 i + 1, which become i and n + i; the angles as in "twice"
    "complex",  # channels 2 i and 2 i + 1; the angles stand once, as complex numbers
]
OF_LATENTS: tuple[Angles, ...] = ("parted", "complex")


# What models give their layers: cosines and sines, or complex numbers, [1, T, ...] each.
PositionEmbeddings = tuple[Tensor, Tensor] | Tensor


class RotaryMismatch(NotFused):
    """Why the angles of a model are not of the kind that was tried."""


@dataclass(frozen=True)
class Rotary:
    """How queries and keys of a pass rotate."""

    cos: Tensor
    """[T, angles]"""
    sin: Tensor
    """[T, angles]"""
    angles: Angles

    @classmethod
    def of(cls, given: PositionEmbeddings | None, angles: Angles | None) -> Rotary | None:
        """Return what a model gives its layers as one; None when nothing rotates.

        Raises: RotaryMismatch, when it gives another kind of numbers.
        """
        if given is None or angles is None:
            return None
        if isinstance(given, Tensor) != (angles == "complex"):
            raise RotaryMismatch(f"the angles are not {angles}")
        cos, sin = _parts_of_complex(given) if isinstance(given, Tensor) else given
        return cls(cos.flatten(0, -2).contiguous(), sin.flatten(0, -2).contiguous(), angles)

    @property
    def rotated(self) -> int:
        """The first channels of a head, which rotate; the others do not."""
        return self.cos.shape[-1] * (2 if self.angles in ("once", "complex") else 1)

    @property
    def is_interleaved(self) -> bool:
        """Whether neighbouring channels rotate together."""
        return self.angles in ("interleaved", "repeated", "parted", "complex")

    @property
    def is_parted(self) -> bool:
        """Whether neighbours do not stay such."""
        return self.angles == "parted"

    @property
    def step(self) -> int:
        """How far the angle of a pair is from the next's."""
        return 2 if self.angles == "repeated" else 1


PARTS_OF_COMPLEX: MutableMapping[Tensor, tuple[Tensor, Tensor]] = WeakIdKeyDictionary()


def _parts_of_complex(given: Tensor) -> tuple[Tensor, Tensor]:
    """Return the real and imaginary parts of ``given``, made once a pass, in which all layers are
    given the same.
    """
    if given not in PARTS_OF_COMPLEX:
        PARTS_OF_COMPLEX[given] = given.real.contiguous(), given.imag.contiguous()
    return PARTS_OF_COMPLEX[given]


class FusedAttention(nn.Module):
    """The attention of the Llama kind, with norms of queries and keys, sinks, and gates of the
    outputs, if ``attention`` has them.

    ``angles``: how queries and keys get the rotary embedding; None: they do not. Raises: NotFused,
        for an attention made of other parts.
    """

    def __init__(
        self, attention: nn.Module, geometry: LayerGeometry, *, angles: Angles | None
    ) -> None:
        super().__init__()
        if angles in OF_LATENTS:
            raise RotaryMismatch(f"only keys of latents rotate by {angles} angles")
        q_k_v = ("qkv_proj",) if hasattr(attention, "qkv_proj") else ("q_proj", "k_proj", "v_proj")
        check_parts(attention, {*q_k_v, "o_proj"}, {"q_norm", "k_norm", "sinks"})
        if geometry.head_dim != geometry.v_head_dim:
            raise NotFused("values are of another size than keys")
        queries = geometry.heads * geometry.head_dim
        linears: list[Linear] = [getattr(attention, name) for name in q_k_v]
        # a head's gates stand beside its queries
        self.is_gated = len(linears) == 3 and linears[0].out_features == 2 * queries
        keys = geometry.kv_heads * geometry.head_dim
        sizes = [2 * queries if self.is_gated else queries, keys, keys]
        self.geometry = geometry
        self.angles = angles
        self.qkv, self.at = side_by_side(linears, sizes)
        self.o_proj = attention.get_submodule("o_proj")
        self.q_norm = _norm_of(attention, "q_norm")
        self.k_norm = _norm_of(attention, "k_norm")
        self._check_head_norms()
        self.sinks: nn.Parameter | None = getattr(attention, "sinks", None)

    def _check_head_norms(self) -> None:
        q, k, geometry = self.q_norm, self.k_norm, self.geometry
        if q is None and k is None:
            return
        heads, kv_heads, width = geometry.heads, geometry.kv_heads, geometry.head_dim
        if q is None or k is None or q.kind != k.kind or q.bias is not None or k.bias is not None:
            raise NotFused("queries and keys have norms of different kinds, or with a bias")
        shapes = tuple(q.weight.shape), tuple(k.weight.shape)
        one, each = ((width,), (width,)), ((heads, width), (kv_heads, width))
        whole = (heads * width,), (kv_heads * width,)
        if shapes not in (one, each) and (shapes != whole or q.kind.centered):
            raise NotFused("the norms of queries and keys are not over one head each, or all")

    @property
    def codes(self) -> Codes | None:
        """What the input may be rounded to before."""
        return codes_of(self.qkv)

    def forward(self, x: Tensor, scale: Tensor | None, angles: PositionEmbeddings | None) -> Tensor:
        """Return the outputs [T, H] of ``x`` [T, H], or of its codes and their scales."""
        qkv = multiply(self.qkv, x, scale)
        attended, scale = self._attend(qkv, angles), None
        if self.is_gated:
            codes = codes_of(self.o_proj)
            attended, scale = gate_heads(attended, qkv, self.at[0], self.geometry.heads, codes)
        return multiply(self.o_proj, attended, scale)

    def _attend(self, qkv: Tensor, angles: PositionEmbeddings | None) -> Tensor:
        """Return the attention [T, heads * D] of queries, keys and values side by side."""
        geometry = self.geometry
        found = RECORDING.get(None)
        if found is not None:
            found.layers.append(geometry)
            return qkv.new_zeros(qkv.shape[0], geometry.heads * geometry.head_dim)
        packed = packed_tokens()
        kv = pages_of(geometry.layer_idx)
        rotary = Rotary.of(angles, self.angles)
        if rotary and rotary.rotated > geometry.head_dim:
            raise RotaryMismatch(
                f"{rotary.rotated} channels of {geometry.head_dim} would be rotated"
            )
        q = rotate_and_write(
            qkv,
            self.at,
            geometry.heads,
            2 * geometry.head_dim if self.is_gated else geometry.head_dim,
            self.q_norm,
            self.k_norm,
            rotary,
            kv,
            packed,
        )
        return attend(
            q,
            kv,
            packed,
            scaling=geometry.scaling,
            window=geometry.window,
            softcap=geometry.softcap,
            sinks=self.sinks,
        ).flatten(1)


def gate_heads(
    x: Tensor, qkv: Tensor, at: int, heads: int, codes: Codes | None = None
) -> tuple[Tensor, Tensor | None]:
    """Multiply the outputs of attention by the sigmoid of their gates.

    Args:
        x: the outputs, [T, heads * D].
        qkv: queries, gates, keys and values, [T, ...]; the gates of a head follow its queries.
        at: the column of ``qkv`` where the queries begin.
        heads: of queries.
        codes: round the products to these; None leaves them as they are.
    Returns: the products and None, or their codes and the scales of these, f32 [T, 1].
    """
    if x.is_cuda:
        from qtool.engine import elementwise

        return elementwise.gate_heads(x, qkv, at, heads, codes)
    gates = qkv[:, at : at + 2 * x.shape[1]].view(len(x), heads, 2, -1)[:, :, 1]
    return rounded(x * gates.sigmoid().flatten(1), codes)


def rotate_and_write(
    qkv: Tensor,
    at: Sequence[int],
    heads: int,
    stride_q_head: int,
    q_norm: Norm | None,
    k_norm: Norm | None,
    rotary: Rotary | None,
    kv: KVPages,
    packed: Packed,
) -> Tensor:
    """Norm and rotate queries and keys, and store keys and values. Return the queries [T, heads,
    D].

    Args:
        qkv: queries, keys and values of each token, [T, ...]; ``at``: where each of the three
            begins.
        heads: of queries.
        stride_q_head: outputs from one head's queries to the next's.
        q_norm: of the queries of a head, or of all heads at once.
        k_norm: of the keys, likewise.
        rotary: how queries and keys rotate; None: they do not.
    """
    if qkv.is_cuda:
        from qtool.engine import elementwise

        norms = (q_norm.weight, k_norm.weight, *q_norm.kind) if q_norm and k_norm else None
        scales = kv.k_scale, kv.v_scale
        where = packed.table, packed.rows, packed.positions
        return elementwise.rotate_and_write(
            qkv,
            (at[0], at[1], at[2]),
            heads,
            stride_q_head,
            norms,
            (rotary.cos, rotary.sin) if rotary else None,
            rotary.rotated if rotary else 0,
            kv.k,
            kv.v,
            scales,
            *where,
            interleaved=bool(rotary and rotary.is_interleaved),
            angle_step=rotary.step if rotary else 1,
        )
    if _native_takes(qkv, q_norm, k_norm, rotary, kv):
        return native_elementwise.rotate_and_write(
            qkv,
            (at[0], at[1], at[2]),
            heads,
            stride_q_head,
            (q_norm.weight, k_norm.weight, q_norm.kind) if q_norm and k_norm else None,
            (rotary.cos, rotary.sin) if rotary else None,
            rotary.rotated if rotary else 0,
            kv,
            packed,
            interleaved=bool(rotary and rotary.is_interleaved),
        )
    tokens = len(qkv)
    _, kv_heads, _, width = kv.k.shape
    strides = (stride_q_head, width, width)
    q, k, v = (
        qkv[:, start : start + count * stride].view(tokens, count, stride)[..., :width]
        for start, count, stride in zip(at, (heads, kv_heads, kv_heads), strides, strict=True)
    )
    q, k = _normed(q, q_norm), _normed(k, k_norm)
    if rotary:
        q, k = rotate(q, rotary), rotate(k, rotary)
    write(kv, k, v, packed)
    return q


def _native_takes(
    qkv: Tensor, q_norm: Norm | None, k_norm: Norm | None, rotary: Rotary | None, kv: KVPages
) -> bool:
    """Whether native_elementwise.c norms, rotates and stores such queries and keys."""
    if rotary and rotary.step != 1:
        return False
    norms = [norm.weight for norm in (q_norm, k_norm) if norm]
    if any(weight.shape[-1] > kv.k.shape[3] for weight in norms):
        return False
    angles = (rotary.cos, rotary.sin) if rotary else ()
    return native_elementwise.applies(qkv, kv.k, kv.v, *norms, *angles)


def _normed(heads: Tensor, norm: Norm | None) -> Tensor:
    """Return the norm of ``heads`` [T, heads, D], over each head or all, as its weight is long."""
    if norm is None:
        return heads
    is_whole = norm.weight.shape[-1] > heads.shape[-1]
    return norm.normalize(heads.flatten(1) if is_whole else heads).view(heads.shape)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate the first channels of ``x`` [T, heads, D], as transformers does."""
    rotated = rotary.rotated
    turning = x[..., :rotated].float() if rotary.angles == "repeated" else x[..., :rotated]
    if rotary.is_interleaved:
        one, other = turning[..., ::2], turning[..., 1::2]
    else:
        one, other = turning.chunk(2, dim=-1)
    last = rotary.step * rotated // 2
    cos, sin = (part[:, None, : last : rotary.step] for part in (rotary.cos, rotary.sin))
    turned = [part.to(x.dtype) for part in (one * cos - other * sin, other * cos + one * sin)]
    if rotary.is_interleaved and not rotary.is_parted:
        turned = [torch.stack(turned, dim=-1).flatten(-2)]
    return torch.cat((*turned, x[..., rotated:]), dim=-1)


def _norm_of(module: nn.Module, name: str) -> Norm | None:
    norm = getattr(module, name, None)
    return None if norm is None else Norm.of(norm)

"""The attention of a decoder layer with few launches: one matmul for queries, keys and values,
`rotate_and_write`, attention, a matmul.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from qtool.engine.attention.interface import (
    RECORDING,
    attend,
    packed_tokens,
    pages_of,
    write,
)
from qtool.engine.attention.pages import KVPages, LayerGeometry, Packed
from qtool.engine.joined import Linear, check_parts, codes_of, multiply, side_by_side
from qtool.engine.norms import Codes, NotFused, RMSNorm

# whether models make the angle of each pair of channels once, or twice, for both channels
Angles = Literal["once", "twice"]


class RotaryMismatch(NotFused):
    """Why the angles of a model are not of the kind that was tried."""


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
        self.geometry, self.angles = geometry, angles
        self.qkv, self.at = side_by_side(linears, sizes)
        self.o_proj = attention.get_submodule("o_proj")
        self.q_norm = _norm_of(attention, "q_norm")
        self.k_norm = _norm_of(attention, "k_norm")
        self._check_head_norms()
        self.sinks: nn.Parameter | None = getattr(attention, "sinks", None)

    def _check_head_norms(self) -> None:
        q, k = self.q_norm, self.k_norm
        if q is None and k is None:
            return
        width = self.geometry.head_dim
        if (
            q is None
            or k is None
            or q.kind != k.kind
            or not len(q.weight) == len(k.weight) == width
        ):
            raise NotFused("the norms of queries and keys are not over one head each")

    @property
    def codes(self) -> Codes | None:
        """What the input may be rounded to before."""
        return codes_of(self.qkv)

    def forward(
        self, x: Tensor, scale: Tensor | None, angles: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Return the outputs [T, H] of ``x`` [T, H], or of its codes and their scales."""
        qkv = multiply(self.qkv, x, scale)
        attended = self._attend(qkv, angles)
        if self.is_gated:
            heads, width = self.geometry.heads, self.geometry.head_dim
            both = qkv[:, self.at[0] : self.at[0] + 2 * heads * width].view(len(x), heads, -1)
            attended = attended * both[..., width:].sigmoid().flatten(1)
        y: Tensor = self.o_proj(attended)
        return y

    def _attend(self, qkv: Tensor, angles: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return the attention [T, heads * D] of queries, keys and values side by side."""
        geometry, found = self.geometry, RECORDING.get(None)
        if found is not None:
            found.layers.append(geometry)
            return qkv.new_zeros(qkv.shape[0], geometry.heads * geometry.head_dim)
        packed, kv = packed_tokens(), pages_of(geometry.layer_idx)
        rotary, rotated = None, 0
        if self.angles and angles:
            cos, sin = angles
            rotary = cos.flatten(0, -2).contiguous(), sin.flatten(0, -2).contiguous()
            rotated = cos.shape[-1] * (2 if self.angles == "once" else 1)
            if rotated > geometry.head_dim:
                raise RotaryMismatch(f"{rotated} channels of {geometry.head_dim} would be rotated")
        q = rotate_and_write(
            qkv,
            self.at,
            geometry.heads,
            2 * geometry.head_dim if self.is_gated else geometry.head_dim,
            self.q_norm,
            self.k_norm,
            rotary,
            rotated,
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


def rotate_and_write(
    qkv: Tensor,
    at: Sequence[int],
    heads: int,
    stride_q_head: int,
    q_norm: RMSNorm | None,
    k_norm: RMSNorm | None,
    rotary: tuple[Tensor, Tensor] | None,
    rotated: int,
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
        q_norm: of the queries of a head.
        k_norm: of the keys of a head.
        rotary: cosines and sines [T, at least rotated / 2]; the rest repeats them.
        rotated: the first channels of a head, which are rotated.
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
            rotary,
            rotated,
            kv.k,
            kv.v,
            scales,
            *where,
        )
    (tokens, _), (_, kv_heads, _, width) = qkv.shape, kv.k.shape
    strides = (stride_q_head, width, width)
    q, k, v = (
        qkv[:, start : start + count * stride].view(tokens, count, stride)[..., :width]
        for start, count, stride in zip(at, (heads, kv_heads, kv_heads), strides, strict=True)
    )
    q, k = (
        part if norm is None else norm.normalize(part) for part, norm in ((q, q_norm), (k, k_norm))
    )
    if rotary:
        q, k = (_rotate(part, *rotary, rotated) for part in (q, k))
    write(kv, k, v, packed)
    return q


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, rotated: int) -> Tensor:
    """Rotate the first ``rotated`` channels of ``x`` [T, heads, D], as transformers does."""
    one, other = x[..., :rotated].chunk(2, dim=-1)
    cos, sin = (part[:, None, : rotated // 2] for part in (cos, sin))
    turned = one * cos - other * sin, other * cos + one * sin
    return torch.cat((*(part.to(x.dtype) for part in turned), x[..., rotated:]), dim=-1)


def _norm_of(module: nn.Module, name: str) -> RMSNorm | None:
    norm = getattr(module, name, None)
    return None if norm is None else RMSNorm.of(norm)

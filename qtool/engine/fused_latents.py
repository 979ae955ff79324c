"""DeepSeek's multi-head latent attention with few launches: one matmul for queries, or what they
are made of, and latents; `rotate_and_write`; queries taken to the latents; attention; values; a
matmul. Large chunks attend to keys and values instead, see `qtool.engine.attention.latents`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qtool.engine.attention.interface import (
    RECORDING,
    attend,
    attend_latents,
    packed_tokens,
    pages_of,
    write,
)
from qtool.engine.attention.pages import KVPages, LayerGeometry, Packed
from qtool.engine.fused_attention import (
    Angles,
    PositionEmbeddings,
    Rotary,
    RotaryMismatch,
    rotate,
)
from qtool.engine.joined import Linear, check_parts, codes_of, multiply, side_by_side
from qtool.engine.latent_attention import LatentAttention
from qtool.engine.norms import Codes, Norm, NotFused, Sum, add_norm


class FusedLatentAttention(nn.Module):
    """An attention that keeps latents; its queries may be made of latents of their own.

    ``angles``: how queries and keys get the rotary embedding; None: they do not. Raises: NotFused,
        for an attention made of other parts.
    """

    def __init__(
        self, attention: nn.Module, geometry: LayerGeometry, *, angles: Angles | None
    ) -> None:
        super().__init__()
        latent = getattr(attention, "latent", None)
        if not isinstance(latent, LatentAttention):
            raise NotFused(f"{type(attention).__name__} keeps no latents")
        is_low_rank = getattr(attention, "q_a_proj", None) is not None
        of_queries = ("q_a_proj", "q_a_layernorm", "q_b_proj") if is_low_rank else ("q_proj",)
        others = {"kv_a_proj_with_mqa", "kv_a_layernorm", "o_proj"}
        check_parts(attention, {*of_queries, *others}, {"latent"})
        linears: list[Linear] = [
            getattr(attention, name) for name in (of_queries[0], "kv_a_proj_with_mqa")
        ]
        self.sizes = (linears[0].out_features, geometry.head_dim)
        self.both, self.at = side_by_side(linears, self.sizes)
        self.q_norm, self.q_b_proj = None, None
        if is_low_rank:
            self.q_norm = Norm.of(attention.get_submodule("q_a_layernorm"))
            self.q_b_proj = attention.get_submodule("q_b_proj")
        self.kv_norm = Norm.of(attention.get_submodule("kv_a_layernorm"))
        if self.kv_norm.bias is not None:
            raise NotFused("the norm of latents has a bias")
        self.geometry = geometry
        self.angles = angles
        self.latent = latent
        self.o_proj = attention.get_submodule("o_proj")

    @property
    def codes(self) -> Codes | None:
        """What the input may be rounded to before."""
        return codes_of(self.both)

    def forward(self, x: Tensor, scale: Tensor | None, angles: PositionEmbeddings | None) -> Tensor:
        """Return the outputs [T, H] of ``x`` [T, H], or of its codes and their scales."""
        both = multiply(self.both, x, scale)
        q, kv = (both[:, at : at + size] for at, size in zip(self.at, self.sizes, strict=True))
        if self.q_b_proj is not None:
            normed, scales, _ = add_norm(Sum(q), self.q_norm, codes_of(self.q_b_proj))
            q = multiply(self.q_b_proj, normed, scales)
        y: Tensor = self.o_proj(self._attend(q, kv, angles).flatten(1))
        return y

    def _attend(self, q: Tensor, kv: Tensor, angles: PositionEmbeddings | None) -> Tensor:
        """Return the values that tokens attend to, [T, heads, value width]."""
        geometry = self.geometry
        found = RECORDING.get(None)
        latent = self.latent
        tokens = len(q)
        heads = geometry.heads
        rank = latent.rank
        if found is not None:
            found.layers.append(geometry)
            return q.new_zeros(tokens, heads, latent.value_width)
        rotary = Rotary.of(angles, self.angles)
        turning = geometry.head_dim - rank
        if rotary and rotary.rotated != turning:
            raise RotaryMismatch(f"{rotary.rotated} channels of {turning} would be rotated")
        packed = packed_tokens()
        pages = pages_of(geometry.layer_idx)
        own = q.view(tokens, heads, -1)[..., : latent.key_width]
        if packed.expanded is not None:
            q_rope = q.new_empty(tokens, heads, turning)
            rotate_and_write(q, kv, q_rope, self.kv_norm, rotary, pages, packed)
            return attend_latents(latent, own, q_rope, pages, packed, scaling=geometry.scaling)
        queries = q.new_empty(tokens, heads, geometry.head_dim)
        rotate_and_write(q, kv, queries[..., rank:], self.kv_norm, rotary, pages, packed)
        latent.take_to_latents(own, queries)
        return latent.values(attend(queries, pages, packed, scaling=geometry.scaling))


def rotate_and_write(
    q: Tensor,
    kv: Tensor,
    q_rope: Tensor,
    norm: Norm,
    rotary: Rotary | None,
    pages: KVPages,
    packed: Packed,
) -> None:
    """Norm latents, rotate the keys beside them, and store both; rotate queries.

    Args:
        q: queries of each token, [T, heads * (key width + rotary)].
        kv: the latent and the key of each token, [T, rank + rotary].
        q_rope: [T, heads, rotary], which is filled with the rotary part of the queries.
        norm: of latents.
        rotary: how queries and keys rotate; None: they do not.
        pages: of the layer.
        packed: the tokens of the pass.
    """
    heads = q_rope.shape[1]
    rank = len(norm.weight)
    turning = q_rope.shape[2]
    if q.is_cuda:
        from qtool.engine import elementwise_latents

        eps, *kind = norm.kind
        elementwise_latents.rotate_and_write(
            q,
            kv,
            q_rope,
            rank,
            norm.weight,
            eps,
            (kind[0], kind[1], kind[2]),
            (rotary.cos, rotary.sin) if rotary else None,
            pages.k,
            pages.k_scale,
            packed.table,
            packed.rows,
            packed.positions,
            interleaved=bool(rotary and rotary.is_interleaved),
            parted=bool(rotary and rotary.is_parted),
        )
        return
    q_turning = q.view(len(q), heads, -1)[..., -turning:]
    k_turning = kv[:, None, rank:]
    if rotary:
        q_turning, k_turning = rotate(q_turning, rotary), rotate(k_turning, rotary)
    q_rope.copy_(q_turning)
    latents = norm.normalize(kv[:, :rank])[:, None]
    write(pages, torch.cat([latents, k_turning], dim=-1), latents, packed)

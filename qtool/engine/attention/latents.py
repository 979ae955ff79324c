"""Attention of chunks to keys and values that are made from the latents of their contexts.

Queries can attend to DeepSeek's latents directly, which suits few queries: no key or value is made,
and each pair of a query and a key takes 1 088 multiply-adds a head. For many queries it is cheaper
to make keys and values, at 131 072 multiply-adds for each key and head: a pair then takes 320.
`qtool.engine.attention.pages.pairs_saved` tells which chunks these are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from qtool.engine.attention.pages import MAX_EXPANDED_TOKENS, KVPages, LayerGeometry, Packed
from qtool.runtime.kernels import current

# The keys and values that are made at a time: of all heads if they fit, else of some heads after
# others. Heads are independent, so no partial results are merged, however long the context.
WORKSPACE_BYTES = 512 << 20


class Latents(Protocol):
    """What takes queries to latents and latents to values, or makes keys and values; see
    `qtool.engine.latent_attention`.
    """

    weight: Tensor
    """[heads, key width + value width, rank]."""
    key_width: int
    """Of keys, without the rotary part."""

    def queries(self, q: Tensor, q_rope: Tensor) -> Tensor:
        """Return queries for latents, [T, heads, rank + rotary].

        Args:
            q: queries without their rotary part, [T, heads, key width].
            q_rope: the rotary part, [T, heads, rotary].
        """

    def values(self, gathered: Tensor) -> Tensor:
        """Return values [T, heads, value width] of gathered latents [T, heads, rank]."""

    def expand(self, latents: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [heads, T, ...] of ``latents`` [1, T, rank] and the rotary part
        of keys [1, T, rotary].
        """


def reserve_bytes(layers: Sequence[LayerGeometry], dtype: torch.dtype) -> int:
    """Return the most bytes that `attend_expanded` allocates for ``layers`` of a model of
    ``dtype``.
    """
    widths = [layer.head_dim for layer in layers if layer.keeps_latents]
    return MAX_EXPANDED_TOKENS * max(widths) * dtype.itemsize + WORKSPACE_BYTES if widths else 0


def attend_expanded(
    latent: Latents,
    q: Tensor,
    q_rope: Tensor,
    kv: KVPages,
    packed: Packed,
    out: Tensor,
    scaling: float,
) -> None:
    """Fill ``out`` for the tokens of the chunks of ``packed.expanded``, on a GPU.

    Args:
        latent: the layer, which makes keys and values.
        q: queries of all tokens without their rotary part, [T, heads, key width].
        q_rope: the rotary part, [T, heads, rotary].
        kv: the pages of the layer, which hold the latents of the new tokens too.
        packed: the tokens of the pass.
        out: [T, heads, value width], contiguous.
        scaling: what logits are multiplied with.
    """
    from qtool.engine.attention import triton_latent  # needs triton

    rank = kv.v.shape[3]
    expanded = packed.expanded
    assert expanded is not None
    with current(q.device):
        latents = triton_latent.gather(kv, packed, q.dtype)
        each = _heads_at_once(latent.weight, expanded.keys)
        expanded_kv = q.new_empty(expanded.keys, each * latent.weight.shape[1])
        for begin in range(0, q.shape[1], each):
            some = slice(begin, begin + each)
            torch.mm(latents[:, :rank], latent.weight[some].flatten(0, 1).T, out=expanded_kv)
            triton_latent.prefill_expanded(
                q[:, some], q_rope[:, some], expanded_kv, latents, packed, out[:, some], scaling
            )


def _heads_at_once(weight: Tensor, keys: int) -> int:
    """Return for how many heads of ``weight`` the keys and values of ``keys`` tokens are made
    together: a divisor of their number.
    """
    heads = weight.shape[0]
    most = WORKSPACE_BYTES // (keys * weight.shape[1] * weight.itemsize)
    return max(
        (count for count in range(1, heads + 1) if heads % count == 0 and count <= most), default=1
    )

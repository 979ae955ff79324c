"""The gated delta rule, which defines what gated delta nets compute, and computes it on a CPU.

A layer mixes the last inputs of each channel by a short convolution, and keeps a matrix for each
head: it decays, forgets what it holds for a key, and takes a new value for it. Both states lie in
`RecurrentStates`, at the row of their sequence; a sequence that begins does not read what its row
held before. Source: Yang et al. 2024, *Gated Delta Networks*, arXiv:2412.06464.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from qtool.engine.attention.pages import Packed, RecurrentStates

CHUNK = 64  # tokens that are computed together
EPSILON = 1e-6  # of the norms of queries and keys


@dataclass(frozen=True)
class Shape:
    """How many heads there are, and how wide they are."""

    key_heads: int
    value_heads: int
    key_width: int
    value_width: int

    @property
    def shared(self) -> int:
        """Value heads that share a key head."""
        return self.value_heads // self.key_heads

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Channels of queries, keys and values."""
        keys = self.key_heads * self.key_width
        return keys, keys, self.value_heads * self.value_width


@dataclass(frozen=True)
class DeltaWeights:
    """What `mix` computes with."""

    shape: Shape
    conv: Tensor
    """[C, kernel]: what the newest input is multiplied with comes last."""
    decay: Tensor
    """f32 [heads]: the logarithm of the decay is this times ``softplus(a + dt_bias)``."""
    dt_bias: Tensor
    """f32 [heads]"""


def mix(
    qkv: Tensor,
    b: Tensor,
    a: Tensor,
    weights: DeltaWeights,
    states: RecurrentStates,
    packed: Packed,
) -> Tensor:
    """Return the values [T, heads, D] that the states hold for the queries, and update the states:
    the definition, and what a CPU does.

    Args:
        qkv: queries, keys and values before the convolution, [T, C].
        b: what the learning rate of each head is the sigmoid of, [T, heads].
        a: what the decay is made of, [T, heads].
        weights: of the layer.
        states: of the layer.
        packed: the tokens of the pass.
    Returns: of the dtype of ``qkv``.
    """
    shape = weights.shape
    out = qkv.new_empty(len(qkv), shape.value_heads, shape.value_width)
    rate = b.float().sigmoid()
    log_decay = weights.decay * functional.softplus(a.float() + weights.dt_bias)
    for begin, end, position in packed.spans():
        row = int(packed.rows[begin])
        if position == 0:
            states.conv_state[row] = 0
            states.recurrent_state[row] = 0
        inputs = torch.cat([states.conv_state[row], qkv[begin:end].T], dim=1)
        states.conv_state[row] = inputs[:, end - begin :]
        mixed = functional.conv1d(inputs[None], weights.conv[:, None], groups=len(inputs))[0]
        parts = torch.split(functional.silu(mixed).T, list(shape.sizes), dim=-1)
        widths = shape.key_width, shape.key_width, shape.value_width
        q, k, v = (
            part.reshape(end - begin, -1, width).float()
            for part, width in zip(parts, widths, strict=True)
        )
        q, k = (
            (part * torch.rsqrt(part.square().sum(-1, keepdim=True) + EPSILON)).repeat_interleave(
                shape.shared, dim=1
            )
            for part in (q, k)
        )
        state = states.recurrent_state[row]
        for first in range(begin, end, CHUNK):
            some = slice(first, min(first + CHUNK, end))
            own = slice(some.start - begin, some.stop - begin)
            out[some] = _add_chunk(
                state, q[own] * shape.key_width**-0.5, k[own], v[own], rate[some], log_decay[some]
            )
    return out


def _add_chunk(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, rate: Tensor, log_decay: Tensor
) -> Tensor:
    """Return what ``state`` holds for each token's query, and update it in place.

    Token t decays the state, then moves what it holds for key t towards value t by ``rate``. With
    the state S before the chunk and the decay D(t) since then, the value that token t writes is u_t
    = rate_t (v_t - D(t) k_t S - sum over s < t of D(t) / D(s) (k_t k_s) u_s): a triangular system.

    Args:
        state: f32 [heads, key width, value width].
        q: f32 [n, heads, key width], as are ``k``.
        v: f32 [n, heads, value width].
        rate: f32 [n, heads].
        log_decay: f32 [n, heads].
    """
    q, k, v = (part.transpose(0, 1) for part in (q, k, v))
    rate, total = rate.T[..., None], log_decay.T.cumsum(-1)
    since = (total[:, :, None] - total[:, None, :]).tril().exp().tril()  # D(t) / D(s), s <= t
    whole = total.exp()[..., None]
    system = torch.eye(q.shape[1], device=q.device) + (rate * since * (k @ k.mT)).tril(-1)
    written: Tensor = torch.linalg.solve_triangular(
        system, rate * (v - whole * (k @ state)), upper=False, unitriangular=True
    )
    out: Tensor = whole * (q @ state) + (since * (q @ k.mT)) @ written
    left = (total[:, -1:] - total).exp()[..., None]
    state.copy_(whole[:, -1:] * state + (left * k).mT @ written)
    return out.transpose(0, 1)

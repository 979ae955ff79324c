"""The gated delta rule, which defines what gated delta nets compute, and computes it on a CPU.

A layer mixes the last inputs of each channel by a short convolution, and keeps a matrix for each
head: it decays, forgets what it holds for a key, and takes a new value for it. Both states lie in
`RecurrentStates`, at the row of their sequence; a sequence that begins does not read what its row
held before. Source: Yang et al. 2024, *Gated Delta Networks*, arXiv:2412.06464.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from qtool.engine.attention.pages import Packed, RecurrentStates, StateGeometry

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

    @property
    def draft_sizes(self) -> tuple[int, int, int, int]:
        """Numbers that are kept for a draft: of its keys, values, ``b`` and ``a``."""
        return *self.sizes[1:], self.value_heads, self.value_heads

    def geometry(self, layer_idx: int, kernel: int) -> StateGeometry:
        """Return what a layer keeps if its convolution reads ``kernel`` inputs."""
        heads = (self.value_heads, self.key_width, self.value_width)
        return StateGeometry(layer_idx, sum(self.sizes), kernel - 1, heads, sum(self.draft_sizes))


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
    for begin, end, position in packed.spans():
        row = int(packed.rows[begin])
        own = slice(begin, end)
        state = states.recurrent_state[row]
        if position == 0:
            state.zero_()
        mixed = _convolve(states.conv_state[row], qkv[own], weights.conv, position)
        q, k, v = torch.split(mixed, list(shape.sizes), dim=-1)
        tokens = torch.cat([k, v, b[own], a[own]], dim=1)
        right = _drafts_before(states, row, position)
        known = 1 if begin < packed.decodes else end - begin  # the other tokens are drafts
        if states.drafts:
            states.length[row] = position + known
            positions = torch.arange(position + known, position + end - begin)
            states.drafted[row, positions % states.drafted.shape[1]] = tokens[known:]
        held = len(right) + known
        q = functional.pad(q, (0, 0, len(right), 0))  # nobody asks for their values
        terms = _terms(q, torch.cat([right, tokens]), weights)
        found = [_add(state, [each[:held] for each in terms])]
        if held < len(q):
            found.append(_add(state.clone(), [each[held:] for each in terms]))
        out[own] = torch.cat(found)[len(right) :]
    return out


def _convolve(kept: Tensor, new: Tensor, weight: Tensor, position: int) -> Tensor:
    """Return the SiLU of the convolution of new inputs, [n, C].

    Args:
        kept: the last inputs of the sequence, [inputs, C]; the new ones are added.
        new: the new inputs, [n, C].
        weight: [C, kernel].
        position: of the first new input.
    """
    first = position - weight.shape[1] + 1
    count = len(kept)
    positions = torch.arange(first, position)
    before = torch.where(positions[:, None] >= 0, kept[positions % count], 0.0)
    last = new[-count:]
    stop = position + len(new)
    kept[torch.arange(stop - len(last), stop) % count] = last
    inputs = torch.cat([before, new]).T
    mixed = functional.conv1d(inputs[None], weight[:, None], groups=len(inputs))[0]
    return functional.silu(mixed).T


def _drafts_before(states: RecurrentStates, row: int, position: int) -> Tensor:
    """Return what ``states`` keep of the drafts before ``position`` of a sequence that are not yet
    in its matrix, [n, N].
    """
    if position == 0 or not states.drafts:
        return states.drafted[row, :0]
    positions = torch.arange(int(states.length[row]), position)
    return states.drafted[row, positions % states.drafted.shape[1]]


def _terms(q: Tensor, tokens: Tensor, weights: DeltaWeights) -> list[Tensor]:
    """Return the arguments of `_add_chunk` after ``state``.

    Args:
        q: the queries of n tokens, [n, key heads * key width].
        tokens: their keys, values, ``b`` and ``a`` side by side, [n, sum of `Shape.draft_sizes`].
        weights: of the layer.
    """
    shape = weights.shape
    k, v, b, a = torch.split(tokens, list(shape.draft_sizes), dim=-1)
    q, k = (part.reshape(len(part), -1, shape.key_width).float() for part in (q, k))
    q, k = (
        (part * torch.rsqrt(part.square().sum(-1, keepdim=True) + EPSILON)).repeat_interleave(
            shape.shared, dim=1
        )
        for part in (q, k)
    )
    v = v.reshape(len(v), -1, shape.value_width).float()
    log_decay = weights.decay * functional.softplus(a.float() + weights.dt_bias)
    return [q * shape.key_width**-0.5, k, v, b.float().sigmoid(), log_decay]


def _add(state: Tensor, terms: Sequence[Tensor]) -> Tensor:
    """Return what ``state`` holds for each token's query, [n, heads, D], and update it in place."""
    chunks = zip(*(torch.split(each, CHUNK) for each in terms), strict=True)
    return torch.cat([_add_chunk(state, *chunk) for chunk in chunks])


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
    rate = rate.T[..., None]
    total = log_decay.T.cumsum(-1)
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

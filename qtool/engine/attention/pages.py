"""What layers keep between passes, and the tokens of a pass: the paged keys and values of
attention, and the states of layers that have one for each sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

PAGE = 16  # tokens of a page
LOG2_E = 1.4426950408889634  # kernels keep logits in units of log2
# Keys and values are made from latents for a chunk when that saves operations. For n tokens after b
# others there are P = n b + n (n + 1) / 2 pairs of a query and a key. With DeepSeek's sizes (rank
# 512, 64 rotary channels, keys and values of 128), the multiply-adds of each head are
#     with the latents themselves   P (2 * 512 + 64) + n * 512 * (128 + 128)
#     with keys and values          P (128 + 64 + 128) + (b + n) * 512 * (128 + 128)
# so keys and values pay when 768 P > 131 072 b, or P > 171 b: always without earlier tokens, and
# from 171 tokens on after very many. Writing and reading them costs time too, so 171 becomes:
PAIRS_PER_KEY = 256
MAX_EXPANDED_TOKENS = 163_840  # of all contexts in a step; DeepSeek's context length


@dataclass(frozen=True)
class LayerGeometry:
    """What one layer's attention is: the engine sizes the cache by it."""

    layer_idx: int
    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    window: int | None
    """The positions each token sees, its own included; None: all before it."""
    softcap: float | None
    scaling: float
    keeps_latents: bool = False
    """Whether values are the first ``v_head_dim`` numbers of keys, and are not stored again."""

    @property
    def groups(self) -> int:
        """Into how many groups the heads of a decode are cut, at most."""
        return self.heads if self.keeps_latents else self.kv_heads

    @property
    def stored(self) -> int:
        """Numbers that a token takes in the cache."""
        return self.kv_heads * (self.head_dim + (0 if self.keeps_latents else self.v_head_dim))


@dataclass
class KVPages:
    """The keys and values of one layer; page 0 belongs to no sequence."""

    k: Tensor
    """[pages, kv_heads, PAGE, head_dim], bf16, f16, f32 or float8_e4m3fn."""
    v: Tensor
    """[pages, kv_heads, PAGE, v_head_dim], the dtype of ``k``."""
    k_scale: float = 1.0
    """What keys were divided by, in 8-bit pages."""
    v_scale: float = 1.0
    """What values were divided by, in 8-bit pages."""
    keeps_latents: bool = False
    """Whether ``v`` is a part of ``k``; both are then divided by the same."""

    @property
    def nbytes(self) -> int:
        """Return the size of all pages."""
        return self.k.nbytes + (0 if self.keeps_latents else self.v.nbytes)


@dataclass(frozen=True)
class StateGeometry:
    """What one layer keeps for each sequence, whatever its length."""

    layer_idx: int
    channels: int
    inputs: int
    """How many earlier inputs of each channel the convolution of a token reads."""
    matrix: tuple[int, int, int]
    """Heads, key width, value width."""
    draft_size: int
    """How many numbers are kept for a draft."""

    def conv_shape(self, drafts: int) -> tuple[int, int]:
        """Return how many inputs of how many channels are kept with ``drafts`` drafts a token."""
        return self.inputs + drafts, self.channels


@dataclass
class RecurrentStates:
    """The states of one layer, at the row of each sequence in `Packed.table`.

    A matrix cannot forget a token. So of a token and the drafts after it only the token goes into
    the matrix, and what the drafts would add is kept. The next step of the sequence begins after
    those that were right, and adds them first.
    """

    conv_state: Tensor
    """[rows, inputs, channels]: the last inputs, that of position p at ``p % inputs``; as many as
    a convolution reads, and the drafts.
    """
    recurrent_state: Tensor
    """f32 [rows, heads, key width, value width]."""
    length: Tensor
    """int32 [rows]: how many tokens of the sequence `recurrent_state` holds."""
    drafted: Tensor
    """[rows, 2 * drafts + 1, N]: of each draft keys, values, ``b`` and ``a`` side by side (see
    `delta_rule.mix`), that of position p at ``p % (2 * drafts + 1)``, so that no step writes where
    it reads. Without drafts [rows, 0, N].
    """

    @property
    def drafts(self) -> int:
        """How many drafts a token has, at most."""
        return self.drafted.shape[1] // 2

    @property
    def copied(self) -> tuple[Tensor, ...]:
        """What a copy of the state of a sequence without drafts takes."""
        return self.conv_state, self.recurrent_state, self.length

    @property
    def nbytes(self) -> int:
        """Return the size of all states."""
        return sum(part.nbytes for part in (*self.copied, self.drafted))


LayerCache = KVPages | RecurrentStates


@dataclass(frozen=True)
class Expanded:
    """The last chunks of a pass over cached latents: their queries attend to keys and values that
    are made from the latents of their contexts. A context is all tokens of a sequence so far.
    """

    chunks: int
    token: int
    """The first token of these chunks in the pass."""
    contexts: Tensor
    """int32 [chunks + 1]: where the context of each begins when they lie side by side, and where
    the last ends.
    """
    keys: int
    """Tokens of all contexts."""
    longest: int
    """Tokens of the longest context, or any number above."""


@dataclass
class Packed:
    """The tokens of one forward pass: T tokens of S + ``decodes`` sequences, side by side.

    A captured graph reads the same tensors again. Padding tokens stand among the decodes, at
    position 0 of a row whose pages are page 0; their results are ignored.
    """

    table: Tensor
    """int32 [rows, max_pages], contiguous: the pages of each running sequence, by its row; only
    those up to its position are ever read.
    """
    rows: Tensor
    """int32 [T]: the row of each token."""
    positions: Tensor
    """int32 [T]; they are consecutive within a chunk."""
    decodes: int
    """The first tokens of the pass, each of which attends by itself: the one new token of its
    sequence, or one of several, with drafts.
    """
    starts: Tensor | None = None
    """int32 [S + 1]: where each of the chunks that follow begins, counted from ``decodes``, and
    where the last ends; None without chunks.
    """
    longest: int = 0
    """Tokens of the longest chunk, or any number above."""
    most: int = 0
    """No position of a decode reaches this number, now and in replays of the graph.

    0 stands for all that the table can hold. A tight bound helps a little.
    """
    counters: Tensor | None = None
    """From `new_counters`: split decodes count arrived parts with them.

    Streams that run at the same time need their own; None allocates them in each call.
    """
    expanded: Expanded | None = None
    """The last chunks, if their keys and values are made from latents; layers that cache no latents
    ignore it.
    """

    def expand(self, chunks: Sequence[tuple[int, int]]) -> Packed:
        """Return this pass, which has no padding, with ``expanded`` for its last ``chunks``.

        Args:
            chunks: (tokens before, new tokens) of each.
        """
        if not chunks:
            return self
        assert self.starts is not None
        tokens = len(self.positions) - sum(new for _, new in chunks)
        sizes = [before + new for before, new in chunks]
        contexts = self.starts
        if tokens != self.decodes or any(before for before, _ in chunks):
            bounds = list(accumulate(sizes, initial=0))
            pinned = contexts.device.type == "cuda"
            there = torch.tensor(bounds, dtype=torch.int32, pin_memory=pinned)
            contexts = there.to(contexts.device, non_blocking=True)
        expanded = Expanded(len(chunks), tokens, contexts, sum(sizes), max(sizes))
        return replace(self, expanded=expanded)

    def starts_of(self, expanded: Expanded) -> Tensor:
        """Return where the chunks of ``expanded`` begin, as ``starts``."""
        assert self.starts is not None
        return self.starts[len(self.starts) - 1 - expanded.chunks :]

    def without(self, expanded: Expanded) -> Packed:
        """Return the pass without the chunks of ``expanded``."""
        assert self.starts is not None
        starts = self.starts[: len(self.starts) - expanded.chunks]
        return replace(self, starts=starts if len(starts) > 1 else None, expanded=None)

    def spans(self) -> Iterator[tuple[int, int, int]]:
        """Yield for each sequence its first token, the one after its last, and its first position.

        A decode that follows a token of its sequence, a draft, belongs to the same span. Waits for
        the device.
        """
        rows, positions = self.rows.tolist(), self.positions.tolist()
        starts = [0] if self.starts is None else self.starts.tolist()
        bounds = [
            token
            for token in range(self.decodes)
            if not token
            or (rows[token - 1], positions[token - 1] + 1) != (rows[token], positions[token])
        ]
        for begin, end in pairwise([*bounds, *(self.decodes + start for start in starts)]):
            if begin < end:
                yield begin, end, positions[begin]


def pairs_saved(before: int, new: int) -> int:
    """Return what keys and values made from latents save for a chunk of ``new`` tokens after
    ``before`` others, in pairs of a query and a key; negative if they cost more.
    """
    return new * before + new * (new + 1) // 2 - PAIRS_PER_KEY * before


def new_counters(rows: int, groups: int, device: torch.device) -> Tensor:
    """Return counters for up to ``rows`` decodes of layers with ``groups`` groups of heads.

    Every launch leaves them at zero.
    """
    return torch.zeros(rows * groups, dtype=torch.int32, device=device)

"""The choices of a router, sorted by expert: what grouped products go through."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """Choices of experts in the order of a grouped product: blocks of rows, one expert each.

    A choice is one expert of one token; choice ``t * top_k + i`` is the i-th of token t.
    """

    rows: Tensor
    """The choices of all blocks, int32 [blocks * size], those of an expert in their order; the
    number of choices where a block has no more.
    """
    experts: Tensor
    """Of each block, int32 [blocks]."""
    used: Tensor
    """How many of ``rows`` belong to a block that is used, int32 [1]."""
    size: int
    """Rows of a block."""
    choices: int
    """How many there are in all."""
    top_k: int
    """Neighbouring choices that share a row of the input."""

    def of_own_rows(self) -> Blocks:
        """Return the same blocks for an input with a row for each choice."""
        return replace(self, top_k=1)


class SharedExpert(NamedTuple):
    """The results of a shared expert, which all tokens have besides those that they choose."""

    y: Tensor
    """Its outputs, [T, N]."""
    gate: Tensor
    """Logits, [T, 1]; outputs are multiplied by their sigmoid."""


def add_shared(total: Tensor, shared: SharedExpert | None) -> Tensor:
    """Return ``total``, the sum of the chosen experts, f32 [T, N], plus the gated outputs of
    ``shared``; the definition for kernels.
    """
    if shared is None:
        return total
    return total + shared.gate.float().sigmoid() * shared.y.float()


def most_blocks(choices: int, count: int, size: int) -> int:
    """Return how many blocks of ``size`` rows the ``choices`` of ``count`` experts can need."""
    return min(choices, choices // size + min(choices, count))


def sort_by_expert(experts: Tensor, count: int, size: int) -> Blocks:
    """Sort choices by expert; nothing waits for the device.

    Args:
        experts: of each token, [T, top_k], each below ``count``.
        count: of all experts.
        size: rows of a block.
    """
    device = experts.device
    choices = experts.numel()
    sorted_experts, order = torch.sort(experts.reshape(-1), stable=True)
    numbers = torch.arange(count + 1, dtype=experts.dtype, device=device)
    starts = torch.searchsorted(sorted_experts, numbers)  # [count + 1]
    padded = (starts.diff() + size - 1) // size * size
    ends = padded.cumsum(0)
    blocks = most_blocks(choices, count, size)
    rows = torch.full((blocks * size,), choices, dtype=torch.int32, device=device)
    chosen = sorted_experts.long()
    indices = torch.arange(choices, device=device) - starts[chosen] + (ends - padded)[chosen]
    rows.scatter_(0, indices, order.int())
    firsts = torch.arange(blocks, device=device) * size
    of_block = torch.searchsorted(ends, firsts, right=True).clamp(max=count - 1)
    return Blocks(rows, of_block.int(), ends[-1:].int(), size, choices, experts.shape[1])

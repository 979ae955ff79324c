"""The int32 inputs of a step: filled on the host, sent to the device in one copy, read there
through named views.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qtool.engine.step import Chunk, Step

# Host buffers: one is filled while the step that reads the other may still be running.
NUM_BUFFERS = 2
Ints = TypeVar("Ints", Tensor, NDArray[np.int32])


@dataclass(frozen=True, slots=True)
class StepLayout:
    """How many numbers of each kind a step has. They lie side by side, in the order of the fields
    of `StepInputs`.
    """

    tokens: int
    """T, with padding."""
    starts: int = 0
    """S + 1 for S chunks of prompts; 0 for a step that only decodes."""
    kept: int = 0
    """R, the tokens whose logits are wanted; 0: all."""
    updates: int = 0
    """U, the changes of the page table."""

    @property
    def size(self) -> int:
        """How many numbers these are in all."""
        return 3 * self.tokens + self.starts + self.kept + 2 * self.updates


@dataclass(frozen=True, slots=True)
class StepInputs(Generic[Ints]):
    """Views of the inputs of one step, int32, on the host or on the device."""

    token_ids: Ints
    """[T]; -1 for a token that only the device knows, the last one sampled for its row."""
    positions: Ints
    """[T]"""
    rows: Ints
    """[T]: the row of the page table that each token's sequence has."""
    starts: Ints
    """[S + 1]: where each chunk of a prompt begins, counted from the first; where the last ends."""
    kept: Ints
    """[R]: the tokens whose logits are wanted."""
    table_index: Ints
    """[U]: the indices in the flat page table that change."""
    table_pages: Ints
    """[U]: the pages that stand there from now on."""

    @classmethod
    def of(cls, numbers: Ints, layout: StepLayout) -> StepInputs[Ints]:
        """Return views of the flat ``numbers``, of at least ``layout.size``."""
        sizes = (
            *(layout.tokens, layout.tokens, layout.tokens),
            *(layout.starts, layout.kept, layout.updates, layout.updates),
        )
        bounds = itertools.pairwise(itertools.accumulate(sizes, initial=0))
        return cls(*(numbers[start:stop] for start, stop in bounds))


class StepBuffer:
    """Room for the inputs of the largest step, on the device and `NUM_BUFFERS` times on the host.

    CUDA graphs read the device's room, so its address stays the same until `close`.

    Args:
        largest: no step has more numbers than this layout.
        device: where the model is.
    """

    def __init__(self, largest: StepLayout, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._host = [
            torch.zeros(largest.size, dtype=torch.int32, pin_memory=pinned)
            for _ in range(NUM_BUFFERS)
        ]
        self._device = torch.zeros(largest.size, dtype=torch.int32, device=device)
        self.turn = 0
        """Which of the host buffers `on_host` and `send` use."""

    def advance(self) -> int:
        """Turn to the next host buffer, which no step reads any more; return its number."""
        self.turn = (self.turn + 1) % NUM_BUFFERS
        return self.turn

    def on_host(self, layout: StepLayout) -> StepInputs[NDArray[np.int32]]:
        """Return the current host buffer, to be filled."""
        return StepInputs.of(self._host[self.turn].numpy(), layout)

    def send(self, layout: StepLayout) -> StepInputs[Tensor]:
        """Copy the current host buffer to the device, without waiting for it; return it there."""
        size = layout.size
        self._device[:size].copy_(self._host[self.turn][:size], non_blocking=True)
        return StepInputs.of(self._device, layout)

    def close(self) -> None:
        """Give the device's memory back."""
        self._device = torch.empty(0)


def fill_tokens(
    inputs: StepInputs[NDArray[np.int32]], chunks: Sequence[Chunk], start: int = 0
) -> int:
    """Write the tokens of ``chunks`` side by side from index ``start`` on; return where they
    end.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    for chunk in chunks:
        sequence = chunk.sequence
        stop = chunk.start + chunk.count
        assert sequence.row is not None
        known = sequence.tokens[chunk.start : stop - len(chunk.drafts)]
        token_ids += known
        token_ids += chunk.drafts
        token_ids += [-1] * (chunk.count - len(known) - len(chunk.drafts))
        positions += range(chunk.start, stop)
        rows += [sequence.row] * chunk.count
    end = start + len(token_ids)
    inputs.token_ids[start:end] = token_ids
    inputs.positions[start:end] = positions
    inputs.rows[start:end] = rows
    return end


def fill_updates(
    inputs: StepInputs[NDArray[np.int32]], updates: Sequence[tuple[int, int, int]], table: Tensor
) -> None:
    """Write changes (row, column, page) of the page table ``table`` [rows, columns]."""
    columns = table.shape[1]
    for index, (row, column, page) in enumerate(updates):
        inputs.table_index[index] = row * columns + column
        inputs.table_pages[index] = page


def update_table(table: Tensor, inputs: StepInputs[Tensor]) -> None:
    """Make the changes of a step in the page table, on the device."""
    table.view(-1).index_put_((inputs.table_index,), inputs.table_pages)


def send_step(
    buffer: StepBuffer, step: Step, kept: Sequence[int], table: Tensor
) -> StepInputs[Tensor]:
    """Send the inputs of any step to the device, and make its changes in the page table.

    Args:
        buffer: its room.
        step: the step.
        kept: the tokens whose logits are wanted.
        table: the page table [rows, columns].
    """
    stops = list(itertools.accumulate(chunk.count for chunk in step.chunks))
    prefills = len(step.chunks) - step.decodes
    layout = StepLayout(
        tokens=stops[-1],
        starts=prefills + 1 if prefills else 0,
        kept=len(kept),
        updates=len(step.updates),
    )
    inputs = buffer.on_host(layout)
    fill_tokens(inputs, step.chunks)
    if prefills:
        inputs.starts[0] = 0
        inputs.starts[1:] = [stop - step.decode_tokens for stop in stops[step.decodes :]]
    inputs.kept[:] = kept
    fill_updates(inputs, step.updates, table)
    there = buffer.send(layout)
    if step.updates:
        update_table(table, there)
    return there

"""Drafts by the model's own layer for multi-token prediction (MTP).

After each step of the model the layer runs over the same tokens, prompts too, and caches its keys
and values in the same pages as the model; then it runs again, over its own output, for each further
draft. After a step that only decodes, all of this is one CUDA graph, captured for some numbers of
sequences; after one with prompts it runs launch by launch.

The layer's keys and values also depend on the next token. So in the last token of a page that two
requests share they may come from the other request's next token, and those after rejected drafts
are written again by the next step. Either changes what is drafted, but no answer.
"""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from qtool.engine.attention.interface import running
from qtool.engine.attention.pages import PAGE, LayerCache, Packed
from qtool.engine.cuda_graphs import DECODE_BUCKETS, Recorder, Replayable
from qtool.engine.scheduler import Limits
from qtool.engine.step import Chunk, Step
from qtool.engine.step_buffer import Ints
from qtool.errors import one_line
from qtool.runtime.mtp import MtpLayer

LOG = logging.getLogger("qtool.engine")
LayerCaches: TypeAlias = Mapping[int, LayerCache]


@dataclass(frozen=True, slots=True)
class DraftInputs(Generic[Ints]):
    """The inputs of drafting after a step that only decodes, int32, on the host or on the device:
    for each of S sequences K tokens, its last known one and the drafts after it.

    Missing tokens of a sequence, and all tokens of sequences that are padding, use the row for
    padding.
    """

    indices: Ints
    """[S, K]: the index of each token in the step, and of the token sampled after it."""
    positions: Ints
    """[S, K]: of each token in its sequence."""
    rows: Ints
    """[S, K]: of the page table."""
    drafts: Ints
    """[S, K - 1], -1 where there was none."""
    ends: Ints
    """[S]: how many tokens the pages of the sequence hold."""

    @classmethod
    def of(cls, numbers: Ints, size: int) -> DraftInputs[Ints]:
        """Return the inputs of ``size`` sequences as views that together cover ``numbers`` [N]."""
        tokens = len(numbers) // 4
        counts = (tokens, tokens, tokens, tokens - size, size)
        bounds = itertools.pairwise(itertools.accumulate(counts, initial=0))
        indices, positions, rows, drafts, ends = (numbers[start:stop] for start, stop in bounds)
        return cls(
            indices.reshape(size, -1),
            positions.reshape(size, -1),
            rows.reshape(size, -1),
            drafts.reshape(size, -1),
            ends,
        )


class DraftGraph(NamedTuple):
    """Drafting for a fixed number of sequences, and where it leaves its results."""

    graph: Replayable
    drafts: Tensor
    """int32 [S, D]"""


class MtpDrafter:
    """Runs an MTP layer after the steps of its model.

    Args:
        layer: the layer.
        limits: what the largest step may hold.
        table: the page table, int32 [limits.max_running + 1, columns]; its last row is for padding.
        counters: for split decodes.
    """

    def __init__(self, layer: MtpLayer, limits: Limits, table: Tensor, counters: Tensor) -> None:
        self._layer = layer
        self._limits = limits
        self._table = table
        self._counters = counters
        weight = layer.projection.weight
        # of the tokens of the model's last step, padding of the graphs included
        self._hidden = weight.new_zeros(limits.token_budget + limits.most_decodes, len(weight))
        # the tokens that the model's last step sampled, and the inputs, where graphs read them
        self._tokens = table.new_zeros(limits.most_decodes)
        most = min(limits.max_running, limits.most_decodes // (1 + limits.drafts))
        self._sizes = sorted({*(size for size in DECODE_BUCKETS if size < most), most})
        self._inputs = table.new_zeros(most * self._inputs_per_sequence)
        self.graphs: dict[int, DraftGraph] = {}
        """By how many sequences, smallest first; none until `capture`."""

    @property
    def _inputs_per_sequence(self) -> int:
        """How many numbers `DraftInputs` has for each sequence."""
        return 4 * (1 + self._limits.drafts)

    def keep_hidden(self, module: nn.Module, given: object, output: Sequence[Tensor]) -> None:
        """Keep the hidden states of a step: a forward hook of the model's decoder."""
        hidden = output[0][0]
        self._hidden[: len(hidden)].copy_(hidden)

    def run(
        self, packed: Packed, token_ids: Tensor, hidden: Tensor | None, layers: LayerCaches
    ) -> Tensor:
        """Return the layer's hidden states [T, H].

        Args:
            packed: the tokens.
            token_ids: int [T], the token after each of them.
            hidden: [T, H]; None: the hidden states of the model's last step.
            layers: the KV cache.
        """
        if hidden is None:
            hidden = self._hidden[: len(token_ids)]
        with running(packed, layers):
            states: Tensor = self._layer(token_ids, hidden, packed.positions)
        return states

    def draft(
        self, step: Step, tokens: Tensor | None, prefills_at: int, layers: LayerCaches
    ) -> Tensor | None:
        """Run the layer over ``step``, which the model has just computed; return what it drafts
        after each chunk that samples, int32 [S, D] on the host, valid once the device is done; None
        if no chunk samples.

        Args:
            step: the step.
            tokens: int32 [`Chunk.sampled` of each chunk, side by side]; None if no chunk samples.
            prefills_at: where the hidden states of the chunks that do not decode begin.
            layers: the KV cache.
        """
        if tokens is not None and (size := self._graph_size(step)) is not None:
            drafts = self._replay(step.chunks, tokens, size)
        else:
            if tokens is not None:
                tokens = tokens.clamp(min=0)  # -1 where logits are not finite
            states = self._run_after(step, tokens, prefills_at, layers)
            if tokens is None:
                return None
            drafts = self._continue(step.chunks, tokens, states, layers)
        return drafts.to("cpu", non_blocking=True)

    def _replay(self, chunks: Sequence[Chunk], tokens: Tensor, size: int) -> Tensor:
        """Return what the graph for ``size`` sequences drafts after ``chunks``, int32 [S, D]."""
        self._tokens[: len(tokens)].copy_(tokens)
        self.fill(chunks, size)
        self.graphs[size].graph.replay()
        return self.graphs[size].drafts[: len(chunks)]

    def _run_after(
        self, step: Step, tokens: Tensor | None, prefills_at: int, layers: LayerCaches
    ) -> Tensor:
        """Return the layer's hidden states [T, H] for the tokens of ``step``; see `draft`."""
        chunks, decodes = step.chunks, step.decode_tokens
        prefills = chunks[step.decodes :]
        starts = [0, *itertools.accumulate(chunk.count for chunk in prefills)]
        token_ids, positions, rows = self._ints(
            _following(chunks),
            [index for chunk in chunks for index in range(chunk.start, chunk.start + chunk.count)],
            [chunk.sequence.row for chunk in chunks for _ in range(chunk.count)],
        )
        packed = Packed(
            self._table,
            rows,
            positions,
            decodes=decodes,
            starts=self._ints(starts)[0] if prefills else None,
            longest=max((chunk.count for chunk in prefills), default=0),
            counters=self._counters,
        ).expand(step.expanded)
        hidden = self._hidden[: len(token_ids)]
        if prefills and prefills_at != decodes:
            after = self._hidden[prefills_at : prefills_at + starts[-1]]
            hidden = torch.cat([self._hidden[:decodes], after])
        if tokens is not None:
            token_ids = torch.where(token_ids < 0, tokens[-1 - token_ids.clamp(max=-1)], token_ids)
        return self.run(packed, token_ids, hidden, layers)

    def _continue(
        self, chunks: Sequence[Chunk], tokens: Tensor, states: Tensor, layers: LayerCaches
    ) -> Tensor:
        """Return drafts after the ``tokens`` that each chunk gains, int32 [S, D].

        Args:
            chunks: of the step.
            tokens: int32, sampled after them, not negative.
            states: [T, H], the output of the layer for the step.
            layers: the KV cache.
        """
        stops = itertools.accumulate(chunk.count for chunk in chunks)
        sampling = [
            (chunk, stop) for chunk, stop in zip(chunks, stops, strict=True) if chunk.samples
        ]
        sampled = [chunk.sampled for chunk, _ in sampling]
        firsts, indices, positions, rows, ends = self._ints(
            [
                stop - count
                for stop, count in zip(itertools.accumulate(sampled), sampled, strict=True)
            ],
            [stop - chunk.sampled for chunk, stop in sampling],
            [chunk.start + chunk.count - chunk.sampled for chunk, _ in sampling],
            [chunk.sequence.row for chunk, _ in sampling],
            [len(chunk.sequence.pages) * PAGE for chunk, _ in sampling],
        )
        right = self._count_right([chunk for chunk, _ in sampling], tokens, firsts)
        return self._extend(states[indices + right], positions + right, rows, ends, layers)

    def _extend(
        self, hidden: Tensor, positions: Tensor, rows: Tensor, ends: Tensor, layers: LayerCaches
    ) -> Tensor:
        """Return what the layer drafts, int32 [S, D], -1 where the pages have no room.

        Args:
            hidden: [S, H], its output for the last token of each sequence.
            positions: int32 [S], of these tokens.
            rows: int32 [S], of the page table.
            ends: int32 [S], how many tokens the pages of each sequence hold.
            layers: the KV cache.
        """
        drafts: list[Tensor] = []
        while True:
            token_ids = self._layer.logits(hidden).argmax(-1).int()
            drafts.append(torch.where(positions < ends, token_ids, -1))
            if len(drafts) == self._limits.drafts:
                return torch.stack(drafts, dim=1)
            positions = positions + 1
            has_page = positions < ends
            packed = Packed(
                self._table,
                torch.where(has_page, rows, self._limits.max_running),
                torch.where(has_page, positions, 0),
                decodes=len(rows),
                counters=self._counters,
            )
            hidden = self.run(packed, token_ids, hidden, layers)

    def _graph_size(self, step: Step) -> int | None:
        """Return the size of the smallest graph that can draft after ``step``, in sequences; None
        when there is none.
        """
        if step.decodes != len(step.chunks):
            return None
        return next((size for size in self.graphs if size >= step.decodes), None)

    def fill(self, chunks: Sequence[Chunk], size: int) -> DraftInputs[Tensor]:
        """Send the inputs of drafting after ``chunks``, which decode, to the device, padded to
        ``size`` sequences; return them there. Does not wait for the device.
        """
        count = size * self._inputs_per_sequence
        pinned = self._table.device.type == "cuda"
        numbers = torch.zeros(count, dtype=torch.int32, pin_memory=pinned)
        inputs = DraftInputs.of(numbers.numpy(), size)
        inputs.rows[:] = self._limits.max_running
        inputs.drafts[:] = -1
        index = 0
        for number, chunk in enumerate(chunks):
            row = chunk.sequence.row
            own = (number, slice(chunk.count))
            assert row is not None
            inputs.indices[own] = range(index, index + chunk.count)
            inputs.positions[own] = range(chunk.start, chunk.start + chunk.count)
            inputs.rows[own] = row
            inputs.drafts[number, : len(chunk.drafts)] = chunk.drafts
            inputs.ends[number] = len(chunk.sequence.pages) * PAGE
            index += chunk.count
        self._inputs[:count].copy_(numbers, non_blocking=True)
        return DraftInputs.of(self._inputs[:count], size)

    def draft_fixed(self, inputs: DraftInputs[Tensor], layers: LayerCaches) -> Tensor:
        """Return drafts after the tokens that each sequence gains, int32 [S, D]: what a graph
        captures.
        """
        indices = inputs.indices.flatten()
        tokens = self._tokens[indices].clamp(min=0)  # -1 where logits are not finite
        packed = Packed(
            self._table,
            inputs.rows.flatten(),
            inputs.positions.flatten(),
            decodes=len(indices),
            counters=self._counters,
        )
        states = self.run(packed, tokens, self._hidden[indices], layers)
        right = _count_leading(tokens.view_as(inputs.indices)[:, :-1] == inputs.drafts)
        size, count = inputs.indices.shape
        last = torch.arange(size, device=indices.device) * count + right
        positions = inputs.positions[:, 0] + right
        rows = inputs.rows[:, 0]
        return self._extend(states[last], positions, rows, inputs.ends, layers)

    def memory_bytes(self, step_bytes: int, row_bytes: int) -> int:
        """Return about how much memory the graphs will need; see `CudaGraphs.memory_bytes`."""
        most = self._sizes[-1]
        tokens = most * (1 + self._limits.drafts)
        return step_bytes * tokens // self._limits.token_budget + 2 * most * row_bytes

    def capture(self, layers: LayerCaches, device: torch.device) -> None:
        """Capture all graphs, the largest first. Where the layer's code does not allow it or memory
        ends, some or all are missing, and a warning says so.
        """
        record = Recorder(device)
        try:
            for size in reversed(self._sizes):
                inputs = self.fill((), size)
                self.graphs[size] = DraftGraph(*record(partial(self.draft_fixed, inputs, layers)))
        except (RuntimeError, ValueError) as error:  # no memory is one of the former
            warnings.warn(
                f"there are {len(self.graphs)} of {len(self._sizes)} CUDA graphs for drafts: "
                f"{one_line(error)}",
                stacklevel=2,
            )
        self.graphs = dict(sorted(self.graphs.items()))
        LOG.info("%d CUDA graphs captured for drafts", len(self.graphs))

    def _count_right(self, chunks: Sequence[Chunk], tokens: Tensor, firsts: Tensor) -> Tensor:
        """Return how many drafts of each chunk were right, int [S]."""
        most = max(len(chunk.drafts) for chunk in chunks)
        if not most:
            return torch.zeros_like(firsts)
        padded = [[*chunk.drafts, *[-1] * (most - len(chunk.drafts))] for chunk in chunks]
        (drafts,) = self._ints([token for row in padded for token in row])
        numbers = torch.arange(most, device=firsts.device)
        indices = (firsts[:, None] + numbers).clamp(max=len(tokens) - 1)
        return _count_leading(tokens[indices] == drafts.view(len(chunks), most))

    def _ints(self, *lists: Sequence[int | None]) -> tuple[Tensor, ...]:
        """Return ``lists`` on the device, int32, in one copy, without waiting for it."""
        device = self._table.device
        flat = torch.tensor(
            [number for numbers in lists for number in numbers],
            dtype=torch.int32,
            pin_memory=device.type == "cuda",
        )
        sizes = [len(numbers) for numbers in lists]
        return torch.split(flat.to(device, non_blocking=True), sizes)


def _count_leading(same: Tensor) -> Tensor:
    """Return how many values of each row of ``same``, bool [S, N], come before the first that is
    false, int32 [S].
    """
    return same.int().cumprod(dim=1).sum(dim=1).int()


def _following(chunks: Sequence[Chunk]) -> list[int]:
    """Return the token after each token of ``chunks``; -1 - n stands for the nth token that the
    step samples, counted from 0.
    """
    following: list[int] = []
    sampled = 0
    for chunk in chunks:
        stop = chunk.start + chunk.count
        following += chunk.sequence.tokens[chunk.start + 1 : stop + 1 - chunk.sampled]
        following += range(-1 - sampled, -1 - sampled - chunk.sampled, -1)
        sampled += chunk.sampled
    return following

"""Drafts by the model's own layer for multi-token prediction (MTP).

After each step of the model the layer runs over the same tokens, prompts too, so that its keys and
values stand beside the model's, in the same pages; then again, over its own output, for each
further draft. It runs launch by launch, outside of CUDA graphs. The layer's keys and values depend
on the token after theirs: those of the last token of a page that two requests share may be of the
other's next token, and those after rejected drafts are written again by the next step. Both change
what is drafted, and no answer.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from qtool.engine.attention.interface import running
from qtool.engine.attention.pages import PAGE, LayerCache, Packed
from qtool.engine.scheduler import Limits
from qtool.engine.step import Chunk, Step
from qtool.runtime.mtp import MtpLayer

LayerCaches: TypeAlias = Mapping[int, LayerCache]


class MtpDrafter:
    """Runs an MTP layer after the steps of its model.

    Args:
        layer: the layer.
        limits: what the largest step may hold.
        table: the page table, int32 [limits.max_running + 1, columns]; its last row is for padding.
        counters: for split decodes.
    """

    def __init__(self, layer: MtpLayer, limits: Limits, table: Tensor, counters: Tensor) -> None:
        self._layer, self._limits = layer, limits
        self._table, self._counters = table, counters
        weight = layer.projection.weight
        # of the tokens of the model's last step, which the graphs pad
        self._hidden = weight.new_zeros(limits.token_budget + limits.most_decodes, len(weight))

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
            token_ids: int [T], those after them.
            hidden: [T, H]; None: of the model's last step.
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
        after each chunk that samples, int32 [S, D] on the host once the device has done it.

        Args:
            step: the step.
            tokens: int32, `Chunk.sampled` for each chunk; None if no chunk samples.
            prefills_at: where the hidden states of the chunks that do not decode begin.
            layers: the KV cache.
        """
        chunks, decodes = step.chunks, step.decode_tokens
        prefills = chunks[step.decodes :]
        starts = [0, *itertools.accumulate(chunk.count for chunk in prefills)]
        token_ids, positions, rows = self._ints(
            _following(chunks),
            [place for chunk in chunks for place in range(chunk.start, chunk.start + chunk.count)],
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
        )
        hidden = self._hidden[: len(token_ids)]
        if prefills and prefills_at != decodes:
            after = self._hidden[prefills_at : prefills_at + starts[-1]]
            hidden = torch.cat([self._hidden[:decodes], after])
        if tokens is not None:
            # of logits that are not finite, some token
            tokens = tokens.clamp(min=0)
            token_ids = torch.where(token_ids < 0, tokens[-1 - token_ids.clamp(max=-1)], token_ids)
        states = self.run(packed, token_ids, hidden, layers)
        if tokens is None:
            return None
        drafts = self._continue(chunks, tokens, states, layers)
        return drafts.to("cpu", non_blocking=True)

    def _continue(
        self, chunks: Sequence[Chunk], tokens: Tensor, states: Tensor, layers: LayerCaches
    ) -> Tensor:
        """Return what may follow the ``tokens`` that each chunk gains, int32 [S, D].

        Args:
            chunks: of the step.
            tokens: int32, those sampled after them.
            states: [T, H], the output of the layer for the step.
            layers: the KV cache.
        """
        stops = itertools.accumulate(chunk.count for chunk in chunks)
        sampling = [
            (chunk, stop) for chunk, stop in zip(chunks, stops, strict=True) if chunk.samples
        ]
        sampled = [chunk.sampled for chunk, _ in sampling]
        firsts, places, positions, rows, ends = self._ints(
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
        hidden, positions = states[places + right], positions + right
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

    def _count_right(self, chunks: Sequence[Chunk], tokens: Tensor, firsts: Tensor) -> Tensor:
        """Return how many drafts of each chunk were right, int [S]."""
        most = max(len(chunk.drafts) for chunk in chunks)
        if not most:
            return torch.zeros_like(firsts)
        padded = [[*chunk.drafts, *[-1] * (most - len(chunk.drafts))] for chunk in chunks]
        (drafts,) = self._ints([token for row in padded for token in row])
        numbers = torch.arange(most, device=firsts.device)
        places = (firsts[:, None] + numbers).clamp(max=len(tokens) - 1)
        same = tokens[places] == drafts.view(len(chunks), most)
        return same.int().cumprod(dim=1).sum(dim=1).int()

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


def _following(chunks: Sequence[Chunk]) -> list[int]:
    """Return the token after each token of ``chunks``, -1 - n where it is the nth that the step
    samples.
    """
    following: list[int] = []
    sampled = 0
    for chunk in chunks:
        stop = chunk.start + chunk.count
        following += chunk.sequence.tokens[chunk.start + 1 : stop + 1 - chunk.sampled]
        following += range(-1 - sampled, -1 - sampled - chunk.sampled, -1)
        sampled += chunk.sampled
    return following

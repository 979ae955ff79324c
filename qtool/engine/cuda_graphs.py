"""CUDA graphs of the steps that keep the host busiest: those that only decode, and small ones with
pieces of prompts.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from qtool.engine.attention.pages import Expanded, pairs_saved
from qtool.engine.layer_kinds import repeats, skipping
from qtool.engine.scheduler import Limits
from qtool.engine.step import Step
from qtool.engine.step_buffer import (
    StepBuffer,
    StepInputs,
    StepLayout,
    fill_tokens,
    fill_updates,
    update_table,
)
from qtool.errors import one_line

# Tokens that decode, drafts among them, in a step that has a graph.
DECODE_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 384, 512)
# Tokens of prompts in a step that has a graph: more keep the device busy by themselves.
PREFILL_BUCKETS = (64, 128, 256, 512, 1024, 2048)
# With latents: steps of up to so many tokens of prompts have a graph that attends to the latents.
MAX_ABSORBED_TOKENS = 512
# From so many on, prompts without earlier tokens have one that attends to keys and values.
MIN_EXPANDED_TOKENS = 256
# Steps run without a graph if keys and values save more pairs of a query and a key than this:
# launching 30 layers takes 1 to 2 ms more, about as long as attending to so many with 16 heads.
PAIRS_WORTH_LAUNCHES = 1 << 19
# Tokens that decode in such a step.
GRAPH_DECODE_BATCHES = (0, 64, 256)
# Pieces of prompts in it, at most.
MAX_GRAPH_CHUNKS = 8

LOG = logging.getLogger("qtool.engine")
Result = TypeVar("Result")
NOTHING = Step(chunks=[], decodes=0, updates=[])


class Replayable(Protocol):
    """A captured graph."""

    def replay(self) -> object:
        """Run on the device what was captured."""


@dataclass(frozen=True, slots=True)
class DecodeGraph:
    """A decode step of a fixed size, and where it leaves its results."""

    graph: Replayable
    logits: Tensor
    """[size, V]"""
    tokens: Tensor
    """int32 [size]: the most probable token of each row, -1 where logits are not finite."""


class PromptShape(NamedTuple):
    """The size of a step with prompts that has a graph."""

    decodes: int
    """Tokens that decode."""
    tokens: int
    """Tokens of prompts."""
    expands: bool = False
    """Whether all its prompts begin in it, and attend to keys and values made from latents."""

    @property
    def size(self) -> int:
        """Tokens of the step."""
        return self.decodes + self.tokens

    def expanded(self, starts: Tensor) -> Expanded | None:
        """Return `Packed.expanded` for its chunks, which begin at ``starts``."""
        if not self.expands:
            return None
        chunks = len(starts) - 1
        return Expanded(chunks, self.decodes, starts, keys=self.tokens, longest=self.tokens)

    def layout(self, updates: int = 0) -> StepLayout:
        """Return the layout of its inputs; the graph does not read the ``updates``."""
        return StepLayout(
            tokens=self.size,
            starts=MAX_GRAPH_CHUNKS + 2,
            kept=self.decodes + MAX_GRAPH_CHUNKS,
            updates=updates,
        )


def decode_layout(size: int) -> StepLayout:
    """Return the layout of a decode step of ``size`` tokens, with as many table changes."""
    return StepLayout(tokens=size, updates=size)


class CudaGraphs:
    """The graphs of one model, over the inputs in a `StepBuffer`; none until `capture`.

    Args:
        limits: what the largest step may hold.
        table: the page table, int32 [limits.max_running + 1, columns]; its last row is for padding.
        buffer: where the inputs of steps are.
        keeps_latents: whether prompts may attend to keys and values made from latents.
    """

    def __init__(
        self, limits: Limits, table: Tensor, buffer: StepBuffer, keeps_latents: bool = False
    ) -> None:
        self._limits = limits
        self._table = table
        self._buffer = buffer
        self.decode: dict[int, DecodeGraph] = {}
        """By batch size, smallest first."""
        self.prompts: dict[PromptShape, Replayable] = {}
        """Smallest first."""
        self.kept_logits = torch.empty(0)
        """[R, V]: where all graphs with prompts leave their logits."""
        most = limits.most_decodes
        self._sizes = [
            *(size for size in DECODE_BUCKETS if size < most),
            min(most, DECODE_BUCKETS[-1]),
        ]
        longest = min(limits.token_budget, limits.context_length)
        self._shapes = [
            PromptShape(decodes, tokens, expands)
            for tokens in PREFILL_BUCKETS
            if tokens <= longest
            for decodes in sorted({min(count, most) for count in GRAPH_DECODE_BATCHES})
            for expands in _expands_options(tokens, keeps_latents)
        ]

    def memory_bytes(self, step_bytes: int, row_bytes: int) -> int:
        """Return what the graphs will need, about.

        Decode graphs keep their logits; those with prompts share the logits of the largest, and
        the memory of one step.

        Args:
            step_bytes: what a step of ``limits.token_budget`` tokens needs.
            row_bytes: the size of one row of logits.
        """
        logits = (sum(self._sizes) + self._kept_rows) * row_bytes
        largest = max((shape.size for shape in self._shapes), default=0)
        return logits + (step_bytes + logits) * largest // self._limits.token_budget

    @property
    def _kept_rows(self) -> int:
        return max((shape.decodes for shape in self._shapes), default=0) + MAX_GRAPH_CHUNKS

    def decode_size(self, step: Step) -> int | None:
        """Return the size of the graph that runs ``step``, None when there is none."""
        if step.decodes != len(step.chunks):
            return None
        tokens = step.decode_tokens
        size = next((size for size in self.decode if size >= tokens), None)
        return size if size is not None and len(step.updates) <= size else None

    def prompt_shape(self, step: Step) -> PromptShape | None:
        """Return the smallest shape with a graph that holds ``step``, None when there is none."""
        prefills = step.chunks[step.decodes :]
        if not 0 < len(prefills) <= MAX_GRAPH_CHUNKS:
            return None
        tokens = sum(chunk.count for chunk in prefills)
        decodes = step.decode_tokens
        all_begin = not any(chunk.start for chunk in prefills)
        saved = sum(pairs_saved(before, new) for before, new in step.expanded)
        if not all_begin and saved > PAIRS_WORTH_LAUNCHES:
            return None
        fitting = (
            shape
            for shape in self.prompts
            if shape.decodes >= decodes
            and shape.tokens >= tokens
            and (all_begin or not shape.expands)
        )
        return next(fitting, None)

    def replay_decode(self, step: Step, size: int) -> tuple[Tensor, Tensor]:
        """Run ``step``, which only decodes, as the graph of ``size``; return logits and tokens,
        after each of its tokens.
        """
        self.fill_decode(step, size)
        graph = self.decode[size]
        count = step.decode_tokens
        graph.graph.replay()
        return graph.logits[:count], graph.tokens[:count]

    def replay_prompts(self, step: Step, shape: PromptShape) -> list[int]:
        """Run ``step`` as the graph of ``shape``; return the rows of `kept_logits` that hold the
        logits of its chunks that sample.
        """
        inputs = self.fill_prompts(step, shape)
        if step.updates:
            update_table(self._table, inputs)
        self.prompts[shape].replay()
        prefills = enumerate(step.chunks[step.decodes :], start=shape.decodes)
        return [*range(step.decode_tokens), *(row for row, chunk in prefills if chunk.samples)]

    def fill_decode(self, step: Step, size: int) -> StepInputs[Tensor]:
        """Send the inputs of ``step``, padded to ``size``, to the device; return them."""
        layout = decode_layout(size)
        inputs = self._buffer.on_host(layout)
        count = fill_tokens(inputs, step.chunks)
        padding = self._limits.max_running
        inputs.token_ids[count:] = 0
        inputs.positions[count:] = 0
        inputs.rows[count:] = padding
        inputs.table_index[:] = padding * self._table.shape[1]
        inputs.table_pages[:] = 0
        fill_updates(inputs, step.updates, self._table)
        return self._buffer.send(layout)

    def fill_prompts(self, step: Step, shape: PromptShape) -> StepInputs[Tensor]:
        """Send the inputs of ``step``, padded to ``shape``, to the device; return them.

        Places that stay free decode, or are a prompt, on the row for padding.
        """
        layout = shape.layout(len(step.updates))
        prefills = step.chunks[step.decodes :]
        inputs = self._buffer.on_host(layout)
        inputs.token_ids[:] = 0
        inputs.positions[:] = 0
        inputs.rows[:] = self._limits.max_running
        fill_tokens(inputs, step.chunks[: step.decodes])
        end = fill_tokens(inputs, prefills, start=shape.decodes)
        inputs.positions[end:] = np.arange(len(inputs.positions) - end)
        stops = np.cumsum([chunk.count for chunk in prefills], dtype=np.int32)
        inputs.starts[0] = 0
        inputs.starts[1:] = shape.tokens
        inputs.starts[1 : len(stops) + 1] = stops
        inputs.kept[:] = 0
        inputs.kept[: shape.decodes] = np.arange(shape.decodes)
        inputs.kept[shape.decodes : shape.decodes + len(stops)] = shape.decodes + stops - 1
        fill_updates(inputs, step.updates, self._table)
        return self._buffer.send(layout)

    def warm_up(
        self,
        decode: Callable[[StepInputs[Tensor]], tuple[Tensor, Tensor]],
        prompts: Callable[[StepInputs[Tensor], PromptShape], Tensor],
    ) -> None:
        """Run the steps of all graphs once; see `capture`."""
        for size in self._sizes:
            decode(self.fill_decode(NOTHING, size))
            _wait_for_device()
        for shape in self._shapes:
            prompts(self.fill_prompts(NOTHING, shape), shape)
            _wait_for_device()

    def capture(
        self,
        decode: Callable[[StepInputs[Tensor]], tuple[Tensor, Tensor]],
        prompts: Callable[[StepInputs[Tensor], PromptShape], Tensor],
        device: torch.device,
        layers: Sequence[nn.Module],
    ) -> None:
        """Capture all graphs, the largest first. Where the model's code does not allow it or memory
        ends, some or all are missing, and a warning says so.

        Args:
            decode: runs a decode step; returns logits [size, V] and tokens [size].
            prompts: runs a step with prompts; returns the logits [R, V] of the kept tokens.
            device: a CUDA device.
            layers: the decoder layers that both run.
        """
        record = Recorder(device, layers)
        try:
            for size in reversed(self._sizes):
                inputs = self.fill_decode(NOTHING, size)
                run = partial(decode, inputs)
                graph, (logits, tokens) = record(run, all_layers=not self.decode)
                self.decode[size] = DecodeGraph(graph, logits, tokens)
            self.kept_logits = logits.new_empty(self._kept_rows, logits.shape[1])
            for shape in sorted(self._shapes, key=_cost, reverse=True):
                inputs = self.fill_prompts(NOTHING, shape)
                keep = partial(self.keep_logits, prompts, inputs, shape)
                self.prompts[shape], _ = record(keep, all_layers=not self.prompts)
        except torch.OutOfMemoryError:
            wanted = len(self._sizes) + len(self._shapes)
            warnings.warn(
                f"there is memory for {len(self)} of {wanted} CUDA graphs; "
                "lower mem_fraction_static",
                stacklevel=2,
            )
        except (RuntimeError, ValueError) as error:
            self.prompts.clear()
            if len(self.decode) < len(self._sizes):
                self.decode.clear()
            what = "prompts run" if self.decode else "decode runs"
            warnings.warn(
                f"{what} without CUDA graphs, which this model does not allow: {one_line(error)}",
                stacklevel=2,
            )
        self.decode = dict(sorted(self.decode.items()))
        self.prompts = {shape: self.prompts[shape] for shape in sorted(self.prompts, key=_cost)}

    def keep_logits(
        self,
        prompts: Callable[[StepInputs[Tensor], PromptShape], Tensor],
        inputs: StepInputs[Tensor],
        shape: PromptShape,
    ) -> None:
        """Run a step of ``shape`` and keep its logits: what its graph does."""
        logits = prompts(inputs, shape)
        self.kept_logits[: len(logits)].copy_(logits)

    def close(self) -> None:
        """Give the memory back."""
        self.decode, self.prompts = {}, {}
        self.kept_logits = self._table = torch.empty(0)

    def __len__(self) -> int:
        return len(self.decode) + len(self.prompts)


def _expands_options(tokens: int, keeps_latents: bool) -> tuple[bool, ...]:
    """Return `PromptShape.expands` of each graph for ``tokens`` tokens of prompts."""
    if not keeps_latents or tokens < MIN_EXPANDED_TOKENS:
        return (False,)
    return (True, False) if tokens <= MAX_ABSORBED_TOKENS else (True,)


def _cost(shape: PromptShape) -> tuple[int, bool]:
    """Return a sort key: the smallest first, and of one size the one that attends to keys."""
    return shape.size, not shape.expands


def _wait_for_device() -> None:
    """Wait until the device has read the inputs, before others take their place on the host."""
    torch.cuda.current_stream().synchronize()


class Recorder:
    """Captures graphs that share a memory pool.

    Args:
        device: a CUDA device.
        layers: the decoder layers that run in all graphs; those that repeat others are skipped
            before captures that allow it.
    """

    def __init__(self, device: torch.device, layers: Sequence[nn.Module] = ()) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._layers = layers
        self._repeated = repeats(layers)

    def __call__(
        self, run: Callable[[], Result], *, all_layers: bool = True
    ) -> tuple[torch.cuda.CUDAGraph, Result]:
        """Return the graph of what ``run`` does, and its result, which replays write again.

        Args:
            run: launches what the graph does.
            all_layers: whether the pass before the capture, which loads the kernels, also runs the
                layers that repeat others.
        """
        if all_layers or not self._repeated:
            return self._capture(run, nullcontext())
        try:
            return self._capture(run, skipping(self._repeated, self._layers))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            LOG.debug("all layers run before each capture of a CUDA graph: %s", one_line(error))
            self._repeated = {}
            # a failed capture may leave the old pool in use
            self._pool = torch.cuda.graph_pool_handle()
            return self._capture(run, nullcontext())

    def _capture(
        self, run: Callable[[], Result], warm_up_context: AbstractContextManager[None]
    ) -> tuple[torch.cuda.CUDAGraph, Result]:
        """Call ``run`` within ``warm_up_context``, then capture its graph."""
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):  # also ends when a capture fails
            with warm_up_context:
                run()  # what is loaded at its first launch is loaded now
            # thread_local: another engine may be running in another thread
            with torch.cuda.graph(
                graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
            ):
                result = run()
        torch.cuda.current_stream().wait_stream(stream)
        return graph, result

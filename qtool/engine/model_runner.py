"""The model on its device: the KV cache, one step launched at a time; steps that only decode, and
small ones with prompts, as CUDA graphs.
"""

from __future__ import annotations

import itertools
import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import psutil
import torch
from torch import Tensor

from qtool.engine.attention.interface import NAME, LayerGeometry, recording, running
from qtool.engine.attention.pages import PAGE, KVPages, Packed, new_counters
from qtool.engine.decoder_layers import fuse
from qtool.engine.sampler import History, Logprobs, RowRequest, Sampler, greedy, logprobs_of
from qtool.engine.sampling_params import SamplingParams
from qtool.engine.scheduler import PROMPT_LOGITS, Chunk, Step
from qtool.errors import CheckpointRefused, ResourceError, one_line
from qtool.runtime.kernels import current
from qtool.runtime.linear import ExpertStack

LOG = logging.getLogger("qtool.engine")
# decode batches that have a CUDA graph
BUCKETS = (
    1,
    2,
    4,
    8,
    16,
    24,
    32,
    48,
    64,
    96,
    128,
    160,
    192,
    224,
    256,
    384,
    512,
)
# tokens of prompts of steps that have a CUDA graph: more keep the device busy by themselves
PREFILL_BUCKETS = (
    64,
    128,
    256,
    512,
    1024,
    2048,
)
BESIDE = (0, 64, 256)  # sequences that decode in such a step
CHUNKS = 8  # pieces of prompts in it, at most
FLYING = 2  # steps whose arrays may be in use: one is filled while the one before it is on its way
CPU_SHARE = 0.25  # of the free host memory, for the KV cache of a CPU


@dataclass(frozen=True)
class Limits:
    """How much runs at once: sequences, tokens a step, tokens of one sequence."""

    max_running: int
    token_budget: int
    context_length: int


@dataclass
class InFlightStep:
    """A step on its way: what it will say once `wait` has returned."""

    step: Step
    # int32, on the host: one for each chunk that samples, -1 where the logits were not finite
    tokens: Tensor
    done: torch.cuda.Event | None
    logprobs: Logprobs | None = None
    """On the host, of `logprob_rows`."""
    logprob_rows: tuple[int, ...] = ()
    prompts: dict[int, Logprobs] = field(default_factory=dict)
    """Those of the tokens after each of a chunk's, by the position of the chunk."""

    def wait(self) -> list[int]:
        """Wait until the device has done the step; return its tokens."""
        if self.done is not None:
            self.done.synchronize()
        return cast(list[int], self.tokens.tolist())


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    logits: Tensor
    tokens: Tensor


# of a step with prompts that has a CUDA graph: sequences that decode, tokens of prompts
Shape = tuple[int, int]


class Runner:
    """Runs the steps of a scheduler on a model.

    Args:
        model: a causal language model of transformers, on ``device``, whose attention is
            `qtool.engine.attention.interface`'s.
        static_share: of the device's memory, for weights and KV cache together; without meaning on
            a CPU.
        max_tokens: the size of the KV cache, instead of what memory allows.
        cache_scales: for keys and values of each layer; with them the cache has 8 bits.
        compiled: in which steps decoder layers that cannot be fused run through `torch.compile`.
    Raises: ResourceError, when the device has no memory for a KV cache.
    """

    def __init__(
        self,
        model: Any,
        device: torch.device,
        limits: Limits,
        *,
        static_share: float,
        max_tokens: int | None = None,
        cache_scales: Mapping[int, tuple[float, float]] | None = None,
        cuda_graphs: bool = True,
        compiled: Literal["off", "decode", "all"] = "off",
    ) -> None:
        self.model, self.device, self.limits = model, device, limits
        self.vocab_size: int = model.get_output_embeddings().out_features
        self.sampler = Sampler(self.vocab_size, device)
        self._dtype = model.dtype if cache_scales is None else torch.float8_e4m3fn
        self._scales = cache_scales or {}
        # they ask the device which of them have tokens
        experts = any(isinstance(module, ExpertStack) for module in model.modules())
        self._wants_graphs = cuda_graphs and device.type == "cuda" and not experts
        self._buckets = [
            *(bucket for bucket in BUCKETS if bucket < limits.max_running),
            min(limits.max_running, BUCKETS[-1]),
        ]
        self._columns = -(-limits.context_length // PAGE)
        most = min(limits.token_budget, limits.context_length)
        beside = sorted({min(count, limits.max_running) for count in BESIDE})
        self._shapes = [
            (decodes, tokens) for tokens in PREFILL_BUCKETS if tokens <= most for decodes in beside
        ]
        width = (
            (limits.token_budget + limits.max_running) * 3
            + PROMPT_LOGITS
            + (limits.max_running + 1) * (3 + 2 * self._columns)
        )
        self._host = [
            torch.zeros(width, dtype=torch.int32, pin_memory=device.type == "cuda")
            for _ in range(FLYING)
        ]
        self._answers = [
            torch.zeros(limits.max_running, dtype=torch.int32, pin_memory=device.type == "cuda")
            for _ in range(FLYING)
        ]
        self._turns = itertools.cycle(range(FLYING))
        with torch.inference_mode(), current(device):
            self._inputs = torch.zeros(width, dtype=torch.int32, device=device)
            # the last row is for padding
            self.table = torch.zeros(
                limits.max_running + 1, self._columns, dtype=torch.int32, device=device
            )
            # the token that each row sampled last
            self._last = torch.zeros(limits.max_running + 1, dtype=torch.int32, device=device)
            said = _Stopwatch()
            _freeze_rotary(model, limits.context_length)
            self.geometry = self._record()
            self._eager_prefill = compiled == "decode"
            if not fuse(model) and compiled != "off":
                for layer in model.get_decoder().layers:
                    layer.compile(dynamic=True)
            said("layers fused")
            heads = max(layer.kv_heads for layer in self.geometry)
            self._counters = new_counters(limits.max_running, heads, device)
            self.layers: dict[int, KVPages] = self._pages(0)
            peak = self._peak()
            said("largest step tried")
            self.page_count = self._affordable(static_share, max_tokens, peak)
            self.layers = self._pages(self.page_count)
            self.graphs: dict[int, _Graph] = {}
            self.prompt_graphs: dict[Shape, torch.cuda.CUDAGraph] = {}
            self._kept_logits = torch.empty(0)  # what all of those leave their logits in
            if self._wants_graphs:
                self._capture()
                said(
                    f"{len(self.graphs)} CUDA graphs captured for decoding, "
                    f"{len(self.prompt_graphs)} for prompts"
                )

    @property
    def page_bytes(self) -> int:
        """Bytes of a page of tokens, in all layers."""
        sizes = (layer.kv_heads * (layer.head_dim + layer.v_head_dim) for layer in self.geometry)
        return sum(sizes) * PAGE * self._dtype.itemsize

    def _record(self) -> list[LayerGeometry]:
        """Return what the attention of each layer is, found by a dry pass."""
        self.model.set_attn_implementation(NAME)
        with recording() as found:
            self.model(
                input_ids=self._inputs[None, :1].long(),
                position_ids=self._inputs[None, :1].long(),
                use_cache=False,
            )
        layers = self.model.config.get_text_config().num_hidden_layers
        if len(found.layers) != layers:
            message = (
                f"{len(found.layers)} of the model's {layers} layers attend to a cache of keys "
                "and values"
            )
            raise CheckpointRefused(
                "E_ATTENTION", message, hint="`--engine vllm` hands the checkpoint to vLLM"
            )
        return found.layers

    def close(self) -> None:
        """Give the memory back."""
        self.graphs, self.prompt_graphs, self.layers, self.model = {}, {}, {}, None
        self.table = self._inputs = self._last = self._kept_logits = torch.empty(0)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _pages(self, count: int) -> dict[int, KVPages]:
        """Return the cache of ``count`` pages and one that nobody reads, page 0, in which padding
        writes.
        """
        pages = {}
        for layer in self.geometry:
            k_scale, v_scale = self._scales.get(layer.layer_idx, (1.0, 1.0))
            shape = (count + 1, layer.kv_heads, PAGE)
            k = torch.zeros(*shape, layer.head_dim, dtype=self._dtype, device=self.device)
            v = torch.zeros(*shape, layer.v_head_dim, dtype=self._dtype, device=self.device)
            pages[layer.layer_idx] = KVPages(k, v, k_scale, v_scale)
        return pages

    def _peak(self) -> int:
        """Return the bytes that the largest step needs beside weights and cache, found by running
        it: prefill of new prompts on scratch pages.
        """
        if self.device.type != "cuda":
            return 0
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        params = SamplingParams(top_p=0.9, logit_bias={0: 1.0}, repetition_penalty=1.1)
        row = RowRequest(
            params, 0, 0, History([0]), mask=np.full(-(-self.vocab_size // 32), -1, np.int32)
        )
        longest = self.limits.context_length
        # the small ones only make the kernels compile before they are wanted
        for tokens in (
            self.limits.token_budget,
            300,
            40,
            12,
            5,
            1,
        ):
            tokens = min(tokens, self.limits.token_budget)
            starts = torch.tensor(
                [*range(0, tokens, longest), tokens], dtype=torch.int32, device=self.device
            )
            positions = torch.arange(tokens, dtype=torch.int32, device=self.device) % longest
            rows = torch.full_like(positions, self.limits.max_running)
            packed = Packed(
                self.table,
                rows,
                positions,
                0,
                starts,
                longest=min(tokens, longest),
                counters=self._counters,
            )
            kept = torch.zeros(
                min(self.limits.max_running, tokens), dtype=torch.long, device=self.device
            )
            self.sampler.sample(
                self._logits(packed, torch.zeros_like(positions), kept), [row] * len(kept)
            )
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        torch.cuda.empty_cache()
        return peak

    def _affordable(self, static_share: float, max_tokens: int | None, peak: int) -> int:
        """Return the number of pages of the cache."""
        most = (
            (self.limits.max_running * self._columns)
            if max_tokens is None
            else -(-max_tokens // PAGE)
        )
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            room = int(total * static_share) - (total - free)
            # each keeps its logits, or they share those of the largest, and a step's memory
            if self._wants_graphs:
                rows = (
                    sum(self._buckets)
                    + max((decodes for decodes, _ in self._shapes), default=0)
                    + CHUNKS
                )
                peak += rows * self.vocab_size * self.model.dtype.itemsize
                peak += (
                    peak
                    * max((sum(shape) for shape in self._shapes), default=0)
                    // self.limits.token_budget
                )
            if free - room < peak:
                lowered = free - peak
                needed = f"a step of {self.limits.token_budget} tokens needs the rest"
                message = (
                    f"the KV cache gets {lowered / 1e9:.1f} GB instead of {room / 1e9:.1f}: "
                    f"{needed}"
                )
                warnings.warn(message, stacklevel=2)
                room = lowered
        else:
            room = int(psutil.virtual_memory().available * CPU_SHARE)
        count = min(most, room // self.page_bytes)
        if count < 1 or (max_tokens is not None and count < most):
            message = (
                f"{max(room, 0) / 1e9:.1f} GB are left for the KV cache, which is "
                f"{max(room, 0) // self.page_bytes * PAGE} tokens"
            )
            hint = (
                "raise mem_fraction_static or lower chunked_prefill_size"
                if self.device.type == "cuda"
                else "a quarter of the free memory is taken"
            )
            raise ResourceError("E_KV_CACHE", message, hint=f"{hint}; or lower max_total_tokens")
        return count

    def _logits(self, packed: Packed, ids: Tensor, kept: Tensor | int) -> Tensor:
        """Return the logits [R, V] after the tokens at ``kept`` of ``ids`` [T], -1 for what its row
        sampled last; 0: after all.
        """
        ids = torch.where(ids < 0, self._last[packed.rows], ids)
        eager = self._eager_prefill and packed.starts is not None
        with (
            running(packed, self.layers),
            torch.compiler.set_stance("force_eager") if eager else nullcontext(),
        ):
            output = self.model(
                input_ids=ids[None],
                position_ids=packed.positions[None],
                logits_to_keep=kept,
                use_cache=False,
            )
        logits: Tensor = output.logits[0]
        return logits

    def launch(
        self, step: Step, requests: Sequence[RowRequest], prompts: Sequence[tuple[int, int]] = ()
    ) -> InFlightStep:
        """Start ``step``. Does not wait for the device.

        Args:
            requests: how to sample, for each chunk that samples.
            prompts: (position of a chunk, how many alternatives) where the log probabilities of a
                prompt are wanted.
        """
        turn = next(self._turns)
        chunks = step.chunks
        size = (
            next((bucket for bucket in self.graphs if bucket >= step.decodes), 0)
            if step.decodes == len(chunks) and not prompts
            else 0
        )
        shape = self._shape_for(step) if not prompts else None
        if size and len(step.updates) <= size:
            logits, tokens = self._replay(turn, step, size)
        elif shape:
            logits, tokens = self._replay_prompts(turn, step, shape), None
        else:
            logits, tokens = self._run(turn, step, [position for position, _ in prompts]), None
        asked: dict[int, Logprobs] = {}
        if prompts:
            rows_of = _rows_of_logits(step, [position for position, _ in prompts])
            asked = self._prompt_logprobs(step, logits, prompts, rows_of)
            logits = logits[
                self._shipped(
                    [rows[-1] for chunk, rows in zip(chunks, rows_of, strict=True) if chunk.samples]
                )
            ]
        launched = InFlightStep(step, self._answers[turn][: len(requests)], None)
        if requests and (tokens is None or not all(_is_plain(request) for request in requests)):
            samples = self.sampler.sample(logits, requests)
            tokens = samples.tokens.int()
            rows = self._shipped([chunk.sequence.row for chunk in chunks if chunk.samples])
            # of logits that are not finite the next step gets some token, until they are read
            self._last.index_put_((rows,), tokens.clamp(min=0))
            if samples.logprobs is not None:
                launched.logprobs, launched.logprob_rows = (
                    _on_host(samples.logprobs),
                    samples.logprob_rows,
                )
        if tokens is not None:
            launched.tokens.copy_(tokens, non_blocking=True)
        launched.prompts = {position: _on_host(logprobs) for position, logprobs in asked.items()}
        if self.device.type == "cuda":
            launched.done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            launched.done.record()
        return launched

    def _replay(self, turn: int, step: Step, size: int) -> tuple[Tensor, Tensor]:
        """Run a step of decode chunks as the CUDA graph of ``size``."""
        count, padding = len(step.chunks), self.limits.max_running
        array = self._host[turn].numpy()[: 5 * size].reshape(5, size)
        array[:3, :count] = self._token_arrays(step.chunks)
        array[:2, count:], array[2, count:] = 0, padding
        array[3, :], array[4, :] = padding * self._columns, 0
        for i, (row, column, page) in enumerate(step.updates):
            array[3, i], array[4, i] = row * self._columns + column, page
        self._inputs[: 5 * size].copy_(self._host[turn][: 5 * size], non_blocking=True)
        graph = self.graphs[size]
        graph.graph.replay()
        return graph.logits[:count], graph.tokens[:count]

    def _decode(self, size: int) -> tuple[Tensor, Tensor]:
        """Return logits and tokens of ``size`` sequences, from `_inputs`: token, position and row
        of each, and changes of the table.
        """
        ids, positions, rows, places, pages = self._inputs[: 5 * size].view(5, size).unbind()
        self.table.view(-1).index_put_((places,), pages)
        logits = self._logits(
            Packed(self.table, rows, positions, size, counters=self._counters), ids, 0
        )
        tokens = greedy(logits).int()
        self._last.index_put_((rows,), tokens.clamp(min=0))
        return logits, tokens

    def _shape_for(self, step: Step) -> Shape | None:
        """Return the smallest shape of a CUDA graph that holds ``step``, pieces of prompts and what
        decodes beside them.
        """
        prefills = step.chunks[step.decodes :]
        if not 0 < len(prefills) <= CHUNKS:
            return None
        tokens = sum(chunk.count for chunk in prefills)
        return next(
            (
                shape
                for shape in self.prompt_graphs
                if shape[0] >= step.decodes and shape[1] >= tokens
            ),
            None,
        )

    def _replay_prompts(self, turn: int, step: Step, shape: Shape) -> Tensor:
        """Run a step as the CUDA graph of ``shape``, and return its logits.

        What is too much decodes, or is a prompt, on the row for padding.
        """
        decodes, size = shape
        whole, prefills = decodes + size, step.chunks[step.decodes :]
        ends = list(itertools.accumulate(chunk.count for chunk in prefills))
        used, fixed = ends[-1], 3 * whole + CHUNKS + 2 + decodes + CHUNKS
        array = self._host[turn].numpy()
        tokens = array[: 3 * whole].reshape(3, whole)
        tokens[:2], tokens[2] = 0, self.limits.max_running
        tokens[:, : step.decodes] = self._token_arrays(step.chunks[: step.decodes])
        tokens[:, decodes : decodes + used] = self._token_arrays(prefills)
        tokens[1, decodes + used :] = np.arange(size - used)
        bounds, kept = (
            array[3 * whole : 3 * whole + CHUNKS + 2],
            array[fixed - decodes - CHUNKS : fixed],
        )
        bounds[:], kept[:] = size, 0
        bounds[: len(prefills) + 1] = [0, *ends]
        kept[:decodes], kept[decodes : decodes + len(prefills)] = (
            np.arange(decodes),
            np.array(ends) + decodes - 1,
        )
        stop = fixed + 2 * len(step.updates)
        array[fixed:stop] = [
            *(row * self._columns + column for row, column, _ in step.updates),
            *(page for *_, page in step.updates),
        ]
        self._inputs[:stop].copy_(self._host[turn][:stop], non_blocking=True)
        if step.updates:
            places, pages = self._inputs[fixed:stop].view(2, -1).unbind()
            self.table.view(-1).index_put_((places,), pages)
        self.prompt_graphs[shape].replay()
        rows = [
            *range(step.decodes),
            *(decodes + i for i, chunk in enumerate(prefills) if chunk.samples),
        ]
        return self._kept_logits.index_select(0, self._shipped(rows))

    def _prompts(self, shape: Shape) -> Tensor:
        """Return the logits of a step of ``shape``, one row for each that decodes and for each of
        `CHUNKS`, from `_inputs`.
        """
        decodes, size = shape
        whole = decodes + size
        ids, positions, rows = self._inputs[: 3 * whole].view(3, whole).unbind()
        bounds, kept = (
            self._inputs[3 * whole :][: CHUNKS + 2],
            self._inputs[3 * whole + CHUNKS + 2 :][: decodes + CHUNKS],
        )
        return self._logits(
            Packed(
                self.table, rows, positions, decodes, bounds, longest=size, counters=self._counters
            ),
            ids,
            kept.long(),
        )

    def _run(self, turn: int, step: Step, whole: Sequence[int]) -> Tensor:
        """Run any step, launch by launch, and return its logits; ``whole``: the positions of chunks
        all of whose logits are wanted.
        """
        chunks, updates, decodes = step.chunks, step.updates, step.decodes
        starts = np.cumsum([0, *(chunk.count for chunk in chunks)])
        tokens = int(starts[-1])
        array = self._host[turn].numpy()
        array[: 3 * tokens].reshape(3, tokens)[:] = self._token_arrays(chunks)
        kept = [
            place
            for i, chunk in enumerate(chunks)
            for place in (
                range(starts[i], starts[i + 1])
                if i in whole
                else [starts[i + 1] - 1]
                if chunk.samples
                else []
            )
        ]
        parts: list[Any] = [
            starts[decodes:] - decodes,
            kept,
            [row * self._columns + column for row, column, _ in updates],
            [page for *_, page in updates],
        ]
        offsets = np.cumsum([3 * tokens, *(len(part) for part in parts)])
        for part, offset in zip(parts, offsets, strict=False):
            array[offset : offset + len(part)] = part
        self._inputs[: offsets[-1]].copy_(self._host[turn][: offsets[-1]], non_blocking=True)
        ids, positions, rows = self._inputs[: 3 * tokens].view(3, tokens).unbind()
        bounds, wanted, places, pages = (
            self._inputs[start:stop] for start, stop in itertools.pairwise(offsets)
        )
        if updates:
            self.table.view(-1).index_put_((places,), pages)
        packed = Packed(
            self.table,
            rows,
            positions,
            decodes,
            bounds if decodes < len(chunks) else None,
            counters=self._counters,
        )
        packed.longest = max((chunk.count for chunk in chunks[decodes:]), default=0)
        return self._logits(packed, ids, wanted.long())

    @staticmethod
    def _token_arrays(chunks: Sequence[Chunk]) -> tuple[list[int], list[int], list[int]]:
        """Return token (-1 where the host does not know it yet), position and row of each token of
        ``chunks``.
        """
        ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        for chunk in chunks:
            sequence, stop = chunk.sequence, chunk.start + chunk.count
            assert sequence.row is not None
            tokens = sequence.tokens[chunk.start : stop]
            ids += tokens
            ids += [-1] * (chunk.count - len(tokens))
            positions += range(chunk.start, stop)
            rows += [sequence.row] * chunk.count
        return ids, positions, rows

    def _prompt_logprobs(
        self,
        step: Step,
        logits: Tensor,
        prompts: Sequence[tuple[int, int]],
        rows_of: Sequence[range],
    ) -> dict[int, Logprobs]:
        """Return the log probabilities of the prompt's token after each token of some chunks."""
        found: dict[int, Logprobs] = {}
        for position, alternatives in prompts:
            chunk, first = step.chunks[position], rows_of[position].start
            following = chunk.sequence.tokens[chunk.start + 1 : chunk.start + chunk.count + 1]
            found[position] = logprobs_of(
                logits[first : first + len(following)], self._shipped(following), alternatives
            )
        return found

    def _shipped(self, numbers: Sequence[int | None]) -> Tensor:
        """Return ``numbers`` on the device, int64, without waiting for it."""
        return torch.tensor(numbers, dtype=torch.long, pin_memory=self.device.type == "cuda").to(
            self.device, non_blocking=True
        )

    def _capture(self) -> None:
        """Capture the steps that have graphs, the largest first; none, and a warning, where the
        model's code does not allow it.
        """
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

        def captured(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run()  # what compiles at first use does so now
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # another engine may run
            with torch.cuda.graph(
                graph, pool=pool, stream=stream, capture_error_mode="thread_local"
            ):
                result = run()
            return graph, result

        graphs: dict[int, _Graph] = {}
        prompts: dict[Shape, torch.cuda.CUDAGraph] = {}
        padding = torch.tensor(
            [[self.limits.max_running], [self.limits.max_running * self._columns]]
        )
        try:
            for size in reversed(self._buckets):
                self._inputs.zero_()
                self._inputs[: 5 * size].view(5, size)[2:4] = padding
                graph, (logits, tokens) = captured(partial(self._decode, size))
                graphs[size] = _Graph(graph, logits, tokens)
            rows = max((decodes for decodes, _ in self._shapes), default=0) + CHUNKS
            self._kept_logits = logits.new_empty(rows, self.vocab_size)
            for shape in sorted(self._shapes, key=sum, reverse=True):
                self._pad(shape)
                prompts[shape], _ = captured(partial(self._keep_logits, shape))
        except torch.OutOfMemoryError:
            asked, made = len(self._buckets) + len(self._shapes), len(graphs) + len(prompts)
            warnings.warn(
                f"there is memory for {made} of {asked} CUDA graphs; lower mem_fraction_static",
                stacklevel=2,
            )
        except (RuntimeError, ValueError) as error:
            prompts, graphs = {}, graphs if len(graphs) == len(self._buckets) else {}
            what = "prompts run" if graphs else "decode runs"
            warnings.warn(
                f"{what} without CUDA graphs, which this model does not allow: {one_line(error)}",
                stacklevel=2,
            )
        self.graphs = dict(sorted(graphs.items()))
        self.prompt_graphs = dict(sorted(prompts.items(), key=lambda item: sum(item[0])))

    def _pad(self, shape: Shape) -> None:
        """Fill `_inputs` with a step of ``shape`` that is nothing but padding."""
        decodes, size = shape
        whole = decodes + size
        self._inputs.zero_()
        self._inputs[: 3 * whole].view(3, whole)[2] = self.limits.max_running
        self._inputs[whole + decodes : 2 * whole] = torch.arange(size)
        self._inputs[3 * whole + 1 : 3 * whole + CHUNKS + 2] = size

    def _keep_logits(self, shape: Shape) -> None:
        self._kept_logits[: shape[0] + CHUNKS].copy_(self._prompts(shape))


def _rows_of_logits(step: Step, whole: Sequence[int]) -> list[range]:
    """Return which rows of the logits each chunk has: one for each token where it is in ``whole``,
    else one if it samples.
    """
    sizes = [
        chunk.count if position in whole else int(chunk.samples)
        for position, chunk in enumerate(step.chunks)
    ]
    return [
        range(stop - size, stop)
        for size, stop in zip(sizes, itertools.accumulate(sizes), strict=True)
    ]


def _freeze_rotary(model: Any, context_length: int) -> None:
    """Settle rotary embeddings that change with the longest position of a pass (longrope, dynamic)
    for the whole context, as vLLM does.

    Sequences of any length share a pass here, and keys that were rotated once stay in the cache.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if kinds is None or "inv_freq" not in " ".join(name for name, _ in module.named_buffers()):
            continue
        last = torch.tensor([[context_length - 1]], device=model.device)
        for layer_type in kinds if isinstance(kinds, dict) else [None]:
            module(
                torch.zeros(1, dtype=model.dtype, device=model.device),
                last,
                *([layer_type] if layer_type else []),
            )
        module.rope_type = dict.fromkeys(kinds, "default") if isinstance(kinds, dict) else "default"


class _Stopwatch:
    """Logs how long each part of a start took."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, what: str) -> None:
        now = time.monotonic()
        LOG.info("%s in %.1f s", what, now - self._last)
        self._last = now


def _is_plain(request: RowRequest) -> bool:
    """Whether the largest logit is all that is wanted."""
    return request.params.greedy and not request.changes_logits and not request.logprobs


def _on_host(logprobs: Logprobs) -> Logprobs:
    return Logprobs(
        *(
            part.to("cpu", non_blocking=True)
            for part in (logprobs.chosen, logprobs.top, logprobs.top_ids)
        )
    )

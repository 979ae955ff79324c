"""The model on its device: launches one step at a time, without waiting for it."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Hashable, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from qtool.engine import kv_cache
from qtool.engine.attention.interface import running
from qtool.engine.attention.latents import reserve_bytes
from qtool.engine.attention.native_decode import decode_library
from qtool.engine.attention.pages import PAGE, LayerCache, Packed, new_counters
from qtool.engine.cuda_graphs import CudaGraphs, PromptShape
from qtool.engine.delta_net import replace_delta_nets
from qtool.engine.fusion import compile_ahead, fuse
from qtool.engine.in_flight import InFlightStep
from qtool.engine.latent_attention import keep_latents
from qtool.engine.layer_kinds import kind_of, run_without_repeats
from qtool.engine.mtp import MtpDrafter
from qtool.engine.requirements import check_by_numbers, record_layers
from qtool.engine.rotary import freeze_rotary
from qtool.engine.sampler import Logprobs, Sampler, greedy, logprobs_of
from qtool.engine.sampling_batch import History, RowRequest
from qtool.engine.sampling_params import SamplingParams
from qtool.engine.scheduler import PROMPT_LOGITS, Limits
from qtool.engine.step import Step
from qtool.engine.step_buffer import (
    NUM_BUFFERS,
    StepBuffer,
    StepInputs,
    StepLayout,
    send_step,
    update_table,
)
from qtool.engine.stopwatch import Stopwatch
from qtool.errors import CheckpointRefused
from qtool.runtime.causal_lm import CausalLM
from qtool.runtime.compiling import compile_in_parallel
from qtool.runtime.experts.per_expert import ExpertStack
from qtool.runtime.kernels import current
from qtool.runtime.mtp import MtpLayer
from qtool.sizes import format_size

LOG = logging.getLogger("qtool.engine")
# Steps of a start that make kernels compile before they are wanted, after the largest.
WARM_UP_TOKENS = (300, 40, 12, 5, 1)


class Runner:
    """Runs the steps of a scheduler on a model.

    Args:
        model: a causal language model of transformers, on ``device``, whose attention is
            `qtool.engine.attention.interface`'s.
        static_share: of the device's memory, for weights and KV cache together; a CPU ignores it.
        max_tokens: the size of the KV cache, instead of what memory allows.
        cache_scales: for keys and values of each layer; with them the cache has 8 bits.
        compiled: in which steps decoder layers that cannot be fused run through `torch.compile`.
        log_time: of the start; logs how long the parts done here take.
    Raises: ResourceError, when the device has no memory for a KV cache.
    """

    def __init__(
        self,
        model: CausalLM,
        device: torch.device,
        limits: Limits,
        *,
        static_share: float,
        max_tokens: int | None = None,
        cache_scales: Mapping[int, tuple[float, float]] | None = None,
        cuda_graphs: bool = True,
        compiled: Literal["off", "decode", "all"] = "off",
        log_time: Stopwatch,
    ) -> None:
        self.model, self.device, self.limits = model, device, limits
        self.vocab_size: int = model.get_output_embeddings().out_features
        self.sampler = Sampler(self.vocab_size, device)
        self._mtp_layer: MtpLayer | None = getattr(model, "mtp", None)
        # experts ask the device which of them have tokens
        experts = any(isinstance(module, ExpertStack) for module in model.modules())
        wants_graphs = cuda_graphs and device.type == "cuda" and not experts
        columns = -(-limits.context_length // PAGE)
        self._eager_prefill = compiled == "decode"
        self.cache_dtype = model.dtype if cache_scales is None else torch.float8_e4m3fn
        scales = cache_scales or {}
        with torch.inference_mode(), current(device):
            self._make_buffers(columns)
            freeze_rotary(model, limits.context_length)
            replace_delta_nets(model)
            keep_latents(model)
            with compile_in_parallel(device):
                self.geometry = record_layers(model, self._mtp_layer)
                self._make_caches(scales)
                compiled_kinds = self._compile_ahead(graphs=wants_graphs)
            is_fused = fuse(model)
            check_by_numbers(model, self.geometry)
            if not is_fused and compiled != "off":
                for layer in self._layers:
                    layer.compile(dynamic=True)
            if self._mtp is not None:
                decoder = cast(nn.Module, model.get_decoder())
                decoder.register_forward_hook(self._mtp.keep_hidden)
            log_time("fusing", "layers fused")
            step_bytes = self._measure_step(graphs=wants_graphs, compiled_kinds=compiled_kinds)
            step_bytes += reserve_bytes(self.geometry.layers, model.dtype)
            log_time("largest step", "largest step tried")
            if wants_graphs:
                row_bytes = self.vocab_size * model.dtype.itemsize
                step_bytes += self.graphs.memory_bytes(step_bytes, row_bytes)
                if self._mtp is not None:
                    step_bytes += self._mtp.memory_bytes(step_bytes, row_bytes)
            room = kv_cache.cache_room(
                device, static_share=static_share, step_bytes=step_bytes, budget=limits.token_budget
            )
            self.page_bytes = kv_cache.page_bytes(self.geometry.layers, self.cache_dtype)
            self.page_count = kv_cache.count_pages(
                room,
                self.page_bytes,
                most=limits.max_running * columns,
                wanted=None if max_tokens is None else -(-max_tokens // PAGE),
                device=device,
            )
            self.layers |= kv_cache.allocate_pages(
                self.page_count, self.geometry.layers, self.cache_dtype, device, scales
            )
            if wants_graphs:
                self.graphs.capture(self.decode, self.prefill, device, self._layers)
                if self._mtp is not None:
                    self._mtp.capture(self.layers, device)
                decode, prompts = len(self.graphs.decode), len(self.graphs.prompts)
                log_time("CUDA graphs", f"{decode} CUDA graphs for decoding, {prompts} for prompts")

    @property
    def keeps_prefixes(self) -> bool:
        """Whether a prompt may start with the pages of another."""
        return True

    def _make_buffers(self, columns: int) -> None:
        """Allocate what steps read and write besides weights and KV cache."""
        limits, device = self.limits, self.device
        largest = StepLayout(
            tokens=limits.token_budget + limits.max_running,
            starts=limits.max_running + 2,
            kept=limits.most_decodes + PROMPT_LOGITS,
            updates=(limits.max_running + 1) * columns,
        )
        self.buffer = StepBuffer(largest, device)
        pinned = device.type == "cuda"
        self._sampled = [
            torch.zeros(limits.most_decodes, dtype=torch.int32, pin_memory=pinned)
            for _ in range(NUM_BUFFERS)
        ]
        rows = limits.max_running + 1  # the last row is for padding
        self.table = torch.zeros(rows, columns, dtype=torch.int32, device=device)
        # the token that each row sampled last
        self._last = torch.zeros(rows, dtype=torch.int32, device=device)

    def _make_caches(self, scales: Mapping[int, tuple[float, float]]) -> None:
        """Allocate what ``self.geometry`` asks for, and the KV cache without pages."""
        limits, device, dtype = self.limits, self.device, self.model.dtype
        self.keeps_latents = any(layer.keeps_latents for layer in self.geometry.layers)
        self.graphs = CudaGraphs(limits, self.table, self.buffer, self.keeps_latents)
        heads = max(layer.groups for layer in self.geometry.layers)
        self._counters = new_counters(limits.most_decodes, heads, device)
        self._mtp: MtpDrafter | None = None
        if self._mtp_layer is not None:
            self._mtp = MtpDrafter(self._mtp_layer, limits, self.table, self._counters)
        # the rows of sequences, and the one for padding
        state_rows = len(self.table) + limits.snapshots
        states = kv_cache.allocate_states(
            state_rows, self.geometry.states, dtype, device, limits.drafts
        )
        pages = kv_cache.allocate_pages(0, self.geometry.layers, self.cache_dtype, device, scales)
        self.layers: dict[int, LayerCache] = {**states, **pages}
        if self.geometry.states:
            size = format_size(sum(each.nbytes for each in self.layers.values()))
            counts = limits.max_running, limits.snapshots
            LOG.info("the states of %d requests and %d snapshots take %s", *counts, size)
        if scales and self.keeps_latents:
            LOG.warning("the scales of keys and values are not those of latents: 1.0 is used")

    @property
    def _layers(self) -> list[nn.Module]:
        return list(self.model.get_decoder().layers)

    def close(self) -> None:
        """Give the memory back."""
        self.graphs.close()
        self.buffer.close()
        self.layers, self._sampled = {}, []
        del self.model, self.sampler, self._mtp, self._mtp_layer
        self.table = self._last = self._counters = torch.empty(0)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _compile_ahead(self, *, graphs: bool) -> frozenset[Hashable]:
        """Compile the kernels of a start, and return what `compile_ahead` does."""
        if self.device.type != "cuda":
            return frozenset()

        def run() -> None:
            with suppress(CheckpointRefused):  # the check itself follows, with the model as it runs
                check_by_numbers(self.model, self.geometry)
            self._try_steps(graphs=graphs)

        return compile_ahead(self.model, run)

    def _measure_step(self, *, graphs: bool, compiled_kinds: frozenset[Hashable]) -> int:
        """Return the bytes that the largest step needs besides weights and cache, found by running
        it: prefill of new prompts on scratch pages. If some layers are not of ``compiled_kinds``,
        their kernels compile first.
        """
        if self.device.type != "cuda":
            if self.model.dtype == torch.bfloat16:
                decode_library()  # compiled now, and not while a request waits
            return 0
        if not compiled_kinds.issuperset(map(kind_of, self._layers)):
            with compile_in_parallel(self.device):
                run_without_repeats(self._layers, partial(self._try_steps, graphs=graphs))
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self._try_steps(graphs=False)
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        torch.cuda.empty_cache()
        return peak

    def _try_steps(self, *, graphs: bool) -> None:
        budget = self.limits.token_budget
        for tokens in (budget, *WARM_UP_TOKENS):
            self._try_step(min(tokens, budget))
        if graphs:
            self.graphs.warm_up(self.decode, self.prefill)

    def _try_step(self, tokens: int) -> None:
        """Run a step of ``tokens`` tokens of prompts, with all that a request can ask for."""
        longest = self.limits.context_length
        starts = [*range(0, tokens, longest), tokens]
        positions = torch.arange(tokens, dtype=torch.int32, device=self.device) % longest
        packed = Packed(
            self.table,
            torch.full_like(positions, self.limits.max_running),
            positions,
            decodes=0,
            starts=torch.tensor(starts, dtype=torch.int32, device=self.device),
            longest=min(tokens, longest),
            counters=self._counters,
        ).expand([(0, end - start) for start, end in itertools.pairwise(starts)])
        ids = torch.zeros_like(positions)
        self._try_outputs(packed, ids)
        if self._mtp is not None:
            self._mtp.run(packed, ids, hidden=None, layers=self.layers)

    def _try_outputs(self, packed: Packed, ids: Tensor) -> None:
        """Make what comes of the tokens of a step that is only tried."""
        samples = min(self.limits.most_decodes, len(ids))
        kept = torch.zeros(samples, dtype=torch.long, device=self.device)
        logits = self._logits(packed, ids, kept)
        params = SamplingParams(top_p=0.9, logit_bias={0: 1.0}, repetition_penalty=1.1)
        mask = np.full(-(-self.vocab_size // 32), -1, np.int32)
        row = RowRequest(params, seed=0, position=0, history=History([0]), mask=mask)
        self.sampler.sample(logits, [row] * samples)

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
            requests: how to sample, `Chunk.sampled` for each chunk.
            prompts: (position of a chunk, how many alternatives) where the log probabilities of a
                prompt are wanted.
        """
        turn = self.buffer.advance()
        self._copy_states(step.restores, restore=True)
        logits, tokens, prompt_logprobs = self._forward(step, prompts)
        self._copy_states(step.saves)
        launched = InFlightStep(step, self._sampled[turn][: len(requests)])
        if requests and (tokens is None or not all(map(_takes_largest, requests))):
            samples = self.sampler.sample(logits, requests)
            tokens = samples.tokens.int()
            self._remember(step, tokens)
            if samples.logprobs is not None:
                launched.logprobs = samples.logprobs.on_host()
                launched.logprob_rows = samples.logprob_rows
        if tokens is not None:
            launched.tokens.copy_(tokens, non_blocking=True)
        if self._mtp is not None:
            launched.drafts = self._mtp.draft(step, tokens, self._prefills_at, self.layers)
        for position, logprobs in prompt_logprobs.items():
            launched.prompts[position] = logprobs.on_host()
        launched.mark_end(self.device)
        return launched

    def _copy_states(self, pairs: Sequence[tuple[int, int]], *, restore: bool = False) -> None:
        """Copy the states of rows to snapshots, whose own rows are the last; or back."""
        if pairs:
            rows, snapshots = (self._to_device(numbers) for numbers in zip(*pairs, strict=True))
            ends = [rows, snapshots + self.limits.max_running + 1]
            kv_cache.copy_states(self.layers.values(), *(ends[::-1] if restore else ends))

    def _forward(
        self, step: Step, prompts: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor | None, dict[int, Logprobs]]:
        """Run the model; return the logits of the chunks that sample, the most probable tokens if a
        graph made them, and the log probabilities of ``prompts``.
        """
        self._prefills_at = step.decode_tokens
        if prompts:
            return self._run_with_prompt_logprobs(step, prompts)
        if (size := self.graphs.decode_size(step)) is not None:
            return *self.graphs.replay_decode(step, size), {}
        if (shape := self.graphs.prompt_shape(step)) is not None:
            rows = self.graphs.replay_prompts(step, shape)
            self._prefills_at = shape.decodes
            return self.graphs.kept_logits.index_select(0, self._to_device(rows)), None, {}
        return self._run(step), None, {}

    def _remember(self, step: Step, tokens: Tensor) -> None:
        """Keep ``tokens``, int32, as the last of the rows of ``step`` that sample; after drafts the
        host knows which one is.
        """
        rows = self._to_device(
            [chunk.sequence.row for chunk in step.chunks for _ in range(chunk.sampled)]
        )
        # of logits that are not finite the next step gets some token, until they are read
        self._last.index_put_((rows,), tokens.clamp(min=0))

    def decode(self, inputs: StepInputs[Tensor]) -> tuple[Tensor, Tensor]:
        """Return logits and most probable tokens of a step that only decodes: what its graph
        does.
        """
        update_table(self.table, inputs)
        packed = Packed(
            self.table,
            inputs.rows,
            inputs.positions,
            decodes=len(inputs.rows),
            counters=self._counters,
        )
        logits = self._logits(packed, inputs.token_ids, 0)
        tokens = greedy(logits).int()
        self._last.index_put_((inputs.rows,), tokens.clamp(min=0))
        return logits, tokens

    def prefill(self, inputs: StepInputs[Tensor], shape: PromptShape) -> Tensor:
        """Return the logits of the kept tokens of a step of ``shape``: what its graph does."""
        packed = Packed(
            self.table,
            inputs.rows,
            inputs.positions,
            decodes=shape.decodes,
            starts=inputs.starts,
            longest=shape.tokens,
            counters=self._counters,
            expanded=shape.expanded(inputs.starts),
        )
        return self._logits(packed, inputs.token_ids, inputs.kept.long())

    def _run(self, step: Step, whole: Sequence[int] = ()) -> Tensor:
        """Run any step, launch by launch; return the logits that `Step.logit_rows` counts.

        Args:
            whole: positions of chunks all of whose logits are wanted.
        """
        stops = itertools.accumulate(chunk.count for chunk in step.chunks)
        kept = [
            index
            for stop, size in zip(stops, step.logit_rows(whole), strict=True)
            for index in range(stop - size, stop)
        ]
        packed, inputs = self._send(step, kept)
        return self._logits(packed, inputs.token_ids, inputs.kept.long())

    def _send(self, step: Step, kept: Sequence[int]) -> tuple[Packed, StepInputs[Tensor]]:
        """Send the inputs of any step to the device, and make its changes of the page table."""
        inputs = send_step(self.buffer, step, kept, self.table)
        packed = Packed(
            self.table,
            inputs.rows,
            inputs.positions,
            decodes=step.decode_tokens,
            starts=inputs.starts if len(inputs.starts) else None,
            longest=max((chunk.count for chunk in step.chunks[step.decodes :]), default=0),
            counters=self._counters,
        )
        return packed.expand(step.expanded), inputs

    def _run_with_prompt_logprobs(
        self, step: Step, prompts: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor | None, dict[int, Logprobs]]:
        """Run ``step``; return the logits of the chunks that sample, None, and the log
        probabilities of the prompt's token after each token of some chunks.
        """
        whole = [position for position, _ in prompts]
        logits = self._run(step, whole)
        stops = list(itertools.accumulate(step.logit_rows(whole)))
        found: dict[int, Logprobs] = {}
        for position, alternatives in prompts:
            chunk = step.chunks[position]
            following = chunk.sequence.tokens[chunk.start + 1 : chunk.start + chunk.count + 1]
            rows = logits[stops[position] - chunk.count :][: len(following)]
            found[position] = logprobs_of(rows, self._to_device(following)[:, None], alternatives)
        last = [
            index
            for stop, chunk in zip(stops, step.chunks, strict=True)
            for index in range(stop - chunk.sampled, stop)
        ]
        return logits[self._to_device(last)], None, found

    def _to_device(self, numbers: Sequence[int | None]) -> Tensor:
        """Return ``numbers`` on the device, int64, without waiting for it."""
        there = torch.tensor(numbers, dtype=torch.long, pin_memory=self.device.type == "cuda")
        return there.to(self.device, non_blocking=True)


def _takes_largest(request: RowRequest) -> bool:
    """Whether the largest logit is all that is wanted."""
    return request.params.greedy and not request.changes_logits and not request.logprobs

"""`EncoderRunner`: runs the steps of a scheduler for embeddings and scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from qtool.checkpoint.encoding import Encoding
from qtool.engine.attention.pages import Packed
from qtool.engine.in_flight import InFlightStep
from qtool.engine.model_runner import Runner
from qtool.engine.sampling_batch import RowRequest
from qtool.engine.scheduler import Limits
from qtool.engine.step import Chunk, Step
from qtool.runtime.causal_lm import CausalLM
from qtool.runtime.encoder import Encoder


class EncoderRunner(Runner):
    """Makes a vector of each prompt, when its last chunk is computed.

    Args:
        encoding: what is made of hidden states.
        model: an `Encoder`.
        device: where the model is.
        limits: what the largest step may hold.
        options: the others of `Runner`. Steps run without CUDA graphs.
    """

    def __init__(
        self,
        encoding: Encoding,
        model: CausalLM,
        device: torch.device,
        limits: Limits,
        **options: object,
    ) -> None:
        self._encoding = encoding
        self._head = cast(Encoder, model).head
        size = model.get_output_embeddings().in_features
        rows = limits.max_running + 1 if encoding.pooling == "mean" else 0
        # of the tokens of each row so far, for the mean
        self._sums = torch.zeros(rows, size, device=device)
        options["cuda_graphs"] = False
        super().__init__(model, device, limits, **options)  # type: ignore[arg-type]

    @property
    def keeps_prefixes(self) -> bool:
        """Whether a prompt may start with the pages of another: the mean needs all its tokens."""
        return self._encoding.pooling == "last"

    def close(self) -> None:
        """Give the memory back."""
        super().close()
        self._head = None
        self._sums = torch.empty(0)

    def launch(
        self, step: Step, requests: Sequence[RowRequest], prompts: Sequence[tuple[int, int]] = ()
    ) -> InFlightStep:
        """Start ``step``. Does not wait for the device."""
        turn = self.buffer.advance()
        ending = [chunk for chunk in step.chunks if chunk.samples]
        launched = InFlightStep(step, self._sampled[turn][: len(ending)])
        states = self._run(step) if self._encoding.pooling == "last" else self._run_means(step)
        if ending:
            vectors = self._finish(states)
            is_finite = torch.isfinite(vectors).all(dim=1)
            launched.tokens.copy_(is_finite.int() - 1, non_blocking=True)
            launched.vectors = vectors.to("cpu", non_blocking=True)
        launched.mark_end(self.device)
        return launched

    def _run_means(self, step: Step) -> Tensor:
        """Run ``step``; return the mean of the hidden states of each prompt that ends, [R, H]."""
        packed, inputs = self._send(step, [])
        states = self._logits(packed, inputs.token_ids, 0)
        begun = [chunk for chunk in step.chunks if not chunk.start]
        self._sums.index_fill_(0, self._to_device(_rows(begun)), 0.0)
        self._sums.index_add_(0, packed.rows.long(), states.float())
        ending = [chunk for chunk in step.chunks if chunk.samples]
        sizes = [chunk.start + chunk.count for chunk in ending]
        sums = self._sums.index_select(0, self._to_device(_rows(ending)))
        return sums / self._to_device(sizes)[:, None]

    def _finish(self, states: Tensor) -> Tensor:
        """Return what is made of pooled hidden states [R, H], float32."""
        vectors = states.float()
        return vectors if self._head is None else vectors @ self._head.T

    def _try_outputs(self, packed: Packed, ids: Tensor) -> None:
        """Make vectors of the tokens of a step that is only tried."""
        kept = 0 if self._encoding.pooling == "mean" else packed.rows[:1].long()
        states = self._logits(packed, ids, kept)
        if self._encoding.pooling == "mean":
            self._sums.index_add_(0, packed.rows.long(), states.float())
        self._finish(states[: self.limits.max_running])


def _rows(chunks: Sequence[Chunk]) -> list[int | None]:
    """Return the row of the page table that each chunk has."""
    return [chunk.sequence.row for chunk in chunks]

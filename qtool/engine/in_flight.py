"""`InFlightStep`: a step that was launched on the device and is not read back yet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from qtool.engine.sampler import Logprobs
from qtool.engine.step import Step


@dataclass
class InFlightStep:
    """A step on its way, and what it will have made once `wait` has returned."""

    step: Step
    tokens: Tensor
    """int32 on the host: `Chunk.sampled` for each chunk, -1 where the logits were not finite."""
    done: torch.cuda.Event | None = None
    """Reached when the device has done the step; None where launching waits for it."""
    drafts: Tensor | None = None
    """int32 [S, D] on the host, of the chunks that sample: what may follow the tokens they gain,
    -1 where nothing was drafted; None without an MTP layer.
    """
    vectors: Tensor | None = None
    """float32 [S, N] on the host, of the chunks that end a prompt, where prompts are encoded;
    ``tokens`` then has 0 for each.
    """
    logprobs: Logprobs | None = None
    """On the host, of `logprob_rows`."""
    logprob_rows: tuple[int, ...] = ()
    prompts: dict[int, Logprobs] = field(default_factory=dict)
    """Those of the tokens after each of a chunk's, by the position of the chunk."""

    def mark_end(self, device: torch.device) -> None:
        """Note that all of the step has been launched on ``device``."""
        if device.type == "cuda":
            self.done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.done.record()

    def wait(self) -> list[int]:
        """Wait until the device has done the step; return its tokens."""
        if self.done is not None:
            self.done.synchronize()
        return cast(list[int], self.tokens.tolist())

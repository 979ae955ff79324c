"""How fast a checkpoint is served: time a token at several batches, prompt tokens a second."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping

import torch

from qtool.checkpoint import Checkpoint
from qtool.engine.attention.pages import PAGE
from qtool.engine.engine import Engine
from qtool.evaluation.gate import BATCHES
from qtool.evaluation.report import Speed

PROMPT_TOKENS = 128
SHORT_TOKENS = 16  # whose time is subtracted: that of the prompt, and of the first steps
CONTEXT = 4096


def measure_speed(checkpoint: Checkpoint, device: torch.device, dtype: str | None) -> Speed:
    """Start an engine as `qtool serve` does, and time it.

    Args:
        checkpoint: what it runs.
        device: where it runs.
        dtype: what unquantized layers compute in; None for the checkpoint's.
    Raises: CheckpointRefused, for a model that the engine does not run.
    """
    known = checkpoint.text_config.get("max_position_embeddings")
    context = min(CONTEXT, known) if isinstance(known, int) else CONTEXT
    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    with Engine(
        checkpoint.source,
        skip_tokenizer_init=True,
        disable_radix_cache=True,
        device=str(device),
        dtype=dtype,
        context_length=context,
    ) as engine:
        runner = engine.loop.runner
        caches = sum(each.nbytes for each in runner.layers.values())
        resident = checkpoint.size_bytes
        if on_gpu:
            resident = torch.cuda.memory_allocated(device) - before - caches
        tokens = 128 if on_gpu else 24
        draw = random.Random(0)
        run = _Timed(engine, draw)
        run.seconds(1, 64, 1)
        return Speed(
            decode_ms={
                batch: run.decode_ms(batch, 2 * tokens if batch == 1 else tokens)
                for batch in BATCHES
            },
            prefill_tokens_s=run.prefill_tokens_s(64 if on_gpu else 8, min(2048, context // 2)),
            weight_bytes=resident,
            cache_tokens=runner.page_count * PAGE,
        )


class _Timed:
    def __init__(self, engine: Engine, draw: random.Random) -> None:
        self._engine = engine
        self._draw = draw
        self._vocab_size = engine.loop.runner.vocab_size

    def seconds(self, batch: int, size: int, tokens: int) -> float:
        """Return how long ``tokens`` greedy tokens after each of ``batch`` prompts take."""
        prompts = self._prompts(batch, size)
        params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        start = time.perf_counter()
        results = self._engine.generate(input_ids=prompts, sampling_params=params)
        took = time.perf_counter() - start
        assert all(len(result["output_ids"]) == tokens for result in results)
        return took

    def decode_ms(self, batch: int, tokens: int) -> float:
        """Return the milliseconds a token, without what the prompts take."""
        self.seconds(batch, PROMPT_TOKENS, 4)
        short = self.seconds(batch, PROMPT_TOKENS, SHORT_TOKENS)
        long = self.seconds(batch, PROMPT_TOKENS, SHORT_TOKENS + tokens)
        return (long - short) / tokens * 1e3

    def prefill_tokens_s(self, batch: int, size: int) -> float:
        """Return the prompt tokens a second."""
        return batch * size / self.seconds(batch, size, 1)

    def _prompts(self, batch: int, size: int) -> list[list[int]]:
        last = min(self._vocab_size, 128_000)
        return [[self._draw.randrange(5, last) for _ in range(size)] for _ in range(batch)]


def speedups(quantized: Speed, reference: Speed) -> dict[str, float]:
    """Return how many times faster ``quantized`` is, by the names that gates use."""
    return {
        **{
            f"speedup@{batch}": reference.decode_ms[batch] / quantized.decode_ms[batch]
            for batch in quantized.decode_ms
        },
        "prefill_speedup": quantized.prefill_tokens_s / reference.prefill_tokens_s,
    }


def slower_note(found: Mapping[str, float]) -> list[str]:
    """Return what a reader should know first: where the quantized model is the slower one."""
    slower = [f"{name} {value:.2f}" for name, value in found.items() if value < 1]
    if not slower:
        return []
    return [f"the quantized model is slower than its reference: {', '.join(slower)}"]

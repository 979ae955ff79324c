"""Steps of fixed sizes, padded as CUDA graphs are, on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace

import torch

from qtool.engine.cuda_graphs import NOTHING, DecodeGraph, PromptShape
from qtool.engine.engine import Engine
from qtool.engine.mtp import DraftGraph


def run_in_fixed_steps(
    engine: Engine, sizes: list[int], shapes: list[PromptShape], drafted: Sequence[int] = ()
) -> list[object]:
    """Let ``engine`` run what fits in steps of ``sizes`` and ``shapes``, and draft for ``drafted``
    sequences at a time; return the list of those that it runs from now on.
    """
    runner, graphs = engine.loop.runner, engine.loop.runner.graphs
    used: list[object] = []

    def replay_decode(inputs, logits, tokens, size):
        used.append(size)
        for kept, made in zip((logits, tokens), runner.decode(inputs), strict=True):
            kept.copy_(made)

    def replay_prompts(inputs, shape):
        used.append(shape)
        graphs.keep_logits(runner.prefill, inputs, shape)

    def replay_drafts(inputs, drafts, size):
        used.append(("drafts", size))
        drafts.copy_(runner._mtp.draft_fixed(inputs, runner.layers))

    with torch.inference_mode():
        for size in drafted:
            inputs = runner._mtp.fill((), size)
            made = runner._mtp.draft_fixed(inputs, runner.layers)
            replay = partial(replay_drafts, inputs, made, size)
            runner._mtp.graphs[size] = DraftGraph(SimpleNamespace(replay=replay), made)
        for size in sizes:
            inputs = graphs.fill_decode(NOTHING, size)
            made = runner.decode(inputs)
            replay = partial(replay_decode, inputs, *made, size)
            graphs.decode[size] = DecodeGraph(SimpleNamespace(replay=replay), *made)
        graphs.kept_logits = torch.empty(graphs._kept_rows, runner.vocab_size)
        for shape in shapes:
            inputs = graphs.fill_prompts(NOTHING, shape)
            replay = partial(replay_prompts, inputs, shape)
            graphs.prompts[shape] = SimpleNamespace(replay=replay)
    return used

"""What each part of a quantized model costs: one at a time is put into the 16-bit reference."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from qtool import formats
from qtool.checkpoint import Checkpoint
from qtool.checkpoint.part_costs import PartCost, worst_first
from qtool.evaluation.agreement import kl_divergence
from qtool.evaluation.perplexity import load_dequantized
from qtool.evaluation.texts import Window
from qtool.events import OnEvent, ProgressEvent, StageEvent
from qtool.runtime.causal_lm import CausalLM
from qtool.runtime.skeleton import Skeleton

TOKENS = 4096  # that each part is measured on, at most
_BLOCK = re.compile(r"(.*?\.\d+)(?:\.|$)")  # up to the number of the decoder layer
_EXPERTS = re.compile(r"(.*\.experts)(?:\.|$)")


def cost_by_layer(
    quantized: Checkpoint,
    reference: Checkpoint,
    windows: Sequence[Window],
    *,
    parts: str,
    device: torch.device,
    dtype: torch.dtype,
    on_event: OnEvent,
) -> tuple[PartCost, ...]:
    """Return the cost of each part, worst first. Both models are in memory in 16 bits.

    Args:
        quantized: the checkpoint.
        reference: its 16-bit model.
        windows: texts; the first `TOKENS` tokens are used.
        parts: single modules, where the experts of a layer are one, or whole decoder layers.
        device: where the models run.
        dtype: what they compute in; inputs are rounded as the scheme says.
        on_event: gets stages and progress.
    """
    on_event(StageEvent("loading both models for the cost of each part"))
    schemes = _schemes(quantized, parts, dtype)
    ours, theirs = (
        cast(nn.Module, load_dequantized(each, dtype=dtype)).to(device)
        for each in (quantized, reference)
    )
    texts = _first(windows)
    expected = [_log_probabilities(cast(CausalLM, theirs), ids) for ids in texts]
    found = []
    for number, (part, names) in enumerate(schemes.items()):
        on_event(ProgressEvent("parts measured", number, len(schemes)))
        own = theirs.get_submodule(part)
        theirs.set_submodule(part, ours.get_submodule(part))
        try:
            cost = _mean_kl(cast(CausalLM, theirs), texts, expected)
        finally:
            theirs.set_submodule(part, own)
        found.append(PartCost(part, cost, tuple(sorted(names))))
    on_event(ProgressEvent("parts measured", len(schemes), len(schemes)))
    return worst_first(found)


def _schemes(checkpoint: Checkpoint, parts: str, dtype: torch.dtype) -> dict[str, set[str]]:
    """Return the parts that are quantized, in the model's names, and their schemes."""
    layout = formats.detect(checkpoint)
    skeleton = Skeleton(checkpoint, layout, dtype)
    found: dict[str, set[str]] = {}
    for name, module in (layout.modules if layout else {}).items():
        if skeleton.is_loaded(f"{name}.weight"):
            part = _part_of(skeleton.target(name).module, parts)
            found.setdefault(part, set()).add(module.scheme.name)
    return found


def _part_of(module: str, parts: str) -> str:
    pattern = _BLOCK if parts == "blocks" else _EXPERTS
    match = pattern.match(module)
    return match[1] if match else module


def _first(windows: Sequence[Window]) -> list[tuple[int, ...]]:
    """Return whole windows up to `TOKENS` tokens, and one at least."""
    found: list[tuple[int, ...]] = []
    left = TOKENS
    for window in windows:
        if found and len(window.ids) > left:
            break
        found.append(window.ids[:TOKENS])
        left -= len(window.ids)
    return found


@torch.inference_mode()
def _log_probabilities(model: CausalLM, ids: Sequence[int]) -> Tensor:
    given = torch.tensor([list(ids)], device=next(iter(model.parameters())).device)
    logits = model(input_ids=given, use_cache=False).logits[0, :-1]
    return logits.float().log_softmax(-1)


def _mean_kl(model: CausalLM, texts: Sequence[Sequence[int]], expected: Sequence[Tensor]) -> float:
    total, count = 0.0, 0
    for ids, reference in zip(texts, expected, strict=True):
        found = _log_probabilities(model, ids)
        total += float(kl_divergence(reference, found).sum())
        count += len(reference)
    return total / count

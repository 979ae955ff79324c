"""Rotary embeddings whose frequencies change with the longest position of a pass."""

from __future__ import annotations

import torch

from qtool.runtime.causal_lm import CausalLM


def freeze_rotary(model: CausalLM, context_length: int) -> None:
    """Settle such embeddings (longrope, dynamic) for the whole context, as vLLM does.

    Sequences of any length share a pass here, and keys that were rotated once stay in the cache.
    """
    last = torch.tensor([[context_length - 1]], device=model.device)
    x = torch.zeros(1, dtype=model.dtype, device=model.device)
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if not any("inv_freq" in name for name, _ in module.named_buffers()):
            continue
        if isinstance(kinds, dict):
            for layer_type, kind in kinds.items():
                if _changes(kind):
                    module(x, last, layer_type)
                    kinds[layer_type] = "default"
        elif isinstance(kinds, str) and _changes(kinds):
            module(x, last)
            module.rope_type = "default"  # type: ignore[assignment]


def _changes(kind: str) -> bool:
    """Whether transformers computes embeddings of this kind again for longer positions."""
    return "dynamic" in kind or kind == "longrope"

"""Which tensors of a GGUF file each tensor or layer of a checkpoint becomes. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from qtool.checkpoint import Checkpoint
from qtool.checkpoint.gguf_names import GATE_UP, MODEL_TYPES, Architecture
from qtool.errors import CheckpointRefused

ALIASES = {"mistral": "llama"}
"""transformers' model types -> those whose tensors and rules they have."""
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
EXPERT = re.compile(r"(.+)\.(\d+)\.(\w+)")


@dataclass(frozen=True)
class Target:
    """A tensor of a GGUF file, or a part of one."""

    name: str
    expert: int | None = None
    """The number of the expert in it; None for the whole of it."""
    part: int = 0
    """Which rows of the source, among ``parts``: gate or up."""
    parts: int = 1


def architecture_of(checkpoint: Checkpoint) -> Architecture:
    """Return the rules of GGUF for the model.

    Raises: CheckpointRefused, when there are none for its architecture.
    """
    model_type = str(checkpoint.config.get("model_type"))
    wanted = ALIASES.get(model_type, model_type)
    is_language_model = "text_config" not in checkpoint.config
    if wanted not in MODEL_TYPES or not is_language_model:
        classes = checkpoint.config.get("architectures") or ["without architectures"]
        raise CheckpointRefused(
            "E_GGUF_ARCHITECTURE",
            f"{checkpoint.source}: no rules are known to write {classes[0]} (`{model_type}`) as "
            "GGUF",
            hint=f"they are known for {', '.join([*MODEL_TYPES, 'mistral'])}",
        )
    return MODEL_TYPES[wanted]


def targets_of(architecture: Architecture, name: str, suffix: str) -> tuple[Target, ...]:
    """Return what the tensor ``name`` + ``suffix`` becomes; nothing when it has no place.

    Args:
        name: of a module in transformers' names; for experts in stacks and for sinks, of the tensor
            itself.
        suffix: ``weight`` or ``bias``.
    """
    found = LAYER.fullmatch(name)
    if found is None:
        stem = _modules(architecture.model_type, "model").get(name)
        return (Target(f"{stem}.{suffix}"),) if stem else ()
    prefix, rest = f"blk.{found[1]}", found[2]
    stem = _modules(architecture.model_type, "layer").get(rest)
    if stem:
        return (Target(f"{prefix}.{stem}.{suffix}"),)
    if architecture.experts is None:
        return ()
    return _expert_targets(architecture, prefix, rest, suffix)


def _expert_targets(
    architecture: Architecture, prefix: str, rest: str, suffix: str
) -> tuple[Target, ...]:
    """Return what the experts' tensor ``rest`` of a layer becomes; nothing when it is of none."""
    module = architecture.experts_module
    stems = _modules(architecture.model_type, "expert_layers")
    expert = EXPERT.fullmatch(rest)
    if expert and expert[1] == module and expert[3] in stems:
        return (Target(f"{prefix}.{stems[expert[3]]}.{suffix}", int(expert[2])),)
    if rest == f"{module}.{GATE_UP}":
        both = ("ffn_gate_exps", "ffn_up_exps")
        return tuple(
            Target(f"{prefix}.{stem}.{suffix}", None, part, len(both))
            for part, stem in enumerate(both)
        )
    if rest == f"{module}.down_proj":
        return (Target(f"{prefix}.ffn_down_exps.{suffix}"),)
    return ()


@lru_cache
def _modules(model_type: str, part: str) -> Mapping[str, str]:
    """Return module -> stem of an architecture, of its layers or outside of them."""
    stems: Mapping[str, str] = getattr(MODEL_TYPES[model_type], part)
    return {module: stem for stem, module in stems.items()}

"""Which tensors of a GGUF file each tensor or layer of a checkpoint becomes. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from qtool.checkpoint import Checkpoint
from qtool.checkpoint.gguf_names import (
    ARCHITECTURES,
    EXPERTS,
    EXPERTS_MODULE,
    GATE_UP,
    Architecture,
)
from qtool.errors import CheckpointRefused

ALIASES = {"mistral": "llama"}
"""transformers' model types -> those whose tensors and rules they have."""
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
EXPERT = re.compile(rf"{re.escape(EXPERTS_MODULE)}\.(\d+)\.(gate_proj|up_proj|down_proj)")
STEMS = {layer: stem for stem, layer in EXPERTS.items()}


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
    known = {each.model_type: each for each in ARCHITECTURES.values()}
    is_language_model = "text_config" not in checkpoint.config
    if wanted not in known or not is_language_model:
        classes = checkpoint.config.get("architectures") or ["without architectures"]
        raise CheckpointRefused(
            "E_GGUF_ARCHITECTURE",
            f"{checkpoint.place}: no rules are known to write {classes[0]} (`{model_type}`) as "
            "GGUF",
            hint=f"they are known for {', '.join([*known, 'mistral'])}",
        )
    return known[wanted]


def targets_of(architecture: Architecture, name: str, suffix: str) -> tuple[Target, ...]:
    """Return what the tensor ``name`` + ``suffix`` becomes; nothing when it has no place.

    Args:
        name: of a module in transformers' names; for experts in stacks and for sinks, of the tensor
            itself.
        suffix: ``weight`` or ``bias``.
    """
    found = LAYER.fullmatch(name)
    if found is None:
        stem = _modules(architecture.name, "model").get(name)
        return (Target(f"{stem}.{suffix}"),) if stem else ()
    prefix, rest = f"blk.{found[1]}", found[2]
    stem = _modules(architecture.name, "layer").get(rest)
    if stem:
        return (Target(f"{prefix}.{stem}.{suffix}"),)
    return () if architecture.experts is None else _expert_targets(prefix, rest, suffix)


def _expert_targets(prefix: str, rest: str, suffix: str) -> tuple[Target, ...]:
    """Return what the experts' tensor ``rest`` of a layer becomes; nothing when it is of none."""
    if expert := EXPERT.fullmatch(rest):
        return (Target(f"{prefix}.{STEMS[expert[2]]}.{suffix}", int(expert[1])),)
    if rest == f"{EXPERTS_MODULE}.{GATE_UP}":
        both = ("gate_proj", "up_proj")
        return tuple(
            Target(f"{prefix}.{STEMS[layer]}.{suffix}", None, part, len(both))
            for part, layer in enumerate(both)
        )
    if rest == f"{EXPERTS_MODULE}.down_proj":
        return (Target(f"{prefix}.{STEMS['down_proj']}.{suffix}"),)
    return ()


@lru_cache
def _modules(architecture: str, part: str) -> Mapping[str, str]:
    """Return module -> stem of ``architecture``, of its layers or outside of them."""
    stems: Mapping[str, str] = getattr(ARCHITECTURES[architecture], part)
    return {module: stem for stem, module in stems.items()}

"""Models that return something else than the next token: without their head, and what takes its
place.
"""

from __future__ import annotations

from dataclasses import replace

from qtool.architecture.meta import building, read_config
from qtool.checkpoint import Checkpoint
from qtool.checkpoint.encoding import Encoding
from qtool.errors import CheckpointRefused
from qtool.runtime.skeleton import Skeleton

CLASSIFIER = "score"
LM_HEAD = "lm_head"


def without_head(checkpoint: Checkpoint) -> Checkpoint:
    """Return ``checkpoint`` with a config that names the class without a head, which transformers
    then builds and loads.

    Raises: CheckpointRefused, when transformers has no such class.
    """
    with building(checkpoint):
        from transformers import MODEL_MAPPING

        base = MODEL_MAPPING[type(read_config(checkpoint))]
        kind = base[0] if isinstance(base, tuple) else base
        config = {**checkpoint.config, "architectures": [kind.__name__]}
    return replace(checkpoint, config=config)


def head_of(skeleton: Skeleton, encoding: Encoding) -> str | None:
    """Return the layer of the checkpoint whose rows score; None for embeddings."""
    if encoding.task == "embed":
        return None
    if not encoding.labels:
        return CLASSIFIER
    tensors = (*skeleton.names.unused, *skeleton.names.linears)
    if any(f".{name}".startswith(f".{LM_HEAD}.") for name in tensors):
        return LM_HEAD
    if skeleton.checkpoint.tied_embeddings:
        return next(iter(skeleton.names.embeddings))
    message = f"{skeleton.checkpoint.source} has no head, whose rows score"
    raise CheckpointRefused("E_TENSORS", message, hint="take all weights from one export")

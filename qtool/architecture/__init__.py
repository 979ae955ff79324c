"""Whether config and tensors are one model: the check that every command makes before it reads
weights.
"""

from __future__ import annotations

from qtool.architecture.dtypes import check_dtypes
from qtool.architecture.generation import check_generation
from qtool.architecture.standard import is_standard
from qtool.architecture.vocabulary import check_vocabulary
from qtool.checkpoint import Checkpoint
from qtool.formats import Layout
from qtool.name_map import NameMap, names_from_headers

__all__ = ["check_model", "map_names"]


def check_model(checkpoint: Checkpoint, layout: Layout | None, *, is_causal: bool = False) -> None:
    """Refuse ``checkpoint`` if the model that its config describes has other tensors.

    Headers decide for the usual architectures; for all others transformers does, which builds the
    model without data. What transformers does not know, or a config without `architectures`, is
    let pass.

    Args:
        checkpoint: the checkpoint.
        layout: what `formats.detect` returned.
        is_causal: whether it must load as a causal language model, whatever class it names.
    Raises: CheckpointRefused.
    """
    check_dtypes(checkpoint, layout)
    check_vocabulary(checkpoint)
    check_generation(checkpoint)
    if is_standard(checkpoint, layout):
        return
    from qtool.architecture.meta import check_tensors

    check_tensors(checkpoint, layout, is_causal=is_causal)


def map_names(checkpoint: Checkpoint) -> NameMap:
    """Return how the tensors of ``checkpoint`` and the modules of its model correspond.

    Headers say it for the usual architectures; for all others transformers does. Of a model that
    brings its own code, or a config without `architectures`, the names are taken as they stand.

    Raises: CheckpointRefused, when transformers cannot build the model.
    """
    config = checkpoint.config
    if config.get("auto_map") or not config.get("architectures") or is_standard(checkpoint, None):
        return names_from_headers(checkpoint)
    from qtool.architecture.names import names_from_model

    return names_from_model(checkpoint)

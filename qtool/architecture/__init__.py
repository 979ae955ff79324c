"""`check_model`: whether config and tensors are one model, which every command asks before it reads
weights. `map_names`: which tensor each layer of that model is made from.
"""

from __future__ import annotations

from collections.abc import Mapping

from qtool.architecture.dtypes import check_dtypes
from qtool.architecture.generation import check_generation
from qtool.architecture.mtp import find_mtp, has_known_mtp, loaded_shapes, with_mtp_layer
from qtool.architecture.standard import Shape, is_standard
from qtool.architecture.vocabulary import check_vocabulary
from qtool.checkpoint import Checkpoint
from qtool.errors import CheckpointRefused
from qtool.formats import Layout
from qtool.name_map import NameMap, names_from_headers

__all__ = ["check_model", "check_model_and_mtp", "map_names"]


def check_model(
    checkpoint: Checkpoint, layout: Layout | None, shapes: Mapping[str, Shape] | None = None
) -> None:
    """Refuse ``checkpoint`` if the model that its config describes has other tensors.

    Headers decide for the usual architectures; for all others transformers does, which builds the
    model without data. A class that transformers does not have, and a config without
    `architectures`, pass.

    Args:
        checkpoint: the checkpoint.
        layout: what `formats.detect` returned.
        shapes: what transformers loads, where that is not what the headers say.
    Raises: CheckpointRefused.
    """
    check_dtypes(checkpoint, layout)
    check_vocabulary(checkpoint)
    check_generation(checkpoint)
    if shapes is None and is_standard(checkpoint, layout):
        return
    from qtool.architecture.meta import check_tensors

    check_tensors(checkpoint, layout, shapes)


def check_model_and_mtp(checkpoint: Checkpoint, layout: Layout | None, *, deep: bool) -> str | None:
    """Return why the MTP layer of ``checkpoint`` cannot draft; None if it can, or if there is none
    that qtool knows.

    Args:
        checkpoint: the checkpoint.
        layout: what `formats.detect` returned.
        deep: check the whole model, as `check_model` does, and the decoder layer of the MTP layer
            with it; False: only the parts around that layer, by their headers.
    Raises: CheckpointRefused, when the model without its MTP layer is not what its config says.
    """
    problem = None
    if has_known_mtp(checkpoint):
        try:
            names = find_mtp(checkpoint)
            whole = with_mtp_layer(checkpoint)
            shapes = loaded_shapes(whole, layout, names)
            if deep:
                check_model(whole, layout, shapes)
                return None
        except CheckpointRefused as error:
            problem = f"speculative_algorithm NEXTN would be refused: {error.message}"
    if deep:
        check_model(checkpoint, layout)
    return problem


def map_names(checkpoint: Checkpoint, layout: Layout | None = None) -> NameMap:
    """Return how the tensors of ``checkpoint`` and the modules of its model correspond; quantized
    layers count as the matrices they stand for.

    Headers tell it for the usual architectures, transformers for all others. With code of its own,
    or without `architectures` in its config, a model has the names of its checkpoint.

    Raises: CheckpointRefused, when transformers cannot build the model.
    """
    config = checkpoint.config
    if config.get("auto_map") or not config.get("architectures") or is_standard(checkpoint, layout):
        return names_from_headers(checkpoint)
    from qtool.architecture.names import names_from_model

    return names_from_model(checkpoint, layout)

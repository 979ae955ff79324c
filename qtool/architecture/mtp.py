"""Where a checkpoint has its layer for multi-token prediction (MTP), and whether it can draft."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qtool.architecture.standard import Shape, model_tensors
from qtool.checkpoint import Checkpoint
from qtool.errors import CheckpointRefused
from qtool.formats import Layout
from qtool.modules import is_mtp_layer

# Classes whose MTP layer is one of their decoder layers between two norms and a projection, and a
# norm. Sources: DeepSeek-AI 2024, arXiv:2412.19437, section 2.2; vLLM 0.11
# `models/deepseek_mtp.py`, `models/glm4_moe_mtp.py` and `models/qwen3_next_mtp.py`; SGLang 0.5
# `models/deepseek_nextn.py`.
AFTER_LAYERS = ("DeepseekV3ForCausalLM", "Glm4MoeForCausalLM")
"""Classes whose MTP layer is numbered as a decoder layer, after the last, with all its parts."""
OWN_MODULE = (
    "Qwen3NextForCausalLM",
    "Qwen3_5ForCausalLM",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForCausalLM",
    "Qwen3_5MoeForConditionalGeneration",
)
"""Classes whose MTP layer is a module of its own, `mtp`."""
CLASSES = (*AFTER_LAYERS, *OWN_MODULE)
EMBEDDINGS = "embed_tokens"
HINT = "leave speculative_algorithm out, or NGRAM, which needs no layer"


@dataclass(frozen=True, kw_only=True)
class MtpNames:
    """The names of an MTP layer in its checkpoint."""

    block: str
    """The decoder layer in it, e.g. ``model.layers.61``."""
    target: str
    """Its name among the model's decoder layers, as the one after the last."""
    embedding_norm: str
    hidden_norm: str
    norm: str
    """Before the head."""
    projection: str
    """The linear layer that joins embedding and hidden state."""
    embeddings: str
    """Its own embeddings, if it has some."""
    shared_embeddings: str
    """The model's."""
    head: str
    """Its own output head, if it has one."""

    @property
    def modules(self) -> tuple[str, ...]:
        """All parts of the layer."""
        norms = self.embedding_norm, self.hidden_norm, self.norm
        return self.block, *norms, self.projection, self.embeddings, self.head


def find_mtp(checkpoint: Checkpoint) -> MtpNames:
    """Return the names of the MTP layer of ``checkpoint``, of several the first.

    Raises: CheckpointRefused, when it has none or qtool does not know its kind.
    """
    path, tensors, kind = checkpoint.source, checkpoint.tensors, _class_of(checkpoint)
    if kind not in CLASSES:
        known = f"{', '.join(CLASSES[:-1])} and {CLASSES[-1]}"
        message = f"{path}: qtool knows the MTP layers of {known}, and this is {kind}"
        raise CheckpointRefused("E_SPECULATION", message, hint=HINT)
    if checkpoint.text_config.get("num_hidden_layers") is None:
        message = f"{path}: config.json has no `num_hidden_layers`, which the MTP layer follows"
        raise CheckpointRefused("E_SPECULATION", message, hint=HINT)
    names = _names(checkpoint, is_own_module=kind in OWN_MODULE)
    norms = (names.embedding_norm, names.hidden_norm, names.norm)
    missing = [name for name in (f"{norm}.weight" for norm in norms) if name not in tensors]
    prefix = f"{names.projection}."
    if missing or not any(name.startswith(prefix) for name in tensors):
        message = f"{path} has no MTP layer: `{(*missing, names.projection)[0]}` is missing"
        raise CheckpointRefused("E_SPECULATION", message, hint=HINT)
    return names


def _class_of(checkpoint: Checkpoint) -> str:
    architectures = checkpoint.config.get("architectures") or ["a model without `architectures`"]
    return str(architectures[0])


def has_known_mtp(checkpoint: Checkpoint) -> bool:
    """Whether there is a tensor of an MTP layer of a kind that qtool knows."""
    return _class_of(checkpoint) in CLASSES and any(
        name.startswith("mtp.") or is_mtp_layer(checkpoint, name) for name in checkpoint.tensors
    )


def _names(checkpoint: Checkpoint, *, is_own_module: bool) -> MtpNames:
    """Return the names of the model's MTP layer, whether the checkpoint has it or not."""
    number = checkpoint.text_config.get("num_hidden_layers")
    ending = f"{EMBEDDINGS}.weight"
    found = (name for name in checkpoint.tensors if name.endswith(f".{ending}"))
    table = next((name for name in found if not name.startswith("mtp.")), f"model.{ending}")
    decoder = table.removesuffix(ending)
    if is_own_module:
        return MtpNames(
            block="mtp.layers.0",
            target=f"{decoder}layers.{number}",
            embedding_norm="mtp.pre_fc_norm_embedding",
            hidden_norm="mtp.pre_fc_norm_hidden",
            norm="mtp.norm",
            projection="mtp.fc",
            embeddings=f"mtp.{EMBEDDINGS}",
            shared_embeddings=f"{decoder}{EMBEDDINGS}",
            head="mtp.lm_head",
        )
    layer = f"model.layers.{number}"
    return MtpNames(
        block=layer,
        target=layer,
        embedding_norm=f"{layer}.enorm",
        hidden_norm=f"{layer}.hnorm",
        norm=f"{layer}.shared_head.norm",
        projection=f"{layer}.eh_proj",
        embeddings=f"{layer}.{EMBEDDINGS}",
        shared_embeddings=f"model.{EMBEDDINGS}",
        head=f"{layer}.shared_head.head",
    )


def with_mtp_layer(checkpoint: Checkpoint) -> Checkpoint:
    """Return ``checkpoint`` with a config that counts the decoder layer of the first MTP layer
    among the others, after the last; transformers then builds and loads it as one of them.
    """
    config, text = checkpoint.config, checkpoint.text_config
    longer = {**text, "num_hidden_layers": text["num_hidden_layers"] + 1}
    nested = {key: longer for key, value in config.items() if value is text}
    return replace(checkpoint, config={**config, **nested} if nested else longer)


def loaded_shapes(
    checkpoint: Checkpoint, layout: Layout | None, names: MtpNames
) -> dict[str, Shape]:
    """Return the shapes of what transformers loads, the decoder layer of the MTP layer included, by
    the names that it is to think they have.

    Args:
        checkpoint: what `with_mtp_layer` returned.
        layout: what `formats.detect` returned.
        names: those of the MTP layer.
    Raises: CheckpointRefused, when another part of the MTP layer has a shape that does not fit.
    """
    shapes = model_tensors(checkpoint, layout)
    shared = f"{names.shared_embeddings}.weight"
    matrix = shapes.get(shared, ())
    if len(matrix) != 2:
        message = f"{checkpoint.source} has no embeddings: there is no matrix `{shared}`"
        raise CheckpointRefused("E_TENSORS", message, hint="take the weights from the original")
    size = matrix[-1]
    expected = {
        names.embedding_norm: (size,),
        names.hidden_norm: (size,),
        names.norm: (size,),
        names.projection: (size, 2 * size),
        names.embeddings: matrix,
        names.head: matrix,
    }
    for part, wanted in expected.items():
        shape = shapes.pop(f"{part}.weight", wanted)
        if tuple(shape) != tuple(wanted):
            message = f"{checkpoint.source}: `{part}.weight` is {list(shape)}, not {list(wanted)}"
            raise CheckpointRefused("E_SPECULATION", message, hint=HINT)
    return {
        moved_name(name, (names.block, names.target)): shape
        for name, shape in shapes.items()
        if name.startswith(f"{names.block}.") or not is_mtp_layer(checkpoint, name)
    }


def moved_name(name: str, moved: tuple[str, str] | None) -> str:
    """Return the name that transformers gets for the tensor ``name``; see `names.names_in`."""
    if moved is None or not name.startswith(f"{moved[0]}."):
        return name
    return moved[1] + name.removeprefix(moved[0])

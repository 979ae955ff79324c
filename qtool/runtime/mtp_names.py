"""Where a checkpoint has its layer for multi-token prediction (MTP), and whether qtool knows it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from qtool.checkpoint import Checkpoint
from qtool.errors import CheckpointRefused

# Classes whose MTP layer is one of their decoder layers between two norms and a projection, and a
# norm. Sources: DeepSeek-AI 2024, arXiv:2412.19437, section 2.2; vLLM 0.11
# `models/deepseek_mtp.py` and `models/glm4_moe_mtp.py`; SGLang 0.5 `models/deepseek_nextn.py`.
KNOWN = ("DeepseekV3ForCausalLM", "Glm4MoeForCausalLM")
JOINT = ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")
HINT = "leave speculative_algorithm out, or NGRAM, which needs no layer"


@dataclass(frozen=True)
class MtpNames:
    """The names of an MTP layer in its checkpoint."""

    prefix: str
    """Of all of them, e.g. ``model.layers.61``."""

    @property
    def projection(self) -> str:
        """The layer that makes one vector of embedding and hidden state."""
        return f"{self.prefix}.eh_proj"

    def tensor(self, name: str) -> str:
        """Return the name of the tensor ``name`` of the layer."""
        return f"{self.prefix}.{name}"


def find_mtp(checkpoint: Checkpoint) -> MtpNames:
    """Return the names of the MTP layer of ``checkpoint``, of several the first.

    Raises: CheckpointRefused, when it has none or qtool does not know its kind.
    """
    path, config = checkpoint.place, checkpoint.text_config
    kind = (checkpoint.config.get("architectures") or ["a model without `architectures`"])[0]
    if kind not in KNOWN:
        message = f"{path}: qtool knows the MTP layers of {' and '.join(KNOWN)}, and this is {kind}"
        raise CheckpointRefused("E_SPECULATION", message, hint=HINT)
    names = MtpNames(f"model.layers.{config.get('num_hidden_layers')}")
    prefix = f"{names.projection}."
    missing = [name for name in map(names.tensor, JOINT) if name not in checkpoint.tensors]
    if missing or not any(name.startswith(prefix) for name in checkpoint.tensors):
        message = f"{path} has no MTP layer: `{(*missing, names.projection)[0]}` is missing"
        raise CheckpointRefused("E_SPECULATION", message, hint=HINT)
    return names


def with_mtp_layer(checkpoint: Checkpoint) -> Checkpoint:
    """Return ``checkpoint`` with a config that counts the decoder layer of the first MTP layer
    among the others, after which it stands; transformers then builds and loads it as one of them.
    """
    config: dict[str, Any] = {**checkpoint.config}
    config["num_hidden_layers"] = checkpoint.config["num_hidden_layers"] + 1
    return replace(checkpoint, config=config)

"""The metadata of a GGUF file's architecture, checked: `Fields`."""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Mapping

from qtool.checkpoint.config_values import MAX_LAYERS
from qtool.checkpoint.gguf_header import GgufHeader, GgufTensor
from qtool.checkpoint.gguf_names import Architecture
from qtool.checkpoint.gguf_values import Value
from qtool.checkpoint.strict_json import JsonDict, refused
from qtool.errors import CheckpointRefused, naming

# keys of an architecture that qtool knows; empty: what they say, the tensors or the class say too
SIZES: Mapping[str, str] = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "attention.value_length": "",
    "rope.dimension_count": "",
    "vocab_size": "",
}
NUMBERS: Mapping[str, str] = {
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base_swa": "rope_local_base_freq",
}
SCALING = "rope.scaling."
MAX_FACTORS_BYTES = 4096
LARGEST_F32 = (2 - 2**-23) * 2.0**127
OTHERS = (
    "tensor_data_layout",  # of files of 2023: where the weights came from
    "attention.sliding_window_pattern",
    *(f"{SCALING}{key}" for key in ("type", "factor", "attn_factor", "original_context_length")),
    *(f"{SCALING}{key}" for key in ("finetuned", "yarn_beta_fast", "yarn_beta_slow")),
)


class Fields:
    """The metadata of one architecture, checked."""

    def __init__(self, header: GgufHeader, architecture: Architecture) -> None:
        self.header = header
        self.architecture = architecture
        self.file = header.files[0]
        prefix = f"{architecture.name}."
        self.found: dict[str, Value] = {
            key.removeprefix(prefix): value
            for key, value in header.metadata.items()
            if key.startswith(prefix)
        }
        if unknown := self.found.keys() - {*SIZES, *NUMBERS, *OTHERS}:
            raise refused(
                "E_GGUF_KEY",
                f"{self.file}: the key `{prefix}{min(unknown)}` may change the model, and qtool "
                "does not know it",
                "llama.cpp may load the file; or take the safetensors version",
            )

    def refused(self, key: str, wanted: str) -> CheckpointRefused:
        """Return the error for a value of ``key`` that is not ``wanted``."""
        name = f"{self.architecture.name}.{key}"
        if key not in self.found:
            return refused("E_GGUF_KEY", f"{self.file}: the key `{name}` is missing")
        return refused(
            "E_GGUF_KEY",
            f"{self.file}: `{name}` is {self.found[key]!r:.80}, and must be {wanted}",
        )

    def values(self) -> JsonDict:
        """Return what has a place in config.json under another name."""
        values: JsonDict = {}
        values |= {name: self.size(key) for key, name in SIZES.items() if key in self.found}
        values |= {name: self.number(key) for key, name in NUMBERS.items() if key in self.found}
        for key in ("block_count", "embedding_length", "attention.head_count"):
            if not values.get(SIZES[key]):
                raise self.refused(key, "a whole number from 1 on")
        if values[SIZES["block_count"]] > MAX_LAYERS:
            raise self.refused("block_count", f"at most {MAX_LAYERS:,}")
        if values.get(SIZES["attention.head_count_kv"]) == 0:
            raise self.refused("attention.head_count_kv", "a whole number from 1 on")
        values.pop("", None)
        return values

    def size(self, key: str) -> int | None:
        """Return a whole number; None when there is none."""
        value = self.found.get(key)
        if value is None or (type(value) is int and 0 <= value < 1 << 31):
            return value
        raise self.refused(key, "one whole number")

    def number(self, key: str) -> float | None:
        """Return a finite number; None when there is none."""
        value = self.found.get(key)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.refused(key, "a number")
        if not abs(value) <= LARGEST_F32:  # NaN is not either
            raise self.refused(key, "a number of float32")
        return short(value)

    def tensor(self, name: str) -> GgufTensor:
        """Return a tensor that every model has."""
        if name not in self.header.tensors:
            raise refused("E_GGUF_TENSOR", f"{self.file}: the tensor `{name}` is missing")
        return self.header.tensors[name]

    def experts(self, name: str) -> GgufTensor:
        """Return a tensor that every model has, the weights of experts: [E, O, I]."""
        tensor = self.tensor(name)
        if len(tensor.shape) != 3:
            raise bad_shape(tensor, "a stack of experts")
        return tensor

    def factors(self, name: str) -> list[float] | None:
        """Return the numbers of a small F32 tensor; None when there is none."""
        tensor = self.header.tensors.get(name)
        if tensor is None:
            return None
        if tensor.type != "F32" or tensor.size_bytes > MAX_FACTORS_BYTES:
            raise refused(
                "E_GGUF_ROPE", f"{self.file}: `{name}` is {tensor.type} {[*tensor.shape]}"
            )
        with naming(tensor.file), tensor.file.open("rb") as file:
            file.seek(tensor.offset)
            values = array("f", file.read(tensor.size_bytes))
        if not all(0 < value < math.inf for value in values):
            raise refused("E_GGUF_ROPE", f"{self.file}: `{name}` holds impossible factors")
        return [short(value) for value in values]


def bad_shape(tensor: GgufTensor, expected: str) -> CheckpointRefused:
    """Return the error for a ``tensor`` that is not what was ``expected``."""
    return refused(
        "E_GGUF_SHAPE",
        f"{tensor.file}: tensor `{tensor.name}` has the shape {[*tensor.shape]}; expected "
        f"{expected}",
    )


def short(value: float) -> float:
    """Return the shortest decimal number that is ``value`` in f32: metadata holds f32."""
    if type(value) is int or not abs(value) <= LARGEST_F32:
        return value
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return value

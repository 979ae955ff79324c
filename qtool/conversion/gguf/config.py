"""What the metadata of a GGUF file says of the model: its sizes, its rotary embedding, its
attention. A config that llama.cpp computes otherwise is refused, or a note says so.

Source: llama.cpp, `conversion/*.py` and `src/models/*.cpp`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from torch import Tensor

from qtool.architecture.meta import read_config
from qtool.checkpoint import Checkpoint
from qtool.checkpoint.gguf_config import SAMPLING
from qtool.checkpoint.gguf_names import LLAMA3_FACTORS, LONG_FACTORS, Architecture, stem_of
from qtool.checkpoint.gguf_rope import llama3_factors
from qtool.checkpoint.strict_json import read_json
from qtool.conversion.gguf.types import ModelShape
from qtool.errors import CheckpointRefused


@dataclass(frozen=True)
class ModelConfig:
    """A model's config as transformers completes it, with what of it GGUF says."""

    checkpoint: Checkpoint
    architecture: Architecture
    values: Mapping[str, Any]

    @classmethod
    def of(cls, checkpoint: Checkpoint, architecture: Architecture) -> ModelConfig:
        """Read the config of ``checkpoint`` and refuse what llama.cpp computes otherwise.

        Raises: CheckpointRefused.
        """
        config = cls(checkpoint, architecture, read_config(checkpoint).to_dict())
        config._check()
        return config

    @property
    def shape(self) -> ModelShape:
        """What the choice of types depends on."""
        return ModelShape(
            architecture=self.architecture.name,
            layers=self.values["num_hidden_layers"],
            heads=self.heads,
            kv_heads=self.kv_heads,
            experts=self.experts,
            has_tied_embeddings=self.checkpoint.tied_embeddings,
        )

    @property
    def heads(self) -> int:
        """Of the queries."""
        heads: int = self.values["num_attention_heads"]
        return heads

    @property
    def kv_heads(self) -> int:
        """Of keys and values."""
        heads: int = self.values.get("num_key_value_heads") or self.heads
        return heads

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        channels: int = self.values.get("head_dim") or self.values["hidden_size"] // self.heads
        return channels

    @property
    def experts(self) -> int:
        """Experts of a layer; 0 for a dense model."""
        if self.architecture.experts is None:
            return 0
        count: int = self.values.get("num_local_experts") or self.values["num_experts"]
        return count

    @property
    def rope(self) -> Mapping[str, Any]:
        """The parameters of the rotary embedding, in layers with full attention."""
        rope = self.values["rope_parameters"]
        full: Mapping[str, Any] = rope.get("full_attention", rope)
        return full

    @property
    def rope_dimensions(self) -> int:
        """How many channels of a head rotate."""
        return int(self.rope.get("partial_rotary_factor", 1.0) * self.head_dim)

    def describe(self, writer: gguf.GGUFWriter) -> None:
        """Write all of it into the metadata of ``writer``."""
        values = self.values
        writer.add_block_count(values["num_hidden_layers"])
        writer.add_context_length(values["max_position_embeddings"])
        writer.add_embedding_length(values["hidden_size"])
        writer.add_feed_forward_length(values["intermediate_size"])
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_vocab_size(values["vocab_size"])
        writer.add_layer_norm_rms_eps(values["rms_norm_eps"])
        writer.add_rope_dimension_count(self.rope_dimensions)
        self._describe_rope(writer)
        self._describe_windows(writer)
        self._describe_experts(writer)
        self._describe_sampling(writer)
        if values.get("attn_logit_softcapping"):
            writer.add_attn_logit_softcapping(values["attn_logit_softcapping"])
        if values.get("final_logit_softcapping"):
            writer.add_final_logit_softcapping(values["final_logit_softcapping"])

    def rope_tensors(self) -> dict[str, Tensor]:
        """Return the factors of the rotary embedding's frequencies, f32, by name."""
        if self.rope["rope_type"] == "llama3":
            original = {"original_max_position_embeddings": self._original_length()}
            scaling = {**self.rope, **original}
            factors = llama3_factors(scaling, self.rope["rope_theta"], self.head_dim)
            return {LLAMA3_FACTORS: torch.tensor(factors, dtype=torch.float32)}
        if self.rope["rope_type"] == "longrope":
            return {
                name: torch.tensor(self.rope[key], dtype=torch.float32)
                for name, key in LONG_FACTORS.items()
            }
        return {}

    def norm_shift(self, tensor: str) -> float:
        """Return what is added to the numbers of ``tensor``, a name of the file."""
        return self.architecture.norm_shift_of(stem_of(tensor))

    def notes(self) -> Iterator[str]:
        """Yield what llama.cpp leaves out."""
        window = self.values.get("sliding_window")
        uses_window = self.values.get("use_sliding_window", True)
        name = self.architecture.name
        if window and uses_window and self.architecture.full_attention_every is None:
            yield (
                f"llama.cpp has no sliding window for `{name}`: beyond {window} tokens it attends "
                "to all of them"
            )

    def _describe_rope(self, writer: gguf.GGUFWriter) -> None:
        rope = self.rope
        writer.add_rope_freq_base(rope["rope_theta"])
        windowed = self.values["rope_parameters"].get("sliding_attention")
        if windowed:
            writer.add_rope_freq_base_swa(windowed["rope_theta"])
        kind = rope["rope_type"]
        if kind == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        elif kind == "yarn":
            self._describe_yarn(writer)
        elif kind == "longrope":
            self._describe_longrope(writer)

    def _describe_yarn(self, writer: gguf.GGUFWriter) -> None:
        rope = self.rope
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(self._original_length())
        for name, add in (
            ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if rope.get(name) is not None:
                add(rope[name])

    def _describe_longrope(self, writer: gguf.GGUFWriter) -> None:
        original = self._original_length()
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(original)
        scale = self.values["max_position_embeddings"] / original
        factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        writer.add_rope_scaling_attn_factors(self.rope.get("attention_factor") or factor)

    def _describe_windows(self, writer: gguf.GGUFWriter) -> None:
        window = self.values.get("sliding_window")
        if self.architecture.full_attention_every and window:
            writer.add_sliding_window(window)
        elif self.architecture.name == "phi3":
            writer.add_sliding_window(window or 0)

    def _describe_experts(self, writer: gguf.GGUFWriter) -> None:
        if not self.experts:
            return
        values = self.values
        writer.add_expert_count(self.experts)
        writer.add_expert_used_count(values["num_experts_per_tok"])
        if self.architecture.model_type != "mixtral":
            hidden = values.get("moe_intermediate_size") or values["intermediate_size"]
            writer.add_expert_feed_forward_length(hidden)
        if shared := values.get("shared_expert_intermediate_size"):
            writer.add_expert_shared_feed_forward_length(shared)

    def _describe_sampling(self, writer: gguf.GGUFWriter) -> None:
        """Write how answers are drawn, where generation_config.json says that they are."""
        path = self.checkpoint.path / "generation_config.json"
        found = read_json(path) if path.is_file() else {}
        if not found.get("do_sample"):
            return
        for key, name in SAMPLING.items():
            if found.get(name) is not None:
                getattr(writer, f"add_sampling_{key}")(found[name])

    def _original_length(self) -> int:
        found = self.rope.get("original_max_position_embeddings")
        length: int = found or self.values["original_max_position_embeddings"]
        return length

    def _check(self) -> None:
        values = self.values
        name = self.architecture.name
        activation = values.get("hidden_activation") or values.get("hidden_act")
        if activation not in self.architecture.activations:
            raise self._otherwise(f"the activation is `{activation}`")
        kinds = {"default", "linear", "yarn"}
        if name == "llama":
            kinds.add("llama3")
        elif name == "phi3":
            kinds.add("longrope")
        if self.rope["rope_type"] not in kinds:
            raise self._otherwise(f"rope_type is `{self.rope['rope_type']}`")
        if self.rope_dimensions != self.head_dim and name != "phi3":
            raise self._otherwise("only a part of each head rotates")
        normalizes = self.architecture.normalizes_experts
        if normalizes is not None and bool(values.get("norm_topk_prob")) != normalizes:
            raise self._otherwise(f"norm_topk_prob is {values.get('norm_topk_prob')}")
        if values.get("use_bidirectional_attention"):
            raise self._otherwise("attention is bidirectional")
        self._check_windows()
        self._check_attention_scale()

    def _check_windows(self) -> None:
        every = self.architecture.full_attention_every
        kinds = self.values.get("layer_types")
        if every is None or not kinds or not self.values.get("sliding_window"):
            return
        expected = [
            "full_attention" if (layer + 1) % every == 0 else "sliding_attention"
            for layer in range(len(kinds))
        ]
        if list(kinds) != expected:
            raise self._otherwise(f"not every {every}th layer alone has full attention")

    def _check_attention_scale(self) -> None:
        scalar = self.values.get("query_pre_attn_scalar")
        if scalar is None:
            return
        is_27b = self.values["num_hidden_layers"] == self.architecture.layers_of_27b
        expected = self.values["hidden_size"] // self.heads if is_27b else self.head_dim
        if scalar != expected:
            raise self._otherwise(f"query_pre_attn_scalar is {scalar} and not {expected}")

    def _otherwise(self, what: str) -> CheckpointRefused:
        return CheckpointRefused(
            "E_GGUF_CONFIG",
            f"{self.checkpoint.source}: {what}, and llama.cpp computes `{self.architecture.name}` "
            "otherwise",
            hint="the file would load and give other answers: convert to another format",
        )

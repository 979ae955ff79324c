"""The members of transformers' causal language models that qtool uses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


class TextConfig(Protocol):
    """The configuration of a language model without towers."""

    num_hidden_layers: int


class ModelConfig(Protocol):
    """The configuration of any model."""

    eos_token_id: int | list[int] | None

    def get_text_config(self) -> TextConfig:
        """Return the part that describes the language model; itself, where there is no other."""


class Decoder(Protocol):
    """The layers of a model, from token ids to hidden states."""

    layers: nn.ModuleList
    norm: nn.Module

    def __call__(
        self, *, input_ids: Tensor, position_ids: Tensor, use_cache: bool
    ) -> Sequence[Tensor]:
        """Return the hidden states [1, T, H] after the last norm, first in the sequence."""


class LogitsOutput(Protocol):
    """The output of a forward pass."""

    logits: Tensor


class CausalLM(Protocol):
    """A causal language model of transformers."""

    dtype: torch.dtype
    device: torch.device
    config: ModelConfig

    def __call__(
        self,
        *,
        input_ids: Tensor,
        position_ids: Tensor,
        use_cache: bool,
        logits_to_keep: Tensor | int = 0,
    ) -> LogitsOutput:
        """Return the logits [1, R, V] after the tokens to keep; 0: after all."""

    def modules(self) -> Iterator[nn.Module]:
        """Return all modules, the model included."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return all parameters."""

    def get_decoder(self) -> Decoder:
        """Return the layers."""

    def get_output_embeddings(self) -> nn.Linear:
        """Return the head, or what stands in its place."""

    def set_attn_implementation(self, name: str, /) -> None:
        """Choose the attention by its name in transformers' attention interface."""

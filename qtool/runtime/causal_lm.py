"""The members of transformers' causal language models that qtool uses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, Self

import torch
from torch import Tensor, nn


class TextConfig(Protocol):
    """The configuration of a language model without towers."""

    num_hidden_layers: int
    tie_word_embeddings: bool


class ModelConfig(Protocol):
    """The configuration of any model."""

    eos_token_id: int | list[int] | None
    tie_word_embeddings: bool
    is_encoder_decoder: bool
    _experts_implementation: str | None
    """How layers of experts multiply, by transformers' name."""

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


class MtpDecoder(Decoder, Protocol):
    """A decoder whose layers an MTP layer may have."""

    embed_tokens: nn.Module
    rotary_emb: nn.Module


class GenerationConfig(Protocol):
    """The defaults of ``generate``."""

    eos_token_id: int | list[int] | None


class LogitsOutput(Protocol):
    """The output of a forward pass."""

    logits: Tensor


class CausalLM(Protocol):
    """A causal language model of transformers."""

    dtype: torch.dtype
    device: torch.device
    config: ModelConfig
    generation_config: GenerationConfig | None
    base_model_prefix: str
    """The attribute that holds the model without its head, e.g. ``model``."""

    def __call__(
        self,
        *,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        use_cache: bool,
        logits_to_keep: Tensor | int = 0,
    ) -> LogitsOutput:
        """Return the logits [1, R, V] after the tokens to keep; 0: after all."""

    def generate(self, inputs: Tensor, **options: object) -> Tensor:
        """Continue the prompts ``inputs`` [B, T] of token ids."""

    def eval(self) -> Self:
        """Switch to evaluation mode."""

    def requires_grad_(self, requires_grad: bool) -> Self:
        """Say whether gradients are computed."""

    def modules(self) -> Iterator[nn.Module]:
        """Return all modules, the model included."""

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Return all modules by name, the model included."""

    def get_submodule(self, target: str) -> nn.Module:
        """Return the module ``target``."""

    def set_submodule(self, target: str, module: nn.Module) -> None:
        """Put ``module`` in the place of the module ``target``."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return parameters and buffers by name."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return all parameters."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return all parameters by name."""

    def can_generate(self) -> bool:
        """Whether the model continues texts."""

    def get_decoder(self) -> Decoder:
        """Return the layers."""

    def get_output_embeddings(self) -> nn.Linear:
        """Return the head, or what stands in its place."""

    def set_attn_implementation(self, name: str, /) -> None:
        """Choose the attention by its name in transformers' attention interface."""

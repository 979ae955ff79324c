"""`Encoder`: a model of transformers without its head, with the members of a causal language model
that the engine uses; what stands for its logits are hidden states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from qtool.runtime.build import dequantized_matrix
from qtool.runtime.causal_lm import CausalLM, Decoder, ModelConfig
from qtool.runtime.encoder_names import head_of
from qtool.runtime.load_plan import LoadPlan


@dataclass(frozen=True)
class HiddenStates:
    """The output of a pass."""

    logits: Tensor
    """[1, R, H]"""


class Encoder(nn.Module):
    """A model that returns hidden states.

    Args:
        base: the model without a head, loaded.
        head: [L, H] in float32, whose products with a hidden state score; None for embeddings.
    """

    def __init__(self, base: CausalLM, head: Tensor | None) -> None:
        super().__init__()
        self.base = cast(Any, base)
        self.head = head
        self.config: ModelConfig = base.config
        self.generation_config = None
        self.base_model_prefix = "base"

    @property
    def dtype(self) -> torch.dtype:
        """Of unquantized layers."""
        return cast(torch.dtype, self.base.dtype)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return cast(torch.device, self.base.device)

    def forward(
        self,
        *,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        use_cache: bool,
        logits_to_keep: Tensor | int = 0,
    ) -> HiddenStates:
        """Return the hidden states after the last norm of the tokens to keep; 0: of all."""
        output = self.base(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)
        hidden: Tensor = output[0]
        return HiddenStates(
            hidden if isinstance(logits_to_keep, int) else hidden[:, logits_to_keep]
        )

    def get_decoder(self) -> Decoder:
        """Return the layers."""
        return cast(Decoder, self.base.get_decoder())

    def get_output_embeddings(self) -> nn.Linear:
        """Return a layer without data, of the size of a head for the next token."""
        embeddings = self.base.get_input_embeddings()
        return nn.Linear(
            embeddings.embedding_dim, embeddings.num_embeddings, bias=False, device="meta"
        )

    def set_attn_implementation(self, name: str, /) -> None:
        """Choose the attention by its name in transformers' attention interface."""
        self.base.set_attn_implementation(name)


def make_encoder(plan: LoadPlan, base: CausalLM) -> CausalLM:
    """Return ``base``, which was loaded by ``plan``, with the head of its encoding."""
    encoding = plan.encoding
    assert encoding is not None
    head = None
    name = head_of(plan.skeleton, encoding)
    if name is not None:
        head = dequantized_matrix(plan, name).float()
        if encoding.labels:
            head = head[list(encoding.labels)]
        if len(encoding.labels) == 2:
            head = head[:1] - head[1:]
        head = head.to(plan.device)
    return cast(CausalLM, Encoder(base, head).requires_grad_(False).eval())

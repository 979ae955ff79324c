"""`MtpLayer`: a checkpoint's own layer for multi-token prediction (MTP), which drafts tokens.

Source: DeepSeek-AI 2024, arXiv:2412.19437, section 2.2.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from qtool.runtime.build import dequantized_matrix, read_checked
from qtool.runtime.causal_lm import CausalLM, MtpDecoder
from qtool.runtime.load_plan import LoadPlan


class MtpLayer(nn.Module):
    """One decoder layer that reads a hidden state and the token after it, and predicts the token
    after that one. Applied to its own output, it goes on.

    Args:
        plan: with the names of the layer.
        model: whose last decoder layer is the one of the MTP layer; it is taken out.
    """

    def __init__(self, plan: LoadPlan, model: CausalLM) -> None:
        super().__init__()
        decoder = cast(MtpDecoder, model.get_decoder())
        self.block = decoder.layers[-1]
        _let_experts_run_together(self.block)
        decoder.layers = decoder.layers[:-1]
        model.config.get_text_config().num_hidden_layers -= 1
        names = plan.mtp
        assert names is not None
        self.embedding_norm = _norm(plan, decoder, names.embedding_norm)
        self.hidden_norm = _norm(plan, decoder, names.hidden_norm)
        self.norm = _norm(plan, decoder, names.norm)
        self.projection = _linear(plan, names.projection)
        self.rotary = decoder.rotary_emb
        # time, height and width, whose positions are the same for text
        self.grid_count = 3 if hasattr(self.rotary, "mrope_section") else 1
        # the layer has its own names for what it shares with the model
        embeddings: nn.Module = decoder.embed_tokens
        self.embeddings = embeddings
        if _differs(plan, names.embeddings, names.shared_embeddings):
            matrix = dequantized_matrix(plan, names.embeddings).to(plan.device)
            self.embeddings = nn.Embedding(len(matrix), matrix.shape[1], _weight=matrix)
        self.head: nn.Module = model.get_output_embeddings()
        if _differs(plan, names.head, "lm_head"):
            self.head = _linear(plan, names.head)
        self.requires_grad_(False).eval()

    def forward(self, token_ids: Tensor, hidden: Tensor, positions: Tensor) -> Tensor:
        """Return the hidden states [T, H] after the norm before the head.

        As SGLang does, and other than vLLM, what goes in again has passed that norm, as the
        model's own hidden states have.

        Args:
            token_ids: int [T], the token after each position.
            hidden: [T, H], after the last norm of the model, or what this returned.
            positions: int [T].
        """
        both = [self.embedding_norm(self.embeddings(token_ids)), self.hidden_norm(hidden)]
        x = self.projection(torch.cat(both, dim=-1))[None]
        position_ids = positions[None]
        x = self.block(
            x,
            attention_mask=None,
            position_ids=position_ids,
            past_key_values=None,
            use_cache=False,
            position_embeddings=self.rotary(x, position_ids=self._rotated(position_ids)),
        )
        normed: Tensor = self.norm(x)[0]
        return normed

    def _rotated(self, position_ids: Tensor) -> Tensor:
        """Return ``position_ids`` [1, T] as the rotary embeddings take them."""
        return position_ids if self.grid_count == 1 else position_ids.expand(self.grid_count, 1, -1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [T, V] of what `forward` returned."""
        logits: Tensor = self.head(hidden)
        return logits


def attach_mtp(plan: LoadPlan, model: CausalLM) -> None:
    """Make the last layer of ``model``, which was loaded beside the others, its ``mtp``."""
    cast(nn.Module, model).add_module("mtp", MtpLayer(plan, model))


def _let_experts_run_together(block: nn.Module) -> None:
    """Let experts that stay in 16 bits multiply together, as those of unquantized models do. One by
    one, the host would ask which have tokens, which a CUDA graph cannot.
    """
    for module in block.modules():
        config: Any = getattr(module, "config", None)
        is_stack = isinstance(getattr(module, "gate_up_proj", None), nn.Parameter)
        if is_stack and getattr(config, "_experts_implementation", None) == "eager":
            own: Any = copy.copy(config)
            own._experts_implementation = "grouped_mm"
            module.config = own


def _norm(plan: LoadPlan, decoder: MtpDecoder, name: str) -> nn.Module:
    """Return a norm of the model's kind, with the weight of the norm ``name``."""
    norm = copy.deepcopy(decoder.norm)
    weight = read_checked(plan, f"{name}.weight").to(plan.device, plan.skeleton.dtype)
    norm.weight = nn.Parameter(weight, requires_grad=False)
    return norm


def _linear(plan: LoadPlan, name: str) -> nn.Linear:
    """Return the layer ``name`` in 16 bits."""
    matrix = dequantized_matrix(plan, name).to(plan.device)
    linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(matrix, requires_grad=False)
    return linear


def _differs(plan: LoadPlan, own: str, shared: str) -> bool:
    """Whether the layer has weights ``own`` that are not those of the model's ``shared``, which
    cannot be seen where one of them is quantized.
    """
    tensors = plan.checkpoint.tensors
    names = [f"{own}.weight", f"{shared}.weight"]
    known = {} if plan.layout is None else plan.layout.modules
    if own in known or shared in known or not all(name in tensors for name in names):
        return False
    first, second = (read_checked(plan, name) for name in names)
    return not torch.equal(first, second)
